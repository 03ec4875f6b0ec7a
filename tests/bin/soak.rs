//! `make soak`: load for minutes on paths that keep failing. Ends with 1 where something that must be zero is not.

use std::time::Duration;

use anyhow::ensure;
use harness::{dice::Dice, soak};

/// Usage: `soak [SECONDS]`, 60 by default. `KVFERRY_SEED` repeats a run's dice.
fn main() -> anyhow::Result<()> {
    let seconds = std::env::args().nth(1).map_or(Ok(60), |seconds| seconds.parse())?;
    let seed = Dice::seed()?;
    println!("seed {seed}: {seconds} s");
    let verdict = soak::run(seed, Duration::from_secs(seconds))?;
    println!("{verdict}");
    ensure!(verdict.is_good(), "something that must be zero is not, or nothing was done");
    Ok(())
}

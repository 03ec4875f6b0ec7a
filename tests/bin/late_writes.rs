//! `make late-writes`: the late-write probes as often as wanted, as a table. Ends with 1 where a byte came late,
//! or where the probes struck too late to have shown anything.

use anyhow::ensure;
use harness::late::{self, Memory};
use kvferry_client::Path;

/// Usage: `late-writes [RUNS]`, 100 by default.
fn main() -> anyhow::Result<()> {
    let runs = std::env::args().nth(1).map_or(Ok(100), |runs| runs.parse())?;
    ensure!(runs > 0, "no runs show nothing");
    let impatient = late::impatient()?;
    println!("control: {impatient} late bytes for an engine that does not wait for the answer");
    ensure!(impatient > 0, "the probes are blind");
    println!("{}", late::heading());
    let mut rows = late::run(Path::Tcp, Memory::Shared, runs, |row| println!("{row}"))?;
    rows.extend(late::run(Path::Local, Memory::Shared, runs, |row| println!("{row}"))?);
    println!("private memory that the engines themselves copy:");
    rows.extend(late::run(Path::Tcp, Memory::Assisted, runs, |row| println!("{row}"))?);
    rows.extend(late::run(Path::Local, Memory::Assisted, runs, |row| println!("{row}"))?);
    let late: u64 = rows.iter().map(|row| row.late).sum();
    ensure!(late == 0, "{late} bytes were late");
    ensure!(rows.iter().all(late::Row::proves_something), "in some row too little was in flight");
    println!("no byte came late");
    Ok(())
}

//! Six seconds of load on paths that keep failing, two minutes in the long form; `make soak` takes any time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use harness::{dice::Dice, soak};

/// I1 to I4 and I10 all at once.
#[test]
fn m1_nothing_is_lost_wrong_or_late_while_everything_fails() {
    let lasts = Duration::from_secs(if harness::long() { 120 } else { 6 });
    let seed = Dice::seed().unwrap();
    println!("seed {seed}");
    let verdict = soak::run(seed, lasts).unwrap();
    println!("{verdict}");
    assert!(verdict.is_good(), "{verdict}");
    let tally = verdict.tally;
    assert!(tally.cuts + tally.partitions > 0 && tally.cancelled > 0, "nothing befell it: {verdict}");
    assert!(tally.restarts > 0 || !harness::long(), "{verdict}");
}

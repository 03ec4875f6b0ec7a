//! `sim`: lives many lives of the simulation, says what happened in them, and stops at the first broken rule.
//!
//! ```text
//! sim [--seeds N] [--from SEED]     N lives, from that seed on
//! sim --seed SEED                   one life, aloud
//! ```

use std::{collections::BTreeMap, process::ExitCode, time::Instant};

use harness::sim;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut seeds, mut from, mut one) = (200u64, 1u64, None);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok());
        match (argument.as_str(), value) {
            ("--seeds", Some(value)) => seeds = value,
            ("--from", Some(value)) => from = value,
            ("--seed", Some(value)) => one = Some(value),
            _ => {
                eprintln!("usage: sim [--seeds N] [--from SEED] | sim --seed SEED");
                return ExitCode::from(2);
            }
        }
    }
    let range = one.map_or(from..from + seeds, |seed| seed..seed + 1);
    // What breaks is told below, with what came before it.
    std::panic::set_hook(Box::new(|_| {}));
    let (begin, count) = (Instant::now(), range.end - range.start);
    let mut tally = sim::Tally::new();
    let mut lines = 0;
    for seed in range {
        match sim::live(seed, one.is_some()) {
            Ok(lived) => {
                lines += lived.lines;
                lived.tally.into_iter().for_each(|(what, often)| *tally.entry(what).or_default() += often);
            }
            Err(broken) => {
                broken.last.iter().for_each(|line| println!("{line}"));
                println!("\nseed {} breaks a rule after {} lives: {}", broken.seed, seed - from, broken.why);
                println!("again, aloud: make sim SEED={}", broken.seed);
                return ExitCode::FAILURE;
            }
        }
    }
    report(&tally);
    let seconds = begin.elapsed().as_secs_f64();
    println!("{count} lives, {lines} events in {seconds:.1} s: {:.1} seeds/s", count as f64 / seconds);
    ExitCode::SUCCESS
}

fn report(tally: &sim::Tally) {
    let mut kinds: BTreeMap<&str, Vec<(&str, u64)>> = BTreeMap::new();
    for (what, often) in tally {
        let (kind, rest) = what.split_once(' ').unwrap_or((what, ""));
        let kind = if ["call", "fault", "outcome"].contains(&kind) { kind } else { "event" };
        kinds.entry(kind).or_default().push((if kind == "event" { what } else { rest }, *often));
    }
    for (kind, counts) in kinds {
        counts.iter().for_each(|(what, often)| println!("{kind:>8}  {often:>8}  {what}"));
    }
}

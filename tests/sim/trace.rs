//! What happened, in words: hashed as a whole, the last lines kept, and counted by kind.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::{self, Write},
};

/// Lines that are shown when a life ends badly.
const KEPT: usize = 80;

/// How often each kind of fault, call and outcome happened.
pub type Tally = BTreeMap<&'static str, u64>;

/// The words of one life.
#[derive(Debug, Default)]
pub(super) struct Trace {
    hash: u64,
    lines: u64,
    last: VecDeque<String>,
    tally: Tally,
    aloud: bool,
}

impl Trace {
    /// Nothing happened yet. Aloud, every line is printed as it comes.
    pub(super) fn new(aloud: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, aloud, ..Self::default() }
    }

    /// Something happened at this virtual time (microseconds).
    pub(super) fn line(&mut self, now_us: u64, what: fmt::Arguments<'_>) {
        let mut line = if self.last.len() == KEPT { self.last.pop_front() } else { None }.unwrap_or_default();
        line.clear();
        // Writing to a string cannot fail.
        let _ = write!(line, "{:>12.6} {what}", now_us as f64 / 1e6);
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.aloud {
            println!("{line}");
        }
        self.lines += 1;
        self.last.push_back(line);
    }

    /// Counts something.
    pub(super) fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    /// What was counted.
    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Of all lines.
    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// How many lines there were.
    pub(super) fn count_lines(&self) -> u64 {
        self.lines
    }

    /// The newest lines, oldest first.
    pub(super) fn last(&self) -> impl Iterator<Item = &str> {
        self.last.iter().map(String::as_str)
    }
}

//! The byte oracle: pools of engine memory of which every byte is known at every moment.
//!
//! A pool starts filled with its owner's pattern. [`Pool::expect`] says which bytes a transfer brings;
//! [`Pool::verify`] then reads the *whole* pool: a byte of the transfer that is not there is wrong, a changed
//! byte nobody announced is stray. [`Pool::hand_over`] gives a range to another owner at once, as an engine's
//! page allocator does after a terminal state; whatever of the old owner's transfer lands there afterwards
//! is late (I1, I2).
//!
//! Patterns are computed, so a pool costs its bytes once and an engine process needs only a stamp to know what
//! another process sends. A pool is only read and written while no transfer may touch what is looked at.

use std::{collections::BTreeMap, fmt, ops::Range};

use anyhow::ensure;
use kvferry_client::{Memory, SharedBuffer};
use serde::{Deserialize, Serialize};

use crate::{batch::Move, pattern::Stamp};

/// What a pool is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// A sealed memfd, mapped by the daemon.
    Shared,
    /// Plain memory of the process.
    Process,
}

impl Kind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Shared, Self::Process];
}

#[derive(Debug)]
enum Store {
    Shared(SharedBuffer),
    Process(Vec<u8>),
}

/// How the bytes of a span came to be expected; says what it means when they are not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    Own,
    Moved,
    HandedOver,
    Undefined,
}

/// Bytes known to be `stamp` from `offset` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    length: u64,
    stamp: Stamp,
    offset: u64,
    origin: Origin,
}

impl Span {
    /// The part of a span at `start` that lies in `range`, with its start.
    fn clip(self, start: u64, range: &Range<u64>) -> Option<(u64, Self)> {
        let begin = start.max(range.start);
        let end = (start + self.length).min(range.end);
        (begin < end)
            .then(|| (begin, Self { length: end - begin, offset: self.offset + (begin - start), ..self }))
    }
}

/// A pool of engine memory and what must be in it.
#[derive(Debug)]
pub struct Pool {
    store: Store,
    spans: BTreeMap<u64, Span>,
}

impl Pool {
    /// Allocates `length` bytes and fills them with the stamp.
    pub fn new(kind: Kind, length: u64, stamp: Stamp) -> anyhow::Result<Self> {
        ensure!(length > 0, "a pool needs bytes");
        let bytes = usize::try_from(length)?;
        let store = match kind {
            Kind::Shared => Store::Shared(SharedBuffer::new(bytes)?),
            Kind::Process => Store::Process(vec![0; bytes]),
        };
        let mut pool = Self { store, spans: BTreeMap::new() };
        pool.refill(0..length, stamp, Origin::Own);
        Ok(pool)
    }

    /// For registration.
    pub fn memory(&self) -> Memory<'_> {
        match &self.store {
            Store::Shared(buffer) => Memory::Shared(buffer),
            Store::Process(bytes) => {
                Memory::Process { address: bytes.as_ptr() as u64, length: bytes.len() as u64 }
            }
        }
    }

    /// Where it begins in this process.
    pub fn address(&self) -> u64 {
        match &self.store {
            Store::Shared(buffer) => buffer.address(),
            Store::Process(bytes) => bytes.as_ptr() as u64,
        }
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// From now on the moves' destinations must hold what `source` holds now.
    pub fn expect(&mut self, source: &Pool, moves: &[Move]) {
        for each in moves {
            let range = each.from..each.from + each.length;
            let pieces: Vec<_> = source.spans_in(range.clone()).collect();
            self.clear(each.to..each.to + each.length);
            for (start, span) in pieces {
                let to = each.to + (start - range.start);
                self.spans.insert(to, Span { origin: Origin::Moved, ..span });
            }
        }
    }

    /// As [`Pool::expect`], from another process's pool that holds nothing but its stamp.
    pub fn expect_stamp(&mut self, source: Stamp, moves: &[Move]) {
        for each in moves {
            self.clear(each.to..each.to + each.length);
            let span = Span { length: each.length, stamp: source, offset: each.from, origin: Origin::Moved };
            self.spans.insert(each.to, span);
        }
    }

    /// Overwrites the range; as an engine does with pages it got back from a transfer that had ended.
    pub fn overwrite(&mut self, range: Range<u64>, stamp: Stamp) {
        self.refill(range, stamp, Origin::Own);
    }

    /// Gives the range to another owner, who fills it at once. What an older transfer writes into it from now
    /// on is counted as late.
    pub fn hand_over(&mut self, range: Range<u64>, new_owner: Stamp) {
        self.refill(range, new_owner, Origin::HandedOver);
    }

    /// The range's contents are undefined: the destination of a transfer that failed.
    pub fn forget(&mut self, range: Range<u64>) {
        let length = range.end - range.start;
        let span = Span { length, stamp: Stamp::of(0), offset: 0, origin: Origin::Undefined };
        self.clear(range.clone());
        self.spans.insert(range.start, span);
    }

    /// Reads the whole pool.
    pub fn verify(&self) -> Verdict {
        let bytes = self.bytes();
        let mut verdict = Verdict { pool: bytes.len() as u64, ..Verdict::default() };
        for (&start, span) in &self.spans {
            if span.origin == Origin::Undefined {
                continue;
            }
            let found = &bytes[start as usize..(start + span.length) as usize];
            let (count, first) = span.stamp.mismatches(span.offset, found);
            match span.origin {
                Origin::Moved => verdict.moved += span.length,
                Origin::Own | Origin::HandedOver | Origin::Undefined => {}
            }
            match span.origin {
                Origin::Moved => verdict.wrong += count,
                Origin::HandedOver => verdict.late += count,
                Origin::Own | Origin::Undefined => verdict.stray += count,
            }
            verdict.first = verdict.first.or_else(|| {
                first.map(|index| Finding {
                    offset: start + index as u64,
                    expected: span.stamp.byte(span.offset + index as u64),
                    found: found[index],
                })
            });
        }
        verdict
    }

    fn spans_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Span)> {
        let first = self.spans.range(..=range.start).next_back().map_or(range.start, |(&at, _)| at);
        self.spans
            .range(first..range.end.max(first))
            .filter_map(move |(&start, span)| span.clip(start, &range))
    }

    fn refill(&mut self, range: Range<u64>, stamp: Stamp, origin: Origin) {
        let place = range.start as usize..range.end as usize;
        stamp.fill(range.start, &mut self.bytes_mut()[place]);
        self.clear(range.clone());
        let length = range.end - range.start;
        if length > 0 {
            self.spans.insert(range.start, Span { length, stamp, offset: range.start, origin });
        }
    }

    /// Makes room: what lies in the range is forgotten, what sticks out on either side stays.
    fn clear(&mut self, range: Range<u64>) {
        let first = self.spans.range(..=range.start).next_back().map_or(range.start, |(&at, _)| at);
        let touched: Vec<u64> =
            self.spans.range(first..range.end.max(first)).map(|(&start, _)| start).collect();
        for start in touched {
            let Some(span) = self.spans.remove(&start) else { continue };
            let outside = [0..range.start, range.end..u64::MAX];
            let kept = outside.iter().filter_map(|side| span.clip(start, side));
            self.spans.extend(kept);
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.store {
            Store::Shared(buffer) => buffer.as_slice(),
            Store::Process(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.store {
            Store::Shared(buffer) => buffer.as_mut_slice(),
            Store::Process(bytes) => bytes,
        }
    }
}

/// What a look at a whole pool showed, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Verdict {
    /// In the pool.
    pub pool: u64,
    /// Announced by [`Pool::expect`] and compared: never 0 where a transfer is said to have been checked.
    pub moved: u64,
    /// Announced, and something else is there.
    pub wrong: u64,
    /// Changed though nobody announced it.
    pub stray: u64,
    /// Changed after the range was handed over.
    pub late: u64,
    /// The first byte that is not right.
    pub first: Option<Finding>,
}

/// One byte that is not right.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// In the pool.
    pub offset: u64,
    /// What must be there.
    pub expected: u8,
    /// What is there.
    pub found: u8,
}

impl Verdict {
    /// Every byte is what it must be.
    pub fn is_clean(&self) -> bool {
        self.wrong + self.stray + self.late == 0
    }

    /// # Panics
    /// When a byte is wrong, stray or late.
    pub fn assert_clean(&self, what: &str) {
        assert!(self.is_clean(), "{what}: {self}");
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, moved, wrong, stray, late, first } = self;
        write!(f, "of {pool} bytes {moved} moved; {wrong} wrong, {stray} stray, {late} late")?;
        match first {
            Some(Finding { offset, expected, found }) => {
                write!(f, "; first at {offset}: {found:#04x} instead of {expected:#04x}")
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 10_000;

    fn pool(owner: u32) -> Pool {
        Pool::new(Kind::Process, LENGTH, Stamp::of(owner)).unwrap()
    }

    fn copy(source: &Pool, target: &mut Pool, moves: &[Move]) {
        for each in moves {
            let (from, to, length) = (each.from as usize, each.to as usize, each.length as usize);
            target.bytes_mut()[to..to + length].copy_from_slice(&source.bytes()[from..from + length]);
        }
    }

    #[test]
    fn what_was_announced_and_came_is_clean() {
        let (source, mut target) = (pool(1), pool(2));
        let moves = [
            Move { from: 10, to: 5000, length: 77 },
            Move { from: 50, to: 4000, length: 1000 },
            // Over the first: the later move is what counts.
            Move { from: 900, to: 5050, length: 3 },
        ];
        target.expect(&source, &moves);
        copy(&source, &mut target, &moves);
        let verdict = target.verify();
        verdict.assert_clean("copied");
        assert_eq!((verdict.pool, verdict.moved), (LENGTH, 1077));
    }

    #[test]
    fn what_did_not_come_is_wrong_and_what_came_uncalled_is_stray() {
        let (source, mut target) = (pool(1), pool(2));
        let announced = Move { from: 0, to: 100, length: 50 };
        let uncalled = Move { from: 0, to: 3000, length: 7 };
        target.expect(&source, &[announced]);
        copy(&source, &mut target, &[uncalled]);
        let verdict = target.verify();
        assert_eq!((verdict.wrong, verdict.stray, verdict.late), (50, 7, 0));
        assert_eq!(verdict.first.map(|finding| finding.offset), Some(100));
    }

    #[test]
    fn what_comes_after_the_hand_over_is_late() {
        let (source, mut target) = (pool(1), pool(2));
        let moves = [Move { from: 0, to: 100, length: 50 }];
        target.expect(&source, &moves);
        copy(&source, &mut target, &moves);
        target.hand_over(80..180, Stamp { owner: 4, transfer: 1 });
        target.verify().assert_clean("handed over");
        copy(&source, &mut target, &[Move { from: 20, to: 120, length: 5 }]);
        assert_eq!(target.verify().late, 5);
    }

    #[test]
    fn a_forgotten_range_is_not_judged_and_its_neighbours_are() {
        let mut target = pool(2);
        target.forget(100..200);
        target.bytes_mut()[99..201].fill(0xff);
        assert_eq!(target.verify().stray, 2);
    }

    #[test]
    fn a_transfer_carries_on_what_another_brought() {
        let (first, mut second, mut third) = (pool(1), pool(2), pool(4));
        let there = [Move { from: 5, to: 1000, length: 500 }];
        second.expect(&first, &there);
        copy(&first, &mut second, &there);
        let on = [Move { from: 900, to: 0, length: 700 }];
        third.expect(&second, &on);
        copy(&second, &mut third, &on);
        third.verify().assert_clean("carried on");
    }

    #[test]
    fn a_stamp_stands_for_an_untouched_pool() {
        let (source, mut target) = (pool(1), pool(2));
        let moves = [Move { from: 33, to: 44, length: 55 }];
        target.expect_stamp(Stamp::of(1), &moves);
        copy(&source, &mut target, &moves);
        target.verify().assert_clean("by stamp");
    }
}

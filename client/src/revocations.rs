//! What this engine has revoked, for the daemon that comes after this one.
//!
//! A daemon's memory of revocations dies with it, and a peer's retry may come years of computer time later. So
//! the engine keeps a copy and hands it over when it attaches again, before its endpoint listens: what was revoked
//! stays revoked as long as the engine lives.
//!
//! A revocation is noted *before* it is sent. A daemon may die between acting and answering, and then nobody
//! knows its epoch; at the hand-over such a revocation gets an epoch above all that daemon can have reached.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kvferry_proto::{engine::v1 as wire, types::v1 as types};
use sha2::{Digest, Sha256};

use crate::{Error, Failure, Reason};

/// Ranges kept. Beyond it the oldest are given up, and whoever was admitted before them is refused, hit or not.
const MOST_RANGES: usize = 4096;
/// Tags kept: as many as a daemon keeps.
const MOST_TAGS: usize = 65_536;
/// How long a daemon refuses a tag.
const TAG_LIFE: Duration = Duration::from_secs(15 * 60);

/// A piece of this engine's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// Its first address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// The tag of a request: what a [`Transfer`](crate::Transfer) carries and
/// [`revoke_tag`](crate::Engine::revoke_tag) names.
///
/// A name of exactly 16 bytes is the tag itself. Of every other name it is the first 16 bytes of its SHA-256, so
/// that engines in whatever language agree.
pub fn tag(name: impl AsRef<[u8]>) -> [u8; 16] {
    let name = name.as_ref();
    name.try_into().unwrap_or_else(|_| {
        let mut tag = [0; 16];
        tag.copy_from_slice(&Sha256::digest(name)[..16]);
        tag
    })
}

/// Refuses what no daemon takes.
///
/// # Errors
/// `BadArgument` for no ranges at all and for an empty one, `OutOfBounds` for one that wraps around; with its index.
pub(crate) fn check(ranges: &[Range]) -> Result<(), Error> {
    if ranges.is_empty() {
        return Err(Error::argument("no ranges to revoke", None));
    }
    for (index, range) in ranges.iter().enumerate() {
        let index = Some(index as u64);
        if range.length == 0 {
            return Err(Error::argument("a range to revoke is empty", index));
        }
        if range.address.checked_add(range.length).is_none() {
            let failure = Failure::new(Reason::OutOfBounds, "a range to revoke wraps around");
            return Err(Error::Refused(Failure { index, ..failure }));
        }
    }
    Ok(())
}

/// All revocations that still mean something. The lock is held for map operations only.
#[derive(Debug, Default)]
pub(crate) struct Revocations(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The newest that was answered.
    epoch: u64,
    /// Calls that may have raised the daemon's epoch beyond it.
    unanswered: u64,
    floor: Mark,
    ranges: BTreeMap<Range, Mark>,
    /// When each was revoked.
    tags: HashMap<[u8; 16], Instant>,
    /// Rises with each hand-over: answers to calls of earlier ones change nothing any more.
    generation: u64,
}

/// When something was revoked.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    /// The newest answer; 0: none yet.
    epoch: u64,
    /// Calls without an answer.
    unanswered: u32,
}

/// A call that was noted.
#[derive(Debug)]
pub(crate) struct Noted {
    generation: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Ranges(Vec<Range>),
    /// More ranges than are kept.
    Everything,
    Tag {
        tag: [u8; 16],
        /// It was revoked before.
        again: bool,
    },
}

impl Revocations {
    /// The newest that was answered: every later one gets a higher epoch, and so may one that has no answer yet.
    pub(crate) fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    pub(crate) fn note(&self, ranges: &[Range]) -> Noted {
        let mut state = self.lock();
        let what = if ranges.len() > MOST_RANGES {
            state.floor.unanswered += 1;
            What::Everything
        } else {
            let mut ranges = ranges.to_vec();
            ranges.sort_unstable();
            ranges.dedup();
            for range in &ranges {
                state.ranges.entry(*range).or_default().unanswered += 1;
            }
            What::Ranges(ranges)
        };
        state.unanswered += 1;
        state.make_room();
        Noted { generation: state.generation, what }
    }

    /// # Errors
    /// [`Error::Refused`] with `Limit` when too many are kept; the daemon would refuse it as well.
    pub(crate) fn note_tag(&self, tag: [u8; 16]) -> Result<Noted, Error> {
        let mut state = self.lock();
        let again = state.tags.contains_key(&tag);
        // Looked through only where room is needed: tags are revoked often.
        if !again && state.tags.len() >= MOST_TAGS {
            state.tags.retain(|_, since| since.elapsed() < TAG_LIFE);
        }
        if !again && state.tags.len() >= MOST_TAGS {
            let text = format!("{MOST_TAGS} tags are revoked");
            return Err(Error::Refused(Failure::new(Reason::Limit, text)));
        }
        state.tags.insert(tag, Instant::now());
        state.unanswered += 1;
        Ok(Noted { generation: state.generation, what: What::Tag { tag, again } })
    }

    /// The daemon has acted, in this epoch. A call without an answer is left as it was noted.
    pub(crate) fn answered(&self, noted: &Noted, epoch: u64) {
        self.lock().close(noted, |mark| {
            mark.epoch = mark.epoch.max(epoch);
        });
        let mut state = self.lock();
        state.epoch = state.epoch.max(epoch);
        if let What::Tag { tag, .. } = noted.what {
            // Its time began later than it was noted.
            state.tags.insert(tag, Instant::now());
        }
    }

    /// The daemon has refused to act.
    pub(crate) fn refused(&self, noted: &Noted) {
        let mut state = self.lock();
        state.close(noted, |_| {});
        if let What::Tag { tag, again: false } = noted.what {
            state.tags.remove(&tag);
        }
        state.ranges.retain(|_, mark| mark.epoch > 0 || mark.unanswered > 0);
    }

    /// What the next daemon must know before the endpoint listens. From now on calls are noted for that one.
    pub(crate) fn hand_over(&self) -> wire::Revocations {
        let mut state = self.lock();
        state.tags.retain(|_, since| since.elapsed() < TAG_LIFE);
        let top = state.epoch + state.unanswered;
        state.epoch = top;
        state.unanswered = 0;
        state.generation += 1;
        state.floor.settle(top);
        state.ranges.values_mut().for_each(|mark| mark.settle(top));
        let range = |(range, mark): (&Range, &Mark)| wire::Revocation {
            epoch: mark.epoch,
            range: Some(types::Range { base: range.address, length: range.length }),
        };
        let tombstone = |(tag, since): (&[u8; 16], &Instant)| wire::Tombstone {
            tag: tag.to_vec(),
            age_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        wire::Revocations {
            epoch: top,
            floor: state.floor.epoch,
            ranges: state.ranges.iter().map(range).collect(),
            tombstones: state.tags.iter().map(tombstone).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A call has its answer.
    fn close(&mut self, noted: &Noted, mut each: impl FnMut(&mut Mark)) {
        if noted.generation != self.generation {
            return;
        }
        self.unanswered = self.unanswered.saturating_sub(1);
        let mut close = |mark: &mut Mark| {
            mark.unanswered = mark.unanswered.saturating_sub(1);
            each(mark);
        };
        match &noted.what {
            What::Ranges(ranges) => {
                for range in ranges {
                    self.ranges.get_mut(range).into_iter().for_each(&mut close);
                }
            }
            What::Everything => close(&mut self.floor),
            What::Tag { .. } => {}
        }
    }

    /// Gives up the oldest; of those without an answer nobody knows how old they are, so they stay the longest.
    fn make_room(&mut self) {
        while self.ranges.len() > MOST_RANGES {
            let known = self.ranges.values().filter(|mark| mark.unanswered == 0).map(|mark| mark.epoch);
            match known.min() {
                Some(oldest) => {
                    self.floor.epoch = self.floor.epoch.max(oldest);
                    self.ranges.retain(|_, mark| mark.unanswered > 0 || mark.epoch > oldest);
                }
                None => {
                    // Never closed by an answer: the hand-over puts it above everything.
                    self.floor.unanswered += 1;
                    self.ranges.clear();
                }
            }
        }
    }
}

impl Mark {
    fn settle(&mut self, top: u64) {
        if std::mem::take(&mut self.unanswered) > 0 {
            self.epoch = top;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(number: u64) -> Range {
        Range { address: number * 4096, length: 4096 }
    }

    /// Epochs of the ranges handed over, by number; the whole list's epoch and floor.
    fn handed(book: &Revocations) -> (Vec<(u64, u64)>, u64, u64) {
        let list = book.hand_over();
        let ranges = list.ranges.iter();
        let ranges = ranges.map(|entry| (entry.range.unwrap().base / 4096, entry.epoch)).collect();
        (ranges, list.epoch, list.floor)
    }

    #[test]
    fn what_was_answered_keeps_its_epoch_and_what_was_not_gets_one_above_all() {
        let book = Revocations::default();
        let first = book.note(&[range(1), range(2)]);
        book.answered(&first, 1);
        let second = book.note(&[range(2)]);
        let _lost = book.note(&[range(3)]);
        let _lost_too = book.note_tag([1; 16]).unwrap();
        book.answered(&second, 4);
        // That daemon may have reached 6: two calls were not answered.
        assert_eq!(handed(&book), (vec![(1, 1), (2, 4), (3, 6)], 6, 0));
        assert_eq!(handed(&book), (vec![(1, 1), (2, 4), (3, 6)], 6, 0), "a second try hands over the same");
    }

    #[test]
    fn a_range_with_one_answer_of_two_counts_as_unanswered() {
        let book = Revocations::default();
        let first = book.note(&[range(1)]);
        let _second = book.note(&[range(1)]);
        book.answered(&first, 1);
        assert_eq!(handed(&book), (vec![(1, 2)], 2, 0));
    }

    #[test]
    fn an_answer_after_the_hand_over_closes_no_newer_call() {
        let book = Revocations::default();
        let late = book.note(&[range(1)]);
        assert_eq!(handed(&book), (vec![(1, 1)], 1, 0));
        let _pending = book.note(&[range(1)]);
        book.answered(&late, 1);
        assert_eq!(handed(&book), (vec![(1, 2)], 2, 0));
    }

    #[test]
    fn what_the_daemon_refused_was_never_revoked() {
        let book = Revocations::default();
        book.refused(&book.note(&[range(1)]));
        book.refused(&book.note_tag([1; 16]).unwrap());
        let again = book.note_tag([2; 16]).unwrap();
        book.answered(&again, 1);
        book.refused(&book.note_tag([2; 16]).unwrap());
        let list = book.hand_over();
        assert_eq!((list.epoch, list.ranges.len()), (1, 0));
        assert_eq!(list.tombstones.iter().map(|dead| dead.tag[0]).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn it_is_bounded_and_errs_on_the_safe_side() {
        let book = Revocations::default();
        for epoch in 1..=MOST_RANGES as u64 + 3 {
            book.answered(&book.note(&[range(epoch)]), epoch);
        }
        let (ranges, _, floor) = handed(&book);
        assert_eq!((ranges.len(), floor), (MOST_RANGES, 3));
        // More than are kept at once, and the answer is lost.
        let many: Vec<Range> = (0..=MOST_RANGES as u64).map(range).collect();
        let _lost = book.note(&many);
        let (_, epoch, floor) = handed(&book);
        assert_eq!((epoch, floor), (MOST_RANGES as u64 + 4, MOST_RANGES as u64 + 4));
    }

    #[test]
    fn a_full_table_of_tags_is_refused_before_anything_is_sent() {
        let book = Revocations::default();
        for number in 0..MOST_TAGS as u128 {
            book.note_tag(number.to_be_bytes()).unwrap();
        }
        let Err(Error::Refused(failure)) = book.note_tag([0xff; 16]) else { panic!("it was noted") };
        assert_eq!(failure.reason, Reason::Limit);
        assert!(book.note_tag([0; 16]).is_ok(), "the same tag again needs no room");
    }

    #[test]
    fn what_is_no_range_is_refused_by_its_index() {
        let range = |address, length| Range { address, length };
        let refusal = |ranges: &[Range]| match check(ranges) {
            Err(Error::Refused(failure)) => (failure.reason, failure.index),
            other => panic!("not refused: {other:?}"),
        };
        assert_eq!(refusal(&[]), (Reason::BadArgument, None));
        assert_eq!(refusal(&[range(1, 1), range(2, 0)]), (Reason::BadArgument, Some(1)));
        assert_eq!(refusal(&[range(u64::MAX, 1)]), (Reason::OutOfBounds, Some(0)));
        assert!(check(&[range(0, u64::MAX), range(u64::MAX - 1, 1)]).is_ok());
    }

    #[test]
    fn long_names_are_hashed_and_tags_are_not() {
        assert_eq!(tag([7; 16]), [7; 16]);
        // SHA-256 of "abc".
        let known =
            [0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde, 0x5d, 0xae, 0x22, 0x23];
        assert_eq!(tag("abc"), known);
        assert_ne!(tag("abc "), tag("abc"));
    }
}

//! The oracle: reads a whole sink pool and says what is in it.
//!
//! A sink is walked buffer by buffer in address order. Expected slices are checked against the transfer's
//! content, the gaps between them against the background, so every byte of the pool is looked at once.

use super::protocol::{Tally, Verdict};
use crate::{
    pattern::{Mismatch, Stream},
    workloads::{Plan, Slice},
};

/// A run of sink bytes and what it should hold.
enum Run {
    Slice { number: usize, slice: Slice },
    Gap { buffer: u32, start: u64, end: u64 },
}

/// Calls `visit` for every run of the sink, in address order.
fn walk(plan: &Plan, mut visit: impl FnMut(Run)) {
    let mut order: Vec<usize> = (0..plan.slices.len()).collect();
    order.sort_unstable_by_key(|at| (plan.slices[*at].sink_buffer, plan.slices[*at].sink_offset));
    let mut order = order.into_iter().peekable();
    for (buffer, length) in (0..).zip(&plan.sink) {
        let mut start = 0;
        while let Some(number) = order.next_if(|at| plan.slices[*at].sink_buffer == buffer) {
            let slice = plan.slices[number];
            visit(Run::Gap { buffer, start, end: slice.sink_offset });
            visit(Run::Slice { number, slice });
            start = slice.sink_offset + slice.length;
        }
        visit(Run::Gap { buffer, start, end: *length });
    }
}

fn bytes_of<'a>(pool: &[&'a [u8]], buffer: u32, start: u64, end: u64) -> &'a [u8] {
    &pool[buffer as usize][start as usize..end as usize]
}

fn check_gap(pool: &[&[u8]], buffer: u32, start: u64, end: u64) -> Option<Mismatch> {
    Stream::background(buffer.into()).check(bytes_of(pool, buffer, start, end), start)
}

/// Every expected slice must hold the content of `transfer`, everything else the background.
pub(crate) fn verify(plan: &Plan, pool: &[&[u8]], transfer: u64) -> Verdict {
    let mut verdict = Verdict { slices: plan.slices.len() as u64, ..Verdict::default() };
    walk(plan, |run| match run {
        Run::Gap { buffer, start, end } => {
            if let Some(found) = check_gap(pool, buffer, start, end) {
                verdict.stray += found.bytes;
                let at = start + found.first as u64;
                verdict.first.get_or_insert_with(|| format!("a stray byte in buffer {buffer} at {at}"));
            }
        }
        Run::Slice { number, slice } => {
            let bytes =
                bytes_of(pool, slice.sink_buffer, slice.sink_offset, slice.sink_offset + slice.length);
            let found = Stream::slice(transfer, number as u64).check(bytes, 0);
            let wrong = found.map_or(0, |found| found.bytes);
            verdict.verified += slice.length - wrong;
            verdict.wrong += wrong;
            if let Some(found) = found {
                verdict.wrong_slices += 1;
                verdict.first.get_or_insert_with(|| explain(plan, bytes, transfer, number, found));
            }
        }
    });
    verdict
}

/// What a wrong slice holds instead, as far as its content tells.
fn explain(plan: &Plan, bytes: &[u8], transfer: u64, number: usize, found: Mismatch) -> String {
    let slice = plan.slices[number];
    if Stream::background(slice.sink_buffer.into()).check(bytes, slice.sink_offset).is_none() {
        return format!("slice {number} never arrived");
    }
    let holds = |other: &usize| {
        let stream = Stream::slice(transfer, *other as u64);
        plan.slices[*other].length == slice.length && stream.check(bytes, 0).is_none()
    };
    match (0..plan.slices.len()).find(holds) {
        Some(other) => format!("slice {number} holds the bytes of slice {other}"),
        None => format!(
            "slice {number} differs at byte {} of {} (buffer {}, {} bytes in all)",
            found.first, slice.length, slice.sink_buffer, found.bytes
        ),
    }
}

/// Sorts every byte of a sink by where it came from: `transfer`, or the source's content after it was
/// overwritten for transfer number `later`.
pub(crate) fn tally(plan: &Plan, pool: &[&[u8]], transfer: u64, later: u64) -> Tally {
    let mut tally =
        Tally { digest: pool.iter().fold(0, |digest, bytes| fold(digest, bytes)), ..Tally::default() };
    walk(plan, |run| match run {
        Run::Gap { buffer, start, end } => {
            tally.stray += check_gap(pool, buffer, start, end).map_or(0, |found| found.bytes);
        }
        Run::Slice { number, slice } => {
            let bytes =
                bytes_of(pool, slice.sink_buffer, slice.sink_offset, slice.sink_offset + slice.length);
            let contents = [transfer, later].map(|transfer| Stream::slice(transfer, number as u64));
            tally_slice(&mut tally, bytes, slice, contents);
        }
    });
    tally
}

fn tally_slice(tally: &mut Tally, bytes: &[u8], slice: Slice, [content, later]: [Stream; 2]) {
    let background = Stream::background(slice.sink_buffer.into());
    // Whole slices are the usual case and take the fast path.
    if content.check(bytes, 0).is_none() {
        tally.arrived += slice.length;
        return;
    }
    if background.check(bytes, slice.sink_offset).is_none() {
        tally.untouched += slice.length;
        return;
    }
    // Later content is recognised by whole words: a single byte agrees by chance once in 256.
    for (offset, word) in (0..).step_by(8).zip(bytes.chunks(8)) {
        if word.len() == 8 && later.check(word, offset).is_none() {
            tally.later += 8;
            continue;
        }
        for (at, byte) in (offset..).zip(word) {
            match *byte {
                byte if byte == background.byte(slice.sink_offset + at) => tally.untouched += 1,
                byte if byte == content.byte(at) => tally.arrived += 1,
                _ => tally.other += 1,
            }
        }
    }
}

/// Order-dependent, so that bytes that merely changed places show too.
fn fold(digest: u64, bytes: &[u8]) -> u64 {
    let mix = |digest: u64, word: u64| (digest.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let (words, tail) = bytes.as_chunks::<8>();
    let digest = words.iter().fold(digest, |digest, word| mix(digest, u64::from_le_bytes(*word)));
    tail.iter().fold(digest, |digest, byte| mix(digest, u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        worker::{
            pool::Pool,
            protocol::{Sabotage, Side},
        },
        workloads,
    };

    const TRANSFER: u64 = 9;

    /// A sink of the aux workload (plain memory, so no daemon is needed) that has received everything.
    fn received() -> Pool {
        let mut pool = Pool::new(workloads::plan("aux", 1).unwrap(), Side::Sink).unwrap();
        pool.clear();
        for number in 0..pool.plan.slices.len() {
            pool.receive(number, TRANSFER);
        }
        pool
    }

    #[test]
    fn a_complete_transfer_is_clean_and_every_byte_is_counted() {
        let pool = received();
        let verdict = verify(&pool.plan, &pool.bytes(), TRANSFER);
        assert!(verdict.is_clean(), "{verdict}");
        assert_eq!((verdict.verified, verdict.slices), (17_920, 10));
    }

    #[test]
    fn each_sabotage_is_found_and_named() {
        for (how, named) in [
            (Sabotage::Flip, "differs at byte"),
            (Sabotage::Stray, "a stray byte"),
            (Sabotage::Skip, "never arrived"),
            (Sabotage::Dup, "holds the bytes of slice"),
        ] {
            let mut pool = received();
            pool.sabotage(how, TRANSFER).unwrap();
            let verdict = verify(&pool.plan, &pool.bytes(), TRANSFER);
            assert!(!verdict.is_clean(), "{how:?} was not found");
            assert!(
                verdict.first.as_deref().is_some_and(|first| first.contains(named)),
                "{how:?}: {verdict}"
            );
            assert_eq!(verdict.stray, u64::from(how == Sabotage::Stray));
        }
    }

    #[test]
    fn content_of_an_earlier_transfer_is_wrong_everywhere() {
        let pool = received();
        assert_eq!(verify(&pool.plan, &pool.bytes(), TRANSFER + 1).wrong_slices, 10);
    }

    #[test]
    fn a_tally_tells_arrived_untouched_and_late_bytes_apart() {
        let look = |pool: &Pool| tally(&pool.plan, &pool.bytes(), TRANSFER, TRANSFER + 1);
        let mut pool = Pool::new(workloads::plan("aux", 1).unwrap(), Side::Sink).unwrap();
        pool.clear();
        let all = pool.plan.bytes();
        let before = look(&pool);
        assert_eq!(before, Tally { untouched: all, digest: before.digest, ..Tally::default() });

        pool.receive(9, TRANSFER);
        let length = pool.plan.slices[9].length;
        let half = look(&pool);
        assert_eq!((half.arrived, half.untouched, half.later), (length, all - length, 0));
        assert_ne!(half.digest, before.digest);
        assert_eq!(look(&pool), half);

        pool.receive(9, TRANSFER + 1);
        assert_eq!(look(&pool).later, length);
        pool.sabotage(Sabotage::Stray, TRANSFER).unwrap();
        assert_eq!(look(&pool).stray, 1);
    }

    impl Pool {
        /// Stands for the transfer of one slice.
        fn receive(&mut self, number: usize, transfer: u64) {
            let slice = self.plan.slices[number];
            Stream::slice(transfer, number as u64).fill(self.sink_bytes(slice), 0);
        }
    }
}

//! Batches as the suites think of them: moves between two pools, in offsets.

use kvferry_client::{Lengths, Op, Slices};
use serde::{Deserialize, Serialize};

/// `length` bytes from `from` in the source pool to `to` in the destination pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Move {
    /// Offset in the pool the bytes come from.
    pub from: u64,
    /// Offset in the pool they go to.
    pub to: u64,
    /// Bytes.
    pub length: u64,
}

/// How the slices of a batch lie in memory. Destinations never overlap: their contents would be undefined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrangement {
    /// One after the other on both sides: can be coalesced.
    Adjacent,
    /// Ascending at the source, descending at the destination.
    Reversed,
    /// Adjacent at the source, a hole of the same size after each at the destination.
    Interleaved,
    /// Each source begins in the middle of the one before.
    OverlappingSources,
}

/// Distance of a batch from both ends of its pools, so that strays on either side show. Odd on purpose: what
/// is aligned on neither side is what alignment bugs need.
pub const MARGIN: u64 = 8191;

impl Arrangement {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Adjacent, Self::Reversed, Self::Interleaved, Self::OverlappingSources];

    /// A batch of `count` slices of `size` bytes.
    pub fn moves(self, count: u64, size: u64) -> Vec<Move> {
        let place = |index: u64| match self {
            Self::Adjacent => (index * size, index * size),
            Self::Reversed => (index * size, (count - 1 - index) * size),
            Self::Interleaved => (index * size, 2 * index * size),
            Self::OverlappingSources => (index * (size / 2), index * size),
        };
        (0..count)
            .map(|index| {
                let (from, to) = place(index);
                Move { from: MARGIN + from, to: MARGIN + to, length: size }
            })
            .collect()
    }
}

/// Payload bytes of a batch.
pub fn bytes(moves: &[Move]) -> u64 {
    moves.iter().map(|each| each.length).sum()
}

/// The smallest range of the destination pool that holds the batch.
pub fn destination(moves: &[Move]) -> std::ops::Range<u64> {
    let begin = moves.iter().map(|each| each.to).min().unwrap_or(0);
    let end = moves.iter().map(|each| each.to + each.length).max().unwrap_or(0);
    begin..end
}

/// The batch as an engine submits it, given where its own pool and its peer's begin.
pub fn slices(op: Op, moves: &[Move], local: u64, remote: u64) -> Slices {
    let (sources, destinations) = match op {
        Op::Read => (remote, local),
        _ => (local, remote),
    };
    let from = moves.iter().map(|each| sources + each.from).collect();
    let to = moves.iter().map(|each| destinations + each.to).collect();
    let lengths = match moves {
        [first, rest @ ..] if rest.iter().all(|each| each.length == first.length) => {
            Lengths::Uniform(first.length)
        }
        _ => Lengths::Each(moves.iter().map(|each| each.length).collect()),
    };
    match op {
        Op::Read => Slices { local: to, remote: from, lengths },
        _ => Slices { local: from, remote: to, lengths },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_never_overlap_and_keep_their_margin() {
        for arrangement in Arrangement::ALL {
            for (count, size) in [(1, 1), (2, 3), (1023, 7), (4, 1 << 20)] {
                let mut moves = arrangement.moves(count, size);
                assert_eq!(bytes(&moves), count * size);
                moves.sort_by_key(|each| each.to);
                assert!(moves.windows(2).all(|pair| pair[0].to + pair[0].length <= pair[1].to));
                assert!(destination(&moves).start >= MARGIN);
            }
        }
    }

    #[test]
    fn a_read_goes_the_other_way() {
        let moves = [Move { from: 1, to: 2, length: 3 }];
        let write = slices(Op::Write, &moves, 100, 200);
        assert_eq!((write.local, write.remote), (vec![101], vec![202]));
        let read = slices(Op::Read, &moves, 100, 200);
        assert_eq!((read.local, read.remote), (vec![102], vec![201]));
    }
}

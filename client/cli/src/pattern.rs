//! What every byte of a pool must hold.
//!
//! A destination byte is computed from (transfer, slice, offset in the slice); a byte outside every expected
//! slice from (pool buffer, offset in the buffer). Nothing is remembered and nothing is sent along, so the
//! process that receives can check on its own, and a slice that lands in the wrong place, twice, or from an
//! earlier transfer shows as certainly as a flipped bit.
//!
//! The unit is an 8-byte word, because mixing per byte is eight times too slow. Words are counted from the
//! start of the stream, not by address: a slice at an odd address only costs unaligned loads.

/// Bytes made from one mixed word.
const WORD: usize = size_of::<u64>();
/// Odd, so that counting by it visits every 64-bit value.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
const MULTIPLIER: u64 = 0xD6E8_FEB8_6659_FD93;

/// The bytes of one slice or of one pool buffer's background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream {
    seed: u64,
}

/// How a run of bytes departs from its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// Offset of the first wrong byte in the run that was checked.
    pub(crate) first: usize,
    /// Bytes that differ.
    pub(crate) bytes: u64,
}

impl Stream {
    /// What slice number `slice` of transfer number `transfer` carries.
    pub(crate) fn slice(transfer: u64, slice: u64) -> Self {
        Self { seed: scramble(scramble(transfer ^ STEP).wrapping_add(slice)) }
    }

    /// What a pool buffer holds where nothing was ever sent.
    pub(crate) fn background(buffer: u64) -> Self {
        Self { seed: scramble(scramble(!buffer) ^ MULTIPLIER) }
    }

    /// The word that covers bytes `index * 8 ..` of the stream.
    ///
    /// One multiplication only: this runs for every word moved. Both steps are invertible, so equal words mean
    /// equal counters, and the seeds keep the counters of different streams apart.
    #[inline]
    fn word(self, index: u64) -> u64 {
        let counter = self.seed.wrapping_add(index.wrapping_mul(STEP));
        let mixed = (counter ^ (counter >> 32)).wrapping_mul(MULTIPLIER);
        mixed ^ (mixed >> 29)
    }

    #[inline]
    pub(crate) fn byte(self, offset: u64) -> u8 {
        self.word(offset / WORD as u64).to_le_bytes()[(offset % WORD as u64) as usize]
    }

    /// Writes the stream's bytes from `offset` on into `bytes`.
    pub(crate) fn fill(self, bytes: &mut [u8], offset: u64) {
        let (head, body) = bytes.split_at_mut(head_len(bytes.len(), offset));
        self.fill_bytes(head, offset);
        let start = offset + head.len() as u64;
        let (words, tail) = body.as_chunks_mut::<WORD>();
        let first = start / WORD as u64;
        for (index, word) in (first..).zip(words.iter_mut()) {
            *word = self.word(index).to_le_bytes();
        }
        let done = words.len() * WORD;
        self.fill_bytes(tail, start + done as u64);
    }

    fn fill_bytes(self, bytes: &mut [u8], offset: u64) {
        for (at, byte) in (offset..).zip(bytes) {
            *byte = self.byte(at);
        }
    }

    /// None if `bytes` are the stream's bytes from `offset` on.
    pub(crate) fn check(self, bytes: &[u8], offset: u64) -> Option<Mismatch> {
        let (head, body) = bytes.split_at(head_len(bytes.len(), offset));
        let start = offset + head.len() as u64;
        let (words, tail) = body.as_chunks::<WORD>();
        let first = start / WORD as u64;
        // Differences are gathered, not branched on: the loop stays straight for the case that matters.
        let mut wrong = 0;
        for (index, word) in (first..).zip(words) {
            wrong |= self.word(index) ^ u64::from_le_bytes(*word);
        }
        let tail_at = start + (words.len() * WORD) as u64;
        let same = wrong == 0 && self.same_bytes(head, offset) && self.same_bytes(tail, tail_at);
        if same { None } else { self.mismatch(bytes, offset) }
    }

    fn same_bytes(self, bytes: &[u8], offset: u64) -> bool {
        (offset..).zip(bytes).all(|(at, byte)| self.byte(at) == *byte)
    }

    fn mismatch(self, bytes: &[u8], offset: u64) -> Option<Mismatch> {
        let mut wrong = (offset..).zip(bytes).enumerate().filter(|(_, (at, byte))| self.byte(*at) != **byte);
        let (first, _) = wrong.next()?;
        Some(Mismatch { first, bytes: 1 + wrong.count() as u64 })
    }
}

/// Bytes before the first word boundary of the stream at or after `offset`.
fn head_len(length: usize, offset: u64) -> usize {
    (offset.wrapping_neg() % WORD as u64).min(length as u64) as usize
}

/// A full avalanche (splitmix64's finaliser): neighbouring numbers give unrelated seeds.
pub(crate) fn scramble(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The slow definition that the fast paths must agree with.
    fn expected(stream: Stream, offset: u64, length: usize) -> Vec<u8> {
        (offset..).take(length).map(|at| stream.byte(at)).collect()
    }

    #[test]
    fn filling_agrees_with_the_definition_at_every_alignment_and_length() {
        let stream = Stream::slice(7, 3);
        for offset in 0..17 {
            for length in 0..40 {
                let mut bytes = vec![0xAA; length];
                stream.fill(&mut bytes, offset);
                assert_eq!(bytes, expected(stream, offset, length), "offset {offset} length {length}");
                assert_eq!(stream.check(&bytes, offset), None);
            }
        }
    }

    #[test]
    fn one_wrong_bit_anywhere_is_found_and_located() {
        let stream = Stream::background(2);
        for offset in [0, 3, 8] {
            let good = expected(stream, offset, 37);
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                assert_eq!(stream.check(&bad, offset), Some(Mismatch { first: at, bytes: 1 }));
            }
        }
    }

    #[test]
    fn streams_of_other_transfers_slices_and_backgrounds_are_unrelated() {
        let streams = [
            Stream::slice(1, 0),
            Stream::slice(0, 1),
            Stream::slice(1, 1),
            Stream::slice(2, 0),
            Stream::background(0),
            Stream::background(1),
        ];
        for (at, one) in streams.iter().enumerate() {
            for other in &streams[at + 1..] {
                let differing = one.check(&expected(*other, 0, 4096), 0).map_or(0, |found| found.bytes);
                // Unrelated bytes agree once in 256: 16 of 4096.
                assert!(differing > 4000, "{one:?} and {other:?} agree in {}", 4096 - differing);
            }
        }
    }
}

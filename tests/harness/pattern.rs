//! Bytes that tell whose they are: a function of (owner, transfer, offset), so nothing needs to be stored.

use serde::{Deserialize, Serialize};

/// Who wrote a byte, and for which transfer.
///
/// Bytes of owners of different parity always differ (their top bit does), so that between an even owner's
/// memory and an odd owner's not even a single misplaced byte can pass by luck. Otherwise two bytes of different
/// stamps or offsets agree once in 128.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stamp {
    /// Whose memory.
    pub owner: u32,
    /// Written for which transfer; 0 before any.
    pub transfer: u32,
}

const WORD: u64 = 8;
const CHUNK: usize = 4096;

impl Stamp {
    /// A fresh pool's stamp.
    pub fn of(owner: u32) -> Self {
        Self { owner, transfer: 0 }
    }

    /// Writes the bytes that belong at `offset` and after.
    pub fn fill(self, offset: u64, out: &mut [u8]) {
        let skip = (offset % WORD) as usize;
        let mut word = offset / WORD;
        let (head, rest) = out.split_at_mut(if skip == 0 { 0 } else { out.len().min(8 - skip) });
        if !head.is_empty() {
            head.copy_from_slice(&self.word(word)[skip..skip + head.len()]);
            word += 1;
        }
        let mut words = rest.chunks_exact_mut(8);
        for place in &mut words {
            place.copy_from_slice(&self.word(word));
            word += 1;
        }
        let tail = words.into_remainder();
        let length = tail.len();
        tail.copy_from_slice(&self.word(word)[..length]);
    }

    /// Counts the bytes that are not what belongs at `offset` and after, and gives the first one's index.
    pub fn mismatches(self, offset: u64, bytes: &[u8]) -> (u64, Option<usize>) {
        let mut expected = [0; CHUNK];
        let (mut count, mut first) = (0, None);
        for (number, chunk) in bytes.chunks(CHUNK).enumerate() {
            let at = number * CHUNK;
            let expected = &mut expected[..chunk.len()];
            self.fill(offset + at as u64, expected);
            if *expected != *chunk {
                let wrong = || expected.iter().zip(chunk).enumerate().filter(|(_, (a, b))| a != b);
                count += wrong().count() as u64;
                first = first.or_else(|| wrong().next().map(|(index, _)| at + index));
            }
        }
        (count, first)
    }

    /// The byte that belongs at `offset`.
    pub fn byte(self, offset: u64) -> u8 {
        self.word(offset / WORD)[(offset % WORD) as usize]
    }

    fn word(self, index: u64) -> [u8; 8] {
        const TOP_BITS: u64 = 0x8080_8080_8080_8080;
        let seed = (u64::from(self.owner) << 32) | u64::from(self.transfer);
        let mixed = mix(mix(seed).wrapping_add(index));
        let parity = if self.owner % 2 == 1 { TOP_BITS } else { 0 };
        ((mixed & !TOP_BITS) | parity).to_le_bytes()
    }
}

/// The finisher of splitmix64: every input bit moves every output bit.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_window_is_a_window_of_the_whole() {
        let stamp = Stamp { owner: 3, transfer: 9 };
        let mut whole = [0; 100];
        stamp.fill(0, &mut whole);
        for begin in 0..40 {
            for end in begin..60 {
                let mut window = vec![0; end - begin];
                stamp.fill(begin as u64, &mut window);
                assert_eq!(window, whole[begin..end], "{begin}..{end}");
            }
        }
        assert_eq!(stamp.byte(37), whole[37]);
    }

    #[test]
    fn one_wrong_byte_is_found_where_it_is() {
        let stamp = Stamp::of(2);
        let mut bytes = vec![0; 3 * CHUNK + 5];
        stamp.fill(1, &mut bytes);
        assert_eq!(stamp.mismatches(1, &bytes), (0, None));
        bytes[2 * CHUNK + 7] ^= 1;
        assert_eq!(stamp.mismatches(1, &bytes), (1, Some(2 * CHUNK + 7)));
    }

    #[test]
    fn owners_of_different_parity_share_no_byte() {
        let (mut even, mut odd) = ([0; 4096], [0; 4096]);
        Stamp::of(2).fill(0, &mut even);
        Stamp::of(3).fill(0, &mut odd);
        assert!(even.iter().all(|byte| odd.iter().all(|other| byte != other)));
    }
}

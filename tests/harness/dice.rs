//! Randomness that can be had again: splitmix64 from a seed, which every suite that rolls dice prints.

use std::ops::Range;

/// A stream of draws.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From `KVFERRY_SEED`, else from the system.
    pub fn seed() -> anyhow::Result<u64> {
        if let Some(seed) = std::env::var_os("KVFERRY_SEED") {
            return Ok(seed.to_string_lossy().parse()?);
        }
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A stream of its own for the `index`-th user of this seed.
    pub fn fork(&self, index: u64) -> Self {
        let mut other = Self(self.0 ^ index.wrapping_mul(0xd134_2543_de82_ef95));
        other.next_u64();
        other
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number in the range, which must not be empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next_u64() % (range.end - range.start)
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.next_u64().is_multiple_of(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_its_stream_again_and_forks_differ() {
        let draws = |mut dice: Dice| [0; 8].map(|_| dice.next_u64());
        assert_eq!(draws(Dice::new(7)), draws(Dice::new(7)));
        assert_ne!(draws(Dice::new(7)), draws(Dice::new(8)));
        assert_ne!(draws(Dice::new(7).fork(1)), draws(Dice::new(7).fork(2)));
        let mut dice = Dice::new(1);
        assert!((0..1000).all(|_| (3..9).contains(&dice.within(3..9))));
        assert!((0..1000).all(|_| (0.0..1.0).contains(&dice.unit())));
    }
}

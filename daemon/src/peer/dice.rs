//! Random draws for jitter, without a system call each. Never used where an adversary could gain from guessing.

/// An xorshift generator, seeded by the kernel.
#[derive(Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new() -> Self {
        let seed = crate::domain::BootId::random().0;
        Self(seed.iter().fold(1u64, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte)) | 1)
    }

    /// In [0, 1).
    pub(super) fn draw(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_spread_over_the_unit_interval() {
        let mut dice = Dice::new();
        let draws: Vec<f64> = (0..1000).map(|_| dice.draw()).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        let mean = draws.iter().sum::<f64>() / 1000.0;
        assert!((0.4..0.6).contains(&mean), "{mean}");
    }
}

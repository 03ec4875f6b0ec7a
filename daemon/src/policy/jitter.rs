//! Spreading waits, so that the sessions that failed together do not come back together.

use std::time::Duration;

/// Shortens a wait to somewhere in `[0.75, 1]` of itself, by a random draw in `[0, 1)`.
///
/// Only ever shorter, so that a cap holds; by a quarter at most, so that waits that double keep growing. A draw
/// outside its range counts as the nearest end.
pub(super) fn spread(wait: Duration, draw: f64) -> Duration {
    let draw = if draw.is_nan() { 0.0 } else { draw.clamp(0.0, 1.0) };
    wait.mul_f64(0.75 + 0.25 * draw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_shortened_by_a_quarter_at_most() {
        let wait = Duration::from_millis(100);
        assert_eq!(spread(wait, 0.0), Duration::from_millis(75));
        assert_eq!(spread(wait, 1.0), wait);
        for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -3.0, 7.0] {
            let spread = spread(wait, odd);
            assert!(spread >= wait.mul_f64(0.75) && spread <= wait, "{odd} gave {spread:?}");
        }
    }
}

//! Medians, spreads, and when a figure means nothing.

use serde::Serialize;

/// The limit itself may vary so much, (p90 - p10) / p50, before a run is called noisy.
const NOISE_MAX: f64 = 0.25;

/// Ordinary spread of a series.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) p10: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
}

impl Spread {
    /// None for an empty series.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        // Between ranks the value is interpolated: with seven pairs p90 would otherwise be the maximum.
        let at = |share: f64| {
            let rank = share * last as f64;
            let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
            low + (high - low) * rank.fract()
        };
        Some(Self { p10: at(0.1), p50: at(0.5), p90: at(0.9) })
    }

    pub(crate) fn is_noisy(&self) -> bool {
        self.p50 <= 0.0 || (self.p90 - self.p10) / self.p50 > NOISE_MAX
    }
}

/// One measurement of the limit and the one of kvferry that followed it; ns per replay, medians of a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairing {
    pub(crate) limit: f64,
    pub(crate) kvferry: f64,
}

/// What a series of pairs says. Each pair is compared in itself, so slow drifts of the machine cancel out.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) limit_ns: Spread,
    pub(crate) kvferry_ns: Spread,
    /// Speed as a share of the limit's: limit time / kvferry time.
    pub(crate) share: Spread,
    /// What kvferry takes longer.
    pub(crate) extra_ns: Spread,
    pub(crate) noisy: bool,
}

impl Comparison {
    /// None for an empty series.
    pub(crate) fn of(pairs: &[Pairing]) -> Option<Self> {
        let series = |pick: fn(&Pairing) -> f64| Spread::of(&pairs.iter().map(pick).collect::<Vec<_>>());
        let limit_ns = series(|pair| pair.limit)?;
        Some(Self {
            limit_ns,
            kvferry_ns: series(|pair| pair.kvferry)?,
            share: series(|pair| pair.limit / pair.kvferry)?,
            extra_ns: series(|pair| pair.kvferry - pair.limit)?,
            noisy: limit_ns.is_noisy(),
        })
    }
}

pub(crate) fn median(ns: &[u64]) -> f64 {
    Spread::of(&ns.iter().map(|ns| *ns as f64).collect::<Vec<_>>()).map_or(0.0, |spread| spread.p50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_interpolated_and_order_does_not_matter() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0]), Some(Spread { p10: 3.0, p50: 3.0, p90: 3.0 }));
        let spread = Spread::of(&[10.0, 0.0, 5.0, 2.5, 7.5]).unwrap();
        assert_eq!((spread.p10, spread.p50, spread.p90), (1.0, 5.0, 9.0));
        assert_eq!(median(&[4, 1, 3]), 3.0);
    }

    #[test]
    fn a_limit_that_varies_by_more_than_a_quarter_is_noisy() {
        let pairs = |limits: &[f64]| -> Vec<Pairing> {
            limits.iter().map(|limit| Pairing { limit: *limit, kvferry: 200.0 }).collect()
        };
        assert!(!Comparison::of(&pairs(&[100.0, 110.0, 95.0, 100.0])).unwrap().noisy);
        assert!(Comparison::of(&pairs(&[100.0, 180.0, 70.0, 100.0])).unwrap().noisy);
    }

    #[test]
    fn pairs_are_compared_in_themselves() {
        // The machine slows down threefold half-way; kvferry takes twice the limit throughout.
        let pairs: Vec<_> =
            [100.0, 100.0, 300.0].map(|limit| Pairing { limit, kvferry: 2.0 * limit }).into_iter().collect();
        let found = Comparison::of(&pairs).unwrap();
        assert_eq!((found.share.p10, found.share.p90), (0.5, 0.5));
        assert_eq!(found.extra_ns.p50, 100.0);
    }
}

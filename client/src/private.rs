//! Which private memory of this process a daemon may have copied: what is registered, or just being registered.

use std::sync::Arc;

/// Ranges of addresses, apart from each other and in order. A snapshot: cheap to hand out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Arc<[(u64, u64)]>);

impl Ranges {
    /// Of base and length each; they may overlap. What wraps is left out.
    pub(crate) fn of(ranges: impl Iterator<Item = (u64, u64)>) -> Self {
        let mut ends: Vec<(u64, u64)> =
            ranges.filter_map(|(base, length)| Some((base, base.checked_add(length)?))).collect();
        ends.sort_unstable();
        ends.dedup_by(|next, before| {
            let joins = next.0 <= before.1;
            if joins {
                before.1 = before.1.max(next.1);
            }
            joins
        });
        Self(ends.into())
    }

    /// Whether every byte of `[address, address + length)` is in them.
    pub(crate) fn contains(&self, address: u64, length: u64) -> bool {
        let after = self.0.partition_point(|(base, _)| *base <= address);
        let end = address.checked_add(length);
        let holds = |(_, last): &(u64, u64)| end.is_some_and(|end| end <= *last);
        after.checked_sub(1).and_then(|at| self.0.get(at)).is_some_and(holds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inside_is_found_and_nothing_else() {
        let ranges = [(100, 50), (150, 10), (10, 5), (120, 5), (u64::MAX - 9, 10), (u64::MAX, 2), (30, 0)];
        let ranges = Ranges::of(ranges.into_iter());
        let mut inside = [false; 256];
        for (base, length) in [(100, 50), (150, 10), (10, 5)] {
            inside[base..base + length].fill(true);
        }
        for address in 0..200u64 {
            for length in 1..40u64 {
                let all = (address..address + length).all(|at| inside[at as usize]);
                assert_eq!(ranges.contains(address, length), all, "{length} at {address}");
            }
        }
        assert!(!ranges.contains(u64::MAX, 2) && !ranges.contains(u64::MAX - 4, 10));
        assert!(!Ranges::default().contains(0, 1));
    }
}

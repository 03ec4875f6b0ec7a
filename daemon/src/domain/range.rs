//! A piece of an engine's address space.

use super::{Failure, Reason};

/// Addresses `[base, base + length)`: never empty, never beyond the end of the address space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct AddressRange {
    base: u64,
    end: u64,
}

impl AddressRange {
    /// `length` bytes from `base` on.
    ///
    /// # Errors
    /// `BadArgument` for no bytes, `OutOfBounds` where the range leaves the address space.
    pub fn new(base: u64, length: u64) -> Result<Self, Failure> {
        if length == 0 {
            return Err(Failure::new(Reason::BadArgument, "length is zero"));
        }
        let end = base.checked_add(length).ok_or_else(|| {
            Failure::new(Reason::OutOfBounds, format!("{base:#x} + {length:#x} leaves the address space"))
        })?;
        Ok(Self { base, end })
    }

    /// First address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The address behind the last.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.end - self.base
    }

    /// The same bytes in the fewest ranges, ascending: those that overlap or touch become one.
    pub fn join(mut ranges: Vec<Self>) -> Vec<Self> {
        ranges.sort_unstable();
        ranges.dedup_by(|next, before| {
            let joins = next.base <= before.end;
            if joins {
                before.end = before.end.max(next.end);
            }
            joins
        });
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_wrapping_ranges_are_no_ranges() {
        let reason = |base, length| AddressRange::new(base, length).map_err(|failure| failure.reason);
        assert_eq!(reason(5, 0), Err(Reason::BadArgument));
        assert_eq!(reason(u64::MAX, 1), Err(Reason::OutOfBounds));
        assert_eq!(reason(1, u64::MAX), Err(Reason::OutOfBounds));
        assert_eq!(reason(0, u64::MAX).map(|range| (range.base(), range.end())), Ok((0, u64::MAX)));
    }

    #[test]
    fn ranges_that_touch_are_joined() {
        let range = |base, end| AddressRange::new(base, end - base).expect("a range");
        let joined =
            AddressRange::join(vec![range(8, 9), range(4, 6), range(1, 2), range(5, 8), range(4, 5)]);
        assert_eq!(joined, [range(1, 2), range(4, 9)]);
    }
}

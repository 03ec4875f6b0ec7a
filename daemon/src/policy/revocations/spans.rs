//! The ranges of one endpoint as disjoint spans, each with the newest epoch it was revoked in.
//!
//! Kept twice: by address for whoever asks what a part touches, by epoch for whoever tells a peer what is new, or
//! forgets what is oldest. Both hold the same spans, so the second is bounded as the first is (I8).

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Unbounded},
};

use crate::domain::{AddressRange, Epoch};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    end: u64,
    epoch: Epoch,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Spans {
    /// By first address.
    by_address: BTreeMap<u64, Span>,
    /// (epoch, first address) of each.
    by_epoch: BTreeSet<(Epoch, u64)>,
}

impl Spans {
    pub(super) fn len(&self) -> usize {
        self.by_address.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether any of these bytes was revoked after `admitted`.
    pub(super) fn touches(&self, address: u64, bytes: u64, admitted: Epoch) -> bool {
        let end = address.saturating_add(bytes);
        let before = self.by_address.range(..address).next_back().filter(|(_, span)| span.end > address);
        let within = self.by_address.range(address..end.max(address));
        bytes > 0 && before.into_iter().chain(within).any(|(_, span)| span.epoch > admitted)
    }

    /// What was revoked after `told`, oldest first, by address within an epoch. Costs what it yields.
    pub(super) fn since(&self, told: Epoch) -> impl Iterator<Item = (Epoch, AddressRange)> + '_ {
        let newer = self.by_epoch.range((Excluded((told, u64::MAX)), Unbounded));
        newer.filter_map(|&(epoch, base)| {
            let end = self.by_address.get(&base)?.end;
            Some((epoch, AddressRange::new(base, end - base).ok()?))
        })
    }

    /// Puts a range over whatever lies there: none of that is newer.
    pub(super) fn lay(&mut self, range: AddressRange, epoch: Epoch) {
        if let Some((_, before)) = self.by_address.range_mut(..range.base()).next_back()
            && before.end > range.base()
        {
            let whole = *before;
            before.end = range.base();
            self.keep_tail(whole, range);
        }
        while let Some((&base, &span)) = self.by_address.range(range.base()..range.end()).next() {
            self.remove(base);
            self.keep_tail(span, range);
        }
        self.insert(range.base(), Span { end: range.end(), epoch });
    }

    /// Forgets whole epochs, oldest first, until no more than `most` spans are left; answers the newest epoch
    /// forgotten. What is left of an epoch of which some spans go would hit nobody whom the floor lets pass.
    pub(super) fn shrink_to(&mut self, most: usize) -> Option<Epoch> {
        let mut forgotten = None;
        while let Some(&(epoch, base)) = self.by_epoch.first()
            && (self.len() > most || forgotten == Some(epoch))
        {
            self.remove(base);
            forgotten = Some(epoch);
        }
        forgotten
    }

    fn keep_tail(&mut self, span: Span, range: AddressRange) {
        if span.end > range.end() {
            self.insert(range.end(), span);
        }
    }

    fn insert(&mut self, base: u64, span: Span) {
        self.by_epoch.insert((span.epoch, base));
        self.by_address.insert(base, span);
    }

    fn remove(&mut self, base: u64) {
        if let Some(span) = self.by_address.remove(&base) {
            self.by_epoch.remove(&(span.epoch, base));
        }
    }
}

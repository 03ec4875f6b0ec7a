//! Which transfer stands for a batch that was cut into several, so that `wait` and `cancel` with the id the
//! caller knows reach the one under way.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::TransferId;

/// Cut batches under way or not settled; each stands for millions of slices, so few are enough.
const MOST: usize = 64;
/// Batches remembered of which nobody waited for the end.
const MOST_DROPPED: usize = 4096;

/// The lock is held for single map operations.
#[derive(Debug, Default)]
pub(crate) struct Cuts(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    under_way: HashMap<TransferId, Cut>,
    /// The batch, and the piece that was under way when its call was dropped.
    dropped: VecDeque<(TransferId, TransferId)>,
}

#[derive(Clone, Copy, Debug)]
struct Cut {
    current: TransferId,
    cancelled: bool,
}

/// A call that carries a batch. Dropped in the middle, it makes room for others; which piece was under way is
/// remembered, because the daemon ends that one by itself and can be asked about it.
#[derive(Debug)]
#[must_use]
pub(crate) struct Cutting<'a> {
    cuts: &'a Cuts,
    batch: TransferId,
}

impl Cutting<'_> {
    /// The batch has ended.
    pub(crate) fn end(self) {
        self.cuts.end(self.batch);
    }

    /// It is not settled: it has its place until it is.
    pub(crate) fn stays(self) {
        std::mem::forget(self);
    }
}

impl Drop for Cutting<'_> {
    fn drop(&mut self) {
        let mut cuts = self.cuts.lock();
        // Nothing after an orderly end.
        let Some(cut) = cuts.under_way.remove(&self.batch) else { return };
        if cuts.dropped.len() == MOST_DROPPED {
            cuts.dropped.pop_front();
        }
        cuts.dropped.push_back((self.batch, cut.current));
    }
}

impl Cuts {
    /// Remembers a batch. Nothing when there are too many.
    pub(crate) fn begin(&self, batch: TransferId) -> Option<Cutting<'_>> {
        let mut cuts = self.lock();
        if cuts.under_way.len() >= MOST && !cuts.under_way.contains_key(&batch) {
            return None;
        }
        cuts.dropped.retain(|(dropped, _)| *dropped != batch);
        cuts.under_way.insert(batch, Cut { current: batch, cancelled: false });
        Some(Cutting { cuts: self, batch })
    }

    /// The next piece is about to start. False when the batch was cancelled meanwhile.
    pub(crate) fn advance(&self, batch: TransferId, piece: TransferId) -> bool {
        match self.lock().under_way.get_mut(&batch) {
            Some(cut) if !cut.cancelled => {
                cut.current = piece;
                true
            }
            _ => false,
        }
    }

    /// Starts no further piece of the batch.
    pub(crate) fn cancel(&self, batch: TransferId) {
        if let Some(cut) = self.lock().under_way.get_mut(&batch) {
            cut.cancelled = true;
        }
    }

    /// The batch has ended.
    pub(crate) fn end(&self, batch: TransferId) {
        let mut cuts = self.lock();
        cuts.under_way.remove(&batch);
        cuts.dropped.retain(|(dropped, _)| *dropped != batch);
    }

    /// What the daemon knows a batch by at the moment.
    pub(crate) fn current(&self, batch: TransferId) -> TransferId {
        self.lock().all().find(|(each, _)| *each == batch).map_or(batch, |(_, piece)| piece)
    }

    /// The batch that a transfer known to the daemon is a piece of.
    pub(crate) fn batch_of(&self, piece: TransferId) -> TransferId {
        self.lock().all().find(|(_, current)| *current == piece).map_or(piece, |(batch, _)| batch)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Batches and their pieces under way.
    fn all(&self) -> impl Iterator<Item = (TransferId, TransferId)> {
        let under_way = self.under_way.iter().map(|(batch, cut)| (*batch, cut.current));
        under_way.chain(self.dropped.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> TransferId {
        TransferId([number; 16])
    }

    #[test]
    fn a_cut_batch_is_its_current_piece_until_it_ends() {
        let cuts = Cuts::default();
        let cutting = cuts.begin(id(1)).unwrap();
        assert!(cuts.advance(id(1), id(2)));
        assert_eq!(cuts.current(id(1)), id(2));
        assert_eq!(cuts.batch_of(id(2)), id(1));
        cutting.end();
        assert_eq!(cuts.current(id(1)), id(1));
        assert_eq!(cuts.batch_of(id(2)), id(2));
    }

    #[test]
    fn a_cancelled_batch_starts_no_further_piece() {
        let cuts = Cuts::default();
        let _cutting = cuts.begin(id(1)).unwrap();
        cuts.cancel(id(1));
        assert!(!cuts.advance(id(1), id(2)));
        assert_eq!(cuts.current(id(1)), id(1));
    }

    #[test]
    fn there_is_a_limit() {
        let cuts = Cuts::default();
        let _all: Vec<_> = (0..MOST as u8).map(|number| cuts.begin(id(number)).unwrap()).collect();
        assert!(cuts.begin(id(255)).is_none());
        assert!(cuts.begin(id(0)).is_some(), "submitting one again joins it");
    }

    #[test]
    fn a_call_dropped_in_mid_batch_makes_room_and_its_piece_is_still_known() {
        let cuts = Cuts::default();
        for number in 0..=2 * MOST as u8 {
            let cutting = cuts.begin(id(number)).unwrap();
            assert!(cuts.advance(id(number), id(number + 100)));
            drop(cutting);
        }
        assert_eq!(cuts.current(id(1)), id(101));
        assert_eq!(cuts.batch_of(id(101)), id(1));
        cuts.end(id(1));
        assert_eq!(cuts.current(id(1)), id(1));
        cuts.begin(id(2)).unwrap().stays();
        assert_eq!(cuts.current(id(2)), id(2), "it runs again");
        assert_eq!(cuts.lock().under_way.len(), 1);
    }
}

//! Which transfer stands for a batch that was cut into several, so that `wait` and `cancel` with the id the
//! caller knows reach the one under way.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::TransferId;

/// Cut batches under way or not settled; each stands for millions of slices, so few are enough.
const MOST: usize = 64;

/// The lock is held for single map operations.
#[derive(Debug, Default)]
pub(crate) struct Cuts(Mutex<HashMap<TransferId, Cut>>);

#[derive(Clone, Copy, Debug)]
struct Cut {
    current: TransferId,
    cancelled: bool,
}

impl Cuts {
    /// Remembers a batch. False when there are too many.
    pub(crate) fn begin(&self, batch: TransferId) -> bool {
        let mut cuts = self.lock();
        let room = cuts.len() < MOST || cuts.contains_key(&batch);
        if room {
            cuts.insert(batch, Cut { current: batch, cancelled: false });
        }
        room
    }

    /// The next piece is about to start. False when the batch was cancelled meanwhile.
    pub(crate) fn advance(&self, batch: TransferId, piece: TransferId) -> bool {
        match self.lock().get_mut(&batch) {
            Some(cut) if !cut.cancelled => {
                cut.current = piece;
                true
            }
            _ => false,
        }
    }

    /// Starts no further piece of the batch.
    pub(crate) fn cancel(&self, batch: TransferId) {
        if let Some(cut) = self.lock().get_mut(&batch) {
            cut.cancelled = true;
        }
    }

    /// The batch has ended.
    pub(crate) fn end(&self, batch: TransferId) {
        self.lock().remove(&batch);
    }

    /// What the daemon knows a batch by at the moment.
    pub(crate) fn current(&self, batch: TransferId) -> TransferId {
        self.lock().get(&batch).map_or(batch, |cut| cut.current)
    }

    /// The batch that a transfer known to the daemon is a piece of.
    pub(crate) fn batch_of(&self, piece: TransferId) -> TransferId {
        self.lock().iter().find(|(_, cut)| cut.current == piece).map_or(piece, |(batch, _)| *batch)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TransferId, Cut>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        assert!(cuts.begin(id(1)));
        assert!(cuts.advance(id(1), id(2)));
        assert_eq!(cuts.current(id(1)), id(2));
        assert_eq!(cuts.batch_of(id(2)), id(1));
        cuts.end(id(1));
        assert_eq!(cuts.current(id(1)), id(1));
        assert_eq!(cuts.batch_of(id(2)), id(2));
    }

    #[test]
    fn a_cancelled_batch_starts_no_further_piece() {
        let cuts = Cuts::default();
        assert!(cuts.begin(id(1)));
        cuts.cancel(id(1));
        assert!(!cuts.advance(id(1), id(2)));
        assert_eq!(cuts.current(id(1)), id(1));
    }

    #[test]
    fn there_is_a_limit() {
        let cuts = Cuts::default();
        assert!((0..MOST as u8).all(|number| cuts.begin(id(number))));
        assert!(!cuts.begin(id(255)));
        assert!(cuts.begin(id(0)), "submitting one again joins it");
    }
}

//! Which parts an inbound session's lanes must not apply any more: the target's half of *stop*.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

use super::wire::WINDOW_PARTS;
use crate::domain::{LaneId, TransferId};

/// The marks of one inbound session.
///
/// Whoever marks raises the engine's gate afterwards: when it is quiet, no marked part can reach memory. A
/// mark vanishes when its lane has processed the sequence or has closed, and a lane bears at most
/// [`WINDOW_PARTS`] of them, because no honest initiator has more parts in flight; so the memory is bounded
/// (I8) whatever a peer asks for.
#[derive(Debug, Default)]
pub struct Stops {
    /// Marks there are, so that lanes need not look when there are none.
    marks: AtomicUsize,
    lanes: Mutex<HashMap<LaneId, Marked>>,
}

#[derive(Debug, Default)]
struct Marked {
    processed: Arc<AtomicU64>,
    transfers: HashMap<TransferId, u64>,
    /// Every part up to here, of whatever transfer: what becomes of a lane with too many marks.
    all: u64,
}

impl Stops {
    /// No marks.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A lane may carry parts from now on. Told when its token is handed out, so that a stop that overtakes
    /// the lane's connection is not lost.
    pub fn expect(&self, lane: LaneId) {
        self.lanes().entry(lane).or_default();
    }

    /// A lane was expected and will not come.
    pub fn forget(&self, lane: LaneId) {
        let mut lanes = self.lanes();
        if let Some(gone) = lanes.remove(&lane) {
            self.marks.fetch_sub(gone.transfers.len(), SeqCst);
        }
        if lanes.is_empty() {
            *lanes = HashMap::new();
        }
    }

    /// Parts of this transfer are not to be applied any more on these lanes, up to these sequences. Lanes
    /// that are closed or were never expected are passed over: they apply nothing.
    pub fn mark(&self, transfer: TransferId, through: &[(LaneId, u64)]) {
        let mut lanes = self.lanes();
        // Counted before the look at `processed`: a lane that goes past the sequence meanwhile sees a mark and
        // comes to clean up, once this lock is free.
        self.marks.fetch_add(1, SeqCst);
        for (lane, through) in through {
            let Some(marked) = lanes.get_mut(lane) else { continue };
            if marked.processed.load(SeqCst) >= *through {
                continue;
            }
            if marked.transfers.len() as u64 >= WINDOW_PARTS && !marked.transfers.contains_key(&transfer) {
                marked.all = marked.all.max(*through);
                continue;
            }
            let mark = marked.transfers.entry(transfer).or_insert_with(|| {
                self.marks.fetch_add(1, SeqCst);
                0
            });
            *mark = (*mark).max(*through);
        }
        self.marks.fetch_sub(1, SeqCst);
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<LaneId, Marked>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lane's own view of the marks. Dropped with the lane, and its marks with it.
#[derive(Debug)]
pub(super) struct LaneStops {
    stops: Arc<Stops>,
    lane: LaneId,
    processed: Arc<AtomicU64>,
}

impl LaneStops {
    pub(super) fn new(stops: Arc<Stops>, lane: LaneId) -> Self {
        let processed = stops.lanes().entry(lane).or_default().processed.clone();
        Self { stops, lane, processed }
    }

    /// Whether this part must not touch memory. Asked inside the gate.
    pub(super) fn is_stopped(&self, transfer: TransferId, sequence: u64) -> bool {
        if self.stops.marks.load(SeqCst) == 0 {
            return false;
        }
        let lanes = self.stops.lanes();
        let stopped = |marked: &Marked| {
            let mark = marked.transfers.get(&transfer).copied().unwrap_or(0);
            sequence <= mark.max(marked.all)
        };
        lanes.get(&self.lane).is_some_and(stopped)
    }

    /// Every part up to this one is over.
    pub(super) fn processed(&self, sequence: u64) {
        self.processed.store(sequence, SeqCst);
        if self.stops.marks.load(SeqCst) == 0 {
            return;
        }
        if let Some(marked) = self.stops.lanes().get_mut(&self.lane) {
            let before = marked.transfers.len();
            marked.transfers.retain(|_, through| *through > sequence);
            self.stops.marks.fetch_sub(before - marked.transfers.len(), SeqCst);
        }
    }

    /// The last part that is over, for whoever holds the lane.
    pub(super) fn progress(&self) -> Arc<AtomicU64> {
        self.processed.clone()
    }
}

impl Drop for LaneStops {
    fn drop(&mut self) {
        self.stops.forget(self.lane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: LaneId = LaneId(4);

    fn transfer(number: u64) -> TransferId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        TransferId(id)
    }

    #[test]
    fn a_mark_counts_up_to_its_sequence_and_vanishes_there() {
        let stops = Stops::new();
        let lane = LaneStops::new(stops.clone(), LANE);
        stops.mark(transfer(1), &[(LANE, 5)]);
        assert!(lane.is_stopped(transfer(1), 5));
        assert!(!lane.is_stopped(transfer(1), 6));
        assert!(!lane.is_stopped(transfer(2), 5));
        lane.processed(4);
        assert!(lane.is_stopped(transfer(1), 5));
        lane.processed(5);
        assert!(!lane.is_stopped(transfer(1), 5));
        assert_eq!(stops.marks.load(SeqCst), 0);
    }

    #[test]
    fn what_is_over_is_not_marked() {
        let stops = Stops::new();
        let lane = LaneStops::new(stops.clone(), LANE);
        lane.processed(5);
        stops.mark(transfer(1), &[(LANE, 5), (LaneId(99), 7)]);
        assert_eq!(stops.marks.load(SeqCst), 0);
        assert_eq!(stops.lanes().len(), 1);
    }

    #[test]
    fn a_stop_that_comes_before_its_lane_is_kept() {
        let stops = Stops::new();
        stops.expect(LANE);
        stops.mark(transfer(1), &[(LANE, 3)]);
        let lane = LaneStops::new(stops.clone(), LANE);
        assert!(lane.is_stopped(transfer(1), 3));
        drop(lane);
        assert_eq!((stops.marks.load(SeqCst), stops.lanes().len()), (0, 0));
    }

    /// I8: a peer that marks more than it can have in flight loses its own parts, not our memory.
    #[test]
    fn marks_are_bounded() {
        let stops = Stops::new();
        let lane = LaneStops::new(stops.clone(), LANE);
        for number in 0..5000 {
            stops.mark(transfer(number), &[(LANE, 10)]);
        }
        assert_eq!(stops.marks.load(SeqCst), WINDOW_PARTS as usize);
        assert!(lane.is_stopped(transfer(4999), 10));
        lane.processed(10);
        assert_eq!(stops.marks.load(SeqCst), 0);
        assert!(!lane.is_stopped(transfer(4999), 11));
    }
}

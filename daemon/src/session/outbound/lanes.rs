//! The lanes of an initiator's session: what each has taken and what is known of its end.
//!
//! A lane's parts are in doubt from submission until they are processed, or until the lane is closed on this
//! side *and* confirmed fenced at the target (I2). Only then do the unprocessed ones come back.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use crate::{
    domain::{Failure, LaneId, TransferId},
    transport::{LaneKind, LaneRecord},
};

/// A part handed to a lane.
#[derive(Clone, Debug)]
pub struct Assigned {
    /// Whose.
    pub transfer: TransferId,
    /// Which of its parts.
    pub part: u32,
    processed: bool,
}

/// How far a lane's life has come. There is no way back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LanePhase {
    /// Asked for.
    Opening,
    /// Takes parts.
    Open,
    /// Asked to close; its owner has not said so yet.
    Closing,
    /// Its owner has closed it: this side is out of reach.
    Closed,
}

/// One lane.
#[derive(Debug)]
pub struct LaneState {
    /// Which way its payload flows.
    pub kind: LaneKind,
    /// How far it has come.
    pub phase: LanePhase,
    /// The target's word that it is fenced there, where it came before our own owner's.
    pub fenced: Option<LaneRecord>,
    /// Why and when the path lost it, where that is why it closed.
    pub lost_to: Option<(Failure, Instant)>,
    /// Payload bytes that moved on it, and when that number last rose.
    pub moved: (u64, Instant),
    /// Sequence of the front of `assigned`.
    front: u64,
    assigned: VecDeque<Assigned>,
}

impl LaneState {
    /// Asked for now.
    pub fn opening(kind: LaneKind, now: Instant) -> Self {
        Self {
            kind,
            phase: LanePhase::Opening,
            fenced: None,
            lost_to: None,
            moved: (0, now),
            front: 1,
            assigned: VecDeque::new(),
        }
    }

    /// Takes a part; returns its sequence.
    pub fn assign(&mut self, transfer: TransferId, part: u32, now: Instant) -> u64 {
        if self.assigned.is_empty() {
            self.moved.1 = now;
        }
        self.assigned.push_back(Assigned { transfer, part, processed: false });
        self.front + self.assigned.len() as u64 - 1
    }

    /// Parts taken and not processed, from the front on.
    pub fn outstanding(&self) -> usize {
        self.assigned.len()
    }

    /// The part with this sequence, while it is in doubt.
    pub fn get(&self, sequence: u64) -> Option<&Assigned> {
        let at = sequence.checked_sub(self.front)?;
        self.assigned.get(at as usize).filter(|assigned| !assigned.processed)
    }

    /// Marks parts processed and returns them; what is unknown or was processed before is passed over.
    pub fn processed(&mut self, from: u64, through: u64, now: Instant) -> Vec<Assigned> {
        self.moved.1 = now;
        let last = self.front + self.assigned.len() as u64;
        let range = from.max(self.front)..through.saturating_add(1).min(last);
        let mut settled = Vec::with_capacity(range.clone().count());
        for sequence in range {
            let assigned = &mut self.assigned[(sequence - self.front) as usize];
            if !std::mem::replace(&mut assigned.processed, true) {
                settled.push(assigned.clone());
            }
        }
        while self.assigned.front().is_some_and(|assigned| assigned.processed) {
            self.assigned.pop_front();
            self.front += 1;
        }
        settled
    }

    /// All parts in doubt, oldest first.
    pub fn in_doubt(&self) -> impl DoubleEndedIterator<Item = &Assigned> {
        self.assigned.iter().filter(|assigned| !assigned.processed)
    }

    /// The last sequence in doubt that belongs to the transfer.
    pub fn last_of(&self, transfer: TransferId) -> Option<u64> {
        let at = self.assigned.iter().rposition(|a| a.transfer == transfer && !a.processed)?;
        Some(self.front + at as u64)
    }

    /// Whether parts can be submitted.
    pub fn is_open(&self) -> bool {
        self.phase == LanePhase::Open
    }

    /// Whether it is, or may come to be, of use.
    pub fn is_live(&self) -> bool {
        matches!(self.phase, LanePhase::Opening | LanePhase::Open)
    }
}

/// What became of each part in doubt, once a lane is fenced on both sides.
#[derive(Debug)]
pub enum Fate {
    /// Applied at the target.
    Applied(Assigned),
    /// Refused by the target.
    Refused(Assigned, Failure),
    /// Never applied, and never will be.
    Lost(Assigned),
}

/// Decides by the target's record. Newest first, so that lost parts pushed to the front of a queue one after
/// the other stand in their old order.
pub fn resolve(lane: LaneState, record: &LaneRecord) -> Vec<Fate> {
    let refused: BTreeMap<u64, &Failure> =
        record.refused.iter().map(|(sequence, failure)| (*sequence, failure)).collect();
    let front = lane.front;
    let mut fates = Vec::with_capacity(lane.assigned.len());
    for (at, assigned) in lane.assigned.into_iter().enumerate().rev() {
        if assigned.processed {
            continue;
        }
        let sequence = front + at as u64;
        fates.push(match refused.get(&sequence) {
            Some(failure) => Fate::Refused(assigned, (*failure).clone()),
            None if sequence <= record.processed => Fate::Applied(assigned),
            None => Fate::Lost(assigned),
        });
    }
    fates
}

/// All lanes of a session.
pub type Lanes = BTreeMap<LaneId, LaneState>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Reason;

    fn lane(parts: u32) -> LaneState {
        let now = Instant::now();
        let mut lane = LaneState::opening(LaneKind::Write, now);
        for part in 0..parts {
            assert_eq!(lane.assign(TransferId([part as u8; 16]), part, now), u64::from(part) + 1);
        }
        lane
    }

    fn parts(assigned: &[Assigned]) -> Vec<u32> {
        assigned.iter().map(|assigned| assigned.part).collect()
    }

    #[test]
    fn acknowledgements_out_of_order_twice_and_beyond_the_end_count_once() {
        let now = Instant::now();
        let mut lane = lane(5);
        assert_eq!(parts(&lane.processed(3, 3, now)), [2]);
        assert_eq!(lane.outstanding(), 5);
        assert_eq!(parts(&lane.processed(1, 4, now)), [0, 1, 3]);
        assert_eq!(lane.outstanding(), 1);
        assert!(lane.processed(1, 4, now).is_empty());
        assert_eq!(parts(&lane.processed(0, u64::MAX, now)), [4]);
        assert!(lane.processed(6, 2, now).is_empty());
    }

    /// I2: what the target did not process comes back, what it did does not.
    #[test]
    fn the_record_decides_about_parts_in_doubt() {
        let mut lane = lane(5);
        lane.processed(2, 2, Instant::now());
        let record = LaneRecord { processed: 3, refused: vec![(3, Failure::plain(Reason::RegionChanged))] };
        let fates: Vec<_> = resolve(lane, &record)
            .into_iter()
            .map(|fate| match fate {
                Fate::Applied(a) => ("applied", a.part),
                Fate::Refused(a, _) => ("refused", a.part),
                Fate::Lost(a) => ("lost", a.part),
            })
            .collect();
        assert_eq!(fates, [("lost", 4), ("lost", 3), ("refused", 2), ("applied", 0)]);
    }
}

//! The transfers of a session, and what every event asks of all of them, known without a look at each.
//!
//! It reads as the map it is. Whoever takes a transfer in hand to change it leaves it on the list of those
//! *touched*, and before the next question their places in the indexes are brought up to date. So an event costs
//! what it touches, and no change to a transfer has to think of an index.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    time::{Duration, Instant},
};

use crate::{
    domain::TransferId,
    transfer::run::{Phase, Run},
};

/// How long endings are waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For the peer's word on its half.
    pub(super) peer_wait: Duration,
    /// For the proof of the own half, until the answer is UNSETTLED.
    pub(super) settle: Duration,
}

/// What the indexes say of a transfer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Place {
    wake: Option<Instant>,
    live: bool,
}

#[derive(Debug)]
pub(super) struct Runs {
    patience: Patience,
    /// Ordered, so that the same events always lead to the same actions in the same order.
    by_id: BTreeMap<TransferId, Run>,
    places: BTreeMap<TransferId, Place>,
    /// When time alone changes something for whom.
    wakes: BTreeSet<(Instant, TransferId)>,
    /// Those whose end is not decided.
    live: usize,
    /// Changed since the indexes were last brought up to date.
    touched: Vec<TransferId>,
}

impl Deref for Runs {
    type Target = BTreeMap<TransferId, Run>;

    fn deref(&self) -> &Self::Target {
        &self.by_id
    }
}

impl Runs {
    pub(super) fn new(patience: Patience) -> Self {
        Self {
            patience,
            by_id: BTreeMap::new(),
            places: BTreeMap::new(),
            wakes: BTreeSet::new(),
            live: 0,
            touched: Vec::new(),
        }
    }

    pub(super) fn insert(&mut self, id: TransferId, run: Run) {
        self.by_id.insert(id, run);
        self.touched.push(id);
    }

    pub(super) fn remove(&mut self, id: &TransferId) -> Option<Run> {
        let run = self.by_id.remove(id)?;
        self.touched.push(*id);
        Some(run)
    }

    pub(super) fn get_mut(&mut self, id: &TransferId) -> Option<&mut Run> {
        let run = self.by_id.get_mut(id)?;
        if self.touched.last() != Some(id) {
            self.touched.push(*id);
        }
        Some(run)
    }

    /// All of them: for what concerns all of them.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Run> {
        self.touched.extend(self.by_id.keys());
        self.by_id.values_mut()
    }

    /// Whether the end of any is still open.
    pub(super) fn any_live(&mut self) -> bool {
        self.catch_up();
        self.live > 0
    }

    /// Those whose time has come, the longest due first.
    pub(super) fn due(&mut self, now: Instant) -> Vec<TransferId> {
        self.catch_up();
        self.wakes.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect()
    }

    /// When the next one's time comes. Asked between steps, when everything is up to date.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        debug_assert!(self.touched.is_empty(), "asked in mid-step");
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Brings the indexes up to date. Returns how many transfers that took a look at.
    pub(super) fn catch_up(&mut self) -> usize {
        let touched = self.touched.len();
        for id in std::mem::take(&mut self.touched) {
            let place = self
                .by_id
                .get(&id)
                .map(|run| Place { wake: self.patience.wake(run), live: !run.is_ending() });
            self.put(id, place);
        }
        touched
    }

    fn put(&mut self, id: TransferId, place: Option<Place>) {
        let before = match place {
            Some(place) => self.places.insert(id, place),
            None => self.places.remove(&id),
        };
        let (before, after) = (before.unwrap_or_default(), place.unwrap_or_default());
        if before.wake != after.wake {
            before.wake.map(|at| self.wakes.remove(&(at, id)));
            after.wake.map(|at| self.wakes.insert((at, id)));
        }
        self.live = self.live + usize::from(after.live) - usize::from(before.live);
    }
}

impl Patience {
    /// When time alone changes something for the transfer.
    fn wake(self, run: &Run) -> Option<Instant> {
        match &run.phase {
            Phase::Ending(ending) if ending.own_settled => Some(ending.peer_deadline(self.peer_wait)),
            Phase::Ending(ending) if ending.told_unsettled => None,
            Phase::Ending(ending) => Some(ending.since + self.settle),
            Phase::Waiting { .. } | Phase::Moving => {
                Some(run.not_before.map_or(run.deadline(), |at| at.min(run.deadline())))
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Transfers that were answered UNSETTLED, until their end is known.
//!
//! The daemon tells the end while it lives. Once it is gone its successor knows nothing of them; then the proof
//! that it is gone is their end: whoever could touch our memory for them does not exist any more.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::{
    Outcome, Report, TransferId,
    lease::{Lease, Verdict},
};

/// Transfers that wait for their end; one more has to be asked about with `wait`.
const MOST: usize = 65_536;
/// Ends remembered for those who ask later.
const MOST_ENDED: usize = 4096;

/// The lock is held for single steps, and while leases of the waiting are looked at.
#[derive(Debug, Default)]
pub(crate) struct Unsettled {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By the id that the daemon knows, under the lease that carried it.
    waiting: HashMap<TransferId, Arc<Lease>>,
    /// By the id that the caller knows.
    ended: VecDeque<(TransferId, Report)>,
}

impl Unsettled {
    /// The report of a transfer that the lease's daemon knew as `id`. An UNSETTLED one is remembered, unless the
    /// proof is there by now: then this is how it ended. Of any other this was the end.
    pub(crate) fn note(&self, id: TransferId, lease: &Arc<Lease>, report: Report) -> Report {
        let mut state = self.lock();
        if report.outcome != Outcome::Unsettled {
            // It may have waited: this is its one end, and it gets no other when its daemon goes.
            state.waiting.remove(&id);
            return report;
        }
        // Under the lock: whoever settles what waits has the proof before it looks here.
        if lease.standing() == Verdict::Exited {
            return Report {
                slices: report.slices,
                bytes: report.bytes,
                ..Verdict::Exited.report(report.id)
            };
        }
        if state.waiting.len() < MOST {
            state.waiting.insert(id, lease.clone());
        }
        drop(state);
        self.news.notify_one();
        report
    }

    /// The daemon told its end.
    pub(crate) fn forget(&self, id: TransferId) {
        self.lock().waiting.remove(&id);
    }

    /// Returns when the end of some transfer can only come from the end of its daemon.
    pub(crate) async fn orphaned(&self) {
        while !self.lock().waiting.values().any(|lease| lease.ending().is_some()) {
            self.news.notified().await;
        }
    }

    /// A lease has ended: to be looked at again.
    pub(crate) fn look(&self) {
        self.news.notify_one();
    }

    /// Takes those whose daemon is proven gone.
    pub(crate) fn take_settled(&self) -> Vec<TransferId> {
        let gone = |lease: &Lease| lease.ending().is_some() && lease.standing() == Verdict::Exited;
        self.lock().waiting.extract_if(|_, lease| gone(lease)).map(|(id, _)| id).collect()
    }

    /// Remembers an end that no daemon can be asked about.
    pub(crate) fn ended(&self, report: Report) {
        let mut state = self.lock();
        if state.ended.len() == MOST_ENDED {
            state.ended.pop_front();
        }
        state.ended.push_back((report.id, report));
    }

    /// How a transfer ended, by the caller's id.
    pub(crate) fn end_of(&self, id: TransferId) -> Option<Report> {
        self.lock().ended.iter().rev().find(|(ended, _)| *ended == id).map(|(_, report)| report.clone())
    }

    /// The lease that carried a transfer, if it has ended before the transfer did.
    pub(crate) fn lost_with(&self, id: TransferId) -> Option<Arc<Lease>> {
        self.lock().waiting.get(&id).filter(|lease| lease.ending().is_some()).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Failure, Reason, lease::tests::lease};

    #[test]
    fn a_transfer_ends_once() {
        let (unsettled, lease, id) = (Unsettled::default(), lease(0), TransferId([1; 16]));
        let report = |outcome| Report::untold(id, outcome, Failure::new(Reason::Cancelled, ""));
        for outcome in [Outcome::Done, Outcome::Failed, Outcome::Cancelled] {
            unsettled.note(id, &lease, report(Outcome::Unsettled));
            assert!(unsettled.lock().waiting.contains_key(&id));
            assert_eq!(unsettled.note(id, &lease, report(outcome)).outcome, outcome);
            assert!(unsettled.lock().waiting.is_empty(), "{outcome:?} would be followed by another end");
        }
    }
}

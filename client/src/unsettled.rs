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

/// What is known of a transfer without asking a daemon.
#[derive(Debug)]
pub(crate) enum Known {
    /// How it ended.
    Ended(Report),
    /// The lease that carried it ended before it did.
    Lost(Arc<Lease>),
    /// It is the daemon's to tell.
    Nothing,
}

impl State {
    fn remember(&mut self, report: Report) {
        if self.ended.len() == MOST_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back((report.id, report));
    }
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

    /// Those whose daemon is proven gone have ended by that: `report` makes the end of each, of the id that the daemon
    /// knew. In one step, so that whoever asks meanwhile finds a transfer waiting, or ended.
    pub(crate) fn settle(&self, report: impl Fn(TransferId) -> Report) -> Vec<Report> {
        let gone = |lease: &Lease| lease.ending().is_some() && lease.standing() == Verdict::Exited;
        let mut state = self.lock();
        let settled: Vec<Report> =
            state.waiting.extract_if(|_, lease| gone(lease)).map(|(id, _)| report(id)).collect();
        settled.iter().for_each(|report| state.remember(report.clone()));
        settled
    }

    /// Remembers an end that no daemon can be asked about.
    pub(crate) fn ended(&self, report: Report) {
        self.lock().remember(report);
    }

    /// Submitted once more under an id of the caller's own: how it ended before is not how it ends now.
    pub(crate) fn begins_again(&self, id: TransferId) {
        self.lock().ended.retain(|(ended, _)| *ended != id);
    }

    /// What is known here of a transfer, by the caller's id and by the one that the daemon knows.
    pub(crate) fn find(&self, id: TransferId, current: TransferId) -> Known {
        let state = self.lock();
        if let Some((_, report)) = state.ended.iter().rev().find(|(ended, _)| *ended == id) {
            return Known::Ended(report.clone());
        }
        match state.waiting.get(&current).filter(|lease| lease.ending().is_some()) {
            Some(lease) => Known::Lost(lease.clone()),
            None => Known::Nothing,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;
    use crate::{
        Failure, Reason,
        lease::{
            Ending,
            tests::{lease, lost},
        },
    };

    /// Whoever waits for a transfer whose daemon goes is never told that there is no such transfer.
    #[test]
    fn a_transfer_that_ends_with_its_daemon_is_known_all_along() {
        let (unsettled, id) = (Unsettled::default(), TransferId([1; 16]));
        let (end, lease) = lost(0);
        unsettled.note(
            id,
            &lease,
            Report::untold(id, Outcome::Unsettled, Failure::new(Reason::Deadline, "")),
        );
        assert!(matches!(unsettled.find(id, id), Known::Nothing), "its daemon lives");
        end.send_replace(Some(Ending { cause: String::new(), silent: false }));
        std::thread::scope(|scope| {
            let settling = scope.spawn(|| {
                assert!(unsettled.settle(|id| Verdict::Exited.report(id)).is_empty(), "nothing is proven");
                lease.released.store(true, SeqCst);
                unsettled.settle(|id| Verdict::Exited.report(id)).len()
            });
            while !settling.is_finished() {
                assert!(!matches!(unsettled.find(id, id), Known::Nothing));
            }
            assert_eq!(settling.join().unwrap(), 1);
        });
        assert!(matches!(unsettled.find(id, id), Known::Ended(report) if report.outcome == Outcome::Failed));
    }

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

//! What is under way for an engine and what ended: a transfer id never runs twice.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::domain::{Failure, Outcome, PeerHalf, Reason, Report, TransferId};

/// The newest word on a transfer: nothing yet, UNSETTLED, or its end.
pub type Verdict = watch::Receiver<Option<Report>>;

/// Where the session that carries a transfer tells how it stands.
#[derive(Debug)]
pub struct Teller {
    id: TransferId,
    log: Arc<TransferLog>,
    verdict: Arc<watch::Sender<Option<Report>>>,
    over: bool,
}

/// The transfers of one engine. A lock, because calls from any thread look ids up; held for map steps only.
#[derive(Debug)]
pub struct TransferLog {
    limits: LogLimits,
    entries: Mutex<Entries>,
}

/// How much is remembered.
#[derive(Clone, Copy, Debug)]
pub struct LogLimits {
    /// Transfers under way at once.
    pub active: usize,
    /// Ended transfers whose report can still be asked for.
    pub finished: usize,
}

#[derive(Debug, Default)]
struct Entries {
    known: HashMap<TransferId, Arc<watch::Sender<Option<Report>>>>,
    finished: VecDeque<TransferId>,
}

/// What became of an admission.
#[derive(Debug)]
pub enum Admission {
    /// A new transfer: run it and tell.
    New(Teller, Verdict),
    /// The id is known: this is the same transfer, to be waited for.
    Known(Verdict),
}

impl TransferLog {
    /// An empty log.
    pub fn new(limits: LogLimits) -> Arc<Self> {
        Arc::new(Self { limits, entries: Mutex::default() })
    }

    /// Joins the transfer with this id, or begins it.
    pub fn admit(self: &Arc<Self>, id: TransferId) -> Result<Admission, Failure> {
        let mut entries = self.entries();
        if let Some(verdict) = entries.known.get(&id) {
            return Ok(Admission::Known(verdict.subscribe()));
        }
        if entries.known.len() - entries.finished.len() >= self.limits.active {
            let message = format!("{} transfers are under way (limits.transfers)", self.limits.active);
            return Err(Failure::new(Reason::Limit, message));
        }
        let (sender, verdict) = watch::channel(None);
        let sender = Arc::new(sender);
        entries.known.insert(id, sender.clone());
        Ok(Admission::New(Teller { id, log: self.clone(), verdict: sender, over: false }, verdict))
    }

    /// The transfer with this id, while it is remembered.
    pub fn find(&self, id: TransferId) -> Option<Verdict> {
        self.entries().known.get(&id).map(|verdict| verdict.subscribe())
    }

    /// Transfers under way.
    pub fn active(&self) -> usize {
        let entries = self.entries();
        entries.known.len() - entries.finished.len()
    }

    /// Not over, and it may take long: whoever waits is answered UNSETTLED meanwhile.
    pub fn unsettled(&self, id: TransferId, report: Report) {
        if let Some(verdict) = self.entries().known.get(&id) {
            verdict.send_replace(Some(report));
        }
    }

    fn finish(&self, id: TransferId) {
        let mut entries = self.entries();
        entries.finished.push_back(id);
        if entries.finished.len() > self.limits.finished
            && let Some(oldest) = entries.finished.pop_front()
        {
            entries.known.remove(&oldest);
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Teller {
    /// Which transfer.
    pub fn id(&self) -> TransferId {
        self.id
    }

    /// Over. Returns whether UNSETTLED was told before, so that somebody may have stopped waiting.
    pub fn end(mut self, report: Report) -> bool {
        debug_assert_ne!(report.outcome, Outcome::Unsettled);
        self.over = true;
        let told = self.verdict.send_replace(Some(report)).is_some();
        self.log.finish(self.id);
        told
    }
}

impl Drop for Teller {
    /// A session that died with the transfer in its hands has proven nothing: whoever waits hears UNSETTLED.
    fn drop(&mut self) {
        if !self.over {
            let failure =
                Failure::new(Reason::Unspecified, "the session that carried the transfer broke down");
            let refused = Report::refused(self.id, failure);
            let unsettled =
                Report { outcome: Outcome::Unsettled, peer_half: PeerHalf::Unconfirmed, ..refused };
            self.verdict.send_replace(Some(unsettled));
            self.log.finish(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Timings;

    fn report(id: TransferId, outcome: Outcome) -> Report {
        Report {
            transfer: id,
            outcome,
            peer_half: PeerHalf::Confirmed,
            failure: None,
            slices: 0,
            slices_done: 0,
            bytes: 0,
            bytes_done: 0,
            bytes_resent: 0,
            attempts: 1,
            path: None,
            timings: Timings::default(),
        }
    }

    fn begin(log: &Arc<TransferLog>, id: u8) -> (Teller, Verdict) {
        match log.admit(TransferId([id; 16])).expect("there is room") {
            Admission::New(teller, verdict) => (teller, verdict),
            Admission::Known(_) => panic!("{id} is new"),
        }
    }

    #[test]
    fn an_id_runs_once_and_is_remembered() {
        let log = TransferLog::new(LogLimits { active: 2, finished: 1 });
        let (teller, verdict) = begin(&log, 1);
        assert!(matches!(log.admit(TransferId([1; 16])), Ok(Admission::Known(_))));
        teller.end(report(TransferId([1; 16]), Outcome::Done));
        assert_eq!(verdict.borrow().as_ref().map(|r| r.outcome), Some(Outcome::Done));
        assert!(matches!(log.admit(TransferId([1; 16])), Ok(Admission::Known(_))));
        assert_eq!(log.active(), 0);
    }

    #[test]
    fn whoever_waits_for_a_session_that_broke_down_hears_unsettled() {
        let log = TransferLog::new(LogLimits { active: 1, finished: 1 });
        let (teller, verdict) = begin(&log, 1);
        drop(teller);
        assert_eq!(verdict.borrow().as_ref().map(|r| r.outcome), Some(Outcome::Unsettled));
        assert_eq!(log.active(), 0);
    }

    #[test]
    fn both_limits_hold() {
        let log = TransferLog::new(LogLimits { active: 1, finished: 1 });
        let (first, _) = begin(&log, 1);
        let refused = log.admit(TransferId([2; 16])).expect_err("the log is full");
        assert_eq!(refused.reason, Reason::Limit);
        first.end(report(TransferId([1; 16]), Outcome::Done));
        begin(&log, 2).0.end(report(TransferId([2; 16]), Outcome::Done));
        assert!(log.find(TransferId([1; 16])).is_none());
        assert!(log.find(TransferId([2; 16])).is_some());
    }
}

//! One confirmed session: which lanes it has, and how far those that closed came.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use tokio::sync::Notify;

use crate::{
    domain::{Failure, Incarnation, LaneId},
    transport::{
        LaneRecord, TargetSink,
        tcp::{Pulse, Stops, TargetLane},
    },
};

/// Closed lanes of one session whose record is kept.
pub(super) const MAX_RECORDS: usize = 1024;

/// One confirmed session.
#[derive(Debug)]
pub struct InboundSession {
    pub(super) initiator: Incarnation,
    label: String,
    /// Payload on its lanes is summed.
    pub(super) checksums: bool,
    pub(super) stops: Arc<Stops>,
    pub(super) pulse: Arc<Pulse>,
    book: Mutex<Book>,
    /// A lane closed, or the session was superseded.
    changed: Notify,
    superseded: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct Book {
    pub(super) ended: bool,
    pub(super) live: BTreeMap<LaneId, LiveLane>,
    pub(super) closed: VecDeque<(LaneId, LaneRecord)>,
    /// Of earlier sessions, until the initiator has said Ready.
    pub(super) inherited: Vec<(LaneId, LaneRecord)>,
}

#[derive(Debug)]
pub(super) enum LiveLane {
    Granted,
    /// Its connection is on the way to a lane's owner; with the wish to close it, if there was one meanwhile.
    Attaching(Option<Failure>),
    Open(TargetLane),
}

impl InboundSession {
    pub(super) fn new(
        initiator: Incarnation,
        label: String,
        checksums: bool,
        inherited: Vec<(LaneId, LaneRecord)>,
    ) -> Arc<Self> {
        Arc::new(Self {
            initiator,
            label,
            checksums,
            stops: Stops::new(),
            pulse: Pulse::new(),
            book: Mutex::new(Book { inherited, ..Book::default() }),
            changed: Notify::new(),
            superseded: AtomicBool::new(false),
        })
    }

    /// Nothing of it can touch memory any more, and nobody serves it: where its handshake was not completed the
    /// table alone knows it.
    pub(super) fn is_over(known: &Arc<Self>) -> bool {
        let book = known.book();
        book.live.is_empty() && (book.ended || Arc::strong_count(known) == 1)
    }

    pub(super) fn supersede(&self) {
        self.superseded.store(true, SeqCst);
        self.changed.notify_waiters();
    }

    /// Transfers to be stopped on its lanes.
    pub fn stops(&self) -> &Arc<Stops> {
        &self.stops
    }

    /// Bytes heard on its lanes.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// The last part that is over on a lane, while it is open.
    pub fn progress(&self, lane: LaneId) -> Option<u64> {
        match self.book().live.get(&lane)? {
            LiveLane::Open(open) => Some(open.processed()),
            LiveLane::Granted | LiveLane::Attaching(_) => None,
        }
    }

    /// The initiator's own endpoint, as it said.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The initiator has heard what earlier sessions' lanes had processed.
    pub fn ready(&self) {
        self.book().inherited = Vec::new();
    }

    /// Resolves when another session of the initiator took this one's place, or the engine is gone.
    pub async fn superseded(&self) {
        self.until(|| self.superseded.load(SeqCst)).await;
    }

    pub(super) fn close(&self, which: impl Fn(LaneId) -> bool, cause: &Failure) {
        let mut book = self.book();
        let mut unused = Vec::new();
        for (lane, live) in book.live.iter_mut().filter(|(lane, _)| which(**lane)) {
            match live {
                LiveLane::Granted => unused.push(*lane),
                LiveLane::Attaching(wish) => *wish = Some(cause.clone()),
                LiveLane::Open(open) => open.close(cause.clone()),
            }
        }
        for lane in unused {
            book.bury(lane, LaneRecord::default());
            self.stops.forget(lane);
        }
    }

    pub(super) async fn closed(&self, which: impl Fn(LaneId) -> bool) {
        self.until(|| !self.book().live.keys().any(|lane| which(*lane))).await;
    }

    async fn until(&self, holds: impl Fn() -> bool) {
        loop {
            // Registered before the look, so that a change in between is not missed.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if holds() {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    /// A lane is over. Where it was the last one its place goes too: sessions are remembered for long, and most have
    /// ended.
    fn bury(&mut self, lane: LaneId, record: LaneRecord) {
        if self.live.remove(&lane).is_some() {
            self.record(lane, record);
        }
        if self.live.is_empty() {
            self.live = BTreeMap::new();
        }
    }

    fn record(&mut self, lane: LaneId, record: LaneRecord) {
        if self.closed.len() == MAX_RECORDS {
            self.closed.pop_front();
        }
        self.closed.push_back((lane, record));
    }
}

impl TargetSink for InboundSession {
    fn lane_closed(&self, lane: LaneId, record: LaneRecord, cause: Failure) {
        self.book().bury(lane, record);
        tracing::debug!(initiator = %self.initiator, lane = lane.0, %cause, "inbound lane closed");
        self.changed.notify_waiters();
    }
}

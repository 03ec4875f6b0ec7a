//! The last word of a lane.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use super::{LaneEvent, LaneRecord, LaneSink, TargetSink};
use crate::domain::{Failure, LaneId, Reason};

/// Tells, when it is dropped, that its lane touches nothing any more (I2).
///
/// A lane's owner keeps it in its last field, behind the socket and the seat, so that it is told once and
/// after everything else is gone, by whatever way the lane ends: a close, a lost connection, a thread that
/// panics, or a command that never reached a thread.
pub(super) struct Ending {
    lane: LaneId,
    listener: Listener,
    /// Why; where nobody said so, the owner itself went away.
    pub(super) cause: Option<Failure>,
    /// Lanes that the owner's thread serves.
    load: Option<Arc<AtomicUsize>>,
}

enum Listener {
    Initiator(Arc<dyn LaneSink>),
    Target(Arc<dyn TargetSink>, LaneRecord),
}

impl Ending {
    /// Of an initiator's lane.
    pub(super) fn initiator(lane: LaneId, sink: Arc<dyn LaneSink>) -> Self {
        Self { lane, listener: Listener::Initiator(sink), cause: None, load: None }
    }

    /// Of a target's lane.
    pub(super) fn target(lane: LaneId, sink: Arc<dyn TargetSink>) -> Self {
        Self { lane, listener: Listener::Target(sink, LaneRecord::default()), cause: None, load: None }
    }

    /// Counts the lane among those of a thread until it ends.
    pub(super) fn count(&mut self, load: &Arc<AtomicUsize>) {
        load.fetch_add(1, SeqCst);
        self.load = Some(load.clone());
    }

    /// Which lane.
    pub(super) fn lane(&self) -> LaneId {
        self.lane
    }

    /// What a target knows of its lane at the end.
    pub(super) fn set_record(&mut self, known: LaneRecord) {
        if let Listener::Target(_, record) = &mut self.listener {
            *record = known;
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(load) = &self.load {
            load.fetch_sub(1, SeqCst);
        }
        let gone = || Failure::new(Reason::ConnectionLost, "the lane's owner went away");
        let cause = self.cause.take().unwrap_or_else(gone);
        match &mut self.listener {
            Listener::Initiator(sink) => sink.lane_event(self.lane, LaneEvent::Closed { cause }),
            Listener::Target(sink, record) => sink.lane_closed(self.lane, std::mem::take(record), cause),
        }
    }
}

impl fmt::Debug for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ending").field("lane", &self.lane).field("cause", &self.cause).finish_non_exhaustive()
    }
}

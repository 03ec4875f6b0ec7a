//! The ways bytes travel, and the seam between them and the sessions above.
//!
//! A session hands [`Part`]s with rising sequence numbers to a lane and hears [`LaneEvent`]s from it. It never
//! blocks on a lane, and a lane never blocks on a session. A lane that closed never re-opens (I2): another one
//! with another id takes its place. No payload byte moves on an async worker: lanes live on OS threads.

mod ending;
pub mod local;
mod own;
mod part;
mod spin;
pub mod tcp;
#[cfg(test)]
mod testing;
mod touch;

use std::sync::Arc;

pub use part::{PART_BYTES, PART_RUNS, Part, PartBounds, Payload, Piece, RemoteRegion, Run};

use crate::domain::{Failure, LaneId, Op};

/// Which way a lane's payload flows. READ has lanes of its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum LaneKind {
    /// Initiator to target.
    Write,
    /// Target to initiator.
    Read,
}

impl LaneKind {
    /// The kind a direction uses.
    pub fn of(op: Op) -> Self {
        match op {
            Op::Write => Self::Write,
            Op::Read => Self::Read,
        }
    }

    /// The direction it serves.
    pub fn op(self) -> Op {
        match self {
            Self::Write => Op::Write,
            Self::Read => Op::Read,
        }
    }
}

/// A part with its place on a lane.
#[derive(Clone, Debug)]
pub struct SequencedPart {
    /// From 1, without gaps, in the order of submission.
    pub sequence: u64,
    /// The part.
    pub part: Part,
}

/// What an initiator's lane tells its session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LaneEvent {
    /// These parts are settled: applied at the destination and acknowledged, or, where their transfer was
    /// stopped or a [`LaneEvent::Refused`] came before, passed over.
    Processed {
        /// First sequence.
        from: u64,
        /// Last sequence, inclusive.
        through: u64,
    },
    /// The target would not apply the part; always told before the part is `Processed`.
    Refused {
        /// Which part.
        sequence: u64,
        /// Why; `index` is the slice descriptor within the part.
        failure: Failure,
    },
    /// The lane's owner has closed it: it touches nothing any more on this side. The last event of a lane.
    Closed {
        /// Why.
        cause: Failure,
    },
}

/// Where an initiator's lane tells its events. Called from lane threads: must not block.
pub trait LaneSink: Send + Sync + std::fmt::Debug {
    /// Takes an event of the lane.
    fn lane_event(&self, lane: LaneId, event: LaneEvent);
}

/// An initiator's end of an open lane.
#[derive(Debug)]
pub enum Lane {
    /// Copies within this node.
    Local(local::Lane),
    /// One TCP connection.
    Tcp(tcp::Lane),
}

impl Lane {
    /// Queues parts. The session keeps what is queued within its window, so this never blocks and never
    /// fails: on a closed lane the parts are dropped, and `Closed` says that they were not processed.
    pub fn submit(&self, parts: Vec<SequencedPart>) {
        match self {
            Self::Local(lane) => lane.submit(parts),
            Self::Tcp(lane) => lane.submit(parts),
        }
    }

    /// Asks the owner to close the lane; `Closed` with this cause follows, unless it was closed already.
    pub fn close(&self, cause: Failure) {
        match self {
            Self::Local(lane) => lane.close(cause),
            Self::Tcp(lane) => lane.close(cause),
        }
    }

    /// Payload bytes the lane has accepted or delivered so far; moves while parts are under way.
    pub fn moved(&self) -> u64 {
        match self {
            Self::Local(lane) => lane.moved(),
            Self::Tcp(lane) => lane.moved(),
        }
    }
}

/// What a target knows of a lane that its owner has closed (I2's confirmation).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LaneRecord {
    /// Every part up to and including this sequence was applied, refused or aborted.
    pub processed: u64,
    /// Those among them that were refused, as far back as the initiator may not have heard.
    pub refused: Vec<(u64, Failure)>,
}

/// Where a target's lane tells that it ended. Called from lane threads: must not block.
pub trait TargetSink: Send + Sync + std::fmt::Debug {
    /// The lane's owner has closed it: it touches the target's memory no more.
    fn lane_closed(&self, lane: LaneId, record: LaneRecord, cause: Failure);
}

/// Shared by all lanes that touch one target engine on behalf of one session.
pub type SharedTargetSink = Arc<dyn TargetSink>;

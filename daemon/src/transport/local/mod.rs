//! Copies between two engines of this node, by a bounded pool of threads.
//!
//! A lane's parts are chunks of at most 1 MiB. Workers take them from the lanes in turn, so a large transfer
//! delays a small one by a chunk, and several workers share one lane's parts, so acknowledgements come out of
//! order. While a worker copies it holds seats at the gates of both engines, and before it copies it looks at
//! the same rules that two TCP ends look at (I1, I4, I5). *Closed* is told when no chunk of the lane is in a
//! worker's hands any more; no chunk starts after the close. Lanes between engines of which one copies for itself have
//! a worker of their own (`transport/own.rs`).
//!
//! Deliberately absent: target-side stop marks. The transfer's own mark and the gates of both engines are on
//! this node, so whoever stops a transfer raises and awaits both.

mod chunk;
mod pool;
#[cfg(test)]
mod tests;

use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::{LaneKind, LaneSink, SequencedPart, ending::Ending, own::Owned};
use crate::{
    domain::{Failure, LaneId, Reason},
    memory::EngineMemory,
};
use pool::{OwnPool, Shared};

pub use pool::CopyPool;

/// A lane to be.
#[derive(Debug)]
pub struct LocalSetup {
    /// The lane's number.
    pub lane: LaneId,
    /// Which way its payload flows.
    pub kind: LaneKind,
    /// The initiator's memory.
    pub source: Arc<EngineMemory>,
    /// The target's memory; may be the same engine's.
    pub target: Arc<EngineMemory>,
    /// Where events go.
    pub sink: Arc<dyn LaneSink>,
}

/// A lane between two engines of this node. Letting go of it closes it.
#[derive(Debug)]
pub struct Lane {
    pool: Arc<Shared>,
    key: u64,
    line: Arc<pool::Line>,
    /// Keeps a thread of its own.
    _own: Option<Arc<Owned<OwnPool>>>,
}

impl CopyPool {
    /// Opens a lane.
    pub fn open(&self, setup: LocalSetup) -> Lane {
        let ending = Ending::initiator(setup.lane, setup.sink.clone());
        let (own, refused) = self.own(&setup);
        let pool = own.as_ref().map_or(self.shared(), |own| own.thread.shared()).clone();
        let (key, line) = pool.open(setup, ending);
        if let Some(error) = refused {
            pool.close(key, Failure::io(Reason::Limit, "starting a thread for the lane", &error));
        }
        Lane { pool, key, line, _own: own }
    }
}

impl Lane {
    /// Queues parts, whose sequences follow those of the call before.
    pub fn submit(&self, parts: Vec<SequencedPart>) {
        self.pool.submit(self.key, parts);
    }

    /// Asks for the end.
    pub fn close(&self, cause: Failure) {
        self.pool.close(self.key, cause);
    }

    /// Payload bytes copied.
    pub fn moved(&self) -> u64 {
        self.line.moved.load(Relaxed)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.close(Failure::new(Reason::ConnectionLost, "the lane was let go"));
    }
}

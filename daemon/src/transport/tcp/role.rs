//! What a lane's thread asks of a lane, whichever of the four it is.

use std::{
    collections::VecDeque,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    Pulse,
    wire::{Refusal, Violation, WINDOW_PARTS},
};
use crate::{
    domain::Failure,
    transport::{LaneRecord, SequencedPart},
};

/// Payload bytes after which a lane lets the others of its thread have a turn.
pub(super) const TURN_BYTES: u64 = 2 << 20;

/// Calls after which it does so too, so that a lane of tiny parts takes no longer.
pub(super) const TURN_CALLS: usize = 64;

/// What the socket is ready for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// What the lane waits for. Where it asks for what is there already, its next turn comes at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Interest {
    pub(super) read: bool,
    pub(super) write: bool,
}

/// Why a lane ends.
#[derive(Debug)]
pub(super) enum Ended {
    /// The connection or the engine is gone.
    Failed(Failure),
    /// The peer broke the protocol.
    Broken(Violation),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Violation> for Ended {
    fn from(violation: Violation) -> Self {
        Self::Broken(violation)
    }
}

/// A lane's work. An error ends the lane, and nothing else does.
pub(super) trait Role: Send {
    /// Does a bounded amount of it.
    fn turn(&mut self, socket: BorrowedFd<'_>, ready: Ready, room: &mut [u8]) -> Result<Interest, Ended>;

    /// Takes more parts; only initiators are given any.
    fn submit(&mut self, _parts: Vec<SequencedPart>) -> Result<(), Ended> {
        Ok(())
    }

    /// Looks at the rules although the socket does not move, so that leases of stopped parts are let go.
    fn review(&mut self) -> Result<(), Ended>;

    /// Whether parts, and with them leases, are held.
    fn holds_leases(&self) -> bool;

    /// What a target knows at the end.
    fn record(&self) -> LaneRecord {
        LaneRecord::default()
    }
}

/// What a turn may still do.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: u64,
    calls: usize,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { bytes: TURN_BYTES, calls: TURN_CALLS }
    }

    /// One call, which moved so much.
    pub(super) fn spend(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.calls = self.calls.saturating_sub(1);
    }

    pub(super) fn is_left(&self) -> bool {
        self.bytes > 0 && self.calls > 0
    }
}

/// What a lane counts while it moves.
#[derive(Debug)]
pub(super) struct Meter {
    pub(super) moved: Arc<AtomicU64>,
    pub(super) pulse: Arc<Pulse>,
}

impl Meter {
    /// Payload accepted by the socket or received from it.
    pub(super) fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Relaxed);
    }

    /// Bytes of any kind from the peer: a sign of life.
    pub(super) fn heard(&self, bytes: usize) {
        self.pulse.heard(bytes as u64);
    }
}

/// A target's memory of what it refused, as far back as the initiator may not have heard.
#[derive(Debug, Default)]
pub(super) struct Refusals(VecDeque<(u64, Refusal)>);

impl Refusals {
    pub(super) fn push(&mut self, sequence: u64, refusal: Refusal) {
        // The initiator has at most a window of parts in flight: it has heard of everything before.
        while self.0.front().is_some_and(|(old, _)| old + WINDOW_PARTS <= sequence) {
            self.0.pop_front();
        }
        self.0.push_back((sequence, refusal));
    }

    pub(super) fn record(&self, processed: u64) -> LaneRecord {
        let told = |&(sequence, refusal): &(u64, Refusal)| (sequence, Failure::from(refusal));
        LaneRecord { processed, refused: self.0.iter().map(told).collect() }
    }
}

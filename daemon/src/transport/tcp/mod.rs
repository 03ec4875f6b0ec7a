//! TCP lanes: KV slices between nodes without RDMA, straight between engine memory and socket.
//!
//! ```text
//!  session --submit--> inbox --> carrier thread: epoll --> turn of a lane
//!                                                            |  fence: enter, look at the rules if they changed
//!                                                            |  one sendmsg / recvmsg over up to 1022 runs
//!                                                            v
//!                                                         sink: Processed, Refused, Closed
//! ```
//!
//! One connection is one lane, write or read. Its four ends are [`write_source`], [`write_target`],
//! [`read_sink`] and [`read_server`], made of the same halves ([`frames`]) around the same [`body`]. What they
//! say to each other is in [`wire`].
//!
//! - I1, I2: engine memory is touched only inside the [`fence`], one non-blocking call at a time; a lane tells
//!   its end once, when socket and seat are gone, and never re-opens.
//! - I4, I5: a target checks a whole part before it receives or sends a byte of it ([`admission`]).
//! - I6: spans handed to the kernel carry the leases of their regions ([`io`]).
//! - I8: queues are bounded by the session's window and [`wire::WINDOW_PARTS`].
//!
//! Deliberately absent: retry (a lane only says what was processed), encryption, io_uring, MSG_ZEROCOPY, and
//! the acceptance of connections (the endpoint reads the [`Preface`] and judges its token).

mod admission;
mod body;
mod by_hand;
mod carrier;
mod fence;
mod frames;
mod inbox;
mod initiator;
mod io;
mod read_server;
mod read_sink;
mod role;
mod stops;
#[cfg(test)]
mod tests;
mod threads;
mod wire;
mod write_source;
mod write_target;

use std::{
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;

pub use by_hand::HandCarrier;
pub use stops::Stops;
pub use wire::{PREFACE_BYTES, Preface, Violation, WINDOW_PARTS};

use self::{
    inbox::{Command, NewLane},
    read_server::ReadServer,
    read_sink::ReadSink,
    role::{Meter, Role},
    stops::LaneStops,
    threads::{Berth, Threads},
    write_source::WriteSource,
    write_target::WriteTarget,
};
use super::{LaneKind, LaneSink, SequencedPart, TargetSink, ending::Ending};
use crate::{
    domain::{Failure, LaneId, Reason},
    memory::EngineMemory,
};

/// What was heard from a peer, over all lanes of a session: life (I9).
#[derive(Debug)]
pub struct Pulse {
    bytes: AtomicU64,
    begun: Instant,
    /// When the last of them came, in nanoseconds after the begin; 0: none came.
    last: AtomicU64,
}

impl Pulse {
    /// Nothing heard yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { bytes: AtomicU64::new(0), begun: Instant::now(), last: AtomicU64::new(0) })
    }

    /// Bytes so far. As long as it rises the peer lives.
    pub fn total(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// When the last of them came.
    pub fn last(&self) -> Option<Instant> {
        let last = self.last.load(Relaxed);
        (last > 0).then(|| self.begun + Duration::from_nanos(last))
    }

    fn heard(&self, bytes: u64) {
        if bytes > 0 {
            self.bytes.fetch_add(bytes, Relaxed);
            let now = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            // Threads may come a moment apart, and in the other order: the latest counts.
            self.last.fetch_max(now.max(1), Relaxed);
        }
    }
}

/// An initiator's end to be.
#[derive(Debug)]
pub struct InitiatorSetup {
    /// The lane's number.
    pub lane: LaneId,
    /// Which way its payload flows.
    pub kind: LaneKind,
    /// The engine whose memory the parts name as local.
    pub memory: Arc<EngineMemory>,
    /// Where events go.
    pub sink: Arc<dyn LaneSink>,
    /// The session's.
    pub pulse: Arc<Pulse>,
    /// Payload is summed: agreed on when the session was opened.
    pub checksums: bool,
}

/// A target's end to be.
#[derive(Debug)]
pub struct TargetSetup {
    /// The lane's number.
    pub lane: LaneId,
    /// Which way its payload flows.
    pub kind: LaneKind,
    /// The engine whose memory the parts name as the target's.
    pub memory: Arc<EngineMemory>,
    /// The session's stop marks.
    pub stops: Arc<Stops>,
    /// Where the end is told.
    pub sink: Arc<dyn TargetSink>,
    /// The session's.
    pub pulse: Arc<Pulse>,
    /// Payload is summed: agreed on when the session was opened.
    pub checksums: bool,
}

/// The threads that carry TCP lanes. Dropped, it closes every lane with `Draining` and waits for the threads.
#[derive(Debug)]
pub struct Carriers {
    threads: Threads,
    next_key: AtomicU64,
}

impl Carriers {
    /// Starts so many threads, named `lane-0` and up; at least one. While work is dense they look for more of
    /// it for up to `spin` before they sleep.
    pub fn start(threads: usize, spin: Duration) -> std::io::Result<Self> {
        Self::counting(threads, spin, &Counter::default())
    }

    /// The same, and parts whose payload arrived changed are counted.
    pub fn counting(threads: usize, spin: Duration, damaged: &Counter) -> std::io::Result<Self> {
        Ok(Self { threads: Threads::start(threads, spin, damaged)?, next_key: AtomicU64::new(1) })
    }

    /// Lanes without a thread: whoever holds the other half gives them their turns, and the same calls always
    /// have the same effects in the same order.
    pub fn by_hand() -> std::io::Result<(Self, HandCarrier)> {
        let (threads, hand) = Threads::by_hand()?;
        Ok((Self { threads, next_key: AtomicU64::new(1) }, hand))
    }

    /// Lanes that are carried now.
    pub fn lanes(&self) -> usize {
        self.threads.lanes()
    }

    /// Takes over an initiator's connection, whose preface has been written.
    pub fn initiate(&self, stream: TcpStream, setup: InitiatorSetup) -> Lane {
        let moved = Arc::new(AtomicU64::new(0));
        let meter = Meter { moved: moved.clone(), pulse: setup.pulse.clone() };
        let (memory, ending) = (setup.memory.clone(), Ending::initiator(setup.lane, setup.sink.clone()));
        let role: Box<dyn Role> = match setup.kind {
            LaneKind::Write => Box::new(WriteSource::new(setup, meter)),
            LaneKind::Read => Box::new(ReadSink::new(setup, meter)),
        };
        Lane { held: self.carry(stream, &memory, role, ending), moved }
    }

    /// Takes over a target's connection, whose preface has been read and judged.
    pub fn serve(&self, stream: TcpStream, setup: TargetSetup) -> TargetLane {
        let moved = Arc::new(AtomicU64::new(0));
        let meter = Meter { moved: moved.clone(), pulse: setup.pulse.clone() };
        let stops = LaneStops::new(setup.stops.clone(), setup.lane);
        let processed = stops.progress();
        let (memory, ending) = (setup.memory.clone(), Ending::target(setup.lane, setup.sink.clone()));
        let role: Box<dyn Role> = match setup.kind {
            LaneKind::Write => Box::new(WriteTarget::new(setup, stops, meter)),
            LaneKind::Read => Box::new(ReadServer::new(setup, stops, meter)),
        };
        TargetLane { held: self.carry(stream, &memory, role, ending), moved, processed }
    }

    /// False once a thread has died: its lanes are closed and the process should not go on for long.
    pub fn is_healthy(&self) -> bool {
        self.threads.are_alive()
    }

    fn carry(
        &self,
        socket: TcpStream,
        memory: &Arc<EngineMemory>,
        role: Box<dyn Role>,
        mut ending: Ending,
    ) -> Held {
        let (berth, refused) = self.threads.berth(memory);
        ending.count(&berth.load);
        let key = self.next_key.fetch_add(1, Relaxed);
        berth.inbox.push(Command::Add(Box::new(NewLane { key, socket, role, ending })));
        let held = Held { key, berth, closed: AtomicBool::new(false) };
        if let Some(error) = refused {
            held.close(Failure::io(Reason::Limit, "starting a thread for the lane", &error));
        }
        held
    }
}

/// A lane as seen from outside its thread. Letting go of it closes the lane.
#[derive(Debug)]
struct Held {
    key: u64,
    berth: Berth,
    /// Asked once, which bounds the inbox.
    closed: AtomicBool,
}

impl Held {
    fn close(&self, cause: Failure) {
        if !self.closed.swap(true, SeqCst) {
            self.berth.inbox.push(Command::Close(self.key, cause));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.close(Failure::new(Reason::ConnectionLost, "the lane was let go"));
    }
}

/// An initiator's end.
#[derive(Debug)]
pub struct Lane {
    held: Held,
    moved: Arc<AtomicU64>,
}

impl Lane {
    /// Queues parts, whose sequences follow those of the call before.
    pub fn submit(&self, parts: Vec<SequencedPart>) {
        if !parts.is_empty() {
            self.held.berth.inbox.push(Command::Submit(self.held.key, parts));
        }
    }

    /// Asks for the end.
    pub fn close(&self, cause: Failure) {
        self.held.close(cause);
    }

    /// Payload bytes the socket has taken or given.
    pub fn moved(&self) -> u64 {
        self.moved.load(Relaxed)
    }
}

/// A target's end.
#[derive(Debug)]
pub struct TargetLane {
    held: Held,
    moved: Arc<AtomicU64>,
    processed: Arc<AtomicU64>,
}

impl TargetLane {
    /// Asks for the end.
    pub fn close(&self, cause: Failure) {
        self.held.close(cause);
    }

    /// Every part up to this sequence was applied, refused or aborted.
    pub fn processed(&self) -> u64 {
        self.processed.load(SeqCst)
    }

    /// Payload bytes the socket has taken or given.
    pub fn moved(&self) -> u64 {
        self.moved.load(Relaxed)
    }
}

//! Client library of kvferry: attach an engine process to its node's daemon, register memory once, move slices.
//!
//! SKELETON: signatures are agreed, bodies follow.
#![allow(missing_docs, unused)]

use std::{ops::Range, path::PathBuf, sync::mpsc, time::Duration};

pub use kvferry_proto::types::v1::{MemoryKind, Op, Path, Reason, SessionState};

/// How to attach. `Default` takes the socket from `KVFERRY_SOCKET`, else `/run/kvferry/engine.sock`, and the
/// policy from `SGLANG_DISAGG_*` where set.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    pub socket: PathBuf,
    pub name: String,
    pub policy: Policy,
    /// Allowed paths in order of preference; empty: the daemon's configuration.
    pub transports: Vec<Path>,
    pub advertise_host: Option<String>,
    pub preferred_port: Option<u16>,
    pub attach_timeout: Duration,
}

/// Unset fields fall back to the daemon's configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    pub attempts: Option<u32>,
    pub backoff: Option<Duration>,
    pub failure_threshold: Option<u32>,
    pub deadline: Option<Duration>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        unimplemented!()
    }
}

/// Everything that can go wrong in a call. `Refused` carries the daemon's typed failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No daemon at the socket: names the path tried and the fix.
    #[error("no kvferry daemon answers at {path}: {cause}; start kvferryd or set KVFERRY_SOCKET")]
    NoDaemon { path: PathBuf, cause: String },
    #[error("{0}")]
    Refused(Failure),
    /// The call itself failed (gRPC status that carries no reason).
    #[error("the daemon could not carry out {call}: {message}")]
    Call { call: &'static str, message: String },
    #[error("{doing}: {source}")]
    System { doing: &'static str, source: std::io::Error },
    /// The handle was inherited over fork.
    #[error("this engine was attached by process {owner}; a forked child must attach for itself")]
    Forked { owner: u32 },
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub reason: Reason,
    pub code: i32,
    pub message: String,
    pub index: Option<u64>,
    pub retryable: bool,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.reason, self.message)
    }
}

/// 16 bytes minted by this library, unique per engine.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TransferId(pub [u8; 16]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub id: u32,
    pub generation: u32,
    pub base: u64,
    pub length: u64,
    pub kind: MemoryKind,
}

/// A sealed memfd, mapped here and touched; register it and the daemon reaches it without a copy.
#[derive(Debug)]
pub struct SharedBuffer {}

impl SharedBuffer {
    pub fn new(length: usize) -> Result<Self, Error> {
        unimplemented!()
    }
    pub fn address(&self) -> u64 {
        unimplemented!()
    }
    pub fn len(&self) -> usize {
        unimplemented!()
    }
    /// Others (the daemon, and through it peers) may write at any time: use while no transfer touches it.
    pub fn as_slice(&self) -> &[u8] {
        unimplemented!()
    }
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        unimplemented!()
    }
    pub fn as_ptr(&self) -> *mut u8 {
        unimplemented!()
    }
}

/// What to register.
#[derive(Debug)]
pub enum Memory<'a> {
    Shared(&'a SharedBuffer),
    /// Plain memory of this process. Stays the caller's to keep alive until unregistered.
    Process {
        address: u64,
        length: u64,
    },
}

/// Packed slices: addresses in the two engines' own address spaces.
#[derive(Clone, Debug, Default)]
pub struct Slices {
    pub local: Vec<u64>,
    pub remote: Vec<u64>,
    pub lengths: Lengths,
}

#[derive(Clone, Debug)]
pub enum Lengths {
    Uniform(u64),
    Each(Vec<u64>),
}

impl Default for Lengths {
    fn default() -> Self {
        Self::Each(Vec::new())
    }
}

#[derive(Clone, Debug)]
pub struct Transfer {
    pub session: String,
    pub op: Op,
    pub slices: Slices,
    pub tag: Option<[u8; 16]>,
    pub deadline: Option<Duration>,
    pub policy: Policy,
    /// None: minted.
    pub id: Option<TransferId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed,
    Cancelled,
    Unsettled,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub id: TransferId,
    pub outcome: Outcome,
    pub peer_confirmed: bool,
    pub failure: Option<Failure>,
    pub slices: u64,
    pub slices_done: u64,
    pub bytes: u64,
    pub bytes_done: u64,
    pub bytes_resent: u64,
    pub attempts: u32,
    pub path: Option<Path>,
    pub queued: Duration,
    pub moving: Duration,
    pub settling: Duration,
    pub total: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    Settled,
    Unsettled,
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub slices: u64,
    pub chunk_slices: u64,
    pub regions: u64,
    pub transfers: u64,
}

#[derive(Clone, Debug)]
pub struct Probe {
    pub alive: bool,
    pub failure: Option<Failure>,
    pub path: Option<Path>,
    pub round_trip: Duration,
}

#[derive(Clone, Debug)]
pub enum Event {
    SessionChanged {
        session: String,
        state: SessionState,
        cause: Option<Failure>,
    },
    TransferSettled(Report),
    RegionInvalidated {
        region: u32,
        cause: Option<Failure>,
    },
    Draining {
        grace: Duration,
    },
    /// The lease ended: the daemon is gone or dropped us.
    Detached {
        cause: String,
    },
}

/// An attached engine. Clones share the attachment; it ends when the last one is dropped.
/// All methods block the calling thread and may be called from any thread, any number at a time.
#[derive(Clone, Debug)]
pub struct Engine {}

impl Engine {
    pub fn attach(options: EngineOptions) -> Result<Self, Error> {
        unimplemented!()
    }
    /// `host:port`: what peers put into [`Transfer::session`].
    pub fn session_id(&self) -> &str {
        unimplemented!()
    }
    pub fn engine_id(&self) -> u64 {
        unimplemented!()
    }
    pub fn boot_id(&self) -> [u8; 16] {
        unimplemented!()
    }
    pub fn daemon_pid(&self) -> u32 {
        unimplemented!()
    }
    pub fn limits(&self) -> &Limits {
        unimplemented!()
    }
    /// All or nothing. Regions in the order given.
    pub fn register(&self, memory: &[Memory<'_>]) -> Result<Vec<Region>, Error> {
        unimplemented!()
    }
    pub fn unregister(&self, regions: &[u32]) -> Result<Settlement, Error> {
        unimplemented!()
    }
    /// Blocks until the transfer is over (or UNSETTLED).
    pub fn transfer(&self, transfer: Transfer) -> Result<Report, Error> {
        unimplemented!()
    }
    /// Starts it on the background thread.
    pub fn submit(&self, transfer: Transfer) -> Result<Pending, Error> {
        unimplemented!()
    }
    pub fn wait(&self, id: TransferId, timeout: Duration) -> Result<Report, Error> {
        unimplemented!()
    }
    pub fn cancel(&self, id: TransferId) -> Result<Settlement, Error> {
        unimplemented!()
    }
    pub fn probe(&self, session: &str, timeout: Duration) -> Result<Probe, Error> {
        unimplemented!()
    }
    pub fn reset_session(&self, session: &str) -> Result<(), Error> {
        unimplemented!()
    }
    /// A bounded stream of events (1024; older ones are dropped and counted).
    pub fn events(&self) -> mpsc::Receiver<Event> {
        unimplemented!()
    }
}

/// A transfer under way. Dropping it does not cancel.
#[derive(Debug)]
pub struct Pending {}

impl Pending {
    pub fn id(&self) -> TransferId {
        unimplemented!()
    }
    pub fn wait(self) -> Result<Report, Error> {
        unimplemented!()
    }
}

/// Read-only questions to a daemon, no attachment needed: what `kvferry status` shows.
#[derive(Debug)]
pub struct Node {}

impl Node {
    pub fn connect(socket: &std::path::Path) -> Result<Self, Error> {
        unimplemented!()
    }
    pub fn info(&self) -> Result<kvferry_proto::engine::v1::NodeInfo, Error> {
        unimplemented!()
    }
    pub fn engines(&self) -> Result<Vec<kvferry_proto::engine::v1::EngineInfo>, Error> {
        unimplemented!()
    }
    pub fn sessions(&self) -> Result<Vec<kvferry_proto::engine::v1::SessionInfo>, Error> {
        unimplemented!()
    }
}

impl std::fmt::Debug for TransferId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

//! What the sessions of one engine work with.

use std::{fmt::Debug, sync::Arc, time::Duration};

use ed25519_dalek::SigningKey;

use super::Resolver;
use crate::{
    domain::{BootId, Failure, Incarnation, PathKind, Report, SessionId, TransferId},
    memory::EngineMemory,
    session::{outbound::State, secret::Secret},
    telemetry::Metrics,
    transport::{local::CopyPool, tcp::Carriers},
};

/// The beat of a control stream.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// From one beat to the next.
    pub heartbeat: Duration,
    /// Without life for this long a peer is dead, stopped or unreachable.
    pub silence: Duration,
}

/// The engines attached to this daemon, for the local path.
pub trait Neighbours: Send + Sync + Debug {
    /// The memory of the engine with this incarnation, while it is attached here.
    fn memory_of(&self, who: &Incarnation) -> Option<Arc<EngineMemory>>;
}

/// Where sessions tell what concerns the engine.
pub trait Outcomes: Send + Sync + Debug {
    /// A transfer must end, but its end is not proven yet.
    fn unsettled(&self, transfer: TransferId, report: Report);
    /// A transfer that was told to be unsettled is over.
    fn settled(&self, report: Report);
    /// A session changed its state, or whom it is pinned to.
    fn session_changed(
        &self,
        session: &SessionId,
        state: State,
        pin: Option<Incarnation>,
        cause: Option<Failure>,
    );
}

/// What every outbound session of an engine shares.
#[derive(Debug)]
pub struct Context {
    /// This daemon's run.
    pub boot: BootId,
    /// The engine's key: proves who opens.
    pub key: SigningKey,
    /// The engine's own endpoint.
    pub own: SessionId,
    /// The engine's memory.
    pub memory: Arc<EngineMemory>,
    /// Paths the engine and the daemon allow, best first.
    pub allowed: Vec<PathKind>,
    /// Payload on tcp is to be summed, where the target can.
    pub checksum: bool,
    /// What peers' daemons must know too, if anything.
    pub secret: Option<Secret>,
    /// Beats.
    pub timing: Timing,
    /// Most slices of a transfer, after expansion of pages.
    pub limit_slices: u64,
    /// Finds peers' addresses; one for all engines.
    pub resolver: Arc<Resolver>,
    /// Owners of TCP lanes.
    pub carriers: Arc<Carriers>,
    /// Workers of the local path.
    pub copies: Arc<CopyPool>,
    /// Who else is here.
    pub neighbours: Arc<dyn Neighbours>,
    /// Who is told.
    pub outcomes: Arc<dyn Outcomes>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

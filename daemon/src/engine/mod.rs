//! Attached engines: what each owns, how it comes, what it may ask for, and how it goes.
//!
//! An [`Engine`] lives as long as its lease: the attach stream and the process, whichever ends first (I10).
//! It owns its memory, its endpoint, its sessions and the log of its transfers; the [`Node`] owns the engines.

mod attach;
mod calls;
mod events;
mod node;
mod outcomes;
mod rails;
mod request;
mod revoke;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tokio::{sync::watch, task::JoinSet};

pub use attach::Lease;
pub use calls::{ProbeResult, SessionView, TransferOrder};
pub use events::{EngineEvent, EventQueue};
pub use node::{Node, Resources};
pub use rails::RailSettings;
pub use request::{AttachRequest, Caller, EnginePolicy, KnownPeer};
pub use revoke::{Arrival, Revocation, Revoked};

use crate::{
    domain::{EngineId, Failure, Incarnation, SessionId},
    memory::{EngineMemory, FdShelf, PROBE_BASE},
    peer::{Context, endpoint::Endpoint, target::Target},
    policy::RetryPolicy,
    session::{Handle, inbound::Inbound, outbound::Pin},
    transfer::log::TransferLog,
};

/// Proves, on every call, which engine calls.
pub type EngineToken = [u8; 32];

/// One attached engine.
#[derive(Debug)]
pub struct Engine {
    /// Within this boot.
    pub id: EngineId,
    /// Who it is.
    pub incarnation: Incarnation,
    /// For people.
    pub name: String,
    /// Its GPU, as its process numbers them.
    pub gpu_id: Option<u32>,
    /// RDMA devices that it may use, best first; none: any.
    pub rails: Vec<String>,
    /// How others address it.
    pub session_id: SessionId,
    /// What its calls carry.
    pub token: EngineToken,
    /// Its process.
    pub caller: Caller,
    /// Free text of the engine's own.
    pub labels: BTreeMap<String, String>,
    /// Its memory.
    pub memory: Arc<EngineMemory>,
    /// Descriptors it handed over.
    pub fds: Arc<FdShelf>,
    /// Its transfers.
    pub log: Arc<TransferLog>,
    /// What it is told.
    pub events: Arc<EventQueue>,
    /// How its transfers are retried unless they say otherwise.
    pub retry: RetryPolicy,
    inbound: Arc<Inbound>,
    target: Arc<Target>,
    context: Arc<Context>,
    session_policy: crate::session::outbound::Policy,
    /// Whom it had met before it attached. Locked for map steps only.
    known_peers: Mutex<HashMap<SessionId, Pin>>,
    max_sessions: usize,
    next_session: AtomicU64,
    /// Locked for map steps only.
    sessions: Mutex<Sessions>,
    endpoint: Mutex<Option<Endpoint>>,
    /// Memory was registered, or is not waited for: sessions may come in.
    complete: watch::Sender<bool>,
    /// Set once, when the lease has ended.
    gone: watch::Sender<Option<Failure>>,
}

#[derive(Debug, Default)]
struct Sessions {
    by_target: HashMap<SessionId, Handle>,
    tasks: JoinSet<()>,
}

impl Sessions {
    /// Ends sessions that lead nowhere and carry nothing, to make room for others.
    fn forget_idle(&mut self) {
        self.by_target.retain(|_, handle| !handle.let_go());
    }
}

impl Engine {
    /// Why it is gone, if it is.
    pub fn gone(&self) -> Option<Failure> {
        self.gone.borrow().clone()
    }

    /// Resolves when its lease has ended; says why.
    pub async fn over(&self) -> Failure {
        let mut gone = self.gone.subscribe();
        let why = gone.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        why.unwrap_or_else(|| Failure::plain(crate::domain::Reason::EngineGone))
    }

    /// Regions of its own and their bytes.
    pub fn registered(&self) -> (u64, u64) {
        let view = self.memory.view();
        let own = view.table.iter().filter(|region| region.info.base != PROBE_BASE);
        own.fold((0, 0), |(regions, bytes), region| (regions + 1, bytes + region.info.length))
    }

    /// Who came to its endpoint.
    pub fn inbound(&self) -> &Inbound {
        &self.inbound
    }

    fn next_first_lane(&self) -> u64 {
        // Lane ids are unique per boot: engine, session, lane.
        self.id.0 << 48 | self.next_session.fetch_add(1, Relaxed) << 32 | 1
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whom the session to that endpoint begins with.
    fn known_peer(&self, target: &SessionId) -> Option<Pin> {
        self.known_peers.lock().unwrap_or_else(PoisonError::into_inner).get(target).copied()
    }

    /// A reset: whoever is there now is as good.
    fn forget_peer(&self, target: &SessionId) {
        self.known_peers.lock().unwrap_or_else(PoisonError::into_inner).remove(target);
    }

    fn handles(&self) -> Vec<Handle> {
        self.sessions().by_target.values().cloned().collect()
    }
}

//! The node: every attached engine, and what they share.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use super::{Engine, EngineToken, RailSettings};
use crate::{
    config::Config,
    domain::{BootId, EngineId, Failure, Incarnation, Reason, TransferId},
    kernel,
    memory::{EngineMemory, FdShelf, Registrar},
    peer::{Neighbours, Ports, Resolver},
    policy::Drain,
    session::secret::Secret,
    telemetry::Metrics,
    transport::{local::CopyPool, tcp::Carriers},
};

/// Descriptors that a newcomer must leave free: for connections, lanes and handed-over memory of those who are there.
const KEPT_DESCRIPTORS: u64 = 32;

/// What all engines of a node share.
#[derive(Debug)]
pub struct Resources {
    /// The settings.
    pub config: Config,
    /// Persists in the state directory.
    pub node_id: String,
    /// This run.
    pub boot: BootId,
    /// What the daemons of the cluster share, if anything.
    pub secret: Option<Secret>,
    /// When it began.
    pub started: Instant,
    /// I7.
    pub registrar: Arc<Registrar>,
    /// Finds peers' addresses.
    pub resolver: Arc<Resolver>,
    /// Owners of TCP lanes.
    pub carriers: Arc<Carriers>,
    /// Workers of the local path.
    pub copies: Arc<CopyPool>,
    /// Endpoint ports.
    pub ports: Ports,
    /// RDMA devices, and who may use which.
    pub rails: RailSettings,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// All engines attached here.
#[derive(Debug)]
pub struct Node {
    /// What they share.
    pub resources: Resources,
    next_engine: AtomicU64,
    /// Locked for map steps only.
    engines: Mutex<Engines>,
    drain: Mutex<Drain>,
}

#[derive(Debug, Default)]
struct Engines {
    by_token: HashMap<EngineToken, Arc<Engine>>,
    by_incarnation: HashMap<Incarnation, Arc<Engine>>,
    /// Attaching, attached or detaching.
    places: usize,
}

impl Node {
    /// Nobody attached yet.
    pub fn new(resources: Resources) -> Arc<Self> {
        let drain = Mutex::new(Drain::new(resources.config.drain.timeout()));
        Arc::new(Self { resources, next_engine: AtomicU64::new(1), engines: Mutex::default(), drain })
    }

    /// The engine with this token.
    pub fn by_token(&self, token: &[u8]) -> Option<Arc<Engine>> {
        let token: EngineToken = token.try_into().ok()?;
        self.engines().by_token.get(&token).cloned()
    }

    /// Where descriptors of the engine with this token go.
    pub fn shelf(&self, token: &EngineToken) -> Option<Arc<FdShelf>> {
        self.engines().by_token.get(token).map(|engine| engine.fds.clone())
    }

    /// Everyone, by id.
    pub fn engines_by_id(&self) -> Vec<Arc<Engine>> {
        let mut engines: Vec<_> = self.engines().by_token.values().cloned().collect();
        engines.sort_unstable_by_key(|engine| engine.id);
        engines
    }

    /// Whether another engine knows this transfer.
    pub fn is_anothers(&self, transfer: TransferId, asking: &Engine) -> bool {
        let others = self.engines_by_id().into_iter().filter(|engine| engine.id != asking.id);
        others.into_iter().any(|engine| engine.log.find(transfer).is_some())
    }

    /// Transfers under way, of all engines.
    pub fn active_transfers(&self) -> usize {
        self.engines_by_id().iter().map(|engine| engine.log.active()).sum()
    }

    /// Whether nobody is attached or on the way.
    pub fn is_empty(&self) -> bool {
        self.engines().places == 0
    }

    /// The drain, to be asked or begun.
    pub fn drain(&self) -> MutexGuard<'_, Drain> {
        self.drain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_id(&self) -> EngineId {
        EngineId(self.next_engine.fetch_add(1, Relaxed))
    }

    /// Takes a place among the engines, before anything costly is done for it.
    ///
    /// # Errors
    /// LIMIT: there are enough, or one more would leave too few descriptors to those that are there.
    pub(super) fn reserve(self: &Arc<Self>) -> Result<Place, Failure> {
        kernel::spare_descriptors(KEPT_DESCRIPTORS)?;
        let mut engines = self.engines();
        let limit = self.resources.config.limits.engines;
        if engines.places >= limit {
            return Err(Failure::new(
                Reason::Limit,
                format!("{limit} engines are attached (limits.engines)"),
            ));
        }
        engines.places += 1;
        Ok(Place(self.clone()))
    }

    /// The live engine with this incarnation.
    pub(super) fn attached(&self, who: &Incarnation) -> Option<Arc<Engine>> {
        self.engines().by_incarnation.get(who).cloned()
    }

    pub(super) fn insert(&self, engine: &Arc<Engine>) {
        let mut engines = self.engines();
        engines.by_token.insert(engine.token, engine.clone());
        engines.by_incarnation.insert(engine.incarnation, engine.clone());
        self.resources.metrics.engines.set(engines.by_token.len() as i64);
    }

    pub(super) fn remove_token(&self, engine: &Engine) {
        let mut engines = self.engines();
        engines.by_token.remove(&engine.token);
        self.resources.metrics.engines.set(engines.by_token.len() as i64);
    }

    pub(super) fn remove_incarnation(&self, engine: &Engine) {
        let mut engines = self.engines();
        if engines.by_incarnation.get(&engine.incarnation).is_some_and(|known| known.id == engine.id) {
            engines.by_incarnation.remove(&engine.incarnation);
        }
    }

    fn engines(&self) -> MutexGuard<'_, Engines> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Neighbours for Node {
    fn memory_of(&self, who: &Incarnation) -> Option<Arc<EngineMemory>> {
        self.attached(who).filter(|engine| engine.gone().is_none()).map(|engine| engine.memory.clone())
    }
}

/// A place among the engines, free again when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Node>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.engines().places -= 1;
    }
}

//! Wiring: the daemon put together from its parts, its start, its drain and its end.

mod admin;
mod predecessor;
mod start;
mod state_dir;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::JoinSet};

pub use start::StartError;

use crate::{
    admin::Admin,
    config::Config,
    domain::{Failure, Reason},
    engine::{EngineEvent, Node},
    memory::{RegionDriver, Registrar},
    policy::DrainStatus,
};

/// How often a drain looks whether it is over.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// How long a daemon that leaves waits for its ports to be recorded.
const RECORD_WAIT: Duration = Duration::from_secs(2);

/// Without a byte from any peer for this long, nothing is in flight towards this node.
const INBOUND_QUIET: Duration = Duration::from_millis(200);

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    node: Arc<Node>,
    admin: Option<Admin>,
    stop: watch::Sender<bool>,
    servers: JoinSet<()>,
    /// Held until the end: nobody else may use the state directory.
    _state_dir: state_dir::StateDir,
}

impl Daemon {
    /// Starts everything; what cannot be bound is an error, and nothing is left behind. Must be called within
    /// the control runtime. `driver` is what the registrar calls.
    pub async fn start(config: Config, driver: Arc<dyn RegionDriver>) -> Result<Self, StartError> {
        start::start(config, driver).await
    }

    /// Where the admin port listens, if it does.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().map(Admin::local_addr)
    }

    /// The registrar, for its figures.
    pub fn registrar(&self) -> &Arc<Registrar> {
        &self.node.resources.registrar
    }

    /// Refuses new transfers, lets those in flight finish in both directions, then takes everything apart.
    pub async fn drain(self) {
        let grace = self.node.resources.config.drain.timeout();
        self.node.drain().stop(Instant::now());
        for engine in self.node.engines_by_id() {
            engine.events.push(EngineEvent::Draining(grace));
        }
        let mut inbound = Inbound::new(&self.node);
        loop {
            let active = self.node.active_transfers() + usize::from(!inbound.is_quiet(&self.node));
            let status = self.node.drain().status(active, Instant::now());
            match status {
                DrainStatus::Waiting { .. } => tokio::time::sleep(DRAIN_POLL).await,
                DrainStatus::NotDraining | DrainStatus::Finished => break,
                DrainStatus::TimedOut { left } => {
                    tracing::warn!(left, "the drain timed out");
                    break;
                }
            }
        }
        self.stop(Failure::new(Reason::Draining, "the daemon is going away")).await;
    }

    /// Ends every lease and waits until everything is fenced and given back.
    async fn stop(mut self, why: Failure) {
        for engine in self.node.engines_by_id() {
            engine.end_lease(why.clone());
        }
        let limit = Instant::now() + self.node.resources.config.fence.settle();
        while !self.node.is_empty() && Instant::now() < limit {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        self.stop.send_replace(true);
        while self.servers.join_next().await.is_some() {}
        let node = self.node.clone();
        // It waits for a disk.
        let _ = tokio::task::spawn_blocking(move || node.resources.ports.flush(RECORD_WAIT)).await;
        if let Some(admin) = self.admin.take() {
            // It joins its thread: not on this runtime's worker.
            let _ = tokio::task::spawn_blocking(move || admin.shutdown()).await;
        }
        tracing::info!("stopped");
    }
}

/// Whether peers still send.
struct Inbound {
    heard: u64,
    since: Instant,
}

impl Inbound {
    fn new(node: &Node) -> Self {
        Self { heard: heard(node), since: Instant::now() }
    }

    fn is_quiet(&mut self, node: &Node) -> bool {
        let now = heard(node);
        if std::mem::replace(&mut self.heard, now) != now {
            self.since = Instant::now();
        }
        self.since.elapsed() >= INBOUND_QUIET
    }
}

fn heard(node: &Node) -> u64 {
    node.engines_by_id().iter().map(|engine| engine.inbound().heard()).sum()
}

//! Start: bind first, then serve.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::JoinSet};

use super::{Daemon, admin::Source, state_dir::StateDir};
use crate::{
    admin::Admin,
    api::{
        EngineService,
        fd_socket::{FdSocket, FdSocketLimits},
        socket::{self, Allow, SocketError},
    },
    config::{Config, LockMode, Security},
    domain::BootId,
    engine::{Node, RailSettings, Resources},
    kernel,
    memory::{LockPolicy, RegionDriver, Registrar},
    peer::{PortSettings, Ports},
    session::secret::Secret,
    telemetry::{Metrics, RegistrarSample},
    transport::{local::CopyPool, tcp::Carriers},
};

/// Calls that may wait for the registrar.
const REGISTRAR_QUEUE: usize = 1024;

/// Why the daemon does not start. Exit code 3, but for `Secret` and `RailMap` (2) and `Internal` (70).
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A Unix socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The admin port cannot be had.
    #[error("admin.listen {address}: {source}")]
    Admin {
        /// Where.
        address: std::net::SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The state directory cannot be used, or the daemon that used it has not exited.
    #[error("endpoint.state_dir {path}: {wrong}")]
    StateDir {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        wrong: String,
    },
    /// The cluster's secret cannot be read.
    #[error("security.secret_file {path}: {wrong}")]
    Secret {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        wrong: String,
    },
    /// The rail map changed for the worse since it was validated.
    #[error("rdma.rail_map: {0}")]
    RailMap(String),
    /// A thread or a descriptor could not be had.
    #[error("{doing}: {source}")]
    Internal {
        /// What for.
        doing: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

impl StartError {
    /// What the process exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Socket(_) | Self::Admin { .. } | Self::StateDir { .. } => 3,
            Self::Secret { .. } | Self::RailMap(_) => 2,
            Self::Internal { .. } => 70,
        }
    }
}

fn internal(doing: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::Internal { doing, source }
}

pub(super) async fn start(config: Config, driver: Arc<dyn RegionDriver>) -> Result<Daemon, StartError> {
    kernel::raise_descriptor_limit();
    // Before anything is bound: it is configuration.
    let secret = read_secret(&config.security)?;
    let rails = RailSettings::new(config.rdma.rail_map().map_err(StartError::RailMap)?);
    let state_dir = StateDir::open(&config.endpoint.state_dir, config.restart.predecessor()).await?;
    let engines = socket::bind(&config.endpoint.socket)?;
    let fds = socket::bind(&config.endpoint.fd_socket())?;
    let node = Node::new(resources(config, &state_dir, secret, rails, driver)?);
    let config = &node.resources.config;
    let admin = config.admin.address().map(|address| start_admin(address, &node)).transpose()?;

    let stop = watch::Sender::new(false);
    let mut servers = JoinSet::new();
    let allow = allow(&config.security);
    let admin_url = admin.as_ref().map_or(String::new(), |admin| format!("http://{}", admin.local_addr()));
    let service = EngineService::new(node.clone(), absolute(config.endpoint.fd_socket()), admin_url);
    let (deadline, bytes) = (config.endpoint.handshake_timeout(), config.limits.message_bytes);
    servers.spawn(socket::serve(engines, service, allow.clone(), deadline, bytes, stopped(&stop)));
    let shelves = node.clone();
    let fd_socket =
        FdSocket::new(Arc::new(move |token| shelves.shelf(token)), allow, FdSocketLimits::default());
    servers.spawn(fd_socket.serve(fds, stopped(&stop)));
    tracing::info!(
        boot = %node.resources.boot, socket = %config.endpoint.socket.display(),
        transports = ?config.paths(), "serving; no RDMA and no GPU support in this version"
    );
    Ok(Daemon { node, admin, stop, servers, _state_dir: state_dir })
}

fn resources(
    config: Config,
    state_dir: &StateDir,
    secret: Option<Secret>,
    rails: RailSettings,
    driver: Arc<dyn RegionDriver>,
) -> Result<Resources, StartError> {
    let lock = match config.registration.lock {
        LockMode::Node => {
            LockPolicy::Node { lock_file: config.registration.lock_file().map(ToOwned::to_owned) }
        }
        LockMode::Off => LockPolicy::Off,
    };
    let registrar = Registrar::start(&lock, driver, REGISTRAR_QUEUE).map_err(internal("the registrar"))?;
    let sampled = registrar.clone();
    let metrics = Metrics::new(move || sample(&sampled));
    let spin = Duration::from_micros(config.tcp.spin_us);
    let carriers = Carriers::counting(config.tcp.threads, spin, &metrics.damaged_parts)
        .map_err(internal("the lane threads"))?;
    let copies = CopyPool::start(config.local.threads).map_err(internal("the copy threads"))?;
    let ports = PortSettings {
        bind: config.endpoint.bind_host,
        range: config.endpoint.ports.ports(),
        quarantine: config.endpoint.port_quarantine(),
        grace: config.restart.grace(),
        record: Some(state_dir.ports()),
    };
    let ports =
        Ports::open(ports, metrics.unrecorded_ports.clone()).map_err(internal("the record of ports"))?;
    Ok(Resources {
        config,
        node_id: state_dir.node_id().to_owned(),
        boot: BootId::random(),
        secret,
        started: Instant::now(),
        registrar,
        resolver: Arc::default(),
        carriers: Arc::new(carriers),
        copies: Arc::new(copies),
        ports,
        rails,
        metrics,
    })
}

fn read_secret(security: &Security) -> Result<Option<Secret>, StartError> {
    let path = &security.secret_file;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let wrong = |wrong| StartError::Secret { path: path.clone(), wrong };
    Secret::read(path).map(Some).map_err(wrong)
}

fn sample(registrar: &Registrar) -> RegistrarSample {
    let stats = registrar.stats();
    RegistrarSample {
        queued: stats.queue_length,
        in_progress: stats.calls_in_progress,
        high_water: stats.calls_high_water,
        calls: stats.calls,
        failures: stats.failures,
        waited: stats.wait_sum,
        busy: stats.call_sum,
    }
}

fn start_admin(address: std::net::SocketAddr, node: &Arc<Node>) -> Result<Admin, StartError> {
    let runtime = tokio::runtime::Handle::current();
    let source = Arc::new(Source::new(node.clone(), runtime));
    Admin::start(address, source).map_err(|source| StartError::Admin { address, source })
}

fn allow(security: &Security) -> Allow {
    let (uids, gids) = (security.allow_uids.clone(), security.allow_gids.clone());
    let own = rustix::process::geteuid().as_raw();
    Arc::new(move |uid, gid| uid == own || uid == 0 || uids.contains(&uid) || gids.contains(&gid))
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn stopped(stop: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + use<> {
    let mut stopped = stop.subscribe();
    async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    }
}

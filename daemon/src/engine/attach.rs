//! How an engine comes and how it goes.
//!
//! The lease ends when the attach stream ends or the process does (pidfd), whichever is first; a child that
//! inherited the engine's sockets does not keep it alive. Then everything of it is put out of reach first, and
//! given back after (I10, I6).

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::JoinSet,
};

use super::{AttachRequest, Caller, Engine, EventQueue, KnownPeer, Node, outcomes::Teller};
use crate::{
    config::ProcessMode,
    domain::{Failure, Incarnation, PathKind, Reason, SessionId},
    memory::{
        Awaited, EngineMemory, FdShelf, PROBE_BASE, PROBE_BYTES, ProcessAccess, ProcessMemory, Quota,
        RegionRequest, RevocationBook, Source,
    },
    peer::{
        Context, Listening, Timing,
        endpoint::{Admission, Endpoint},
        target::{Target, Terms},
    },
    policy::{RevocationLimits, RevocationList, Revocations},
    session::{identity, inbound::Inbound, outbound, outbound::Pin},
    transfer::log::{LogLimits, TransferLog},
};

/// How long a re-attach waits for the release of its previous attach.
const RELEASE_WAIT: Duration = Duration::from_secs(10);

/// An engine's hold on the daemon. Dropped, the engine is detached.
#[derive(Debug)]
pub struct Lease(Arc<Engine>);

impl Lease {
    /// Whose.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.end_lease(Failure::new(Reason::EngineGone, "the engine's lease ended"));
    }
}

impl Node {
    /// Attaches an engine. Nothing of it is left if this fails.
    pub async fn attach(self: &Arc<Self>, request: AttachRequest, caller: Caller) -> Result<Lease, Failure> {
        self.drain().admit()?;
        let place = self.reserve()?;
        let pidfd = caller.pid.map(open_pidfd).transpose()?.flatten().map(Arc::new);
        let incarnation = identity::incarnation(&request.key);
        self.wait_for_release(&incarnation).await?;
        let engine = self.build(request, caller, pidfd.clone()).await?;
        self.insert(&engine);
        tokio::spawn(self.clone().keep(engine.clone(), pidfd, place));
        tracing::info!(
            engine = %engine.id, name = engine.name, session = %engine.session_id, pid = caller.pid, uid = caller.uid,
            private_memory = name(engine.memory.process_access()), "engine attached"
        );
        Ok(Lease(engine))
    }

    /// Waits until an earlier attach of the same incarnation has been released; ends it if it is still live.
    async fn wait_for_release(&self, who: &Incarnation) -> Result<(), Failure> {
        let released = async {
            while let Some(earlier) = self.attached(who) {
                earlier.end_lease(Failure::new(Reason::EngineGone, "the engine attached again"));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(RELEASE_WAIT, released).await.map_err(|_| {
            Failure::new(Reason::Limit, "an earlier attach of this engine is still being released")
        })
    }

    async fn build(
        self: &Arc<Self>,
        request: AttachRequest,
        caller: Caller,
        pidfd: Option<Arc<OwnedFd>>,
    ) -> Result<Arc<Engine>, Failure> {
        let resources = &self.resources;
        let config = &resources.config;
        // Before the endpoint listens: no peer meets it without its past.
        let rails = resources.rails.of(&request)?;
        let memory = self.memory_for(caller, pidfd, request.revocations)?;
        register_probe_region(&memory).await?;
        let allowed = allowed(&config.paths(), &request.transports)?;
        let incarnation = identity::incarnation(&request.key);
        let Listening { listener, returns } = resources.ports.listen(request.preferred_port, incarnation)?;
        let port = listener
            .local_addr()
            .map_err(|error| Failure::io(Reason::PortUnavailable, "the endpoint's address", &error))?
            .port();
        let session_id =
            session_id(request.advertise_host.unwrap_or_else(|| config.endpoint.advertised()), port);
        let timing = Timing { heartbeat: config.session.heartbeat(), silence: config.session.silence() };
        let inbound = Inbound::new(memory.clone(), resources.carriers.clone(), config.limits.sessions);
        let terms = Terms {
            boot: resources.boot,
            key: request.key.clone(),
            capabilities: identity::capabilities(&allowed, config.tcp.checksum),
            secret: resources.secret.clone(),
            timing,
            handshake: config.endpoint.handshake_timeout(),
        };
        let target = Target::new(terms, inbound.clone(), resources.metrics.clone());
        let events = Arc::new(EventQueue::default());
        let log_limits = LogLimits { active: config.limits.transfers, finished: config.limits.finished };
        let log = TransferLog::new(log_limits);
        let retry = request.policy.retry(config.retry.policy());
        let admission = Admission {
            timeout: config.endpoint.handshake_timeout(),
            unclassified: config.endpoint.unclassified,
        };
        let complete = watch::Sender::new(!returns);
        let ready = complete_within(complete.subscribe(), config.restart.grace());
        let endpoint = Endpoint::open(listener, target.clone(), admission, ready).map_err(|error| {
            resources.ports.give_back(port);
            Failure::io(Reason::PortUnavailable, "listening on the endpoint", &error)
        })?;
        let context = Arc::new(Context {
            boot: resources.boot,
            key: request.key,
            own: session_id.clone(),
            memory: memory.clone(),
            allowed,
            checksum: config.tcp.checksum,
            secret: resources.secret.clone(),
            timing,
            limit_slices: config.limits.slices as u64,
            resolver: resources.resolver.clone(),
            carriers: resources.carriers.clone(),
            copies: resources.copies.clone(),
            neighbours: self.clone(),
            outcomes: Arc::new(Teller::new(log.clone(), events.clone(), resources.metrics.clone())),
            metrics: resources.metrics.clone(),
        });
        Ok(Arc::new(Engine {
            id: self.next_id(),
            incarnation,
            name: request.name,
            gpu_id: request.gpu_id,
            rails,
            session_id,
            token: Incarnation::random().0,
            caller,
            labels: request.labels,
            memory,
            fds: Arc::new(FdShelf::new(config.limits.fds)),
            log,
            events,
            retry,
            inbound,
            target,
            context,
            session_policy: outbound::Policy {
                health: request.policy.health(config.session.health()),
                retry,
                pin_idle: config.session.pin_idle(),
                window_parts: config.tcp.window_parts,
                tcp_lanes: config.tcp.lanes,
                peer_wait: config.fence.peer_wait(),
                settle: config.fence.settle(),
            },
            known_peers: Mutex::new(pins(request.known_peers, config.session.pin_idle())),
            max_sessions: config.limits.sessions,
            next_session: AtomicU64::new(0),
            sessions: Mutex::default(),
            endpoint: Mutex::new(Some(endpoint)),
            complete,
            gone: watch::Sender::new(None),
        }))
    }

    fn memory_for(
        &self,
        caller: Caller,
        pidfd: Option<Arc<OwnedFd>>,
        revoked: RevocationList,
    ) -> Result<Arc<EngineMemory>, Failure> {
        let limits = &self.resources.config.limits;
        let process = self.process_access(caller, pidfd);
        let quota =
            Quota { regions: limits.regions + 1, bytes: limits.region_bytes, layouts: limits.regions };
        let kept = RevocationLimits::ranges(limits.revocations);
        let revocations = Revocations::restore(kept, revoked, Instant::now())?;
        let book = RevocationBook::new(revocations, self.resources.metrics.revoked_parts.clone());
        let registrar = self.resources.registrar.clone();
        Ok(EngineMemory::with_revocations(registrar, quota, process, book))
    }

    /// How the engine's private memory will be reached, whatever it registers.
    fn process_access(&self, caller: Caller, pidfd: Option<Arc<OwnedFd>>) -> ProcessAccess {
        let settings = &self.resources.config.process;
        let opened = match settings.mode {
            ProcessMode::Assisted => None,
            ProcessMode::Auto | ProcessMode::Direct => {
                let pid = caller.pid.and_then(Pid::from_raw);
                let unseen =
                    || Failure::new(Reason::UnsupportedMemory, "its process cannot be seen from here");
                Some(pid.ok_or_else(unseen).and_then(ProcessMemory::open))
            }
        };
        match (opened, settings.mode) {
            (Some(Ok(memory)), _) => ProcessAccess::Direct(Arc::new(memory)),
            (Some(Err(failure)), ProcessMode::Direct) => {
                tracing::warn!(pid = caller.pid, %failure, "an engine's private memory is out of reach");
                ProcessAccess::OutOfReach
            }
            (Some(Err(failure)), _) => {
                tracing::debug!(pid = caller.pid, %failure, "an engine's private memory needs its assistance");
                ProcessAccess::Assisted(Awaited::new(pidfd, settings.answer()))
            }
            (None, _) => ProcessAccess::Assisted(Awaited::new(pidfd, settings.answer())),
        }
    }

    /// Owns the engine until its lease ends, then takes it apart.
    async fn keep(
        self: Arc<Self>,
        engine: Arc<Engine>,
        pidfd: Option<Arc<OwnedFd>>,
        place: super::node::Place,
    ) {
        let exit = Failure::new(Reason::EngineGone, "the engine process has exited");
        tokio::select! {
            _ = engine.over() => {}
            () = exited(pidfd) => engine.end_lease(exit),
        }
        let why = engine.over().await;
        self.remove_token(&engine);
        engine.release(&why).await;
        if let Some((_, port)) = engine.session_id.authority() {
            self.resources.ports.give_back(port);
        }
        self.remove_incarnation(&engine);
        drop(place);
        tracing::info!(engine = %engine.id, name = engine.name, cause = %why, "engine detached");
    }
}

impl Engine {
    /// It has registered memory: an engine that came back has registered all it had.
    pub fn registered_all(&self) {
        self.complete.send_replace(true);
    }

    /// Ends the lease; what follows is done by the node. The first cause counts.
    pub fn end_lease(&self, why: Failure) {
        self.gone.send_if_modified(|gone| {
            let first = gone.is_none();
            gone.get_or_insert(why);
            first
        });
    }

    /// Resolves when the engine is out of reach and everything of it was given back.
    async fn release(&self, why: &Failure) {
        // Out of reach at once: from here on no lane starts another call on its memory.
        self.memory.begin_close();
        self.target.close(why.clone());
        // All are told before any is waited for: one silent peer must not keep the others from hearing.
        let mut ends = JoinSet::new();
        for handle in self.handles() {
            let why = why.clone();
            ends.spawn(
                async move { handle.ask(|answer| crate::session::Command::Shutdown(why, answer)).await },
            );
        }
        let sessions = async { while ends.join_next().await.is_some() {} };
        let endpoint = self.endpoint.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let endpoint = async {
            if let Some(endpoint) = endpoint {
                endpoint.close().await;
            }
        };
        tokio::join!(self.inbound.close(why), sessions, endpoint, self.memory.close());
        let mut tasks = std::mem::take(&mut *self.sessions()).tasks;
        while tasks.join_next().await.is_some() {}
    }
}

/// An engine that comes back registers at once what it had. Its peers are at the door: a session opened before
/// would find nothing registered, and fail transfers that a moment later are good.
async fn complete_within(mut complete: watch::Receiver<bool>, grace: Duration) {
    let _ = tokio::time::timeout(grace, complete.wait_for(|complete| *complete)).await;
}

/// Whom an engine says it has met counts as met now: its pins do not outlast those of a daemon that stayed.
fn pins(known: Vec<KnownPeer>, lapse: Duration) -> HashMap<SessionId, Pin> {
    let until = Instant::now() + lapse;
    known.into_iter().map(|peer| (peer.session_id, Pin { incarnation: peer.incarnation, until })).collect()
}

fn session_id(host: String, port: u16) -> SessionId {
    let text = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    SessionId::new(text)
}

/// The engine's wishes within the daemon's allow-list, in the engine's order.
fn allowed(daemon: &[PathKind], engine: &[PathKind]) -> Result<Vec<PathKind>, Failure> {
    if engine.is_empty() {
        return Ok(daemon.to_vec());
    }
    let both: Vec<PathKind> = engine.iter().copied().filter(|path| daemon.contains(path)).collect();
    if both.is_empty() {
        let names = |paths: &[PathKind]| paths.iter().map(|path| path.name()).collect::<Vec<_>>().join(", ");
        let message = format!("the engine allows {}; the daemon allows {}", names(engine), names(daemon));
        return Err(Failure::new(Reason::NoPath, message));
    }
    Ok(both)
}

/// For the log.
fn name(access: &ProcessAccess) -> &'static str {
    match access {
        ProcessAccess::OutOfReach => "out of reach",
        ProcessAccess::Direct(_) => "direct",
        ProcessAccess::Assisted(_) => "assisted",
    }
}

/// Nothing where the kernel has no pidfds: there the attach stream alone is the lease.
fn open_pidfd(pid: i32) -> Result<Option<OwnedFd>, Failure> {
    let gone = || Failure::new(Reason::EngineGone, format!("process {pid} is gone"));
    let pid = Pid::from_raw(pid).ok_or_else(gone)?;
    match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(rustix::io::Errno::NOSYS) => Ok(None),
        Err(rustix::io::Errno::SRCH) => Err(gone()),
        Err(error) => Err(Failure::io(Reason::Driver, "pidfd_open", &error.into())),
    }
}

/// Resolves when the process has exited; never without a descriptor to watch.
async fn exited(pidfd: Option<Arc<OwnedFd>>) {
    #[expect(
        deprecated,
        reason = "its replacement is unsafe; an owned descriptor keeps the promise it asks for"
    )]
    let watched = pidfd.map(|fd| AsyncFd::with_interest(fd, Interest::READABLE));
    let Some(Ok(pidfd)) = watched else { return std::future::pending().await };
    if pidfd.readable().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Every endpoint owns 4 KiB that probes may write and read.
async fn register_probe_region(memory: &EngineMemory) -> Result<(), Failure> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let refused = |error: rustix::io::Errno| Failure::io(Reason::Driver, "the probe region", &error.into());
    let fd =
        memfd_create("kvferry-probe", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(refused)?;
    ftruncate(&fd, PROBE_BYTES).map_err(refused)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(refused)?;
    let source = Source::SharedFd { fd: Arc::new(fd), offset: 0 };
    memory.register(vec![RegionRequest { base: PROBE_BASE, length: PROBE_BYTES, source }], vec![]).await?;
    Ok(())
}

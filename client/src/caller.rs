//! The calls of an attached engine, whoever makes them: blocking threads, async callers, the lease's thread.

use std::{
    collections::HashMap,
    future::Future,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use kvferry_proto::engine::v1::{self as wire, engine_client::EngineClient};
use tokio::{sync::watch, time};
use tonic::{Code, Status, transport::Channel};

use crate::{
    EngineOptions, Error, Failure, Path, Policy, ProcessAccess, Reason, Region,
    assist::Assistant,
    connection,
    cuts::Cuts,
    error::NoReply,
    facts::Facts,
    fds,
    lease::Lease,
    memory::Backing,
    orders::Orders,
    peers::Peers,
    pipe::Pipe,
    regions::Regions,
    revocations::Revocations,
    transfer::{IdMint, millis},
    unsettled::Unsettled,
};

/// The loss of a call that reached a daemon which does not know us: it has done nothing.
pub(crate) const STRANGER: Code = Code::Unauthenticated;
/// What an answer may take on top of the time the daemon was given.
pub(crate) const ANSWER_MARGIN: Duration = Duration::from_secs(2);

/// What all callers of an engine share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) socket: PathBuf,
    /// The engine's own.
    pub(crate) policy: Policy,
    pub(crate) ids: IdMint,
    pub(crate) cuts: Cuts,
    /// What has to outlive the daemon.
    pub(crate) revocations: Revocations,
    pub(crate) regions: Arc<Regions>,
    pub(crate) peers: Peers,
    pub(crate) unsettled: Unsettled,
    pub(crate) orders: Orders,
    facts: Facts,
    /// The latest lease, ended or not.
    lease: watch::Sender<Arc<Lease>>,
    /// There will be another lease after this one.
    returns: AtomicBool,
    /// Names of descriptors handed over.
    handles: AtomicU64,
}

impl Core {
    pub(crate) fn new(options: &EngineOptions, lease: Arc<Lease>) -> Result<Self, Error> {
        Ok(Self {
            socket: options.socket.clone(),
            policy: options.policy,
            ids: IdMint::new()?,
            cuts: Cuts::default(),
            revocations: Revocations::default(),
            regions: Arc::default(),
            peers: Peers::default(),
            unsettled: Unsettled::default(),
            orders: Orders::default(),
            facts: Facts::new(&lease),
            lease: watch::Sender::new(lease),
            returns: AtomicBool::new(options.reattach),
            handles: AtomicU64::new(1),
        })
    }

    /// The latest one.
    pub(crate) fn lease(&self) -> Arc<Lease> {
        self.lease.borrow().clone()
    }

    /// Of the latest attachment.
    pub(crate) fn facts(&self) -> &Facts {
        self.facts.latest()
    }

    /// Attached again, with these regions registered: from now on calls are made under this lease, and the one before
    /// is proven over. Gives the regions that were unregistered meanwhile.
    pub(crate) fn renew(&self, lease: Arc<Lease>, regions: &[(u32, u32)]) -> Vec<u32> {
        self.facts.append(&lease);
        let before = self.lease.send_replace(lease);
        before.released.store(true, Ordering::SeqCst);
        self.unsettled.look();
        self.regions.adopt(regions)
    }

    /// There will be no other lease.
    pub(crate) fn give_up(&self) {
        self.returns.store(false, Ordering::SeqCst);
    }

    /// Whether there will be another lease when this one has ended.
    pub(crate) fn returns(&self) -> bool {
        self.returns.load(Ordering::SeqCst)
    }

    /// Returns when there is another lease than this one; never if there will be none.
    pub(crate) async fn after(&self, lease: &Lease) {
        let mut leases = self.lease.subscribe();
        if leases.wait_for(|latest| latest.number != lease.number).await.is_err() {
            std::future::pending().await
        }
    }

    /// Nobody answers any more.
    pub(crate) fn no_daemon(&self, lease: &Lease, seen: String) -> Error {
        let cause = match lease.ending() {
            Some(ending) if self.returns() => {
                format!("the attachment has ended: {}; it is being renewed", ending.cause)
            }
            Some(ending) => format!("the attachment has ended: {}", ending.cause),
            None => seen,
        };
        Error::NoDaemon { path: self.socket.clone(), cause }
    }
}

/// What a probe of a session found.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The peer answered over every lane kind in use.
    pub alive: bool,
    /// Why not.
    pub failure: Option<Failure>,
    /// The path it answered on.
    pub path: Option<Path>,
    /// There and back.
    pub round_trip: Duration,
}

/// An engine's calls over one channel. Its futures run on the runtime that drives the channel.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) core: Arc<Core>,
    /// The attachment that the channel was made for.
    attachment: u64,
    pub(crate) client: EngineClient<Channel>,
    /// For callers that have one transfer at a time.
    pub(crate) pipe: Option<Arc<Pipe>>,
}

impl Caller {
    pub(crate) fn new(core: Arc<Core>, channel: Channel) -> Self {
        let attachment = core.lease().number;
        Self { core, attachment, client: connection::client(channel), pipe: None }
    }

    /// Has transfers take this way instead of calls of their own.
    pub(crate) fn through(self, pipe: Arc<Pipe>) -> Self {
        Self { pipe: Some(pipe), ..self }
    }

    /// Over the lease's own connection.
    pub(crate) fn over(core: &Arc<Core>, client: EngineClient<Channel>) -> Self {
        Self { core: core.clone(), attachment: core.lease().number, client, pipe: None }
    }

    /// Over a connection of its own, on the runtime that this runs on.
    pub(crate) fn connect(core: &Arc<Core>) -> Self {
        Self::new(core.clone(), connection::lazy(&core.socket))
    }

    /// The same, with a connection to the daemon of the latest attachment: not one that its predecessor broke.
    pub(crate) fn renewed(&mut self) -> &Self {
        if self.attachment != self.core.lease().number {
            *self = Self::connect(&self.core);
        }
        self
    }

    /// Waits for a reply, but not beyond the lease.
    pub(crate) async fn ask<T>(
        &self,
        lease: &Lease,
        call: &'static str,
        rpc: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, NoReply> {
        let reply = tokio::select! {
            biased;
            reply = rpc => reply.map_err(|status| NoReply::from_status(call, &status)),
            () = lease.over() => Err(NoReply::Lost(Code::Unavailable, String::new())),
        };
        match reply {
            // The daemon that answers is not the one that gave us the token; the lease's thread will notice.
            Err(NoReply::Answered(Error::Refused(Failure { reason: Reason::Unauthorised, .. })))
                if lease.ends_soon().await =>
            {
                Err(NoReply::Lost(STRANGER, String::new()))
            }
            reply => reply,
        }
    }

    /// For calls where the lack of a reply is just an error.
    pub(crate) fn explain(&self, lease: &Lease, call: &'static str, no_reply: NoReply) -> Error {
        match no_reply {
            NoReply::Answered(error) => error,
            NoReply::Lost(code, seen) if code == Code::Unavailable || lease.ending().is_some() => {
                self.core.no_daemon(lease, seen)
            }
            NoReply::Lost(_, message) => Error::Call { call, message },
        }
    }

    pub(crate) async fn register(&self, memory: Vec<Backing>) -> Result<Vec<Region>, Error> {
        let lease = self.core.lease();
        let _asked = self.core.regions.ask(&memory);
        let mut regions = self.register_with(&lease, &memory).await?;
        match self.core.regions.record(lease.number, &mut regions, memory) {
            true => Ok(regions),
            false => Err(self.core.no_daemon(&lease, String::new())),
        }
    }

    /// The regions under the daemon's own numbers.
    pub(crate) async fn register_with(
        &self,
        lease: &Lease,
        memory: &[Backing],
    ) -> Result<Vec<Region>, Error> {
        const CALL: &str = "RegisterRegions";
        if lease.process_access == ProcessAccess::Assisted
            && memory.iter().any(|each| each.private().is_some())
        {
            lease.assistant.get_or_try_init(|| self.assist(lease)).await?;
        }
        let handles = self.hand_over(lease, memory).await?;
        let handle = |backing: &Backing| {
            backing.file.as_ref().and_then(|(mapping, _)| handles.get(&mapping.address()).copied())
        };
        let regions = memory.iter().map(|backing| backing.spec(handle(backing))).collect();
        let message = wire::RegisterRegionsRequest { regions, layouts: Vec::new() };
        let mut client = self.client.clone();
        let reply = self
            .ask(lease, CALL, client.register_regions(lease.request(message)))
            .await
            .map_err(|lost| self.explain(lease, CALL, lost))?
            .into_inner();
        if let Some(failure) = reply.failure {
            return Err(Error::Refused(failure.into()));
        }
        let regions: Vec<Region> = reply.regions.into_iter().map(Region::from).collect();
        if regions.len() != memory.len() {
            let message = format!("{} regions came back for {}", regions.len(), memory.len());
            return Err(Error::Call { call: CALL, message });
        }
        Ok(regions)
    }

    /// Has this process copy its private memory for a daemon that cannot reach it.
    async fn assist(&self, lease: &Lease) -> Result<Assistant, Error> {
        const CALL: &str = "OfferAssistant";
        let assistant = Assistant::start(self.core.regions.clone())?;
        let handle = self.core.handles.fetch_add(1, Ordering::Relaxed);
        fds::hand_over(&lease.fd_socket, &lease.token, handle, assistant.as_fd()).await?;
        let message = wire::OfferAssistantRequest { handle };
        let mut client = self.client.clone();
        let reply = self
            .ask(lease, CALL, client.offer_assistant(lease.request(message)))
            .await
            .map_err(|lost| self.explain(lease, CALL, lost))?;
        match reply.into_inner().failure {
            Some(failure) => Err(Error::Refused(failure.into())),
            None => Ok(assistant),
        }
    }

    /// Each file once, however many ranges of it are registered. Handles by address of the mapping.
    async fn hand_over(&self, lease: &Lease, memory: &[Backing]) -> Result<HashMap<u64, u64>, Error> {
        let mut handles = HashMap::new();
        for (mapping, _) in memory.iter().filter_map(|backing| backing.file.as_ref()) {
            if handles.contains_key(&mapping.address()) {
                continue;
            }
            let handle = self.core.handles.fetch_add(1, Ordering::Relaxed);
            fds::hand_over(&lease.fd_socket, &lease.token, handle, mapping.as_fd()).await?;
            handles.insert(mapping.address(), handle);
        }
        Ok(handles)
    }

    pub(crate) async fn probe(&self, session: &str, timeout: Duration) -> Result<Probe, Error> {
        const CALL: &str = "Probe";
        let lease = self.core.lease();
        let timeout_ms = millis(timeout).max(1);
        let message = wire::ProbeRequest { session_id: session.to_owned(), timeout_ms };
        let mut client = self.client.clone();
        let rpc = self.ask(&lease, CALL, client.probe(lease.request(message)));
        let reply = time::timeout(timeout.saturating_add(ANSWER_MARGIN), rpc)
            .await
            .map_err(|_| Error::Timeout(timeout))?
            .map_err(|lost| self.explain(&lease, CALL, lost))?
            .into_inner();
        Ok(Probe {
            alive: reply.alive,
            path: Some(reply.path()).filter(|path| *path != Path::Unspecified),
            round_trip: Duration::from_micros(reply.round_trip_us),
            failure: reply.failure.map(Failure::from),
        })
    }

    pub(crate) async fn reset_session(&self, session: &str) -> Result<(), Error> {
        const CALL: &str = "ResetSession";
        let lease = self.core.lease();
        let message = wire::ResetSessionRequest { session_id: session.to_owned() };
        let mut client = self.client.clone();
        let reply = self
            .ask(&lease, CALL, client.reset_session(lease.request(message)))
            .await
            .map_err(|lost| self.explain(&lease, CALL, lost))?;
        if let Some(failure) = reply.into_inner().failure {
            return Err(Error::Refused(failure.into()));
        }
        self.core.peers.forget(session);
        Ok(())
    }
}

//! The calls of an attached engine, whoever makes them: blocking threads, async callers, the lease's thread.

use std::{
    collections::HashMap,
    future::Future,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use kvferry_proto::{
    engine::v1::{self as wire, engine_client::EngineClient},
    types::v1 as types,
};
use tokio::time;
use tonic::{Code, Request, Response, Status, transport::Channel};

use crate::{
    Error, Failure, Path, Region, Settlement, TransferId,
    buffer::Mapping,
    connection,
    cuts::Cuts,
    error::NoReply,
    fds,
    lease::{Lease, Verdict},
    memory::Backing,
    pipe::Pipe,
    revocations::{Noted, Range, Revocations},
    transfer::{IdMint, millis},
};

/// What an answer may take on top of the time the daemon was given.
pub(crate) const ANSWER_MARGIN: Duration = Duration::from_secs(2);

/// What all callers of an attachment share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) socket: PathBuf,
    pub(crate) lease: Lease,
    pub(crate) ids: IdMint,
    pub(crate) cuts: Cuts,
    /// What has to outlive the daemon.
    pub(crate) revocations: Revocations,
    /// Names of descriptors handed over.
    handles: AtomicU64,
    /// Mappings of registered regions: their addresses must mean nothing else while the daemon uses them.
    /// Bounded by the daemon's limit on regions. Locked for single map operations.
    held: Mutex<HashMap<u32, Arc<Mapping>>>,
}

impl Core {
    pub(crate) fn new(socket: PathBuf, lease: Lease) -> Result<Self, Error> {
        Ok(Self {
            socket,
            lease,
            ids: IdMint::new()?,
            cuts: Cuts::default(),
            revocations: Revocations::default(),
            handles: AtomicU64::new(1),
            held: Mutex::default(),
        })
    }

    /// Nobody answers any more.
    pub(crate) fn no_daemon(&self, seen: String) -> Error {
        let cause = match self.lease.ending() {
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
    pub(crate) client: EngineClient<Channel>,
    /// For callers that have one transfer at a time.
    pub(crate) pipe: Option<Arc<Pipe>>,
}

impl Caller {
    pub(crate) fn new(core: Arc<Core>, channel: Channel) -> Self {
        Self { core, client: connection::client(channel), pipe: None }
    }

    /// Has transfers take this way instead of calls of their own.
    pub(crate) fn through(self, pipe: Arc<Pipe>) -> Self {
        Self { pipe: Some(pipe), ..self }
    }

    /// A message of ours: the token says so.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let token = self.core.lease.token_metadata.clone();
        request.metadata_mut().insert_bin(kvferry_proto::TOKEN_METADATA, token);
        request
    }

    /// Waits for a reply, but not beyond the lease.
    pub(crate) async fn ask<T>(
        &self,
        call: &'static str,
        rpc: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, NoReply> {
        tokio::select! {
            biased;
            reply = rpc => reply.map_err(|status| NoReply::from_status(call, &status)),
            () = self.core.lease.over() => Err(NoReply::Lost(Code::Unavailable, String::new())),
        }
    }

    /// For calls where the lack of a reply is just an error.
    pub(crate) fn explain(&self, call: &'static str, no_reply: NoReply) -> Error {
        match no_reply {
            NoReply::Answered(error) => error,
            NoReply::Lost(code, seen) if code == Code::Unavailable || self.core.lease.ending().is_some() => {
                self.core.no_daemon(seen)
            }
            NoReply::Lost(_, message) => Error::Call { call, message },
        }
    }

    pub(crate) async fn register(&self, memory: Vec<Backing>) -> Result<Vec<Region>, Error> {
        const CALL: &str = "RegisterRegions";
        let handles = self.hand_over(&memory).await?;
        let handle = |backing: &Backing| {
            backing.file.as_ref().and_then(|(mapping, _)| handles.get(&mapping.address()).copied())
        };
        let regions = memory.iter().map(|backing| backing.spec(handle(backing))).collect();
        let message = wire::RegisterRegionsRequest { regions, layouts: Vec::new() };
        let mut client = self.client.clone();
        let reply = self
            .ask(CALL, client.register_regions(self.request(message)))
            .await
            .map_err(|lost| self.explain(CALL, lost))?
            .into_inner();
        if let Some(failure) = reply.failure {
            return Err(Error::Refused(failure.into()));
        }
        let regions: Vec<Region> = reply.regions.into_iter().map(Region::from).collect();
        if regions.len() != memory.len() {
            let message = format!("{} regions came back for {}", regions.len(), memory.len());
            return Err(Error::Call { call: CALL, message });
        }
        let mut held = self.core.held.lock().unwrap_or_else(PoisonError::into_inner);
        for (region, backing) in regions.iter().zip(memory) {
            if let Some((mapping, _)) = backing.file {
                held.insert(region.id, mapping);
            }
        }
        Ok(regions)
    }

    /// Each file once, however many ranges of it are registered. Handles by address of the mapping.
    async fn hand_over(&self, memory: &[Backing]) -> Result<HashMap<u64, u64>, Error> {
        let mut handles = HashMap::new();
        let lease = &self.core.lease;
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

    pub(crate) async fn unregister(&self, regions: &[u32]) -> Result<Settlement, Error> {
        const CALL: &str = "UnregisterRegions";
        let message = wire::UnregisterRegionsRequest { region_ids: regions.to_vec(), ..Default::default() };
        let mut client = self.client.clone();
        let settlement = match self.ask(CALL, client.unregister_regions(self.request(message))).await {
            Ok(reply) => settlement(reply.into_inner())?,
            Err(NoReply::Lost(..)) if self.core.lease.verdict().await == Verdict::Exited => {
                Settlement::Settled
            }
            Err(lost) => return Err(self.explain(CALL, lost)),
        };
        if settlement == Settlement::Settled {
            let mut held = self.core.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.retain(|region, _| !regions.contains(region));
        }
        Ok(settlement)
    }

    pub(crate) async fn cancel(&self, id: TransferId) -> Result<Settlement, Error> {
        const CALL: &str = "Cancel";
        self.core.cuts.cancel(id);
        let transfer_id = self.core.cuts.current(id).0.to_vec();
        let mut client = self.client.clone();
        let rpc = client.cancel(self.request(wire::CancelRequest { transfer_id }));
        match self.ask(CALL, rpc).await {
            Ok(reply) => settlement(reply.into_inner()),
            Err(NoReply::Answered(error)) => Err(error),
            Err(NoReply::Lost(..)) => Ok(match self.core.lease.verdict().await {
                Verdict::Exited => Settlement::Settled,
                Verdict::Unproven => Settlement::Unsettled,
            }),
        }
    }

    pub(crate) async fn revoke(&self, ranges: &[Range]) -> Result<Settlement, Error> {
        let noted = self.core.revocations.note(ranges);
        let wire_range = |range: &Range| types::Range { base: range.address, length: range.length };
        let message = wire::RevokeRequest { ranges: ranges.iter().map(wire_range).collect() };
        let mut client = self.client.clone();
        self.revoked("Revoke", &noted, client.revoke(self.request(message))).await
    }

    pub(crate) async fn revoke_tag(&self, tag: [u8; 16]) -> Result<Settlement, Error> {
        let noted = self.core.revocations.note_tag(tag)?;
        let message = wire::RevokeTagRequest { tag: tag.to_vec() };
        let mut client = self.client.clone();
        self.revoked("RevokeTag", &noted, client.revoke_tag(self.request(message))).await
    }

    /// Without an answer the revocation stays noted. A daemon that has exited touches nothing, and the next one is
    /// told before anybody reaches it: that is settled.
    async fn revoked(
        &self,
        call: &'static str,
        noted: &Noted,
        rpc: impl Future<Output = Result<Response<wire::SettleReply>, Status>>,
    ) -> Result<Settlement, Error> {
        let revocations = &self.core.revocations;
        let answer = match self.ask(call, rpc).await {
            Ok(reply) => {
                let reply = reply.into_inner();
                let epoch = reply.epoch;
                settlement(reply).inspect(|_| revocations.answered(noted, epoch))
            }
            Err(NoReply::Answered(error)) => Err(error),
            Err(NoReply::Lost(..)) => {
                return Ok(match self.core.lease.verdict().await {
                    Verdict::Exited => Settlement::Settled,
                    Verdict::Unproven => Settlement::Unsettled,
                });
            }
        };
        answer.inspect_err(|_| revocations.refused(noted))
    }

    pub(crate) async fn probe(&self, session: &str, timeout: Duration) -> Result<Probe, Error> {
        const CALL: &str = "Probe";
        let timeout_ms = millis(timeout).max(1);
        let message = wire::ProbeRequest { session_id: session.to_owned(), timeout_ms };
        let mut client = self.client.clone();
        let rpc = self.ask(CALL, client.probe(self.request(message)));
        let reply = time::timeout(timeout.saturating_add(ANSWER_MARGIN), rpc)
            .await
            .map_err(|_| Error::Timeout(timeout))?
            .map_err(|lost| self.explain(CALL, lost))?
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
        let message = wire::ResetSessionRequest { session_id: session.to_owned() };
        let mut client = self.client.clone();
        let reply = self
            .ask(CALL, client.reset_session(self.request(message)))
            .await
            .map_err(|lost| self.explain(CALL, lost))?;
        reply.into_inner().failure.map_or(Ok(()), |failure| Err(Error::Refused(failure.into())))
    }
}

fn settlement(reply: wire::SettleReply) -> Result<Settlement, Error> {
    let settlement = Settlement::from_wire(reply.settlement());
    reply.failure.map_or(Ok(settlement), |failure| Err(Error::Refused(failure.into())))
}

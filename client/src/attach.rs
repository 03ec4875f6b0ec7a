//! Attaching: from connecting to the daemon's first event.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use kvferry_proto::engine::v1::{self as wire, engine_client::EngineClient};
use rustix::process::{PTracer, Pid};
use tokio::{
    net::UnixStream,
    sync::{OnceCell, watch},
    time,
};
use tonic::{Streaming, metadata::MetadataValue, transport::Channel};

use crate::{
    EngineOptions, Error, Limits, connection,
    error::NoReply,
    lease::{DaemonProcess, Ending, Lease},
};

/// A lease just begun, and what keeps it.
pub(crate) struct Attached {
    pub(crate) lease: Arc<Lease>,
    pub(crate) events: Streaming<wire::EngineEvent>,
    /// Over the lease's own connection.
    pub(crate) client: EngineClient<Channel>,
    pub(crate) end: watch::Sender<Option<Ending>>,
}

/// How an engine presents itself.
pub(crate) struct Introduction<'a> {
    pub(crate) options: &'a EngineOptions,
    /// The engine's Ed25519 key; its public half is the engine's incarnation.
    pub(crate) seed: &'a [u8; 32],
    /// Counts this engine's attachments.
    pub(crate) number: u64,
    /// Wanted for the endpoint.
    pub(crate) port: Option<u16>,
    pub(crate) known_peers: Vec<wire::KnownPeer>,
    pub(crate) revocations: Option<wire::Revocations>,
    /// From connecting to the first event.
    pub(crate) patience: Duration,
}

pub(crate) async fn attach(introduction: Introduction<'_>) -> Result<Attached, Error> {
    let Introduction { options, number, patience, .. } = introduction;
    let attempt = async {
        let stream = connection::open(&options.socket).await?;
        let daemon = daemon_of(&stream);
        let process = daemon.map_or_else(DaemonProcess::default, DaemonProcess::open);
        let mut client = connection::client(connection::over(stream));
        let refused = |status| explain(options, NoReply::from_status("Attach", &status));
        let mut events = client.attach(request(introduction)).await.map_err(refused)?.into_inner();
        let first = events.message().await.map_err(refused)?.and_then(|event| event.event);
        let Some(wire::engine_event::Event::Attached(attached)) = first else {
            return Err(malformed("its first event is not Attached"));
        };
        // A socket bound by somebody else (a service manager) names the wrong process: prove nothing then.
        let same = daemon.is_some_and(|pid| pid.as_raw_nonzero().get().unsigned_abs() == attached.daemon_pid);
        let process = if same { process } else { DaemonProcess::default() };
        let (end, ended) = watch::channel(None);
        let lease = Lease { number, ..lease(attached, &options.socket, process, ended)? };
        Ok(Attached { lease: Arc::new(lease), events, client, end })
    };
    time::timeout(patience, attempt).await.unwrap_or(Err(Error::Timeout(patience)))
}

/// The process at the other end, allowed from here on to reach our memory through `/proc/<pid>/mem`.
fn daemon_of(stream: &UnixStream) -> Option<Pid> {
    let pid = stream.peer_cred().ok()?.pid().and_then(Pid::from_raw)?;
    // Fails where there is no Yama, and then is not needed; where it is needed and fails, the daemon finds out
    // at attach and asks for an assistant, or says so at registration.
    if let Err(error) = rustix::process::set_ptracer(PTracer::ProcessID(pid)) {
        tracing::debug!(%error, "PR_SET_PTRACER");
    }
    Some(pid)
}

fn request(introduction: Introduction<'_>) -> wire::AttachRequest {
    let Introduction { options, seed, port, known_peers, revocations, .. } = introduction;
    wire::AttachRequest {
        key: seed.to_vec(),
        name: options.name.clone(),
        gpu_id: options.gpu_id,
        rail_map: options.rail_map.clone(),
        policy: options.policy.to_wire(),
        advertise_host: options.advertise_host.clone().unwrap_or_default(),
        preferred_port: port.unwrap_or_default().into(),
        transports: options.transports.iter().map(|path| i32::from(*path)).collect(),
        known_peers,
        revocations,
        ..Default::default()
    }
}

fn lease(
    attached: wire::Attached,
    socket: &Path,
    process: DaemonProcess,
    ended: watch::Receiver<Option<Ending>>,
) -> Result<Lease, Error> {
    let token: [u8; 32] =
        attached.token.as_slice().try_into().map_err(|_| malformed("its token does not have 32 bytes"))?;
    let boot_id = attached
        .boot_id
        .as_slice()
        .try_into()
        .map_err(|_| malformed("its boot id does not have 16 bytes"))?;
    let process_access = attached.process_access();
    let limits = attached.limits.ok_or_else(|| malformed("it tells no limits"))?;
    Ok(Lease {
        number: 0,
        engine_id: attached.engine_id,
        session_id: attached.session_id,
        boot_id,
        token_metadata: MetadataValue::from_bytes(&token),
        token,
        limits: Limits {
            slices: limits.slices,
            chunk_slices: limits.chunk_slices,
            regions: limits.regions,
            transfers: limits.transfers,
        },
        daemon_version: attached.daemon_version,
        daemon_pid: attached.daemon_pid,
        fd_socket: fd_socket(attached.fd_socket, socket),
        process_access,
        assistant: OnceCell::new(),
        process,
        ended,
        draining: AtomicBool::new(false),
        released: AtomicBool::new(false),
    })
}

/// A daemon that does not say has it beside its engine socket.
fn fd_socket(told: String, socket: &Path) -> PathBuf {
    if !told.is_empty() {
        return told.into();
    }
    let mut path = socket.as_os_str().to_owned();
    path.push(".fd");
    path.into()
}

fn malformed(message: &str) -> Error {
    Error::Call { call: "Attach", message: message.to_owned() }
}

fn explain(options: &EngineOptions, no_reply: NoReply) -> Error {
    match no_reply {
        NoReply::Answered(error) => error,
        NoReply::Lost(_, cause) => Error::NoDaemon { path: options.socket.clone(), cause },
    }
}

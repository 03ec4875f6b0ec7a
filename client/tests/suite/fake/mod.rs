//! A daemon that answers as it is told and remembers what it was asked.

mod files;
mod service;

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use kvferry_client::{EngineOptions, Lengths, Op, Policy, Slices, Transfer};
use kvferry_proto::{
    engine::v1::{self as wire, engine_server::EngineServer},
    types::v1 as types,
};
use service::Service;
use tokio::{net::UnixListener, runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Status};

pub(crate) const TOKEN: [u8; 32] = [0x42; 32];
pub(crate) const BOOT: [u8; 16] = [0xb0; 16];
pub(crate) const NEXT_BOOT: [u8; 16] = [0xb1; 16];
pub(crate) const SESSION: &str = "127.0.0.1:20000";

/// What the daemon answers to everything but Attach and GetNode.
#[derive(Clone, Default)]
pub(crate) enum Answer {
    #[default]
    Good,
    /// Takes the call and says nothing.
    Nothing,
    /// Takes the call and answers what is told next.
    Later,
    Status(Code, Option<i32>),
    Failure(types::Failure),
    Outcome(wire::Outcome),
}

/// What the daemon answers to Attach.
#[derive(Clone)]
pub(crate) enum First {
    Attached(Box<wire::Attached>),
    Other(Box<wire::EngineEvent>),
    Ends,
    Silence,
    Status(Code, Option<i32>),
}

#[derive(Default)]
struct State {
    calls: Vec<(&'static str, Option<Vec<u8>>)>,
    transfers: Vec<wire::TransferRequest>,
    streams: usize,
    registered: Vec<wire::RegisterRegionsRequest>,
    waits: Vec<wire::WaitRequest>,
    cancels: Vec<Vec<u8>>,
    handed: Vec<Handed>,
    attached: Option<wire::AttachRequest>,
    attaches: usize,
    /// Number of the first region that the next registration gets.
    first_region: u32,
    unregistered: Vec<wire::UnregisterRegionsRequest>,
    /// Base of a region that is never taken.
    refused_base: Option<u64>,
    lease: Option<mpsc::Sender<Result<wire::EngineEvent, Status>>>,
    answer: Answer,
    fd_reason: u16,
    /// Of the latest revocation.
    epoch: u64,
    /// Cancellations to come of transfers that are not here yet.
    unknown_cancels: u32,
    /// What replies to transfers say.
    known_target: Option<wire::KnownTarget>,
    /// To transfers.
    replies: usize,
}

/// A descriptor as it came over the fd socket.
pub(crate) struct Handed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) files: Vec<OwnedFd>,
}

pub(crate) struct Fake {
    shared: Arc<Shared>,
    first: First,
    runtime: Option<Runtime>,
    dir: tempfile::TempDir,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    told: tokio::sync::Notify,
}

impl Shared {
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let value = change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
        self.told.notify_waiters();
        value
    }

    /// What to answer, once that is known.
    async fn answer(&self) -> Answer {
        loop {
            let told = self.told.notified();
            let answer = self.state.lock().unwrap().answer.clone();
            if !matches!(answer, Answer::Later) {
                return answer;
            }
            told.await;
        }
    }
}

impl Fake {
    pub(crate) fn start() -> Self {
        Self::with(|_| {})
    }

    /// A daemon whose first event is as usual but for a change.
    pub(crate) fn with(change: impl FnOnce(&mut wire::Attached)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut attached = Box::new(attached(dir.path()));
        change(&mut attached);
        Self::run(dir, First::Attached(attached))
    }

    pub(crate) fn with_first(first: First) -> Self {
        Self::run(tempfile::tempdir().unwrap(), first)
    }

    fn run(dir: tempfile::TempDir, first: First) -> Self {
        let shared = Arc::new(Shared::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut fake = Self { shared, first, runtime: None, dir };
        {
            let _inside = runtime.enter();
            fake.serve();
        }
        fake.runtime = Some(runtime);
        fake
    }

    fn serve(&self) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let service = Service { shared: self.shared.clone(), first: self.first.clone() };
        let service = EngineServer::new(service).max_decoding_message_size(64 << 20);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        let files = UnixListener::bind(self.dir.path().join("engine.sock.fd")).unwrap();
        let shared = self.shared.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = files.accept().await {
                files::take(stream, &shared).await;
            }
        });
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("engine.sock")
    }

    pub(crate) fn options(&self) -> EngineOptions {
        EngineOptions {
            socket: self.socket(),
            name: "tester".into(),
            // Tests of attaching again say so.
            reattach: false,
            attach_timeout: Duration::from_secs(20),
            ..EngineOptions::default()
        }
    }

    pub(crate) fn answer(&self, answer: Answer) {
        self.shared.update(|state| state.answer = answer);
    }

    /// The next cancellations come before the transfers that they name.
    pub(crate) fn overtake_by_cancels(&self, count: u32) {
        self.shared.update(|state| state.unknown_cancels = count);
    }

    /// Whether all of those have come.
    pub(crate) fn await_overtaking(&self) {
        self.await_count(1, |state| usize::from(state.unknown_cancels == 0));
    }

    /// What the daemon knows of every target.
    pub(crate) fn know(&self, incarnation: u8, epoch: u64) {
        let known = wire::KnownTarget { incarnation: vec![incarnation; 32], epoch };
        self.shared.update(|state| state.known_target = Some(known));
    }

    pub(crate) fn refuse_files(&self, reason: u16) {
        self.shared.update(|state| state.fd_reason = reason);
    }

    /// Token of every call but Attach and GetNode, in order.
    pub(crate) fn calls(&self) -> Vec<(&'static str, Option<Vec<u8>>)> {
        self.shared.update(|state| state.calls.clone())
    }

    /// Messages of Transfer and TransferStream, in order.
    /// TransferStream calls so far.
    pub(crate) fn streams(&self) -> usize {
        self.shared.update(|state| state.streams)
    }

    pub(crate) fn transfers(&self) -> Vec<wire::TransferRequest> {
        self.shared.update(|state| state.transfers.clone())
    }

    pub(crate) fn registered(&self) -> Vec<wire::RegisterRegionsRequest> {
        self.shared.update(|state| state.registered.clone())
    }

    pub(crate) fn unregistered(&self) -> Vec<wire::UnregisterRegionsRequest> {
        self.shared.update(|state| state.unregistered.clone())
    }

    /// Numbers regions from here on.
    pub(crate) fn number_regions_from(&self, first: u32) {
        self.shared.update(|state| state.first_region = first);
    }

    pub(crate) fn refuse_region_at(&self, base: u64) {
        self.shared.update(|state| state.refused_base = Some(base));
    }

    /// Blocks until engines have attached so many times.
    pub(crate) fn await_attaches(&self, count: usize) {
        self.await_count(count, |state| state.attaches);
    }

    pub(crate) fn waits(&self) -> Vec<wire::WaitRequest> {
        self.shared.update(|state| state.waits.clone())
    }

    pub(crate) fn cancels(&self) -> Vec<Vec<u8>> {
        self.shared.update(|state| state.cancels.clone())
    }

    pub(crate) fn handed(&self) -> Vec<Handed> {
        self.shared.update(|state| std::mem::take(&mut state.handed))
    }

    pub(crate) fn attach_request(&self) -> wire::AttachRequest {
        self.shared.update(|state| state.attached.clone()).expect("somebody attached")
    }

    pub(crate) fn send(&self, event: wire::engine_event::Event) {
        let lease = self.shared.update(|state| state.lease.clone()).expect("somebody attached");
        lease.try_send(Ok(wire::EngineEvent { event: Some(event) })).unwrap();
    }

    /// Ends the lease and goes on otherwise.
    pub(crate) fn end_lease(&self) {
        self.shared.update(|state| state.lease = None);
    }

    /// Whether the engine has ended its lease, within 10 s.
    pub(crate) fn lease_is_closed(&self) -> bool {
        let lease = self.shared.update(|state| state.lease.clone()).expect("somebody attached");
        let runtime = self.runtime.as_ref().unwrap();
        runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(10), lease.closed()).await })
            .is_ok()
    }

    /// Blocks until the daemon has so many transfer messages.
    pub(crate) fn await_transfers(&self, count: usize) {
        self.await_count(count, |state| state.transfers.len());
    }

    /// Blocks until the daemon has so many cancellations.
    pub(crate) fn await_cancels(&self, count: usize) {
        self.await_count(count, |state| state.cancels.len());
    }

    /// Blocks until the daemon has made so many replies to transfers.
    pub(crate) fn await_replies(&self, count: usize) {
        self.await_count(count, |state| state.replies);
    }

    /// Blocks until the daemon has so many registrations.
    pub(crate) fn await_registrations(&self, count: usize) {
        self.await_count(count, |state| state.registered.len());
    }

    /// Blocks until the daemon has so many unregistrations.
    pub(crate) fn await_unregistrations(&self, count: usize) {
        self.await_count(count, |state| state.unregistered.len());
    }

    fn await_count(&self, count: usize, arrived: impl Fn(&State) -> usize) {
        let end = Instant::now() + Duration::from_secs(20);
        let mut state = self.shared.state.lock().unwrap();
        while arrived(&state) < count {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "only {} of {count} arrived", arrived(&state));
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Another run of the daemon at the same sockets, which remembers nothing but what tests ask about.
    pub(crate) fn restart(&mut self, first: First) {
        self.die();
        for socket in ["engine.sock", "engine.sock.fd"] {
            std::fs::remove_file(self.dir.path().join(socket)).unwrap();
        }
        self.first = first;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        {
            let _inside = runtime.enter();
            self.serve();
        }
        self.runtime = Some(runtime);
    }

    /// What the next run answers to Attach, as usual but for its boot and a change.
    pub(crate) fn next_boot(&self, change: impl FnOnce(&mut wire::Attached)) -> First {
        let mut attached = Box::new(attached(self.dir.path()));
        attached.boot_id = NEXT_BOOT.to_vec();
        // A process that cannot be watched: ours will not exit.
        attached.daemon_pid = 1;
        change(&mut attached);
        First::Attached(attached)
    }

    /// Every connection and both listeners close; the process they belong to, ours, lives on.
    pub(crate) fn die(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            self.end_lease();
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

pub(crate) fn attached(dir: &Path) -> wire::Attached {
    wire::Attached {
        engine_id: 7,
        session_id: SESSION.into(),
        boot_id: BOOT.to_vec(),
        token: TOKEN.to_vec(),
        limits: Some(wire::Limits {
            slices: 4 << 20,
            chunk_slices: 65_536,
            regions: 1024,
            transfers: 1024,
            message_bytes: 64 << 20,
        }),
        daemon_version: "fake".into(),
        daemon_pid: std::process::id(),
        fd_socket: dir.join("engine.sock.fd").to_string_lossy().into_owned(),
        process_access: wire::ProcessAccess::Direct.into(),
    }
}

/// A transfer of `count` slices of 100 bytes whose addresses tell their place.
pub(crate) fn transfer(count: u64) -> Transfer {
    Transfer {
        session: "127.0.0.1:20001".into(),
        op: Op::Write,
        slices: Slices {
            local: (0..count).map(|index| 0x1000 + index).collect(),
            remote: (0..count).map(|index| 0x9000_0000 + index).collect(),
            lengths: Lengths::Uniform(100),
        },
        tag: None,
        deadline: None,
        policy: Policy::default(),
        id: None,
    }
}

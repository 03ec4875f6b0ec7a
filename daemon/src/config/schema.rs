//! Every setting with its default. `deploy/kvferryd.example.toml` says what each is for; a test keeps the two
//! in step. Units stand last in names.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{LockMode, LogFormat, PortRange, ProcessMode, Transport};
use crate::{
    domain::PathKind,
    policy::{HealthPolicy, RetryPolicy},
};

macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

section! {
    /// All settings.
    Config {
        /// Transports that may be used, best first.
        transports: Vec<Transport> = vec![Transport::Local, Transport::Tcp],
        /// Where engines and peers reach the daemon.
        endpoint: Endpoint = Endpoint::default(),
        /// Retry of transfers.
        retry: Retry = Retry::default(),
        /// Health of sessions.
        session: Session = Session::default(),
        /// Waits for proof.
        fence: Fence = Fence::default(),
        /// The registrar.
        registration: Registration = Registration::default(),
        /// Engine memory.
        memory: Memory = Memory::default(),
        /// Private memory of engine processes.
        process: Process = Process::default(),
        /// TCP lanes.
        tcp: Tcp = Tcp::default(),
        /// Copies within the node.
        local: Local = Local::default(),
        /// RDMA devices.
        rdma: Rdma = Rdma::default(),
        /// Bounds.
        limits: Limits = Limits::default(),
        /// Who may talk to the daemon.
        security: Security = Security::default(),
        /// The admin port.
        admin: Admin = Admin::default(),
        /// Leaving.
        drain: Drain = Drain::default(),
        /// Coming back.
        restart: Restart = Restart::default(),
        /// The control runtime.
        control: Control = Control::default(),
        /// Logging.
        log: Log = Log::default(),
    }
}

section! {
    /// Where engines and peers reach the daemon.
    Endpoint {
        /// Unix socket for engines.
        socket: PathBuf = "/run/kvferry/engine.sock".into(),
        /// What outlives the daemon: its node id, which process it is, and its ports.
        state_dir: PathBuf = "/var/lib/kvferry".into(),
        /// Address that endpoints are bound to.
        bind_host: IpAddr = IpAddr::from([127, 0, 0, 1]),
        /// Host in session ids; empty = `bind_host`.
        advertise_host: String = String::new(),
        /// Ports of endpoints, one per engine.
        ports: PortRange = PortRange { first: 20_000, last: 27_999 },
        /// Longest time from a connection to the end of its handshake.
        handshake_timeout_ms: u64 = 5000,
        /// Connections of one endpoint that have not said yet what they are.
        unclassified: usize = 1024,
        /// Rest of a port whose engine is gone, before another engine may have it.
        port_quarantine_s: u64 = 900,
    }
}

section! {
    /// Retry of transfers; an engine or a transfer may ask for its own.
    Retry {
        /// Losses in a row that end a transfer; 1 = no retry.
        attempts: u32 = 3,
        /// The n-th loss waits n times this.
        backoff_ms: u64 = 50,
        /// Longest life of a transfer.
        deadline_ms: u64 = 30_000,
        /// Longest time without a byte moved.
        progress_timeout_ms: u64 = 10_000,
        /// Longest time for opening a session again.
        reconnect_ms: u64 = 5000,
    }
}

section! {
    /// Health of sessions.
    Session {
        /// Outages in a row with transfers given up that fail a session; 1 = fail fast.
        failure_threshold: u32 = 10,
        /// Longest wait between probes of a failed session.
        probe_max_ms: u64 = 1000,
        /// Time between beats.
        heartbeat_ms: u64 = 500,
        /// Longest silence of a living peer daemon.
        silence_ms: u64 = 3000,
        /// How long a session id stays bound to the engine first met there.
        pin_idle_s: u64 = 600,
    }
}

section! {
    /// Waits for proof.
    Fence {
        /// Wait for the own half before UNSETTLED is answered.
        settle_ms: u64 = 5000,
        /// Wait for the peer's half before it is called unconfirmed.
        peer_wait_ms: u64 = 3000,
    }
}

section! {
    /// The registrar.
    Registration {
        /// What driver calls are serialised over.
        lock: LockMode = LockMode::Node,
        /// Advisory lock that extends `node` to a second daemon; empty = none.
        lock_file: PathBuf = PathBuf::new(),
    }
}

section! {
    /// Engine memory.
    Memory {
        /// Take memfds of huge pages, where a punched hole kills the daemon.
        allow_hugetlb: bool = false,
    }
}

section! {
    /// Private memory of engine processes.
    Process {
        /// How it is reached.
        mode: ProcessMode = ProcessMode::Auto,
        /// How long an engine that copies for itself may leave a request unclaimed.
        answer_ms: u64 = 1000,
    }
}

section! {
    /// TCP lanes.
    Tcp {
        /// Lanes of a session in each direction.
        lanes: usize = 1,
        /// Threads that carry all lanes.
        threads: usize = 2,
        /// Parts in flight on a lane.
        window_parts: usize = 32,
        /// The longest that a lane's thread looks for work before it sleeps, in microseconds.
        spin_us: u64 = 200,
        /// Sum the payload of parts; either end may ask for it.
        checksum: bool = false,
    }
}

section! {
    /// Copies within the node.
    Local {
        /// Threads that copy.
        threads: usize = 2,
    }
}

section! {
    /// RDMA devices.
    Rdma {
        /// Those of engines that bring no rail map; empty = any.
        rail_map: String = String::new(),
    }
}

section! {
    /// Bounds.
    Limits {
        /// Slices of one transfer.
        slices: usize = 4_194_304,
        /// Slices in one message.
        chunk_slices: usize = 65_536,
        /// Regions of one engine.
        regions: usize = 4096,
        /// Registered bytes of one engine.
        region_bytes: u64 = 1 << 40,
        /// Transfers of one engine that have not ended.
        transfers: usize = 4096,
        /// Ended transfers of one engine that can still be asked about.
        finished: usize = 65_536,
        /// Engines attached at once.
        engines: usize = 64,
        /// Bytes of one gRPC message.
        message_bytes: usize = 16 << 20,
        /// Sessions of one engine.
        sessions: usize = 1024,
        /// Descriptors handed over by one engine and not released.
        fds: usize = 4096,
        /// Revoked ranges that one endpoint remembers.
        revocations: usize = 4096,
    }
}

section! {
    /// Who may talk to the daemon.
    Security {
        /// File with the secret that all daemons of the cluster share; empty = none.
        secret_file: PathBuf = PathBuf::new(),
        /// Bind beyond loopback though peers are not authenticated.
        insecure: bool = false,
        /// Users that may attach; with `allow_gids` empty = the daemon's own and root.
        allow_uids: Vec<u32> = Vec::new(),
        /// Groups that may attach.
        allow_gids: Vec<u32> = Vec::new(),
    }
}

section! {
    /// The admin port.
    Admin {
        /// `ip:port`; empty = off.
        listen: String = "127.0.0.1:9464".into(),
    }
}

section! {
    /// Leaving.
    Drain {
        /// What transfers in flight get after SIGTERM.
        timeout_ms: u64 = 30_000,
    }
}

section! {
    /// Coming back.
    Restart {
        /// Wait at the start for an earlier daemon's exit.
        predecessor_ms: u64 = 10_000,
        /// How long an earlier daemon's ports are held for the engines that had them.
        grace_ms: u64 = 10_000,
    }
}

section! {
    /// The control runtime.
    Control {
        /// Threads for gRPC, timers and heartbeats; payload has threads of its own.
        threads: usize = 1,
    }
}

section! {
    /// Logging.
    Log {
        /// Form of a line.
        format: LogFormat = LogFormat::Text,
        /// A level, or directives of tracing's `EnvFilter`.
        filter: String = "info".into(),
    }
}

impl Config {
    /// The transports as paths, best first.
    pub fn paths(&self) -> Vec<PathKind> {
        let path = |transport: &Transport| match transport {
            Transport::Local => PathKind::Local,
            Transport::Tcp => PathKind::Tcp,
        };
        self.transports.iter().map(path).collect()
    }
}

impl Endpoint {
    /// Host in session ids.
    pub fn advertised(&self) -> String {
        match self.advertise_host.as_str() {
            "" => self.bind_host.to_string(),
            host => host.to_owned(),
        }
    }

    /// The socket that takes descriptors: beside [`Endpoint::socket`].
    pub fn fd_socket(&self) -> PathBuf {
        let mut path = self.socket.clone().into_os_string();
        path.push(".fd");
        path.into()
    }

    /// [`Endpoint::handshake_timeout_ms`]
    pub fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    /// [`Endpoint::port_quarantine_s`]
    pub fn port_quarantine(&self) -> Duration {
        Duration::from_secs(self.port_quarantine_s)
    }
}

impl Retry {
    /// As the policy that decides by it.
    pub fn policy(&self) -> RetryPolicy {
        RetryPolicy {
            attempts: self.attempts,
            backoff: Duration::from_millis(self.backoff_ms),
            deadline: Duration::from_millis(self.deadline_ms),
            progress_timeout: Duration::from_millis(self.progress_timeout_ms),
            reconnect: Duration::from_millis(self.reconnect_ms),
        }
    }
}

impl Session {
    /// As the policy that decides by it.
    pub fn health(&self) -> HealthPolicy {
        HealthPolicy {
            failure_threshold: self.failure_threshold,
            probe_max: Duration::from_millis(self.probe_max_ms),
        }
    }

    /// [`Session::heartbeat_ms`]
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// [`Session::silence_ms`]
    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.silence_ms)
    }

    /// [`Session::pin_idle_s`]
    pub fn pin_idle(&self) -> Duration {
        Duration::from_secs(self.pin_idle_s)
    }
}

impl Fence {
    /// [`Fence::settle_ms`]
    pub fn settle(&self) -> Duration {
        Duration::from_millis(self.settle_ms)
    }

    /// [`Fence::peer_wait_ms`]
    pub fn peer_wait(&self) -> Duration {
        Duration::from_millis(self.peer_wait_ms)
    }
}

impl Process {
    /// [`Process::answer_ms`]
    pub fn answer(&self) -> Duration {
        Duration::from_millis(self.answer_ms)
    }
}

impl Registration {
    /// The lock file, if there is to be one.
    pub fn lock_file(&self) -> Option<&Path> {
        (!self.lock_file.as_os_str().is_empty()).then_some(&self.lock_file)
    }
}

impl Admin {
    /// Where to listen, if at all. Validation has seen to it that the text is an address.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }
}

impl Drain {
    /// [`Drain::timeout_ms`]
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

impl Restart {
    /// [`Restart::predecessor_ms`]
    pub fn predecessor(&self) -> Duration {
        Duration::from_millis(self.predecessor_ms)
    }

    /// [`Restart::grace_ms`]
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.grace_ms)
    }
}

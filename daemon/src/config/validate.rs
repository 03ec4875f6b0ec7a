//! What types cannot say: ranges, and settings that must fit each other.

use tracing_subscriber::EnvFilter;

use super::{Config, Problem, layers::Origins};

/// Longest path of a Unix socket: `sun_path` less its terminating zero.
const MAX_SOCKET_PATH: usize = 107;

/// A day. Longer waits are mistakes, and sums of instants stay far from overflow.
const MAX_MS: u64 = 86_400_000;

/// Wire bytes of one slice in a chunk: two addresses and a length.
const SLICE_BYTES: usize = 24;

/// Room for the rest of a message that carries a full chunk.
const MESSAGE_OVERHEAD: usize = 65_536;

/// Everything that is wrong, in the order of the file.
pub(super) fn problems(config: &Config, origins: &Origins) -> Vec<Problem> {
    let mut check = Check { origins, problems: Vec::new() };
    ranges(config, &mut check);
    endpoint(config, &mut check);
    session(config, &mut check);
    limits(config, &mut check);
    rest(config, &mut check);
    check.problems
}

struct Check<'a> {
    origins: &'a Origins,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn require(&mut self, holds: bool, key: &str, message: impl FnOnce() -> String) {
        if !holds {
            let origin = self.origins.get(key).map_or("the default", String::as_str).to_owned();
            self.problems.push(Problem { key: key.to_owned(), origin, message: message() });
        }
    }
}

fn ranges(config: &Config, check: &mut Check<'_>) {
    let Config { endpoint, retry, session, fence, process, tcp, local, .. } = config;
    let Config { limits, drain, restart, control, .. } = config;
    let table: &[(&str, u64, u64, u64)] = &[
        ("endpoint.handshake_timeout_ms", endpoint.handshake_timeout_ms, 1, MAX_MS),
        ("endpoint.unclassified", endpoint.unclassified as u64, 1, 65_536),
        ("endpoint.port_quarantine_s", endpoint.port_quarantine_s, 0, 86_400),
        ("retry.attempts", retry.attempts.into(), 1, 1000),
        ("retry.backoff_ms", retry.backoff_ms, 0, MAX_MS),
        ("retry.deadline_ms", retry.deadline_ms, 1, MAX_MS),
        ("retry.progress_timeout_ms", retry.progress_timeout_ms, 1, MAX_MS),
        ("retry.reconnect_ms", retry.reconnect_ms, 0, MAX_MS),
        ("session.failure_threshold", session.failure_threshold.into(), 1, 1_000_000),
        ("session.probe_max_ms", session.probe_max_ms, 1, MAX_MS),
        ("session.heartbeat_ms", session.heartbeat_ms, 1, MAX_MS),
        ("session.silence_ms", session.silence_ms, 1, MAX_MS),
        ("session.pin_idle_s", session.pin_idle_s, 0, MAX_MS / 1000),
        ("fence.settle_ms", fence.settle_ms, 1, MAX_MS),
        ("fence.peer_wait_ms", fence.peer_wait_ms, 0, MAX_MS),
        ("process.answer_ms", process.answer_ms, 1, MAX_MS),
        ("tcp.lanes", tcp.lanes as u64, 1, 16),
        ("tcp.threads", tcp.threads as u64, 1, 256),
        ("tcp.window_parts", tcp.window_parts as u64, 1, 1024),
        ("tcp.spin_us", tcp.spin_us, 0, 10_000),
        ("local.threads", local.threads as u64, 1, 256),
        // The wire counts the slices of a transfer, and the regions of a part, in fields of this size.
        ("limits.slices", limits.slices as u64, 1, u32::MAX.into()),
        ("limits.chunk_slices", limits.chunk_slices as u64, 1, u32::MAX.into()),
        ("limits.regions", limits.regions as u64, 1, u16::MAX.into()),
        ("limits.region_bytes", limits.region_bytes, 1, 1 << 60),
        ("limits.transfers", limits.transfers as u64, 1, 1 << 20),
        ("limits.finished", limits.finished as u64, 1, 1 << 24),
        ("limits.engines", limits.engines as u64, 1, 65_536),
        ("limits.message_bytes", limits.message_bytes as u64, 1 << 20, 1 << 30),
        ("limits.sessions", limits.sessions as u64, 1, 65_536),
        ("limits.fds", limits.fds as u64, 1, 65_536),
        // What is told to every peer when a session opens, so it must fit into one message.
        ("limits.revocations", limits.revocations as u64, 1, 65_536),
        ("drain.timeout_ms", drain.timeout_ms, 0, MAX_MS),
        ("restart.predecessor_ms", restart.predecessor_ms, 0, MAX_MS),
        ("restart.grace_ms", restart.grace_ms, 0, MAX_MS),
        ("control.threads", control.threads as u64, 1, 256),
    ];
    for &(key, value, least, most) in table {
        let fits = (least..=most).contains(&value);
        check.require(fits, key, || format!("{value} is not between {least} and {most}"));
    }
}

fn endpoint(config: &Config, check: &mut Check<'_>) {
    let endpoint = &config.endpoint;
    let length = endpoint.fd_socket().as_os_str().len();
    check.require(length <= MAX_SOCKET_PATH, "endpoint.socket", || {
        format!("with .fd the path has {length} bytes; a Unix socket's may have {MAX_SOCKET_PATH}")
    });
    check.require(endpoint.socket.file_name().is_some(), "endpoint.socket", || {
        format!("{:?} names no file", endpoint.socket)
    });
    check.require(!endpoint.state_dir.as_os_str().is_empty(), "endpoint.state_dir", || {
        "a directory is needed".to_owned()
    });
    let host = &endpoint.advertise_host;
    let is_host = host.chars().all(|c| c.is_ascii_alphanumeric() || ".-:_".contains(c));
    check
        .require(is_host, "endpoint.advertise_host", || format!("{host:?} is neither a name nor an address"));
    check.require(
        !endpoint.bind_host.is_unspecified() || !host.is_empty(),
        "endpoint.advertise_host",
        || format!("peers cannot reach {}: say which host they are to use", endpoint.bind_host),
    );
    let authenticated = config.security.insecure || !config.security.secret_file.as_os_str().is_empty();
    check.require(endpoint.bind_host.is_loopback() || authenticated, "endpoint.bind_host", || {
        let host = endpoint.bind_host;
        format!(
            "{host} is not loopback and peers are not authenticated: set security.secret_file, or accept it with \
             security.insecure = true"
        )
    });
}

fn session(config: &Config, check: &mut Check<'_>) {
    let (silence, beat) = (config.session.silence_ms, config.session.heartbeat_ms);
    check.require(silence > beat.saturating_mul(2), "session.silence_ms", || {
        format!(
            "{silence} is not more than two beats (session.heartbeat_ms = {beat}): one lost beat would kill"
        )
    });
}

fn limits(config: &Config, check: &mut Check<'_>) {
    let limits = &config.limits;
    let (chunk, slices) = (limits.chunk_slices, limits.slices);
    check.require(chunk <= slices, "limits.chunk_slices", || {
        format!("{chunk} is more than a whole transfer may have (limits.slices = {slices})")
    });
    let needed = chunk.saturating_mul(SLICE_BYTES).saturating_add(MESSAGE_OVERHEAD);
    check.require(needed <= limits.message_bytes, "limits.message_bytes", || {
        format!(
            "{} cannot hold limits.chunk_slices = {chunk} slices: {needed} are needed",
            limits.message_bytes
        )
    });
}

fn rest(config: &Config, check: &mut Check<'_>) {
    let transports = &config.transports;
    check.require(!transports.is_empty(), "transports", || "at least one transport is needed".to_owned());
    let twice = transports.iter().enumerate().any(|(at, one)| transports[..at].contains(one));
    check.require(!twice, "transports", || "a transport is named twice".to_owned());
    let listen = &config.admin.listen;
    let address = config.admin.address();
    check.require(listen.is_empty() || address.is_some(), "admin.listen", || {
        format!("{listen:?} is no ip:port; \"\" turns the admin port off")
    });
    let reachable = address.is_some_and(|address| !address.ip().is_loopback());
    check.require(!reachable || config.security.insecure, "admin.listen", || {
        format!("{listen} is not loopback and asks for no password; security.insecure = true accepts that")
    });
    if let Err(wrong) = config.rdma.rail_map() {
        check.require(false, "rdma.rail_map", || wrong);
    }
    if let Err(error) = EnvFilter::builder().parse(&config.log.filter) {
        check.require(false, "log.filter", || error.to_string());
    }
}

//! An engine that is thrown away afterwards: what a real one here would meet.

use std::{net::UdpSocket, path::Path, time::Duration};

use kvferry_client::{Engine, EngineOptions, Error, Memory, ProcessAccess, Reason, SharedBuffer};
use kvferry_proto::engine::v1::NodeInfo;

use super::{
    Findings,
    finding::{Finding, Status},
};

const ATTACH_WITHIN: Duration = Duration::from_secs(5);
const PROBE_WITHIN: Duration = Duration::from_secs(3);
const YAMA: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// What sglang takes its address from, in this order.
const HOST_VARIABLES: [&str; 2] = ["SGLANG_HOST_IP", "HOST_IP"];

/// Attaches, and tries what engines need. `visible`: the daemon's process can be seen from here.
pub(super) fn check(
    socket: &Path,
    info: &NodeInfo,
    visible: bool,
    variable: &dyn Fn(&str) -> Option<String>,
    findings: &Findings,
) {
    let engine = match attach(socket, None) {
        Ok(engine) => engine,
        Err(error) => return findings.tell(refused(&error)),
    };
    findings.tell(Finding::ok("attach", format!("an engine was attached as {}", engine.session_id())));
    findings.tell(endpoint(&engine));
    findings.tell(host(socket, info, idea_of_host(variable)));
    findings.tell(shared_buffer(&engine));
    findings.tell(private_memory(&engine, visible));
}

fn attach(socket: &Path, host: Option<String>) -> Result<Engine, Error> {
    Engine::attach(EngineOptions {
        socket: socket.to_owned(),
        name: "kvferry doctor".to_owned(),
        advertise_host: host,
        reattach: false,
        attach_timeout: ATTACH_WITHIN,
        ..EngineOptions::default()
    })
}

fn refused(error: &Error) -> Finding {
    let reason = match error {
        Error::Refused(failure) => failure.reason,
        _ => Reason::Unspecified,
    };
    let fix = match reason {
        Reason::Draining => "the daemon was told to stop: start it again",
        Reason::Limit => "raise limits.engines, or the daemon's RLIMIT_NOFILE",
        Reason::PortUnavailable => "widen endpoint.ports, or wait until ports have rested",
        _ => "see the daemon's log",
    };
    Finding::fail("attach", format!("an engine could not be attached: {error}"), fix)
}

/// The daemon's own address must lead back to it.
fn endpoint(engine: &Engine) -> Finding {
    match reaches(engine) {
        Ok(path) => Finding::ok("endpoint", format!("{} leads here, over {path}", engine.session_id())),
        Err(why) => Finding::fail(
            "endpoint",
            format!("the daemon cannot reach its own endpoint {}: {why}", engine.session_id()),
            "set endpoint.advertise_host to an address or name of endpoint.bind_host, and let endpoint.ports through",
        ),
    }
}

fn reaches(engine: &Engine) -> Result<String, String> {
    let probe = engine.probe(engine.session_id(), PROBE_WITHIN).map_err(|error| error.to_string())?;
    if probe.alive {
        let path = probe.path.map_or("an unknown path", |path| path.as_str_name());
        return Ok(path.trim_start_matches("PATH_").to_ascii_lowercase());
    }
    Err(probe.failure.map_or_else(|| "no reason was given".to_owned(), |failure| failure.to_string()))
}

/// The host that sglang will put into session ids here.
#[derive(Clone, PartialEq, Eq, Debug)]
enum HostIdea {
    /// A variable says so.
    Told { name: &'static str, host: String },
    /// It looks at interfaces and routes; this is the likely outcome.
    Guessed(String),
    /// It will not find one.
    None,
}

fn idea_of_host(variable: &dyn Fn(&str) -> Option<String>) -> HostIdea {
    let told = HOST_VARIABLES.iter().find_map(|&name| variable(name).map(|host| (name, host)));
    match (told, routed_address()) {
        (Some((name, host)), _) => HostIdea::Told { name, host },
        (None, Some(host)) => HostIdea::Guessed(host),
        (None, None) => HostIdea::None,
    }
}

/// The address that packets to the world would leave from. None is sent: connecting a UDP socket only looks up a route.
fn routed_address() -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip().to_string())
}

fn host(socket: &Path, info: &NodeInfo, idea: HostIdea) -> Finding {
    let what = "sglang's host";
    let fix = format!(
        "set SGLANG_HOST_IP={} where sglang runs, or run it in the host's network",
        info.advertise_host
    );
    let (host, says) = match &idea {
        HostIdea::Told { name, host } => (host, format!("{name}={host}")),
        HostIdea::Guessed(host) => {
            (host, format!("SGLANG_HOST_IP is not set, and sglang will probably call this host {host}"))
        }
        HostIdea::None => {
            let why = "SGLANG_HOST_IP is not set, and there is no route to find an address by";
            return Finding::warn(what, why, fix);
        }
    };
    let wrong = match answers_at(socket, host) {
        Ok(()) => return Finding::ok(what, format!("{says}: the daemon answers there")),
        Err(wrong) => format!("{says}: the daemon does not answer there ({wrong})"),
    };
    let status = if matches!(idea, HostIdea::Told { .. }) { Status::Fail } else { Status::Warn };
    Finding { status, what, why: wrong, fix: Some(fix) }
}

/// As an engine that is known by this host.
fn answers_at(socket: &Path, host: &str) -> Result<(), String> {
    let engine = attach(socket, Some(host.to_owned())).map_err(|error| error.to_string())?;
    reaches(&engine).map(drop)
}

fn shared_buffer(engine: &Engine) -> Finding {
    let what = "fd passing";
    let registered = SharedBuffer::new(rustix::param::page_size())
        .and_then(|buffer| engine.register(&[Memory::Shared(&buffer)]));
    match registered {
        Ok(_) => Finding::ok(what, "the daemon has mapped a shared buffer"),
        Err(error) => Finding::fail(
            what,
            format!("a shared buffer was not taken: {error}"),
            "mount the socket's folder at the same path as on the node: descriptors go to the path that the daemon \
             names",
        ),
    }
}

/// A page as sglang's small buffers are: memory of this process that no descriptor stands for.
fn private_memory(engine: &Engine, visible: bool) -> Finding {
    let page = vec![0_u8; rustix::param::page_size()];
    let memory = Memory::Process { address: page.as_ptr() as u64, length: page.len() as u64 };
    let registered = engine.register(&[memory]);
    if let Ok(regions) = &registered {
        let ids: Vec<_> = regions.iter().map(|region| region.id).collect();
        // If it does not come to that, the page is only ever touched by transfers, and nobody names it.
        let _ = engine.unregister(&ids);
    }
    let scope = std::fs::read_to_string(YAMA).ok();
    let how = registered.as_ref().map(|_| engine.process_access());
    private_memory_told(how, visible, scope.as_deref().map(str::trim))
}

/// `how` the page is reached, if it was registered.
fn private_memory_told(how: Result<ProcessAccess, &Error>, visible: bool, scope: Option<&str>) -> Finding {
    let what = "private memory";
    let namespace = if visible { "pid namespace shared" } else { "the daemon is in another pid namespace" };
    let yama = scope.map_or("no Yama".to_owned(), |scope| format!("ptrace_scope {scope}"));
    match how {
        Ok(how) => {
            let how = how.as_str_name().trim_start_matches("PROCESS_ACCESS_").to_ascii_lowercase();
            Finding::ok(what, format!("a page was registered: {how} ({namespace}, {yama})"))
        }
        Err(error) => {
            let fix = match (visible, scope) {
                (false, _) => "share the node's pid namespace (docker --pid=host, Kubernetes hostPID: true)",
                (true, Some("2" | "3")) => {
                    "sysctl kernel.yama.ptrace_scope=1, or run kvferryd with CAP_SYS_PTRACE"
                }
                (true, _) => "run kvferryd as this user or with CAP_SYS_PTRACE and CAP_DAC_OVERRIDE",
            };
            let why = format!("a page was not taken: {error} ({namespace}, {yama})");
            Finding::fail(what, why, format!("{fix}, or keep buffers in kvferry.SharedBuffer"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_what_sglang_takes() {
        let idea = |variables: &[(&str, &str)]| {
            idea_of_host(&|name| {
                let found = variables.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let told = |name, host: &str| HostIdea::Told { name, host: host.to_owned() };
        assert_eq!(idea(&[("HOST_IP", "10.0.0.2")]), told("HOST_IP", "10.0.0.2"));
        let both = [("HOST_IP", "10.0.0.2"), ("SGLANG_HOST_IP", "10.0.0.1")];
        assert_eq!(idea(&both), told("SGLANG_HOST_IP", "10.0.0.1"));
        assert!(!matches!(idea(&[]), HostIdea::Told { .. }));
    }

    #[test]
    fn private_memory_out_of_reach_names_what_is_in_the_way() {
        let error = Error::Timeout(PROBE_WITHIN);
        let fix = |visible, scope| {
            let finding = private_memory_told(Err(&error), visible, scope);
            assert_eq!(finding.status, Status::Fail);
            finding.fix.unwrap()
        };
        assert!(fix(false, None).contains("--pid=host"));
        assert!(fix(true, Some("3")).contains("ptrace_scope=1"));
        assert!(fix(true, None).contains("CAP_SYS_PTRACE"));
    }

    #[test]
    fn a_refusal_comes_with_what_helps() {
        assert!(refused(&Error::Timeout(ATTACH_WITHIN)).fix.unwrap().contains("log"));
    }
}

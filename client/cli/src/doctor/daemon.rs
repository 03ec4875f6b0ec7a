//! The daemon itself: does it answer, which version is it, and how is its node known?

use std::{net::IpAddr, path::Path};

use kvferry_client::{Error, Node};
use kvferry_proto::engine::v1::NodeInfo;

use super::{Findings, finding::Finding};

const OWN_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Nothing where it does not answer.
pub(super) fn check(socket: &Path, findings: &Findings) -> Option<NodeInfo> {
    match Node::connect(socket).and_then(|node| node.info()) {
        Ok(info) => {
            for finding in [version(&info), life(&info), address(&info)] {
                findings.tell(finding);
            }
            Some(info)
        }
        Err(error) => {
            findings.tell(silent(&error));
            None
        }
    }
}

fn silent(error: &Error) -> Finding {
    let fix = match error {
        Error::Call { .. } => {
            "kvferryd and this command are of versions that do not understand each other: install one"
        }
        _ => "the daemon is stopped or stuck, or does not speak to this user: see its log, restart it",
    };
    Finding::fail("daemon", format!("it does not answer: {error}"), fix)
}

fn version(info: &NodeInfo) -> Finding {
    let why = format!("kvferryd {}, this command is {OWN_VERSION}", info.version);
    match info.version == OWN_VERSION {
        true => Finding::ok("version", why),
        false => Finding::warn("version", why, "install the same version in the container and on the node"),
    }
}

fn life(info: &NodeInfo) -> Finding {
    let why = format!("node {}, pid {}, up {} s", info.node_id, info.pid, info.uptime_ms / 1000);
    match info.draining {
        false => Finding::ok("daemon", why),
        true => Finding::fail(
            "daemon",
            format!("{why}; it is draining and takes no engine"),
            "it was told to stop (SIGTERM): start it again; engines that were attached come back by themselves",
        ),
    }
}

fn address(info: &NodeInfo) -> Finding {
    let host = &info.advertise_host;
    let local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let why = format!("peers are told to reach this node at {host}");
    match local {
        false => Finding::ok("address", why),
        true => Finding::warn(
            "address",
            format!("{why}: engines of other nodes cannot"),
            "set endpoint.bind_host and endpoint.advertise_host to the node's address",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Status;

    fn info() -> NodeInfo {
        NodeInfo { version: OWN_VERSION.into(), advertise_host: "10.0.0.1".into(), ..NodeInfo::default() }
    }

    #[test]
    fn what_is_told_of_a_daemon() {
        assert_eq!(version(&info()).status, Status::Ok);
        let other = version(&NodeInfo { version: "9.9.9".into(), ..info() });
        assert_eq!(other.status, Status::Warn);
        assert!(other.why.contains("9.9.9") && other.why.contains(OWN_VERSION), "{other}");
        assert_eq!(life(&info()).status, Status::Ok);
        let leaving = life(&NodeInfo { draining: true, ..info() });
        assert_eq!(leaving.status, Status::Fail);
        assert!(leaving.why.contains("draining"), "{leaving}");
        assert_eq!(address(&info()).status, Status::Ok);
        for host in ["127.0.0.1", "::1", "localhost"] {
            let finding = address(&NodeInfo { advertise_host: host.into(), ..info() });
            assert_eq!(finding.status, Status::Warn, "{finding}");
        }
    }
}

//! Which way the bytes of a session take.

use crate::domain::{Failure, PathKind, Reason};

/// What the choice depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RouteQuery<'a> {
    /// What the engine and the daemon allow, best first.
    pub allowed: &'a [PathKind],
    /// Both engines are attached to one run of one daemon.
    pub same_boot: bool,
    /// What the peer's daemon said it can do.
    pub offered: &'a [PathKind],
}

/// The first allowed path that reaches the peer, or NO_PATH saying what was allowed and what the peer offers.
///
/// Only what is allowed is ever taken: an engine that asked for rdma alone never gets tcp silently.
pub fn route(query: RouteQuery<'_>) -> Result<PathKind, Failure> {
    let reaches = |path: PathKind| match path {
        // The copy path needs no word of the peer: it is the same daemon, and its allow-list is `allowed`.
        PathKind::Local => query.same_boot,
        PathKind::Tcp => query.offered.contains(&PathKind::Tcp),
        // This daemon has no rdma transport, whatever the peer has.
        PathKind::Rdma => false,
    };
    query.allowed.iter().copied().find(|&path| reaches(path)).ok_or_else(|| no_path(query))
}

fn no_path(query: RouteQuery<'_>) -> Failure {
    let node = if query.same_boot { "on this node" } else { "on another node" };
    Failure::new(
        Reason::NoPath,
        format!("allowed: {}; the peer, {node}, offers: {}", names(query.allowed), names(query.offered)),
    )
}

fn names(paths: &[PathKind]) -> String {
    if paths.is_empty() {
        return "nothing".to_owned();
    }
    paths.iter().map(|path| path.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use PathKind::{Local, Rdma, Tcp};

    #[test]
    fn the_first_allowed_path_that_reaches_the_peer() {
        type Row<'a> = (&'a [PathKind], bool, &'a [PathKind], Option<PathKind>);
        let table: [Row<'_>; 12] = [
            (&[Local, Tcp], true, &[Local, Tcp], Some(Local)),
            (&[Local, Tcp], false, &[Local, Tcp], Some(Tcp)),
            // Order is preference, on the same node too.
            (&[Tcp, Local], true, &[Local, Tcp], Some(Tcp)),
            (&[Tcp], true, &[Local, Tcp], Some(Tcp)),
            (&[Local], true, &[], Some(Local)),
            (&[Local], false, &[Local, Tcp], None),
            (&[Tcp], false, &[], None),
            (&[Tcp], false, &[Rdma], None),
            (&[], true, &[Local, Tcp], None),
            // rdma is passed over, and never replaced by what was not allowed.
            (&[Rdma, Tcp], false, &[Rdma, Tcp], Some(Tcp)),
            (&[Rdma], false, &[Rdma, Tcp], None),
            (&[Rdma], true, &[Local, Tcp, Rdma], None),
        ];
        for (allowed, same_boot, offered, expected) in table {
            let got = route(RouteQuery { allowed, same_boot, offered });
            assert_eq!(got.as_ref().ok(), expected.as_ref(), "{allowed:?} {same_boot} {offered:?}");
            if let Err(failure) = got {
                assert_eq!(failure.reason, Reason::NoPath);
            }
        }
    }

    #[test]
    fn no_path_says_what_was_asked_and_what_there_is() {
        let query = RouteQuery { allowed: &[Rdma], same_boot: false, offered: &[Local, Tcp] };
        let failure = route(query).expect_err("rdma is not built");
        assert_eq!(failure.message, "allowed: rdma; the peer, on another node, offers: local, tcp");
    }
}

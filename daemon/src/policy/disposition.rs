//! What a failure means for the transfer it hit and for the health of its session.
//!
//! The classes of [`Reason`] give the rule, this file its exceptions. Counting itself (once per outage) is
//! [`super::Health`]'s; this only says whether a transfer given up for this reason speaks against the session.

use crate::domain::{Class, Reason};

/// Which daemon said it. Only DRAINING means something else from the other side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// This daemon.
    Own,
    /// The peer's daemon, or what became of it.
    Peer,
}

/// Whether a transfer goes on after a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retry {
    /// It ends.
    Never,
    /// What was lost is sent again; a loss is charged to the transfer that was hit.
    Charged,
    /// A transfer of which no part was sent is planned again, waits until its own deadline and is charged
    /// nothing; one of which a part was sent ends.
    IfNothingSent,
}

/// What follows from a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Disposition {
    /// Does the transfer go on?
    pub retry: Retry,
    /// Does giving the transfer up for this count against the session?
    pub counts: bool,
}

/// Judges a reason.
pub fn disposition(reason: Reason, origin: Origin) -> Disposition {
    let (retry, counts) = match (reason, origin) {
        // The outages that led here were counted; a transfer refused meanwhile tells nothing new.
        (Reason::SessionFailed, _) => (Retry::Never, false),
        // An announced end is no fault of the path: the peer will be back at the same address.
        (Reason::Draining, Origin::Peer) => (Retry::IfNothingSent, false),
        // Parts sent to the old boot may or may not have been applied, and the regions are new ones. Who sent
        // none can be planned again against them.
        (Reason::PeerDaemonRestarted, _) => (Retry::IfNothingSent, false),
        (reason, _) => match reason.class() {
            Class::Fabric => (Retry::Charged, true),
            Class::Stale | Class::Caller | Class::Local => (Retry::Never, false),
        },
    };
    Disposition { retry, counts }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, spelled out: a new reason must be put here by hand.
    #[test]
    fn every_reason_has_its_place() {
        use Reason::*;
        let charged = [
            ConnectRefused,
            ConnectTimeout,
            ConnectionLost,
            PeerSilent,
            HandshakeFailed,
            WorkCompletion,
            Checksum,
            ProgressTimeout,
        ];
        let if_nothing_sent = [PeerDaemonRestarted];
        let never = [
            Unspecified,
            SessionFailed,
            PeerRestarted,
            RegionChanged,
            LayoutChanged,
            BadArgument,
            Unregistered,
            OutOfBounds,
            Overlap,
            LayoutMismatch,
            Revoked,
            Cancelled,
            Deadline,
            UnknownSession,
            NotYours,
            UnsupportedMemory,
            NoPath,
            Limit,
            Memlock,
            Draining,
            EngineGone,
            EngineSilent,
            Driver,
            OwnDaemonGone,
            Unauthorised,
            PortUnavailable,
        ];
        let table = charged
            .iter()
            .map(|&reason| (reason, Disposition { retry: Retry::Charged, counts: true }))
            .chain(if_nothing_sent.map(|r| (r, Disposition { retry: Retry::IfNothingSent, counts: false })))
            .chain(never.map(|reason| (reason, Disposition { retry: Retry::Never, counts: false })));
        let mut seen = 0;
        for (reason, expected) in table {
            assert_eq!(disposition(reason, Origin::Own), expected, "{reason:?}");
            seen += 1;
        }
        assert_eq!(seen, Reason::ALL.len());
    }

    #[test]
    fn only_a_draining_peer_is_waited_for() {
        assert_eq!(
            disposition(Reason::Draining, Origin::Peer),
            Disposition { retry: Retry::IfNothingSent, counts: false }
        );
        for &reason in Reason::ALL.iter().filter(|&&reason| reason != Reason::Draining) {
            assert_eq!(disposition(reason, Origin::Own), disposition(reason, Origin::Peer), "{reason:?}");
        }
    }
}

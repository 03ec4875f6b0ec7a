//! What an engine says of itself when it attaches.

use std::{collections::BTreeMap, time::Duration};

use ed25519_dalek::SigningKey;

use crate::{
    domain::{Incarnation, PathKind, SessionId},
    policy::{HealthPolicy, RailMap, RetryPolicy, RevocationList},
};

/// Who is at the other end of the Unix socket, by the kernel's word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The process, as seen from here; nothing where it is in a pid namespace that is not visible.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What the engine sets for its transfers; unset fields fall back.
#[derive(Clone, Copy, Debug, Default)]
pub struct EnginePolicy {
    /// Losses in a row that end a transfer.
    pub attempts: Option<u32>,
    /// Wait after the first loss.
    pub backoff: Option<Duration>,
    /// Outages in a row that fail a session.
    pub failure_threshold: Option<u32>,
    /// Life of a transfer.
    pub deadline: Option<Duration>,
}

impl EnginePolicy {
    /// On top of `base`.
    pub fn retry(&self, base: RetryPolicy) -> RetryPolicy {
        RetryPolicy {
            attempts: self.attempts.unwrap_or(base.attempts).max(1),
            backoff: self.backoff.unwrap_or(base.backoff),
            deadline: self.deadline.unwrap_or(base.deadline),
            ..base
        }
    }

    pub(super) fn health(&self, base: HealthPolicy) -> HealthPolicy {
        let failure_threshold = self.failure_threshold.unwrap_or(base.failure_threshold).max(1);
        HealthPolicy { failure_threshold, ..base }
    }
}

/// An engine another one has met before.
#[derive(Clone, Debug)]
pub struct KnownPeer {
    /// Where.
    pub session_id: SessionId,
    /// Whom.
    pub incarnation: Incarnation,
}

/// A request to attach.
#[derive(Debug)]
pub struct AttachRequest {
    /// The engine's private key.
    pub key: SigningKey,
    /// For people.
    pub name: String,
    /// Its GPU, as its process numbers them.
    pub gpu_id: Option<u32>,
    /// The RDMA devices it brings; nothing: those of the daemon's configuration.
    pub rail_map: Option<RailMap>,
    /// Its own settings.
    pub policy: EnginePolicy,
    /// Free text of its own.
    pub labels: BTreeMap<String, String>,
    /// Host to be known by.
    pub advertise_host: Option<String>,
    /// Port it would like.
    pub preferred_port: Option<u16>,
    /// Paths it allows, best first; empty: the daemon's.
    pub transports: Vec<PathKind>,
    /// Whom it has met.
    pub known_peers: Vec<KnownPeer>,
    /// What its endpoint had revoked under an earlier run of the daemon.
    pub revocations: RevocationList,
}

//! What is known of an engine's attachments, for as long as the engine lives.

use std::sync::OnceLock;

use crate::{Limits, lease::Lease};

/// One attachment's facts, then the next one's. It only grows, by some hundred bytes per daemon restart, so that
/// what was lent out stays; and it has no lock, because a forked child may read it.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) engine_id: u64,
    pub(crate) session_id: String,
    pub(crate) boot_id: [u8; 16],
    pub(crate) daemon_version: String,
    pub(crate) daemon_pid: u32,
    pub(crate) limits: Limits,
    next: OnceLock<Box<Facts>>,
}

impl Facts {
    pub(crate) fn new(lease: &Lease) -> Self {
        Self {
            engine_id: lease.engine_id,
            session_id: lease.session_id.clone(),
            boot_id: lease.boot_id,
            daemon_version: lease.daemon_version.clone(),
            daemon_pid: lease.daemon_pid,
            limits: lease.limits.clone(),
            next: OnceLock::new(),
        }
    }

    /// Those of the latest attachment.
    pub(crate) fn latest(&self) -> &Self {
        let mut facts = self;
        while let Some(next) = facts.next.get() {
            facts = next;
        }
        facts
    }

    /// Of the attachment after the latest. One thread attaches, so nothing is lost to a race.
    pub(crate) fn append(&self, lease: &Lease) {
        if self.latest().next.set(Box::new(Self::new(lease))).is_err() {
            tracing::error!("two threads attached one engine again");
        }
    }
}

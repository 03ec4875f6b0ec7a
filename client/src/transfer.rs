//! The words of a transfer as a caller sees them, and their way to and from the wire.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kvferry_proto::engine::v1 as wire;

use crate::{Error, Failure, Op, Path, Policy, Reason};

/// 16 bytes that name a transfer, unique per engine. Submitting the same id again joins the same transfer.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TransferId(pub [u8; 16]);

impl std::fmt::Debug for TransferId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl TransferId {
    pub(crate) fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// Mints transfer ids: 8 random bytes of this engine, then a count.
#[derive(Debug)]
pub(crate) struct IdMint {
    prefix: [u8; 8],
    next: AtomicU64,
}

impl IdMint {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self { prefix: random()?, next: AtomicU64::new(0) })
    }

    pub(crate) fn mint(&self) -> TransferId {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.prefix);
        id[8..].copy_from_slice(&count.to_be_bytes());
        TransferId(id)
    }
}

/// Random bytes of the system, good enough for keys.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::System {
        doing: "reading random bytes",
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(bytes)
}

/// Packed slices: addresses in the two engines' own address spaces. The columns have equal lengths.
#[derive(Clone, Debug, Default)]
pub struct Slices {
    /// In this engine: the source of a write, the destination of a read.
    pub local: Vec<u64>,
    /// In the target engine.
    pub remote: Vec<u64>,
    /// Bytes of each slice.
    pub lengths: Lengths,
}

/// Bytes of each slice.
#[derive(Clone, Debug)]
pub enum Lengths {
    /// All slices have this many.
    Uniform(u64),
    /// One entry per slice.
    Each(Vec<u64>),
}

impl Default for Lengths {
    fn default() -> Self {
        Self::Each(Vec::new())
    }
}

/// A batch of slices in one direction, with one outcome.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// `host:port` of the target engine: its [`session_id`](crate::Engine::session_id).
    pub session: String,
    /// WRITE moves from here to there, READ from there to here.
    pub op: Op,
    /// What to move.
    pub slices: Slices,
    /// What the target may revoke the transfer by.
    pub tag: Option<[u8; 16]>,
    /// From receipt by the daemon; `None`: the policy's.
    pub deadline: Option<Duration>,
    /// For this transfer alone; unset fields fall back to the engine's.
    pub policy: Policy,
    /// `None`: minted.
    pub id: Option<TransferId>,
}

impl Transfer {
    /// All but the slices.
    pub(crate) fn header(&self, id: TransferId) -> wire::TransferRequest {
        wire::TransferRequest {
            transfer_id: id.0.to_vec(),
            session_id: self.session.clone(),
            op: self.op.into(),
            tag: self.tag.map_or_else(Vec::new, |tag| tag.to_vec()),
            // 0 is how the wire says "the policy's", so a deadline that has passed is the shortest one.
            deadline_ms: self.deadline.map_or(0, |deadline| millis(deadline).max(1)),
            source_ready: Some(wire::SourceReady { how: Some(wire::source_ready::How::Already(true)) }),
            policy: self.policy.to_wire(),
            ..Default::default()
        }
    }
}

/// Whole milliseconds, rounded up.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// How a transfer ended, or that this is not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte was applied at the destination and acknowledged.
    Done,
    /// It ended without; nobody can touch the caller's memory for it any more.
    Failed,
    /// As `Failed`, because it was asked to stop.
    Cancelled,
    /// Not an end: it is not proven that nobody touches the caller's memory for it any more. `wait`, or
    /// [`Event::TransferSettled`](crate::Event::TransferSettled), tells the end.
    Unsettled,
}

/// What became of a transfer.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which one.
    pub id: TransferId,
    /// How it ended.
    pub outcome: Outcome,
    /// It is proven that nobody can touch the *peer's* memory for it any more either.
    pub peer_confirmed: bool,
    /// Set unless `Done`.
    pub failure: Option<Failure>,
    /// Slices of the batch.
    pub slices: u64,
    /// Of these, moved and acknowledged.
    pub slices_done: u64,
    /// Bytes of the batch.
    pub bytes: u64,
    /// Of these, moved and acknowledged.
    pub bytes_done: u64,
    /// Payload bytes handed to the path more than once.
    pub bytes_resent: u64,
    /// Losses counted against the transfer.
    pub attempts: u32,
    /// How it went; `None` if it never got that far.
    pub path: Option<Path>,
    /// From receipt to the first byte.
    pub queued: Duration,
    /// From the first byte to the last.
    pub moving: Duration,
    /// From having to end to proof that it has.
    pub settling: Duration,
    /// All of it, as the daemon measured it.
    pub total: Duration,
}

impl Report {
    /// An end the daemon did not tell: nothing but what this library knows by itself.
    pub(crate) fn untold(id: TransferId, outcome: Outcome, failure: Failure) -> Self {
        Self {
            id,
            outcome,
            peer_confirmed: false,
            failure: Some(failure),
            slices: 0,
            slices_done: 0,
            bytes: 0,
            bytes_done: 0,
            bytes_resent: 0,
            attempts: 0,
            path: None,
            queued: Duration::ZERO,
            moving: Duration::ZERO,
            settling: Duration::ZERO,
            total: Duration::ZERO,
        }
    }

    /// Nothing of the reply is trusted to be more than it says: an outcome this library does not know is not
    /// an end.
    pub(crate) fn from_wire(id: TransferId, reply: wire::TransferReply) -> Self {
        let outcome = match reply.outcome() {
            wire::Outcome::Done => Outcome::Done,
            wire::Outcome::Failed => Outcome::Failed,
            wire::Outcome::Cancelled => Outcome::Cancelled,
            wire::Outcome::Unsettled | wire::Outcome::Unspecified => Outcome::Unsettled,
        };
        let peer_confirmed = reply.peer_half() == wire::PeerHalf::Confirmed;
        let path = Some(reply.path()).filter(|path| *path != Path::Unspecified);
        let timings = reply.timings.unwrap_or_default();
        let missing = || Failure::new(Reason::Unspecified, "the daemon gave no reason");
        let failure = reply.failure.map(Failure::from);
        Self {
            id,
            outcome,
            peer_confirmed,
            failure: if outcome == Outcome::Done { None } else { Some(failure.unwrap_or_else(missing)) },
            slices: reply.slices,
            slices_done: reply.slices_done,
            bytes: reply.bytes,
            bytes_done: reply.bytes_done,
            bytes_resent: reply.bytes_resent,
            attempts: reply.attempts,
            path,
            queued: Duration::from_micros(timings.queued_us),
            moving: Duration::from_micros(timings.moving_us),
            settling: Duration::from_micros(timings.settling_us),
            total: Duration::from_micros(timings.total_us),
        }
    }
}

/// Whether what was asked for is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Nobody on this node touches the memory for it any more.
    Settled,
    /// Not proven in time; ask again to wait on.
    Unsettled,
}

impl Settlement {
    /// An answer this library does not know is not a proof.
    pub(crate) fn from_wire(settlement: wire::Settlement) -> Self {
        match settlement {
            wire::Settlement::Settled => Self::Settled,
            wire::Settlement::Unsettled | wire::Settlement::Unspecified => Self::Unsettled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_within_and_between_engines() {
        let (one, other) = (IdMint::new().unwrap(), IdMint::new().unwrap());
        let ids: std::collections::HashSet<_> = (0..1000).flat_map(|_| [one.mint(), other.mint()]).collect();
        assert_eq!(ids.len(), 2000);
    }

    #[test]
    fn an_outcome_nobody_knows_is_not_an_end() {
        let reply = wire::TransferReply { outcome: 99, ..Default::default() };
        let report = Report::from_wire(TransferId([0; 16]), reply);
        assert_eq!(report.outcome, Outcome::Unsettled);
        assert!(!report.peer_confirmed);
        assert!(report.failure.is_some());
        assert_eq!(Settlement::from_wire(wire::Settlement::Unspecified), Settlement::Unsettled);
    }

    #[test]
    fn a_deadline_is_never_sent_as_none() {
        let transfer = |deadline| Transfer {
            session: String::new(),
            op: Op::Write,
            slices: Slices::default(),
            tag: None,
            deadline,
            policy: Policy::default(),
            id: None,
        };
        let sent = |deadline| transfer(deadline).header(TransferId([0; 16])).deadline_ms;
        assert_eq!(sent(None), 0);
        assert_eq!(sent(Some(Duration::ZERO)), 1);
        assert_eq!(sent(Some(Duration::from_micros(1500))), 2);
        assert_eq!(sent(Some(Duration::MAX)), u64::MAX);
    }
}

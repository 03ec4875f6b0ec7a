//! Who is who in the stories, and what they start from.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::super::{Event, Opened, Policy};
use crate::{
    domain::{
        AddressRange, BootId, Epoch, Failure, Generation, Incarnation, Op, PathKind, Reason, RegionId,
        SliceBatch, TransferId,
    },
    memory::{MemoryKind, PROBE_BASE, PROBE_BYTES, RegionInfo, RegionTable},
    policy::{HealthPolicy, RetryPolicy, RevocationLimits, RevocationList, Revocations},
    session::PeerTable,
    transfer::run::{Admitted, Request},
    transport::{LaneRecord, PART_BYTES},
};

/// Where the engine's memory lies, on both sides; no test touches it.
pub(super) const BASE: u64 = 0x10_0000_0000;
pub(super) const LENGTH: u64 = 1 << 33;
/// Each transfer has a piece of it for itself.
pub(super) const SLOT: u64 = 32 << 20;

/// Where the piece of the transfer with this number lies, on both sides.
pub(super) fn slot(number: u8) -> u64 {
    BASE + u64::from(number) * SLOT
}

pub(super) const ALICE: Incarnation = Incarnation([0xa; 32]);
pub(super) const BOB: Incarnation = Incarnation([0xb; 32]);
pub(super) const BOOT: BootId = BootId([1; 16]);
pub(super) const NEXT_BOOT: BootId = BootId([2; 16]);

pub(in super::super) const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

pub(in super::super) fn id(number: u8) -> TransferId {
    TransferId([number; 16])
}

pub(super) fn lost() -> Failure {
    Failure::plain(Reason::ConnectionLost)
}

pub(super) fn cancelled() -> Failure {
    Failure::plain(Reason::Cancelled)
}

pub(super) fn record(processed: u64) -> LaneRecord {
    LaneRecord { processed, refused: vec![] }
}

pub(in super::super) fn policy() -> Policy {
    Policy {
        health: HealthPolicy { failure_threshold: 2, probe_max: ms(1000) },
        retry: RetryPolicy {
            attempts: 3,
            backoff: ms(50),
            deadline: ms(30_000),
            progress_timeout: ms(10_000),
            reconnect: ms(5000),
        },
        pin_idle: ms(600_000),
        window_parts: 4,
        tcp_lanes: 1,
        peer_wait: ms(3000),
        settle: ms(5000),
    }
}

pub(super) fn info(id: u32, base: u64, length: u64) -> RegionInfo {
    RegionInfo { id: RegionId(id), generation: Generation(1), base, length, kind: MemoryKind::Process }
}

/// The target's table: its memory and the probe region.
pub(super) fn peer_table(version: u64) -> PeerTable {
    let regions = RegionTable::new(vec![info(1, BASE, LENGTH), info(2, PROBE_BASE, PROBE_BYTES)]);
    PeerTable { version, regions, layouts: Default::default() }
}

/// A table in which only probes find anything.
pub(super) fn empty_table(version: u64) -> PeerTable {
    PeerTable { version, regions: RegionTable::new(vec![info(2, PROBE_BASE, PROBE_BYTES)]), ..peer_table(0) }
}

pub(super) fn opened() -> Opened {
    Opened {
        incarnation: ALICE,
        boot: BOOT,
        path: PathKind::Tcp,
        revocations: revocations(7, &[]),
        table: peer_table(1),
        fenced: vec![],
    }
}

/// A list that says no more than that: these epochs revoked these slots of the target's memory (see [`slot`]).
pub(super) fn revocations(epoch: u64, slots: &[(u64, u8)]) -> Revocations {
    let range = |number| AddressRange::new(slot(number), SLOT).expect("a slot");
    let ranges = slots.iter().map(|(at, number)| (Epoch(*at), range(*number))).collect();
    let list = RevocationList { epoch: Epoch(epoch), ranges, ..RevocationList::default() };
    Revocations::restore(RevocationLimits::ranges(1000), list, Instant::now()).expect("a good list")
}

/// The target revoked something that no transfer touches.
pub(super) fn revoked_elsewhere(epoch: u64) -> Event {
    Event::Revoked(Box::new(revocations(epoch, &[])))
}

pub(in super::super) fn admitted(
    id: TransferId,
    op: Op,
    parts: u64,
    policy: RetryPolicy,
    received: Instant,
) -> Admitted {
    let batch = SliceBatch {
        local: vec![slot(id.0[0])],
        remote: vec![slot(id.0[0])],
        lengths: vec![],
        uniform: Some(parts * PART_BYTES),
    };
    Admitted {
        teller: None,
        id,
        op,
        request: Arc::new(Request::Slices(batch)),
        local: vec![],
        tag: None,
        policy,
        received,
        known: None,
        failure_threshold: None,
        own_epoch: Epoch(0),
    }
}

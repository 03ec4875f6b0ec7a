//! Two engines of one node and a pool between them.

use std::{sync::mpsc, thread};

use super::*;
use crate::{
    domain::{Epoch, Generation, LaneId, Tag},
    transport::{
        LaneEvent, PART_BYTES,
        testing::{Engine, Events, Faulty, Slice, block_on, pattern, payload, sequenced},
    },
};

struct Link {
    initiator: Engine,
    target: Engine,
    events: Arc<Events>,
    lane: Lane,
    pool: CopyPool,
}

impl Link {
    fn new(kind: LaneKind) -> Self {
        Self::between(kind, Engine::new(), Engine::new())
    }

    fn between(kind: LaneKind, initiator: Engine, target: Engine) -> Self {
        let pool = CopyPool::start(2).expect("threads");
        let events = Events::new();
        let (source, target_memory) = (initiator.memory.clone(), target.memory.clone());
        let setup = LocalSetup { lane: LaneId(1), kind, source, target: target_memory, sink: events.clone() };
        Self { lane: pool.open(setup), initiator, target, events, pool }
    }
}

/// I3: every byte, whatever the shape, the direction and the memory.
#[test]
fn every_shape_arrives_in_every_kind_of_memory() {
    const SPACE: u64 = 4 << 20;
    let reversed: Vec<Slice> = (0..3000).map(|i| (i * 3, (2999 - i) * 2, 1)).collect();
    let large = vec![(1, 7, (3 << 20) + 3)];
    for kind in [LaneKind::Write, LaneKind::Read] {
        let link = Link::new(kind);
        let mut next = 1;
        for (slices, seed) in [(&reversed, 1), (&large, 2)] {
            for (here, there) in [(false, false), (true, false), (false, true), (true, true)] {
                let (local, remote) = (link.initiator.region(here, SPACE), link.target.region(there, SPACE));
                let (from, to) = if kind == LaneKind::Write { (&local, &remote) } else { (&remote, &local) };
                from.paint(seed);
                let parts = sequenced(&payload(kind, &link.initiator, &local, &remote, slices), next);
                next += parts.len() as u64;
                link.lane.submit(parts);
                link.events.wait_processed(next - 1);
                let mut expected = vec![0; SPACE as usize];
                for &(mine, yours, length) in slices {
                    let (source, sink) = if kind == LaneKind::Write { (mine, yours) } else { (yours, mine) };
                    (0..length).for_each(|at| expected[(sink + at) as usize] = pattern(source + at, seed));
                }
                assert!(to.read() == expected, "{kind:?} {here} {there}");
            }
        }
        assert_eq!(link.events.refused(), []);
        assert!(link.pool.is_healthy());
    }
}

/// A slice over itself behaves as memmove, within a part.
#[test]
fn an_engine_may_shift_its_own_memory() {
    let engine = Engine::new();
    let pool = CopyPool::start(1).expect("a thread");
    let events = Events::new();
    let (source, target) = (engine.memory.clone(), engine.memory.clone());
    let lane = pool.open(LocalSetup {
        lane: LaneId(1),
        kind: LaneKind::Write,
        source,
        target,
        sink: events.clone(),
    });
    let region = engine.shared(8192);
    region.paint(1);
    lane.submit(sequenced(&payload(LaneKind::Write, &engine, &region, &region, &[(0, 100, 4096)]), 1));
    events.wait_processed(1);
    assert!((0..4096).all(|at| region.read()[100 + at as usize] == pattern(at, 1)));
}

/// A8: both directions; whoever was admitted since may go on, a tag is refused whenever it comes.
#[test]
fn a8_what_was_revoked_is_neither_read_nor_written() {
    for kind in [LaneKind::Write, LaneKind::Read] {
        let link = Link::new(kind);
        let (local, remote) = (link.initiator.shared(8192), link.target.shared(8192));
        local.paint(1);
        remote.paint(2);
        let parts = |sequence: u64, admitted: u64| {
            let slices = [(0, 0, 100), (4000, 1000, 100)];
            let payload = payload(kind, &link.initiator, &local, &remote, &slices);
            let payload = Arc::into_inner(payload).expect("the only one");
            let payload = crate::transport::Payload { admit_epoch: Epoch(admitted), ..payload };
            sequenced(&Arc::new(payload), sequence)
        };
        link.target.revoke(remote.info.base + 1000, 1);
        let before = (local.read(), remote.read());
        link.lane.submit(parts(1, 0));
        link.events.wait_processed(1);
        assert!((local.read(), remote.read()) == before, "a refused part moved a byte");
        link.lane.submit(parts(2, 1));
        link.events.wait_processed(2);
        assert!((local.read(), remote.read()) != before);
        link.target.revoke_tag(Tag([7; 16]));
        link.lane.submit(parts(3, 2));
        link.events.wait_processed(3);
        let refused: Vec<_> = link.events.refused();
        let named: Vec<_> = refused.iter().map(|(at, why)| (*at, why.reason, why.index)).collect();
        assert_eq!(named, [(1, Reason::Revoked, Some(1)), (3, Reason::Revoked, None)]);
    }
}

#[test]
fn each_refusal_names_reason_and_run() {
    let link = Link::new(LaneKind::Write);
    let (local, remote) = (link.initiator.shared(8192), link.target.shared(8192));
    local.paint(1);
    let bad = |spoil: &dyn Fn(&mut crate::transport::Payload)| {
        let slices = [(0, 0, 100), (4000, 1000, 100)];
        let payload = payload(LaneKind::Write, &link.initiator, &local, &remote, &slices);
        let mut payload = Arc::into_inner(payload).expect("the only one");
        spoil(&mut payload);
        Arc::new(payload)
    };
    let cases = [
        bad(&|payload| payload.remote_regions[0].generation = Generation(900)),
        bad(&|payload| payload.runs[1].remote += 7150),
        bad(&|payload| payload.runs[1].remote += 1 << 30),
        bad(&|payload| payload.stop()),
    ];
    for (at, payload) in cases.iter().enumerate() {
        link.lane.submit(sequenced(payload, at as u64 + 1));
    }
    link.events.wait_processed(4);
    let mut refused: Vec<_> =
        link.events.refused().into_iter().map(|(at, why)| (at, why.reason, why.index)).collect();
    refused.sort_by_key(|(at, ..)| *at);
    let expected = [
        (1, Reason::RegionChanged, Some(0)),
        (2, Reason::OutOfBounds, Some(1)),
        (3, Reason::Unregistered, Some(1)),
    ];
    assert_eq!(refused, expected);
    assert!(remote.read().iter().all(|&byte| byte == 0), "zero bytes moved");
    assert_eq!(link.lane.moved(), 0);
}

/// I1: once both gates are quiet after a stop, nothing changes any more, however much is queued.
#[test]
fn nothing_is_copied_after_a_stop() {
    let link = Link::new(LaneKind::Write);
    let (local, remote) = (link.initiator.shared(PART_BYTES), link.target.shared(PART_BYTES));
    local.paint(1);
    let flood = payload(LaneKind::Write, &link.initiator, &local, &remote, &vec![(0, 0, PART_BYTES); 2000]);
    link.lane.submit(sequenced(&flood, 1));
    link.events.wait_processed(1);
    flood.stop();
    link.initiator.settle();
    link.target.settle();
    local.paint(2);
    remote.paint(3);
    link.events.wait_processed(2000);
    assert!((0..PART_BYTES).zip(remote.read()).all(|(at, byte)| byte == pattern(at, 3)));
    assert!(link.lane.moved() < 2000 * PART_BYTES, "the stop came after everything");
}

/// I6: unregistering either side ends what is queued and waits for nobody.
#[test]
fn unregistered_memory_is_let_go() {
    for local_goes in [true, false] {
        let link = Link::new(LaneKind::Write);
        let (local, remote) = (link.initiator.shared(PART_BYTES), link.target.shared(PART_BYTES));
        let flood =
            payload(LaneKind::Write, &link.initiator, &local, &remote, &vec![(0, 0, PART_BYTES); 2000]);
        link.lane.submit(sequenced(&flood, 1));
        drop(flood);
        link.events.wait_processed(1);
        let (engine, region) = if local_goes { (&link.initiator, &local) } else { (&link.target, &remote) };
        let mut release = engine.unregister(region);
        block_on(release.settled());
        link.events.wait_processed(2000);
        let refused = link.events.refused();
        assert!(!refused.is_empty(), "the memory went after everything");
        assert!(refused.iter().all(|(_, why)| why.reason == Reason::RegionChanged));
    }
}

/// The end of a lane is told when no chunk of it is in a worker's hands.
#[test]
fn a_close_waits_for_the_chunks_under_way_and_starts_no_other() {
    let link = Link::new(LaneKind::Write);
    let (local, remote) = (link.initiator.shared(PART_BYTES), link.target.shared(PART_BYTES));
    let flood = payload(LaneKind::Write, &link.initiator, &local, &remote, &vec![(0, 0, PART_BYTES); 2000]);
    link.lane.submit(sequenced(&flood, 1));
    link.events.wait_processed(1);
    link.lane.close(Failure::plain(Reason::Cancelled));
    assert_eq!(link.events.wait_closed().reason, Reason::Cancelled);
    remote.paint(3);
    assert!((0..PART_BYTES).zip(remote.read()).all(|(at, byte)| byte == pattern(at, 3)));
    assert!(link.events.processed() < 2000);
    let ends = |event: &LaneEvent| matches!(event, LaneEvent::Closed { .. });
    assert_eq!(link.events.seen().iter().filter(|event| ends(event)).count(), 1);
    link.lane.submit(sequenced(&flood, 2001));
    drop(link.pool);
}

#[test]
fn a_busy_lane_does_not_starve_its_neighbours() {
    let busy = Link::new(LaneKind::Write);
    let (local, remote) = (busy.initiator.shared(PART_BYTES), busy.target.shared(PART_BYTES));
    let flood = payload(LaneKind::Write, &busy.initiator, &local, &remote, &vec![(0, 0, PART_BYTES); 4000]);
    busy.lane.submit(sequenced(&flood, 1));
    busy.events.wait_processed(1);
    let events = Events::new();
    let (source, target) = (busy.initiator.memory.clone(), busy.target.memory.clone());
    let setup = LocalSetup { lane: LaneId(2), kind: LaneKind::Write, source, target, sink: events.clone() };
    let lane = busy.pool.open(setup);
    lane.submit(sequenced(&payload(LaneKind::Write, &busy.initiator, &local, &remote, &[(0, 0, 64)]), 1));
    events.wait_processed(1);
    assert!(busy.events.processed() < 4000, "the flood went first");
    busy.events.wait_processed(4000);
}

#[test]
fn the_lanes_of_a_dead_engine_close() {
    for (initiator_dies, reason) in [(true, Reason::EngineGone), (false, Reason::ConnectionLost)] {
        let link = Link::new(LaneKind::Write);
        let (local, remote) = (link.initiator.shared(64), link.target.shared(64));
        let part = payload(LaneKind::Write, &link.initiator, &local, &remote, &[(0, 0, 64)]);
        let dying = if initiator_dies { &link.initiator } else { &link.target };
        dying.memory.begin_close();
        link.lane.submit(sequenced(&part, 1));
        assert_eq!(link.events.wait_closed().reason, reason);
        assert_eq!(link.events.processed(), 0);
    }
}

#[test]
fn a_pool_that_goes_away_closes_its_lanes() {
    let link = Link::new(LaneKind::Write);
    let (done, ended) = mpsc::channel();
    let pool = link.pool;
    thread::spawn(move || {
        drop(pool);
        done.send(()).expect("the test waits");
    });
    ended.recv_timeout(crate::transport::testing::PATIENCE).expect("the pool ends");
    assert_eq!(link.events.wait_closed().reason, Reason::Draining);
}

/// A worker that dies is noticed, and takes no lane's end with it.
#[test]
fn a_worker_that_panics_is_told_of() {
    let link = Link::new(LaneKind::Write);
    let (source, target) = (link.initiator.memory.clone(), link.target.memory.clone());
    let sink = Arc::<Faulty>::default();
    let faulty = link.pool.open(LocalSetup { lane: LaneId(2), kind: LaneKind::Write, source, target, sink });
    assert!(link.pool.is_healthy());
    faulty.close(Failure::plain(Reason::Cancelled));
    assert_eq!(link.events.wait_closed().reason, Reason::Driver);
    assert!(!link.pool.is_healthy());
}

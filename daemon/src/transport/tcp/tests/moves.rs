//! What is asked for arrives, byte by byte, and nothing else changes.

use super::*;
use crate::{
    domain::Reason,
    transport::testing::{Faulty, Slice, pattern, payload, sequenced, wait_until},
};

const SPACE: u64 = 6 << 20;

fn shapes() -> Vec<(&'static str, Vec<Slice>)> {
    let many = |count: u64, length: u64| -> Vec<Slice> {
        (0..count).map(|i| (i * (length + 3), (count - 1 - i) * (length + 1), length)).collect()
    };
    vec![
        ("one byte", vec![(5, 9, 1)]),
        ("one slice of several parts", vec![(1, 7, (5 << 20) + 3)]),
        ("single bytes, reversed", many(3000, 1)),
        ("exactly a full table", many(1022, 100)),
        ("a table and one more", many(1023, 100)),
        ("tables that are cut by bytes", many(300, 16 << 10)),
        ("mixed", vec![(0, 100, 1), (10, 0, 64), (4096, 8192, 4096), (100_000, 2_000_000, 1_500_000)]),
    ]
}

fn check(
    link: &Link,
    kind: LaneKind,
    private: (bool, bool),
    what: &str,
    slices: &[Slice],
    first: u64,
) -> u64 {
    let local = link.initiator.region(private.0, SPACE);
    let remote = link.target.region(private.1, SPACE);
    let (from, to) = if kind == LaneKind::Write { (&local, &remote) } else { (&remote, &local) };
    from.paint(first);
    let payload = payload(kind, &link.initiator, &local, &remote, slices);
    let parts = sequenced(&payload, first);
    let next = first + parts.len() as u64;
    link.lane.submit(parts);
    link.events.wait_processed(next - 1);
    assert_eq!(link.events.refused(), [], "{what}");
    let mut expected = vec![0; SPACE as usize];
    for &(here, there, length) in slices {
        let (source, sink) = if kind == LaneKind::Write { (here, there) } else { (there, here) };
        for at in 0..length {
            expected[(sink + at) as usize] = pattern(source + at, first);
        }
    }
    assert!(to.read() == expected, "{what} {private:?}");
    next
}

/// I3: every byte, whatever the shape, the direction and the memory.
#[test]
fn every_shape_arrives_in_every_kind_of_memory() {
    let links = [Link::new, Link::summed]
        .map(|link| [LaneKind::Write, LaneKind::Read].map(|kind| (kind, link(kind))));
    for (kind, link) in links.into_iter().flatten() {
        let mut next = 1;
        let mut bytes = 0;
        for (what, slices) in shapes() {
            for private in [(false, false), (true, false), (false, true), (true, true)] {
                next = check(&link, kind, private, what, &slices, next);
                bytes += slices.iter().map(|(.., length)| length).sum::<u64>();
            }
        }
        assert_eq!((link.lane.moved(), link.served.moved()), (bytes, bytes));
        assert_eq!(link.served.processed(), next - 1);
    }
}

/// Regions of both kinds within one part: neighbours are staged together.
#[test]
fn a_part_may_mix_kinds_of_memory() {
    let link = Link::new(LaneKind::Write);
    let (mapped, private) = (link.initiator.shared(8192), link.initiator.private(8192));
    let remote = link.target.shared(16384);
    mapped.paint(1);
    private.paint(2);
    let mut both = Arc::into_inner(payload(
        LaneKind::Write,
        &link.initiator,
        &mapped,
        &remote,
        &[(0, 0, 8192), (0, 8192, 8192)],
    ))
    .expect("the only one");
    both.local_regions
        .push(link.initiator.memory.view().table.get(private.info.id).expect("a region").clone());
    both.runs[1].local = private.info.base;
    both.runs[1].local_region = 1;
    link.lane.submit(sequenced(&Arc::new(both), 1));
    link.events.wait_processed(1);
    let expected: Vec<u8> =
        (0..8192).map(|at| pattern(at, 1)).chain((0..8192).map(|at| pattern(at, 2))).collect();
    assert!(remote.read() == expected);
}

/// One thread, one lane with much to do and one with little: the second does not wait for the first.
#[test]
fn a_busy_lane_does_not_starve_its_neighbours() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let open = || {
        let (here, there) = connection();
        let initiator = Initiator::start(&carriers, LaneKind::Write, here);
        (initiator, Target::start(&carriers, LaneKind::Write, there))
    };
    let (busy, busy_target) = open();
    let others: Vec<_> = (0..8).map(|_| open()).collect();
    let (local, remote) = (busy.engine.shared(1 << 20), busy_target.engine.shared(1 << 20));
    let flood = payload(LaneKind::Write, &busy.engine, &local, &remote, &vec![(0, 0, 1 << 20); 1000]);
    busy.lane.submit(sequenced(&flood, 1));
    wait_until("the flood", || busy.lane.moved() > 0);
    for (other, target) in &others {
        let (local, remote) = (other.engine.shared(4096), target.engine.shared(4096));
        local.paint(1);
        let small = payload(LaneKind::Write, &other.engine, &local, &remote, &[(0, 0, 4096)]);
        other.lane.submit(sequenced(&small, 1));
        other.events.wait_processed(1);
        assert_eq!(remote.read()[77], pattern(77, 1));
    }
    assert!(busy.events.processed() < 1000, "the flood went first");
    busy.events.wait_processed(1000);
}

#[test]
fn more_parts_than_the_window_go_through() {
    let link = Link::new(LaneKind::Write);
    let (local, remote) = (link.initiator.shared(4096), link.target.shared(4096));
    let parts = 3 * WINDOW_PARTS;
    for sequence in 1..=parts {
        let one = payload(LaneKind::Write, &link.initiator, &local, &remote, &[(0, 0, 1)]);
        link.lane.submit(sequenced(&one, sequence));
    }
    link.events.wait_processed(parts);
}

#[test]
fn a_close_is_told_once_on_both_sides() {
    let link = Link::new(LaneKind::Read);
    link.lane.close(Failure::plain(Reason::Cancelled));
    link.lane.close(Failure::plain(Reason::Deadline));
    assert_eq!(link.events.wait_closed().reason, Reason::Cancelled);
    let (record, cause) = link.end.wait();
    assert_eq!((record.processed, cause.reason), (0, Reason::ConnectionLost));
    drop(link.lane);
    drop(link._carriers);
    assert_eq!(link.events.seen().len(), 1);
}

/// Nobody is left waiting: neither lanes that are open nor those that come too late.
#[test]
fn carriers_that_go_away_close_their_lanes() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, there) = connection();
    let initiator = Initiator::start(&carriers, LaneKind::Write, here);
    let target = Target::start(&carriers, LaneKind::Write, there);
    assert!(carriers.is_healthy());
    drop(carriers);
    initiator.events.wait_closed();
    target.end.wait();
    assert!(initiator.engine.memory.gate().is_quiet(initiator.engine.memory.gate().raise()));
}

/// A thread that dies is noticed, and takes no other lane's end with it.
#[test]
fn a_thread_that_panics_is_told_of() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, there) = connection();
    let innocent = Initiator::start(&carriers, LaneKind::Write, here);
    let target = Target::start(&carriers, LaneKind::Write, there);
    let (here, _there) = connection();
    let (memory, sink, pulse) = (Engine::new().memory, Arc::<Faulty>::default(), Pulse::new());
    let (lane, kind) = (LaneId(2), LaneKind::Write);
    let setup = InitiatorSetup { lane, kind, memory, sink, pulse, checksums: false };
    carriers.initiate(here, setup).close(Failure::plain(Reason::Cancelled));
    innocent.events.wait_closed();
    target.end.wait();
    wait_until("the word of it", || !carriers.is_healthy());
    let (here, _there) = connection();
    Initiator::start(&carriers, LaneKind::Write, here).events.wait_closed();
}

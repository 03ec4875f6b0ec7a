//! A fence is a proof (I1, I6): what the test overwrites after the gate was quiet never leaves, and what it
//! finds in memory after the gate was quiet never changes, in whatever state the connection is stuck.

use super::*;
use crate::{
    domain::{Reason, Tag, TransferId},
    transport::{
        PART_BYTES,
        testing::{block_on, pattern, payload, sequenced, wait_until},
    },
};

const PART: u64 = PART_BYTES;
const LATER: u8 = 0;

/// A write lane whose target has stopped reading in the middle of the first part of two.
struct StuckWrite {
    carriers: Carriers,
    source: Initiator,
    peer: TcpStream,
    local: TestRegion,
}

impl StuckWrite {
    fn new() -> Self {
        let carriers = Carriers::start(1, SPIN).expect("a thread");
        let (here, peer) = narrow_connection();
        let source = Initiator::start(&carriers, LaneKind::Write, here);
        let local = source.engine.shared(2 * PART);
        local.paint(1);
        Self { carriers, source, peer, local }
    }

    fn submit(&self) -> Arc<crate::transport::Payload> {
        // The target's regions are not looked at on this side.
        let slices = [(0, 0, PART), (PART, PART, PART)];
        let both = payload(LaneKind::Write, &self.source.engine, &self.local, &self.local, &slices);
        self.source.lane.submit(sequenced(&both, 1));
        wait_until("the first bytes", || self.source.lane.moved() > 0);
        both
    }

    /// Reads what still comes of the part under way, and checks that it is old bytes, then padding.
    fn check_padded(&mut self, reason: Reason) {
        let (header, payload, trailer) = read_part(&mut self.peer);
        assert_eq!((header.sequence, header.bytes), (1, PART as u32));
        assert_eq!(trailer.and_then(|trailer| trailer.aborted), Some(reason));
        let old = payload.iter().enumerate().take_while(|&(at, &byte)| byte == pattern(at as u64, 1)).count();
        assert!(old > 0 && payload[old..].iter().all(|&byte| byte == 0), "later bytes left after {old}");
        let (header, ..) = read_part(&mut self.peer);
        assert_eq!((header.sequence, header.kind), (2, FrameKind::Abort));
    }
}

/// The local half of stop, on a socket that takes nothing.
#[test]
fn a_stopped_write_sends_nothing_that_came_later() {
    let mut stuck = StuckWrite::new();
    let payload = stuck.submit();
    payload.stop();
    stuck.source.engine.settle();
    stuck.local.paint(2);
    stuck.check_padded(Reason::Cancelled);
    send(&mut stuck.peer, &[&Ack::Processed { through: 2 }.encode()]);
    stuck.source.events.wait_processed(2);
    assert_eq!(stuck.source.events.refused(), [], "its owner knows");
    assert!(stuck.carriers.is_healthy());
}

/// I6: unregistering needs neither the peer nor the socket: the leases are let go although nothing moves.
#[test]
fn an_unregistered_source_is_let_go_while_the_socket_is_stuck() {
    let mut stuck = StuckWrite::new();
    drop(stuck.submit());
    let mut release = stuck.source.engine.unregister(&stuck.local);
    block_on(release.settled());
    let refused: Vec<_> =
        stuck.source.events.refused().into_iter().map(|(at, why)| (at, why.reason)).collect();
    assert_eq!(refused.len(), 2);
    assert!(refused.contains(&(1, Reason::RegionChanged)) && refused.contains(&(2, Reason::RegionChanged)));
    stuck.local.paint(2);
    stuck.check_padded(Reason::RegionChanged);
    send(&mut stuck.peer, &[&Ack::Processed { through: 2 }.encode()]);
    stuck.source.events.wait_processed(2);
    let fresh = stuck.source.engine.shared(64);
    fresh.paint(3);
    let next = payload(LaneKind::Write, &stuck.source.engine, &fresh, &fresh, &[(0, 0, 64)]);
    stuck.source.lane.submit(sequenced(&next, 3));
    let (header, bytes, trailer) = read_part(&mut stuck.peer);
    assert_eq!((header.sequence, bytes[5]), (3, pattern(5, 3)));
    assert_eq!(trailer.map(|trailer| trailer.aborted), Some(None));
}

/// A write lane's target in the middle of a part, its initiator the test.
pub(super) struct HalfWritten {
    _carriers: Carriers,
    pub(super) target: Target,
    pub(super) peer: TcpStream,
    pub(super) region: TestRegion,
}

impl HalfWritten {
    pub(super) fn new() -> Self {
        Self::with(|header| header)
    }

    pub(super) fn tagged(tag: Tag) -> Self {
        Self::with(|header| PartHeader { tag: Some(tag), ..header })
    }

    fn with(change: impl FnOnce(PartHeader) -> PartHeader) -> Self {
        let carriers = Carriers::start(1, SPIN).expect("a thread");
        let (mut peer, there) = connection();
        let target = Target::start(&carriers, LaneKind::Write, there);
        let region = target.engine.shared(PART);
        let base = region.info.base;
        let frame = frame_with(change, FrameKind::Write, 1, &region, base, PART as u32);
        send(&mut peer, &[&frame, &vec![9; PART as usize / 2]]);
        wait_until("half of it", || target.lane.moved() == PART / 2);
        Self { _carriers: carriers, target, peer, region }
    }

    /// Sends the other half and checks that none of it was applied, and that this is told.
    pub(super) fn check_rest_is_scrap(&mut self, reason: Reason) {
        let before = self.region.read();
        send(&mut self.peer, &[&vec![8; PART as usize / 2], &trailer(1)]);
        match read_ack(&mut self.peer) {
            Ack::Refused { sequence: 1, refusal } => assert_eq!(refusal.reason, reason),
            other => panic!("{other:?}"),
        }
        assert_eq!(read_ack(&mut self.peer), Ack::Processed { through: 1 });
        assert!(self.region.read() == before, "bytes came late");
        assert_eq!(self.target.lane.moved(), PART, "the lane lives and the bytes went by");
    }
}

/// The target's half of stop: it needs nothing from the initiator.
#[test]
fn a_stopped_part_is_not_applied_any_further() {
    let mut half = HalfWritten::new();
    half.target.stops.mark(TRANSFER, &[(LANE, 1)]);
    half.target.engine.settle();
    half.region.paint(2);
    half.check_rest_is_scrap(Reason::Cancelled);
    let base = half.region.info.base;
    send(&mut half.peer, &[&frame(FrameKind::Write, 2, &half.region, base, 1), &[LATER], &trailer(2)]);
    assert_eq!(read_ack(&mut half.peer), Ack::Processed { through: 2 });
    assert_eq!(half.region.read()[0], LATER, "a mark counts up to its sequence");
}

#[test]
fn an_unregistered_target_is_let_go_in_the_middle_of_a_part() {
    let mut half = HalfWritten::new();
    let mut release = half.target.engine.unregister(&half.region);
    block_on(release.settled());
    half.region.paint(2);
    half.check_rest_is_scrap(Reason::RegionChanged);
}

/// A part that was stopped before it came does not reach memory at all.
#[test]
fn a_stop_that_overtakes_its_part_is_kept() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (mut peer, there) = connection();
    let target = Target::start(&carriers, LaneKind::Write, there);
    let region = target.engine.shared(4096);
    target.stops.mark(TRANSFER, &[(LANE, 1)]);
    target.engine.settle();
    send(&mut peer, &[&frame(FrameKind::Write, 1, &region, region.info.base, 4), &[1; 4], &trailer(1)]);
    assert!(matches!(read_ack(&mut peer), Ack::Refused { sequence: 1, .. }));
    assert_eq!(region.read()[..4], [0; 4]);
}

/// A read lane's target that is stuck in the middle of its answer.
pub(super) struct StuckRead {
    _carriers: Carriers,
    pub(super) target: Target,
    peer: TcpStream,
    pub(super) region: TestRegion,
}

impl StuckRead {
    pub(super) fn new() -> Self {
        let carriers = Carriers::start(1, SPIN).expect("a thread");
        let (mut peer, there) = narrow_connection();
        let target = Target::start(&carriers, LaneKind::Read, there);
        let region = target.engine.shared(PART);
        region.paint(1);
        send(&mut peer, &[&frame(FrameKind::ReadRequest, 1, &region, region.info.base, PART as u32)]);
        wait_until("the first bytes", || target.lane.moved() > 0);
        Self { _carriers: carriers, target, peer, region }
    }

    pub(super) fn check_padded(&mut self, reason: Reason) {
        let header = PartHeader::parse(&read_array(&mut self.peer)).expect("a header");
        assert_eq!((header.kind, header.bytes), (FrameKind::ReadData, PART as u32));
        let mut payload = vec![0; PART as usize];
        self.peer.read_exact(&mut payload).expect("payload in time");
        let old = payload.iter().enumerate().take_while(|&(at, &byte)| byte == pattern(at as u64, 1)).count();
        assert!(old > 0 && payload[old..].iter().all(|&byte| byte == 0), "later bytes left after {old}");
        let trailer = Trailer::parse(&read_array(&mut self.peer), 1).expect("a trailer");
        assert_eq!(trailer.aborted, Some(reason));
    }
}

#[test]
fn a_stopped_answer_gives_nothing_that_came_later() {
    let mut stuck = StuckRead::new();
    stuck.target.stops.mark(TRANSFER, &[(LANE, 1)]);
    stuck.target.engine.settle();
    stuck.region.paint(2);
    stuck.check_padded(Reason::Cancelled);
}

#[test]
fn an_answer_from_an_unregistered_region_ends() {
    let mut stuck = StuckRead::new();
    let mut release = stuck.target.engine.unregister(&stuck.region);
    block_on(release.settled());
    stuck.region.paint(2);
    stuck.check_padded(Reason::RegionChanged);
    drop(stuck.peer);
    let (record, _) = stuck.target.end.wait();
    assert_eq!(record.processed, 1);
    assert_eq!(record.refused[0].1.reason, Reason::RegionChanged);
}

/// The initiator's half of a stopped read: data that is on the way goes to scrap.
#[test]
fn a_stopped_read_applies_nothing_that_comes_later() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, mut peer) = connection();
    let sink = Initiator::start(&carriers, LaneKind::Read, here);
    let (local, next) = (sink.engine.shared(PART), sink.engine.shared(PART));
    let first = payload(LaneKind::Read, &sink.engine, &local, &local, &[(0, 0, PART)]);
    let second = payload(LaneKind::Read, &sink.engine, &next, &next, &[(0, 0, PART)]);
    sink.lane.submit(sequenced(&first, 1));
    sink.lane.submit(sequenced(&second, 2));
    let answer = |sequence: u64, transfer: TransferId| {
        let abort = PartHeader::abort(sequence, transfer);
        PartHeader { kind: FrameKind::ReadData, bytes: PART as u32, ..abort }.encode()
    };
    let second_transfer = second.transfer;
    drop(second);
    // Answers may come only to what was asked.
    (0..2).for_each(|_| _ = read_array::<HEADER_AND_TABLE_START>(&mut peer));
    let half = PART as usize / 2;
    send(&mut peer, &[&answer(1, first.transfer), &vec![9; half]]);
    wait_until("half of it", || sink.lane.moved() == PART / 2);
    first.stop();
    sink.engine.settle();
    local.paint(1);
    send(&mut peer, &[&vec![8; half], &trailer(1)]);
    sink.events.wait_processed(1);
    let mut release = sink.engine.unregister(&next);
    block_on(release.settled());
    send(&mut peer, &[&answer(2, second_transfer), &vec![8; 2 * half], &trailer(2)]);
    sink.events.wait_processed(2);
    assert_eq!(local.read()[half], pattern(half as u64, 1));
    assert!(next.read().iter().all(|&byte| byte == 0));
    let refused = sink.events.refused();
    assert_eq!(
        refused.iter().map(|(at, why)| (*at, why.reason)).collect::<Vec<_>>(),
        [(2, Reason::RegionChanged)]
    );
}

/// I10: a lane of an engine that is gone closes, stuck or not.
#[test]
fn the_lanes_of_a_dead_engine_close() {
    let stuck = StuckWrite::new();
    let _payload = stuck.submit();
    let half = HalfWritten::new();
    stuck.source.engine.memory.begin_close();
    half.target.engine.memory.begin_close();
    assert_eq!(stuck.source.events.wait_closed().reason, Reason::EngineGone);
    let (record, cause) = half.target.end.wait();
    assert_eq!((record.processed, cause.reason), (0, Reason::EngineGone));
}

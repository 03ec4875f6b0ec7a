//! Checksums over table and payload: what arrives changed is not applied for anybody, and what was never to be applied
//! does not count as changed.

use prometheus_client::metrics::counter::Counter;

use super::*;
use crate::{
    domain::Reason,
    transport::{
        PART_BYTES,
        testing::{pattern, payload, sequenced, wait_until},
    },
};

const BYTES: usize = 4096;

fn sealed_trailer(sequence: u64, payload: &[u8]) -> [u8; TRAILER_BYTES] {
    Trailer { aborted: None, sequence, checksum: crc32c::crc32c(payload) }.encode()
}

/// Header, table and the table's checksum.
fn summed_frame(kind: FrameKind, sequence: u64, region: &TestRegion, address: u64, bytes: u32) -> Vec<u8> {
    let mut frame = frame(kind, sequence, region, address, bytes);
    let sum = crc32c::crc32c(&frame[wire::HEADER_BYTES..]);
    frame.extend_from_slice(&sum.to_le_bytes());
    frame
}

fn expect_table_sum(stream: &mut TcpStream, table: &[u8]) {
    assert_eq!(u32::from_le_bytes(read_array(stream)), crc32c::crc32c(table));
}

/// A target that sums, its initiator the test.
fn target() -> (Carriers, Target, TcpStream, TestRegion) {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (peer, there) = connection();
    let target = Target::summing(Engine::new(), &carriers, LaneKind::Write, there, true);
    let region = target.engine.shared(BYTES as u64);
    (carriers, target, peer, region)
}

#[test]
fn a_part_that_arrives_changed_ends_the_lane_and_is_not_acknowledged() {
    for private in [false, true] {
        let (_carriers, target, mut peer, mut region) = target();
        if private {
            region = target.engine.private(BYTES as u64);
        }
        let head =
            |sequence| summed_frame(FrameKind::Write, sequence, &region, region.info.base, BYTES as u32);
        let good = vec![7; BYTES];
        send(&mut peer, &[&head(1), &good, &sealed_trailer(1, &good)]);
        assert_eq!(read_ack(&mut peer), Ack::Processed { through: 1 });
        let mut bad = vec![8; BYTES];
        bad[BYTES / 2] ^= 1;
        send(&mut peer, &[&head(2), &bad, &sealed_trailer(2, &[8; BYTES])]);
        let (record, cause) = target.end.wait();
        assert_eq!((record.processed, cause.reason), (1, Reason::Checksum), "{cause}");
        assert_eq!(record.refused, [], "it will be sent again, on another lane");
        match read_ack(&mut peer) {
            Ack::Refused { sequence: 2, refusal } => assert_eq!(refusal.reason, Reason::Checksum),
            other => panic!("{other:?}"),
        }
        assert_eq!(peer.read(&mut [0; 1]).expect("the end"), 0);
    }
}

/// Which side forgets to sum does not matter: what was agreed on is kept.
#[test]
fn a_missing_checksum_is_a_wrong_one() {
    let (_carriers, target, mut peer, region) = target();
    let head = summed_frame(FrameKind::Write, 1, &region, region.info.base, BYTES as u32);
    send(&mut peer, &[&head, &[7; BYTES], &trailer(1)]);
    assert_eq!(target.end.wait().1.reason, Reason::Checksum);
}

/// What was not agreed on may not come either.
#[test]
fn a_checksum_that_nobody_asked_for_ends_the_lane() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (mut peer, there) = connection();
    let target = Target::start(&carriers, LaneKind::Write, there);
    let region = target.engine.shared(BYTES as u64);
    let head = frame(FrameKind::Write, 1, &region, region.info.base, BYTES as u32);
    send(&mut peer, &[&head, &[7; BYTES], &sealed_trailer(1, &[7; BYTES])]);
    let (_, cause) = target.end.wait();
    assert_eq!(cause.reason, Reason::ConnectionLost);
    assert!(cause.message.contains("trailer checksum"), "{cause}");
}

/// Bytes that go to scrap are nobody's: the lane lives, whatever they sum up to.
#[test]
fn a_refused_part_is_not_judged() {
    let (_carriers, target, mut peer, region) = target();
    let outside = region.info.base + 1;
    let head = summed_frame(FrameKind::Write, 1, &region, outside, BYTES as u32);
    send(&mut peer, &[&head, &[7; BYTES], &sealed_trailer(1, &[8; BYTES])]);
    match read_ack(&mut peer) {
        Ack::Refused { sequence: 1, refusal } => assert_eq!(refusal.reason, Reason::OutOfBounds),
        other => panic!("{other:?}"),
    }
    assert_eq!(read_ack(&mut peer), Ack::Processed { through: 1 });
    let head = summed_frame(FrameKind::Write, 2, &region, region.info.base, BYTES as u32);
    send(&mut peer, &[&head, &[7; BYTES], &sealed_trailer(2, &[7; BYTES])]);
    assert_eq!(read_ack(&mut peer), Ack::Processed { through: 2 });
    assert_eq!(target.lane.processed(), 2);
}

#[test]
fn a_read_that_arrives_changed_ends_the_lane() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, mut peer) = connection();
    let sink = Initiator::summing(Engine::new(), &carriers, LaneKind::Read, here, true);
    let region = sink.engine.shared(16);
    let one = payload(LaneKind::Read, &sink.engine, &region, &region, &[(0, 0, 16)]);
    let transfer = one.transfer;
    sink.lane.submit(sequenced(&one, 1));
    let asked = read_array::<HEADER_AND_TABLE_START>(&mut peer);
    expect_table_sum(&mut peer, &asked[wire::HEADER_BYTES..]);
    let header = PartHeader { kind: FrameKind::ReadData, bytes: 16, ..PartHeader::abort(1, transfer) };
    send(&mut peer, &[&header.encode(), &[1; 16], &sealed_trailer(1, &[2; 16])]);
    assert_eq!(sink.events.wait_closed().reason, Reason::Checksum);
    assert_eq!((sink.events.processed(), sink.events.refused()), (0, vec![]));
}

/// The initiator learns from its target's last word why the lane ended; the part is not refused for good.
#[test]
fn the_targets_last_word_is_the_lanes_end() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, mut peer) = connection();
    let source = Initiator::summing(Engine::new(), &carriers, LaneKind::Write, here, true);
    let region = source.engine.shared(16);
    let one = payload(LaneKind::Write, &source.engine, &region, &region, &[(0, 0, 16)]);
    source.lane.submit(sequenced(&one, 1));
    let (_, bytes, trailer) = read_part_with(expect_table_sum, &mut peer);
    assert_eq!(trailer.map(|trailer| trailer.checksum), Some(crc32c::crc32c(&bytes)));
    let refusal = wire::Refusal::whole(Reason::Checksum);
    send(&mut peer, &[&Ack::Refused { sequence: 1, refusal }.encode()]);
    assert_eq!(source.events.wait_closed().reason, Reason::Checksum);
    assert_eq!((source.events.processed(), source.events.refused()), (0, vec![]));
}

/// A table is judged before the payload behind it: the word may come while the part is still going out.
#[test]
fn the_targets_last_word_may_come_in_mid_part() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, mut peer) = narrow_connection();
    let source = Initiator::summing(Engine::new(), &carriers, LaneKind::Write, here, true);
    let region = source.engine.shared(PART_BYTES);
    let one = payload(LaneKind::Write, &source.engine, &region, &region, &[(0, 0, PART_BYTES)]);
    source.lane.submit(sequenced(&one, 1));
    let _head = read_array::<HEADER_AND_TABLE_START>(&mut peer);
    let refusal = wire::Refusal::whole(Reason::Checksum);
    send(&mut peer, &[&Ack::Refused { sequence: 1, refusal }.encode()]);
    assert_eq!(source.events.wait_closed().reason, Reason::Checksum);
    assert!(source.lane.moved() < PART_BYTES);
    assert_eq!((source.events.processed(), source.events.refused()), (0, vec![]));
}

/// What names other places, or other lengths, or none: whatever byte it was, no memory is touched for it.
#[test]
fn a_table_that_arrives_changed_ends_the_lane_and_touches_nothing() {
    for (kind, frame_kind) in [(LaneKind::Write, FrameKind::Write), (LaneKind::Read, FrameKind::ReadRequest)]
    {
        for at in wire::HEADER_BYTES..HEADER_AND_TABLE_START + wire::TABLE_SUM_BYTES {
            let damaged = Counter::default();
            let carriers = Carriers::counting(1, SPIN, &damaged).expect("a thread");
            let (mut peer, there) = connection();
            let target = Target::summing(Engine::new(), &carriers, kind, there, true);
            let region = target.engine.shared(16 * BYTES as u64);
            // In the second byte of the address this is another page of the region.
            let mut bad = summed_frame(frame_kind, 1, &region, region.info.base, BYTES as u32);
            bad[at] ^= 0x10;
            send(&mut peer, &[&bad]);
            let (record, cause) = target.end.wait();
            assert_eq!((record.processed, cause.reason), (0, Reason::Checksum), "byte {at}: {cause}");
            assert_eq!(record.refused, [], "it will be sent again, on another lane");
            assert!(cause.message.contains("table of part 1"), "{cause}");
            assert_eq!((damaged.get(), target.lane.moved()), (1, 0));
            if kind == LaneKind::Write {
                match read_ack(&mut peer) {
                    Ack::Refused { sequence: 1, refusal } => assert_eq!(refusal.reason, Reason::Checksum),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(peer.read(&mut [0; 1]).expect("the end"), 0);
        }
    }
}

/// What the test above would see if nothing were agreed on.
#[test]
fn without_checksums_a_table_is_what_arrives() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (mut peer, there) = connection();
    let target = Target::start(&carriers, LaneKind::Write, there);
    let region = target.engine.shared(16 * BYTES as u64);
    let mut elsewhere = frame(FrameKind::Write, 1, &region, region.info.base, BYTES as u32);
    elsewhere[wire::HEADER_BYTES + wire::REGION_ENTRY_BYTES + 1] ^= 0x10;
    send(&mut peer, &[&elsewhere, &[7; BYTES], &trailer(1)]);
    assert_eq!(read_ack(&mut peer), Ack::Processed { through: 1 });
    assert!(region.read()[..BYTES].iter().all(|&byte| byte != 7));
}

/// A stop in the middle of a part, on either side of either lane, is no damage.
#[test]
fn a_stop_in_mid_part_is_no_damage() {
    for (kind, here) in
        [LaneKind::Write, LaneKind::Read].into_iter().flat_map(|kind| [(kind, true), (kind, false)])
    {
        let link = Link::over(narrow_connection(), kind, true);
        let length = 16 * PART_BYTES;
        let (local, remote) = (link.initiator.shared(length), link.target.shared(length));
        let long = payload(kind, &link.initiator, &local, &remote, &[(0, 0, length)]);
        let parts = sequenced(&long, 1);
        let last = parts.len() as u64;
        link.lane.submit(parts);
        wait_until("the first bytes", || link.lane.moved() > 0);
        if here {
            long.stop();
            link.initiator.settle();
        } else {
            link.stops.mark(long.transfer, &[(LANE, last)]);
            link.target.settle();
        }
        // Its owner may do with it what he likes now.
        let (engine, given_back) = if here { (&link.initiator, &local) } else { (&link.target, &remote) };
        given_back.paint(2);
        engine.settle();
        let source = if kind == LaneKind::Write { &local } else { &remote };
        let sink = if kind == LaneKind::Write { &remote } else { &local };
        link.events.wait_processed(last);
        source.paint(3);
        let next = payload(kind, &link.initiator, &local, &remote, &[(5, 5, 1000)]);
        link.lane.submit(sequenced(&next, last + 1));
        link.events.wait_processed(last + 1);
        assert_eq!(sink.read()[5..1005], (5..1005).map(|at| pattern(at, 3)).collect::<Vec<_>>());
    }
}

//! Peers that break off, repeat themselves or talk nonsense: the lane ends, typed, and nothing else does.

use super::*;
use crate::{
    domain::Reason,
    transport::testing::{payload, sequenced, wait_until},
};

/// A target's end that gets these bytes as its first.
fn target_hears(kind: LaneKind, bytes: impl FnOnce(&Target) -> Vec<u8>) -> Failure {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (mut peer, there) = connection();
    let target = Target::start(&carriers, kind, there);
    let bytes = bytes(&target);
    peer.write_all(&bytes).expect("the lane reads");
    let (record, cause) = target.end.wait();
    assert_eq!(record.processed, 0);
    assert!(carriers.is_healthy());
    cause
}

/// An initiator's end that has asked for one part and gets these bytes as its answer.
fn initiator_hears(kind: LaneKind, bytes: &[u8]) -> Failure {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, mut peer) = connection();
    let initiator = Initiator::start(&carriers, kind, here);
    let region = initiator.engine.shared(4096);
    let one = payload(kind, &initiator.engine, &region, &region, &[(0, 0, 16)]);
    initiator.lane.submit(sequenced(&one, 1));
    let _asked = read_array::<HEADER_AND_TABLE_START>(&mut peer);
    peer.write_all(bytes).expect("the lane reads");
    let cause = initiator.events.wait_closed();
    assert_eq!(initiator.events.processed(), 0);
    assert!(initiator.pulse.total() > 0, "nonsense too is a sign of life");
    assert!(initiator.pulse.last().is_some_and(|last| last <= std::time::Instant::now()));
    assert!(carriers.is_healthy());
    cause
}

#[test]
fn garbage_ends_the_lane() {
    for kind in [LaneKind::Write, LaneKind::Read] {
        assert_eq!(target_hears(kind, |_| vec![0x5a; 300]).reason, Reason::Checksum);
        assert_eq!(initiator_hears(kind, &[0x5a; 300]).reason, Reason::Checksum);
    }
}

#[test]
fn a_frame_of_the_wrong_kind_ends_the_lane() {
    for (kind, wrong) in [(LaneKind::Write, FrameKind::ReadRequest), (LaneKind::Read, FrameKind::Write)] {
        let cause = target_hears(kind, |target| {
            let region = target.engine.shared(4096);
            frame(wrong, 1, &region, region.info.base, 4)
        });
        assert_eq!(cause.reason, Reason::ConnectionLost, "{cause}");
    }
}

#[test]
fn a_gap_ends_the_lane() {
    for (kind, frame_kind) in [(LaneKind::Write, FrameKind::Write), (LaneKind::Read, FrameKind::ReadRequest)]
    {
        let cause = target_hears(kind, |target| {
            let region = target.engine.shared(4096);
            frame(frame_kind, 2, &region, region.info.base, 4)
        });
        assert!(cause.message.contains("sequence 2"), "{cause}");
    }
}

#[test]
fn a_replayed_part_is_not_applied_again() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (mut peer, there) = connection();
    let target = Target::start(&carriers, LaneKind::Write, there);
    let region = target.engine.shared(4096);
    let part = frame(FrameKind::Write, 1, &region, region.info.base, 4);
    send(&mut peer, &[&part, &[1; 4], &trailer(1)]);
    assert_eq!(read_ack(&mut peer), Ack::Processed { through: 1 });
    region.write(0, &[2; 4]);
    let again = [&part[..], &[1; 4], &trailer(1)].concat();
    peer.write_all(&again).expect("the lane reads");
    let (record, cause) = target.end.wait();
    assert_eq!(record.processed, 1);
    assert!(cause.message.contains("sequence 1"), "{cause}");
    assert_eq!(region.read()[..4], [2; 4]);
}

#[test]
fn an_acknowledgement_of_what_was_never_sent_ends_the_lane() {
    let early = Ack::Processed { through: 2 }.encode();
    assert!(initiator_hears(LaneKind::Write, &early).message.contains("sequence 2"));
}

#[test]
fn data_that_was_not_asked_for_ends_the_lane() {
    let header = PartHeader { kind: FrameKind::ReadData, bytes: 16, ..PartHeader::abort(1, TRANSFER) };
    assert!(initiator_hears(LaneKind::Read, &header.encode()).message.contains("bytes of a reply"));
    let header = PartHeader { sequence: 2, ..header };
    assert!(initiator_hears(LaneKind::Read, &header.encode()).message.contains("sequence 2"));
    let abort = PartHeader::abort(1, TRANSFER);
    assert!(initiator_hears(LaneKind::Read, &abort.encode()).message.contains("kind"));
}

/// I2: what the target says of a lane that broke off is exact.
#[test]
fn a_cut_in_the_middle_of_payload_counts_only_whole_parts() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (mut peer, there) = connection();
    let target = Target::start(&carriers, LaneKind::Write, there);
    let region = target.engine.shared(4096);
    let base = region.info.base;
    for sequence in 1..=3 {
        send(&mut peer, &[&frame(FrameKind::Write, sequence, &region, base, 4), &[1; 4], &trailer(sequence)]);
    }
    let outside = frame(FrameKind::Write, 4, &region, base + 4090, 100);
    send(&mut peer, &[&outside, &[1; 100], &trailer(4)]);
    send(&mut peer, &[&frame(FrameKind::Write, 5, &region, base, 100), &[1; 60]]);
    wait_until("the cut place", || target.lane.moved() == 3 * 4 + 100 + 60);
    drop(peer);
    let (record, cause) = target.end.wait();
    assert_eq!((record.processed, cause.reason), (4, Reason::ConnectionLost));
    let refused: Vec<_> = record.refused.iter().map(|(at, why)| (*at, why.reason)).collect();
    assert_eq!(refused, [(4, Reason::OutOfBounds)]);
    assert_eq!(target.lane.processed(), 4);
    assert!(carriers.is_healthy());
}

/// A target that does not acknowledge holds the initiator to the window.
#[test]
fn an_initiator_keeps_within_the_window() {
    let carriers = Carriers::start(1, SPIN).expect("a thread");
    let (here, mut peer) = connection();
    let initiator = Initiator::start(&carriers, LaneKind::Write, here);
    let region = initiator.engine.shared(4096);
    for sequence in 1..=WINDOW_PARTS + 2 {
        let one = payload(LaneKind::Write, &initiator.engine, &region, &region, &[(0, 0, 1)]);
        initiator.lane.submit(sequenced(&one, sequence));
    }
    (1..=WINDOW_PARTS).for_each(|sequence| assert_eq!(read_part(&mut peer).0.sequence, sequence));
    // The rest is queued already, so the turn that sent the last of these would have sent it too.
    wait_until("the count", || initiator.lane.moved() >= WINDOW_PARTS);
    assert_eq!(initiator.lane.moved(), WINDOW_PARTS);
    send(&mut peer, &[&Ack::Processed { through: 1 }.encode()]);
    assert_eq!(read_part(&mut peer).0.sequence, WINDOW_PARTS + 1);
    wait_until("the count", || initiator.lane.moved() > WINDOW_PARTS);
    assert_eq!(initiator.lane.moved(), WINDOW_PARTS + 1);
}

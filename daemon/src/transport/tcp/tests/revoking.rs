//! A revocation is a proof (A8): once the gate was quiet no byte of an older part reaches what was revoked, in
//! whatever state its lane is, and no byte of it leaves. The lane lives, and whoever is admitted since may go on.

use super::{
    stopping::{HalfWritten, StuckRead},
    *,
};
use crate::{
    domain::{Epoch, Reason, Tag},
    transport::{
        Payload,
        testing::{payload, sequenced},
    },
};

const TAG: Tag = Tag([7; 16]);

/// Sends a small part under this epoch and tag, and tells whether it was applied.
fn is_applied(half: &mut HalfWritten, sequence: u64, admitted: u64, tag: Option<Tag>) -> bool {
    let header = |header| PartHeader { admit_epoch: Epoch(admitted), tag, ..header };
    let base = half.region.info.base;
    let frame = frame_with(header, FrameKind::Write, sequence, &half.region, base, 1);
    let byte = sequence as u8 + 100;
    send(&mut half.peer, &[&frame, &[byte], &trailer(sequence)]);
    let applied = match read_ack(&mut half.peer) {
        Ack::Refused { refusal, .. } => {
            assert_eq!(refusal.reason, Reason::Revoked);
            assert_eq!(read_ack(&mut half.peer), Ack::Processed { through: sequence });
            false
        }
        Ack::Processed { through } => through == sequence,
    };
    assert_eq!(half.region.read()[0] == byte, applied);
    applied
}

#[test]
fn a8_a_part_under_way_is_not_applied_any_further() {
    let mut half = HalfWritten::new();
    let last = half.region.info.base + half.region.info.length - 1;
    half.target.engine.revoke(last, 1);
    half.region.paint(2);
    half.check_rest_is_scrap(Reason::Revoked);
    assert!(is_applied(&mut half, 2, 0, None), "another byte of the region");
    half.target.engine.revoke(half.region.info.base, 1);
    assert!(!is_applied(&mut half, 3, 0, None));
    assert!(!is_applied(&mut half, 4, 1, None));
    assert!(is_applied(&mut half, 5, 2, None), "admitted since");
    assert!(!is_applied(&mut half, 6, 3, None), "from an epoch that never was");
}

#[test]
fn a8_what_does_not_touch_it_goes_on() {
    let mut half = HalfWritten::new();
    half.target.engine.revoke(half.region.info.base + half.region.info.length, 4096);
    half.target.engine.revoke_tag(TAG);
    send(&mut half.peer, &[&vec![8; half.region.info.length as usize / 2], &trailer(1)]);
    assert_eq!(read_ack(&mut half.peer), Ack::Processed { through: 1 });
    assert_eq!(half.region.read().last(), Some(&8));
}

/// Also a chunk that is sent, and admitted, long after.
#[test]
fn a8_a_tagged_part_is_refused_whenever_it_comes() {
    let mut half = HalfWritten::tagged(TAG);
    half.target.engine.revoke_tag(TAG);
    half.region.paint(2);
    half.check_rest_is_scrap(Reason::Revoked);
    assert!(!is_applied(&mut half, 2, 1, Some(TAG)));
    assert!(is_applied(&mut half, 3, 0, None), "without it");
    assert!(is_applied(&mut half, 4, 0, Some(Tag([8; 16]))), "another one");
}

#[test]
fn a8_an_answer_under_way_gives_nothing_that_came_later() {
    let mut stuck = StuckRead::new();
    stuck.target.engine.revoke(stuck.region.info.base, 1);
    stuck.region.paint(2);
    stuck.check_padded(Reason::Revoked);
}

/// Refused on both kinds of lane with the run at fault, and counted.
#[test]
fn a_refusal_names_the_run() {
    for kind in [LaneKind::Write, LaneKind::Read] {
        let link = Link::new(kind);
        let (local, remote) = (link.initiator.shared(8192), link.target.shared(8192));
        local.paint(1);
        remote.paint(2);
        let admitted = |at: u64| {
            let slices = [(0, 0, 100), (4000, 1000, 100)];
            let payload = payload(kind, &link.initiator, &local, &remote, &slices);
            let payload = Arc::into_inner(payload).expect("the only one");
            Arc::new(Payload { admit_epoch: Epoch(at), ..payload })
        };
        link.target.revoke(remote.info.base + 1099, 1);
        let before = (local.read(), remote.read());
        link.lane.submit(sequenced(&admitted(0), 1));
        link.events.wait_processed(1);
        assert!((local.read(), remote.read()) == before, "a refused part moved a byte");
        link.lane.submit(sequenced(&admitted(1), 2));
        link.events.wait_processed(2);
        assert!((local.read(), remote.read()) != before);
        let refused = link.events.refused();
        assert_eq!(refused.len(), 1);
        let (sequence, failure) = &refused[0];
        assert_eq!((*sequence, failure.reason, failure.index), (1, Reason::Revoked, Some(1)));
    }
}

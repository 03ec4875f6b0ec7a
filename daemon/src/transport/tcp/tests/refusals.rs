//! What a target does not apply, it names; the lane and every other byte live on (I4, I5).

use super::*;
use crate::{
    domain::{Generation, Reason, RegionId},
    transport::{
        Payload,
        testing::{pattern, payload, sequenced},
    },
};

/// Sends one bad payload and a good one behind it, and gives the refusal of the bad one.
fn refusal(kind: LaneKind, spoil: impl FnOnce(&mut Payload, &Link)) -> Failure {
    let link = Link::new(kind);
    let (local, remote) = (link.initiator.shared(8192), link.target.shared(8192));
    local.paint(1);
    remote.paint(2);
    let slices = [(0, 0, 100), (100, 100, 100), (4000, 1000, 100)];
    let mut bad =
        Arc::into_inner(payload(kind, &link.initiator, &local, &remote, &slices)).expect("the only one");
    spoil(&mut bad, &link);
    link.lane.submit(sequenced(&Arc::new(bad), 1));
    link.events.wait_processed(1);
    let (before, after) = (pattern(0, 1), pattern(0, 2));
    assert_eq!((local.read()[0], remote.read()[0]), (before, after), "a refused part moved a byte");
    let good = payload(kind, &link.initiator, &local, &remote, &[(0, 0, 8192)]);
    link.lane.submit(sequenced(&good, 2));
    link.events.wait_processed(2);
    assert!(local.read() == remote.read());
    let refused = link.events.refused();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].0, 1);
    link.lane.close(Failure::plain(Reason::Cancelled));
    let (record, _) = link.end.wait();
    assert_eq!((record.processed, record.refused), (2, refused.clone()));
    refused[0].1.clone()
}

fn named(failure: &Failure) -> (Reason, Option<u64>) {
    (failure.reason, failure.index)
}

#[test]
fn each_refusal_names_reason_and_run() {
    for kind in [LaneKind::Write, LaneKind::Read] {
        let generation = refusal(kind, |payload, _| payload.remote_regions[0].generation = Generation(900));
        assert_eq!(named(&generation), (Reason::RegionChanged, Some(0)));
        let region = refusal(kind, |payload, _| payload.remote_regions[0].id = RegionId(900));
        assert_eq!(named(&region), (Reason::RegionChanged, Some(0)));
        let leaves = refusal(kind, |payload, _| payload.runs[1].remote += 8000);
        assert_eq!(named(&leaves), (Reason::OutOfBounds, Some(1)));
        let outside = refusal(kind, |payload, _| payload.runs[2].remote += 1 << 30);
        assert_eq!(named(&outside), (Reason::Unregistered, Some(2)));
        let wraps = refusal(kind, |payload, _| payload.runs[1].remote = u64::MAX - 5);
        assert_eq!(named(&wraps), (Reason::Unregistered, Some(1)));
    }
}

/// Private memory of a process that has died: a refused part on either side, and the lane lives.
#[test]
fn memory_that_does_not_answer_is_a_refused_part() {
    for kind in [LaneKind::Write, LaneKind::Read] {
        for dead_is_local in [false, true] {
            let carriers = Carriers::start(2, SPIN).expect("threads");
            let (here, there) = connection();
            let (mortal, dying) = Engine::of_a_child();
            let (initiator, target) = match dead_is_local {
                true => (Initiator::of(mortal, &carriers, kind, here), Target::start(&carriers, kind, there)),
                false => {
                    (Initiator::start(&carriers, kind, here), Target::of(mortal, &carriers, kind, there))
                }
            };
            let (local, remote) = match dead_is_local {
                true => (dying.end(), target.engine.shared(4096)),
                false => (initiator.engine.shared(4096), dying.end()),
            };
            let slices = [(0, 0, 64)];
            initiator.lane.submit(sequenced(&payload(kind, &initiator.engine, &local, &remote, &slices), 1));
            initiator.events.wait_processed(1);
            let refused = initiator.events.refused();
            assert_eq!((refused.len(), refused[0].0), (1, 1), "{kind:?} {dead_is_local}");
            assert_eq!(refused[0].1.reason, Reason::EngineGone);
            let (local, remote) = (initiator.engine.shared(4096), target.engine.shared(4096));
            initiator.lane.submit(sequenced(&payload(kind, &initiator.engine, &local, &remote, &slices), 2));
            initiator.events.wait_processed(2);
            assert_eq!(initiator.events.refused().len(), 1);
        }
    }
}

//! Revocations, from both ends.

use std::sync::Arc;

use super::rig::*;
use crate::{
    domain::{Epoch, Incarnation, Op, Outcome, PeerHalf, Reason, Tag},
    policy::{RevocationLimits, Revocations},
    session::outbound::{Event, Opened},
};

fn revoked(epoch: u64, slots: &[(u64, u8)]) -> Event {
    Event::Revoked(Box::new(revocations(epoch, slots)))
}

/// Submitted with what was known when the call arrived.
fn write_known(rig: &mut Rig, number: u8, known: Option<(Incarnation, Epoch)>) {
    let admitted = admitted(id(number), Op::Write, 1, policy().retry, rig.now);
    rig.feed(Event::Submit(Box::new(crate::transfer::run::Admitted { known, ..admitted })));
}

/// A8: flying, queued behind the window and backing off alike; whoever has no byte in it does not notice.
#[test]
fn a8_whoever_was_admitted_before_a_revocation_ends_wholly() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    rig.write(2, 9);
    rig.write(3, 3);
    rig.parts();
    rig.feed(revoked(8, &[(8, 2), (8, 200)]));
    assert_eq!(rig.seen, [Epoch(8)], "told after the ends were decided");
    rig.quiet();
    assert_eq!(rig.peer_stops.len(), 1);
    rig.feed(Event::Stopped(id(2)));
    let report = rig.finished[0].clone();
    assert_eq!((report.outcome, report.peer_half), (Outcome::Failed, PeerHalf::Confirmed));
    assert_eq!(rig.failures(), [(2, Reason::Revoked)]);
    let mut sequence = 2;
    while !rig.is_empty() {
        rig.processed(lane, sequence, sequence);
        sequence += 1;
        assert!(sequence < 20, "they go on");
    }
    assert!(rig.finished().iter().all(|(_, outcome)| *outcome == Outcome::Done));
    assert!(rig.closes.is_empty() && rig.disconnects == 0, "no lane was cut");
}

#[test]
fn a8_a_transfer_that_backs_off_ends_too() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.dies(lane, record(1));
    assert!(rig.core.runs[&id(1)].not_before.is_some(), "it backs off");
    rig.feed(revoked(8, &[(8, 1)]));
    assert_eq!(rig.failures(), [(1, Reason::Revoked)]);
}

/// C4b's plain half: queued while the session is down, and revoked meanwhile. What it was admitted under does
/// not change when the target's daemon is another run.
#[test]
fn c4b_a_queued_transfer_keeps_its_epoch_over_a_restart() {
    let mut rig = Rig::up();
    rig.control_ends(Reason::ConnectionLost);
    rig.write(1, 1);
    rig.write(2, 1);
    rig.open(Opened { boot: NEXT_BOOT, revocations: revocations(9, &[(8, 1)]), ..opened() });
    assert_eq!(rig.failures(), [(1, Reason::Revoked)]);
    assert_eq!(rig.core.runs[&id(2)].admit_epoch, Some(Epoch(7)));
    rig.write(3, 1);
    assert_eq!(rig.core.runs[&id(3)].admit_epoch, Some(Epoch(9)));
}

/// What was sent to the earlier daemon and is revoked is told as revoked: that is what the caller has to know.
#[test]
fn a_revocation_is_told_before_a_restart() {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 1);
    rig.control_ends(Reason::ConnectionLost);
    rig.open(Opened { boot: NEXT_BOOT, revocations: revocations(9, &[(8, 1)]), ..opened() });
    let closing: Vec<_> = rig.closes.drain(..).collect();
    closing.into_iter().for_each(|lane| rig.closed(lane, lost()));
    rig.quiet();
    assert_eq!(rig.failures(), [(1, Reason::Revoked)]);
}

#[test]
fn below_the_floor_everybody_ends() {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 1);
    rig.control_ends(Reason::ConnectionLost);
    let closing: Vec<_> = rig.closes.drain(..).collect();
    closing.into_iter().for_each(|lane| rig.closed(lane, lost()));
    let mut floor = Revocations::new(RevocationLimits::ranges(0));
    for _ in 0..8 {
        floor.revoke(vec![]);
    }
    floor.revoke(vec![crate::domain::AddressRange::new(1, 1).expect("a range")]);
    rig.open(Opened { revocations: floor, ..opened() });
    rig.quiet();
    assert_eq!(rig.failures(), [(1, Reason::Revoked)]);
}

/// A transfer that was admitted for nobody in particular is admitted for whoever is met: a list of epochs that it
/// never saw does not concern it.
#[test]
fn whoever_was_never_met_admits_at_the_opening() {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.open(Opened { revocations: revocations(9, &[(8, 1)]), ..opened() });
    rig.open_lane();
    assert_eq!(rig.parts(), [(1, 0)]);
    assert_eq!(rig.core.runs[&id(1)].admit_epoch, Some(Epoch(9)));
}

/// The epoch is that of the call's arrival, not of its turn.
#[test]
fn a_call_that_waited_for_its_turn_is_admitted_under_what_was_known_when_it_arrived() {
    let mut rig = Rig::up();
    let arrived = rig.core.known();
    assert_eq!(arrived, Some((ALICE, Epoch(7))));
    rig.feed(revoked(8, &[(8, 1)]));
    write_known(&mut rig, 1, arrived);
    assert_eq!(rig.core.runs[&id(1)].admit_epoch, Some(Epoch(7)), "so the target refuses it");
    let known = rig.core.known();
    write_known(&mut rig, 2, known);
    assert_eq!(rig.core.runs[&id(2)].admit_epoch, Some(Epoch(8)));
    // Made for somebody else.
    write_known(&mut rig, 3, Some((BOB, Epoch(90))));
    assert_eq!(rig.failures(), [(3, Reason::PeerRestarted)]);
}

/// I4: a call that was on its way while the session was reset names addresses of whom the engine knew then.
#[test]
fn i4_a_call_that_a_reset_overtook_is_refused() {
    let mut rig = Rig::up();
    let arrived = rig.core.known();
    rig.feed(Event::Reset);
    assert_eq!(rig.core.known(), None);
    write_known(&mut rig, 1, arrived);
    assert_eq!(rig.failures(), [(1, Reason::PeerRestarted)]);
    let known = rig.core.known();
    write_known(&mut rig, 2, known);
    rig.open(opened());
    assert_eq!(rig.core.runs[&id(2)].expects, Some(ALICE), "made since then: for whoever is there");
}

#[test]
fn a_tag_ends_whoever_carries_it_whenever_they_were_admitted() {
    let tag = Some(Tag([9; 16]));
    let mut rig = Rig::new();
    let tagged = |rig: &mut Rig, number: u8| {
        let admitted = admitted(id(number), Op::Write, 1, policy().retry, rig.now);
        rig.feed(Event::Submit(Box::new(crate::transfer::run::Admitted { tag, ..admitted })));
    };
    tagged(&mut rig, 1);
    rig.write(2, 1);
    let mut list = revocations(9, &[]);
    list.revoke_tag(Tag([9; 16]), rig.now).expect("room");
    rig.open(Opened { revocations: list.clone(), ..opened() });
    assert_eq!(rig.failures(), [(1, Reason::Revoked)], "not even admitted, and refused");
    tagged(&mut rig, 3);
    rig.feed(Event::Revoked(Box::new(list)));
    assert_eq!(rig.failures(), [(3, Reason::Revoked)]);
    assert_eq!(rig.core.runs.len(), 1);
}

/// The own engine's half: ended wholly, and those that end already are waited for too.
#[test]
fn what_the_own_engine_revokes_is_answered_when_it_is_settled_here() {
    let (mut rig, lane) = Rig::with_lane();
    for number in 1..=3 {
        rig.write(number, 1);
    }
    rig.cancel(1);
    let own = |slots: &[(u64, u8)]| Event::RevokedHere(5, Arc::new(revocations(1, slots)));
    rig.feed(own(&[(1, 1), (1, 2)]));
    assert_eq!(rig.hit_here, [(5, vec![id(1), id(2)])]);
    let settled = |rig: &Rig| [1, 2, 3, 4].map(|number| rig.core.is_settled_here(id(number)));
    assert_eq!(settled(&rig), [false, false, false, true]);
    assert_eq!(rig.stops.len(), 2);
    rig.quiet();
    assert_eq!(settled(&rig), [true, true, false, true], "the peer's half is not waited for");
    [1, 2].iter().for_each(|number| rig.feed(Event::Stopped(id(*number))));
    assert_eq!(rig.failures(), [(1, Reason::Cancelled), (2, Reason::Revoked)]);
    rig.processed(lane, 2, 4);
    assert_eq!(rig.finished(), [(3, Outcome::Done)]);
    assert!(rig.closes.is_empty());
}

/// Revoking again hits only what was admitted before the first time: new transfers may use the memory.
#[test]
fn new_transfers_may_use_what_the_own_engine_revoked() {
    let (mut rig, lane) = Rig::with_lane();
    let admitted = admitted(id(1), Op::Write, 1, policy().retry, rig.now);
    rig.feed(Event::Submit(Box::new(crate::transfer::run::Admitted { own_epoch: Epoch(1), ..admitted })));
    rig.feed(Event::RevokedHere(5, Arc::new(revocations(1, &[(1, 1)]))));
    assert_eq!(rig.hit_here, [(5, vec![])]);
    rig.processed(lane, 2, 2);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

//! When the control stream is opened, and who may be at its other end.

use std::mem::take;

use super::rig::*;
use crate::{
    domain::{Epoch, Outcome, PeerHalf, Reason},
    session::outbound::{Event, Opened, State},
};

#[test]
fn one_open_serves_everyone_who_wants_the_session() {
    let mut rig = Rig::new();
    assert_eq!(rig.state(), State::Idle);
    rig.write(1, 1);
    rig.read(2, 1);
    rig.probe(3);
    rig.pass(ms(10));
    assert_eq!(rig.connects, [None]);
    rig.open(opened());
    assert_eq!((rig.connects.len(), rig.state()), (0, State::Healthy));
    assert_eq!(rig.opens.len(), 2, "one lane for each direction");
}

#[test]
fn what_was_not_asked_for_is_passed_over() {
    let mut rig = Rig::new();
    rig.feed(Event::Opened(Box::new(opened())));
    rig.feed(Event::OpenFailed(lost()));
    rig.control_ends(Reason::ConnectionLost);
    assert_eq!((rig.state(), rig.states.len(), rig.connects.len()), (State::Idle, 0, 0));
}

/// I4: nobody but the incarnation met first is asked for, until the pin lapses.
#[test]
fn i4_a_session_is_pinned_to_whom_it_met() {
    let mut rig = Rig::up();
    rig.control_ends(Reason::ConnectionLost);
    rig.write(1, 1);
    assert_eq!(rig.connects, [Some(ALICE)]);
    rig.refuse(Reason::PeerRestarted);
    assert_eq!(rig.failures(), [(1, Reason::PeerRestarted)]);
    // Refused attempts do not renew the pin.
    rig.pass(policy().pin_idle);
    rig.write(2, 1);
    assert_eq!(rig.connects, [None]);
}

#[test]
fn i4_an_engine_that_attached_again_brings_its_pins() {
    let mut rig = Rig::knowing(policy(), Some(ALICE));
    rig.write(1, 1);
    assert_eq!(rig.connects, [Some(ALICE)]);
    rig.open(opened());
    // No epoch was ever known, so the transfer is admitted when the session opens.
    assert_eq!(rig.core.runs[&id(1)].admit_epoch, Some(Epoch(7)));
}

/// C8, I4: what a pin handed over is worth is counted from the attach, however late the session is first used.
#[test]
fn i4_a_pin_that_was_handed_over_lapses_unless_its_peer_is_met() {
    let mut rig = Rig::knowing(policy(), Some(ALICE));
    rig.pass(policy().pin_idle);
    rig.write(1, 1);
    assert_eq!(rig.connects, [None]);
}

/// The engine is told whom it met, so that it can say so to the next daemon; and that a reset has undone it.
#[test]
fn i4_the_pin_is_told_with_the_state() {
    let mut rig = Rig::new();
    rig.write(1, 1);
    assert_eq!(rig.told_pin, None);
    rig.open(opened());
    assert_eq!(rig.told_pin, Some(ALICE));
    rig.control_ends(Reason::ConnectionLost);
    assert_eq!(rig.told_pin, Some(ALICE));
    rig.feed(Event::Reset);
    assert_eq!(rig.told_pin, None);
}

/// I4: a reset accepts another engine, for those who come after it.
#[test]
fn i4_after_a_reset_only_those_admitted_before_it_end_with_another_engine() {
    let mut rig = Rig::up();
    rig.write(1, 1);
    rig.feed(Event::Reset);
    assert_eq!(rig.disconnects, 1);
    assert_eq!(rig.connects, [None]);
    rig.write(2, 1);
    rig.open(Opened { incarnation: BOB, revocations: revocations(3, &[]), ..opened() });
    assert_eq!(rig.failures(), [(1, Reason::PeerRestarted)]);
    // The epoch of another engine means nothing.
    assert_eq!(rig.core.runs[&id(2)].admit_epoch, Some(Epoch(3)));
    let lane = rig.open_lane();
    assert_eq!(rig.parts(), [(2, 0)]);
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(2, Outcome::Done)]);
    assert_eq!(rig.core.summary().incarnation, Some(BOB));
}

#[test]
fn i4_after_a_reset_the_same_engine_serves_everyone() {
    let mut rig = Rig::up();
    rig.write(1, 1);
    rig.feed(Event::Reset);
    rig.write(2, 1);
    rig.open(opened());
    rig.open_lane();
    assert_eq!(rig.parts(), [(1, 0), (2, 0)]);
    // Admitted while the session was down, under the newest epoch known then.
    assert_eq!(rig.core.runs[&id(2)].admit_epoch, Some(Epoch(7)));
}

#[test]
fn i4_a_lapsed_pin_is_like_a_reset_for_those_who_come_after_it() {
    let mut rig = Rig::up();
    rig.pass(policy().pin_idle);
    // Up, so this one is for whoever is there.
    rig.write(1, 1);
    rig.control_ends(Reason::ConnectionLost);
    rig.write(2, 1);
    rig.open(Opened { incarnation: BOB, ..opened() });
    assert_eq!(rig.failures(), [(1, Reason::PeerRestarted)]);
    rig.open_lane();
    assert_eq!(rig.parts(), [(2, 0)]);
}

/// A reset joins the open that is under way; what it finds counts for those who expected it.
#[test]
fn i4_a_reset_during_an_open_that_finds_another_engine_opens_again() {
    let mut rig = Rig::up();
    rig.control_ends(Reason::ConnectionLost);
    rig.write(1, 1);
    rig.feed(Event::Reset);
    rig.write(2, 1);
    assert_eq!(rig.connects, [Some(ALICE)]);
    rig.refuse(Reason::PeerRestarted);
    assert_eq!(rig.failures(), [(1, Reason::PeerRestarted)]);
    assert_eq!(rig.connects, [None]);
    rig.refuse(Reason::PeerRestarted);
    assert_eq!(rig.failures(), [(2, Reason::PeerRestarted)], "nobody was expected: this is final");
    assert!(rig.connects.is_empty());
}

/// I2: another engine's daemon can say nothing of the lanes to the engine before it.
#[test]
fn i2_another_engine_confirms_nothing_for_the_one_before() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    rig.feed(Event::Reset);
    assert_eq!(take(&mut rig.closes), [lane]);
    rig.open(Opened { incarnation: BOB, fenced: vec![(lane, record(3))], ..opened() });
    assert!(rig.finished.is_empty(), "the own half is not proven");
    rig.closed(lane, cancelled());
    assert!(rig.finished.is_empty());
    rig.quiet();
    assert_eq!(rig.finished[0].peer_half, PeerHalf::Unconfirmed);
    assert_eq!(rig.failures(), [(1, Reason::PeerRestarted)]);
    assert!(rig.core.lanes.is_empty());
}

#[test]
fn a_restarted_daemon_ends_what_was_sent_and_carries_what_was_not() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.write(2, 8);
    rig.write(3, 1);
    assert_eq!(rig.parts(), [(1, 0), (2, 0), (2, 1), (2, 2)]);
    rig.write(4, 1);
    rig.feed(revoked_elsewhere(9));
    rig.control_ends(Reason::ConnectionLost);
    rig.closed(lane, lost());
    rig.open(Opened { boot: NEXT_BOOT, revocations: revocations(1, &[]), ..opened() });
    rig.quiet();
    let ended = rig.failures();
    assert_eq!(ended, [(1, Reason::PeerDaemonRestarted), (2, Reason::PeerDaemonRestarted)]);
    let lane = rig.open_lane();
    assert_eq!(rig.parts(), [(3, 0), (4, 0)]);
    rig.processed(lane, 1, 2);
    assert_eq!(rig.finished(), [(3, Outcome::Done), (4, Outcome::Done)]);
}

#[test]
fn a_transfer_is_planned_again_under_the_epoch_it_was_admitted_with() {
    let mut rig = Rig::up();
    rig.plans_at_once = false;
    rig.write(1, 1);
    rig.control_ends(Reason::ConnectionLost);
    rig.open(Opened { boot: NEXT_BOOT, revocations: revocations(20, &[]), ..opened() });
    let epochs: Vec<_> = rig.plans.iter().map(|plan| (plan.boot, plan.order.admit_epoch)).collect();
    assert_eq!(epochs, [(BOOT, Epoch(7)), (NEXT_BOOT, Epoch(7))]);
}

#[test]
fn an_epoch_never_falls() {
    let mut rig = Rig::up();
    rig.feed(revoked_elsewhere(9));
    rig.feed(revoked_elsewhere(8));
    rig.write(1, 1);
    assert_eq!(rig.core.runs[&id(1)].admit_epoch, Some(Epoch(9)));
}

/// A draining peer will be back: nothing is counted, and what was not sent waits beyond `reconnect_ms`.
#[test]
fn a_draining_peer_is_waited_for_and_not_counted() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 4);
    rig.write(2, 1);
    rig.control_ends(Reason::Draining);
    rig.quiet();
    rig.closed(lane, lost());
    assert_eq!(rig.failures(), [(1, Reason::Draining)]);
    for _ in 0..40 {
        rig.pass(ms(250));
        rig.refuse(Reason::ConnectRefused);
    }
    assert_eq!(rig.core.summary().consecutive_failures, 0);
    rig.pass(ms(250));
    rig.open(Opened { boot: NEXT_BOOT, ..opened() });
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(2, Outcome::Done)]);
}

#[test]
fn a_peer_that_drains_in_mid_outage_is_not_given_up_with_the_outage() {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.refuse(Reason::ConnectRefused);
    rig.wake();
    rig.refuse(Reason::Draining);
    rig.pass(policy().retry.reconnect);
    assert!(rig.finished.is_empty());
    rig.refuse(Reason::ConnectRefused);
    rig.pass(policy().retry.deadline);
    assert_eq!(rig.failures(), [(1, Reason::Deadline)]);
    assert_eq!(rig.core.summary().consecutive_failures, 0);
}

#[test]
fn what_no_retry_can_cure_is_told_at_once() {
    for reason in [Reason::NoPath, Reason::UnknownSession, Reason::Unauthorised, Reason::EngineGone] {
        let mut rig = Rig::new();
        rig.write(1, 1);
        rig.refuse(reason);
        assert_eq!(rig.failures(), [(1, reason)]);
        assert_eq!((rig.connects.len(), rig.core.summary().consecutive_failures), (0, 0), "{reason:?}");
    }
}

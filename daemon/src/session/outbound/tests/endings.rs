//! How transfers end: settled here first (I1), and what is proven of the peer's half.

use std::mem::take;

use super::rig::*;
use crate::{
    domain::{Op, Outcome, PeerHalf, Reason},
    policy::{HealthPolicy, RetryPolicy},
    session::outbound::{Event, Opened, Policy, State},
};

#[test]
fn i1_what_never_started_is_settled_as_it_is() {
    // Before there is a session, before there is a plan, before there is a lane.
    let mut waiting = Rig::new();
    waiting.write(1, 1);
    let mut unplanned = Rig::up();
    unplanned.plans_at_once = false;
    unplanned.write(1, 1);
    let mut unsent = Rig::up();
    unsent.write(1, 1);
    for mut rig in [waiting, unplanned, unsent] {
        rig.cancel(1);
        assert!(rig.stops.is_empty() && rig.peer_stops.is_empty());
        assert_eq!((rig.finished[0].peer_half, rig.finished[0].path), (PeerHalf::Confirmed, None));
        assert_eq!(rig.finished(), [(1, Outcome::Cancelled)]);
        rig.cancel(1);
        assert!(rig.finished.is_empty(), "it ended once");
    }
}

/// I1: the own half by the gate, then the peer's half by its word; the lane and its neighbours carry on.
#[test]
fn i1_cancelled_is_told_when_both_halves_are_proven() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 3);
    rig.write(2, 2);
    rig.parts();
    rig.cancel(1);
    rig.cancel(1);
    assert_eq!(rig.stops.len(), 1, "stopped once");
    assert!(rig.peer_stops.is_empty() && rig.finished.is_empty(), "the own half first");
    rig.quiet();
    assert_eq!(take(&mut rig.peer_stops), [(id(1), vec![(lane, 4)])], "up to its last sequence");
    assert!(rig.finished.is_empty());
    rig.feed(Event::Stopped(id(1)));
    assert_eq!(rig.half(), PeerHalf::Confirmed);
    rig.processed(lane, 2, 5);
    rig.processed(lane, 6, 6);
    assert_eq!(rig.finished(), [(2, Outcome::Done)]);
    assert!(rig.closes.is_empty());
}

#[test]
fn i1_what_is_cancelled_starts_no_part_any_more() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 10);
    rig.parts();
    rig.cancel(1);
    rig.processed(lane, 2, 5);
    assert!(rig.sent.is_empty());
}

/// The parts in doubt may all be acknowledged before the peer answers: that is its word too.
#[test]
fn i1_acknowledgements_prove_the_peers_half() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    rig.cancel(1);
    rig.quiet();
    rig.processed(lane, 2, 3);
    assert_eq!(rig.half(), PeerHalf::Confirmed);
    rig.feed(Event::Stopped(id(1)));
    assert!(rig.finished.is_empty());
}

#[test]
fn i1_a_cancel_in_back_off_ends_at_once() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.dies(lane, record(0));
    rig.cancel(1);
    assert!(rig.stops.is_empty(), "nothing flies");
    assert_eq!(rig.half(), PeerHalf::Confirmed);
}

#[test]
fn i1_a_cancel_while_its_lane_waits_for_the_fence() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.closed(lane, lost());
    rig.cancel(1);
    assert!(rig.finished.is_empty(), "the target may still apply it");
    rig.quiet();
    assert!(rig.finished.is_empty());
    rig.feed(Event::LaneFenced(lane, record(0)));
    assert_eq!(rig.half(), PeerHalf::Confirmed);
}

#[test]
fn what_is_done_cannot_be_cancelled() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.processed(lane, 2, 2);
    rig.cancel(1);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

/// The first reason stays: the caller was told, or will be.
#[test]
fn the_first_end_counts() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    rig.refused(lane, 2, Reason::Revoked);
    rig.cancel(1);
    rig.processed(lane, 2, 3);
    rig.quiet();
    let failure = rig.finished[0].failure.clone().expect("it failed");
    assert_eq!((failure.reason, failure.index), (Reason::Revoked, Some(0)));
    assert_eq!(rig.finished(), [(1, Outcome::Failed)]);
}

#[test]
fn the_peers_word_is_waited_for_only_so_long() {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 1);
    rig.cancel(1);
    rig.quiet();
    rig.pass(ms(2999));
    assert!(rig.finished.is_empty());
    rig.wake();
    assert_eq!(rig.half(), PeerHalf::Unconfirmed);
    rig.feed(Event::Stopped(id(1)));
    assert!(rig.finished.is_empty(), "it is never upgraded");
}

/// Nobody waits for a peer that is silent already.
#[test]
fn i9_without_a_stream_the_peers_word_is_not_waited_for() {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 1);
    rig.cancel(1);
    rig.quiet();
    rig.control_ends(Reason::PeerSilent);
    assert_eq!(rig.half(), PeerHalf::Unconfirmed);

    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 1);
    rig.control_ends(Reason::PeerSilent);
    rig.cancel(1);
    assert!(rig.finished.is_empty(), "the own half is waited for");
    rig.quiet();
    assert!(rig.peer_stops.is_empty());
    assert_eq!(rig.half(), PeerHalf::Unconfirmed);
}

#[test]
fn a_stream_that_came_back_confirms_what_the_gate_was_still_asked_for() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.cancel(1);
    rig.control_ends(Reason::ConnectionLost);
    rig.closed(lane, lost());
    rig.write(2, 1);
    rig.open(opened());
    rig.quiet();
    assert_eq!(rig.half(), PeerHalf::Confirmed, "Accept fenced its lane");
}

/// I1: settlement is never derived from a clock; the caller is told that it is not proven, and later that it is.
#[test]
fn i1_unsettled_is_told_once_and_the_end_follows() {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 1);
    rig.cancel(1);
    rig.pass(ms(4999));
    assert!(rig.unsettled.is_empty());
    rig.pass(ms(1));
    let unsettled = take(&mut rig.unsettled);
    assert_eq!(unsettled.len(), 1);
    assert_eq!((unsettled[0].outcome, unsettled[0].peer_half), (Outcome::Unsettled, PeerHalf::Unconfirmed));
    assert_eq!(rig.core.next_wake(), rig.core.lanes.values().find_map(|lane| rig.core.lane_wake(lane)));
    rig.pass(ms(3_600_000));
    assert!(rig.finished.is_empty() && rig.unsettled.is_empty());
    rig.quiet();
    assert_eq!(rig.finished(), [(1, Outcome::Cancelled)]);
}

#[test]
fn the_deadline_ends_a_transfer_wherever_it_is() {
    let quick = RetryPolicy { deadline: ms(100), ..policy().retry };
    let mut waiting = Rig::new();
    waiting.submit(1, Op::Write, 1, quick);
    let mut moving = Rig::up();
    moving.submit(1, Op::Write, 9, quick);
    moving.open_lane();
    for mut rig in [waiting, moving] {
        rig.pass(ms(99));
        assert!(rig.finished.is_empty() && rig.stops.is_empty());
        rig.wake();
        rig.quiet();
        rig.feed(Event::Stopped(id(1)));
        assert_eq!(rig.failures(), [(1, Reason::Deadline)]);
        assert_eq!(rig.core.summary().consecutive_failures, 0, "the caller's own limit");
    }
}

#[test]
fn unregistered_memory_ends_the_transfers_that_lease_it() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 9);
    rig.feed(Event::LocalRegionsRetired);
    assert!(rig.stops.is_empty(), "not its regions");
    rig.retire_regions();
    rig.quiet();
    rig.processed(lane, 2, 5);
    assert_eq!(rig.failures(), [(1, Reason::RegionChanged)]);
}

#[test]
fn a_shutdown_ends_everything_and_is_over_when_nothing_can_touch_memory() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.read(2, 1);
    rig.probe(3);
    rig.feed(Event::Shutdown(crate::domain::Failure::plain(Reason::EngineGone)));
    assert_eq!(rig.failures(), [(2, Reason::EngineGone)], "nothing of it was sent");
    assert_eq!(take(&mut rig.closes), [lane]);
    rig.quiet();
    assert!(!rig.core.is_over());
    rig.feed(Event::Stopped(id(1)));
    assert_eq!(rig.failures(), [(1, Reason::EngineGone)]);
    assert!(!rig.core.is_over(), "its lane is not closed");
    rig.closed(lane, lost());
    assert!(!rig.core.is_over(), "the probe is not settled");
    while !rig.core.is_over() {
        rig.quiet();
        rig.wake();
    }
    assert_eq!(rig.disconnects, 1);
    assert_eq!(rig.probed.len(), 1);
    rig.write(4, 1);
    rig.probe(5);
    assert_eq!(rig.failures(), [(4, Reason::EngineGone)]);
    assert_eq!((rig.probed.len(), rig.connects.len()), (2, 0));
}

#[test]
fn a_shutdown_without_a_stream_opens_nothing() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.control_ends(Reason::ConnectionLost);
    rig.feed(Event::Shutdown(crate::domain::Failure::plain(Reason::Draining)));
    rig.feed(Event::Opened(Box::new(opened())));
    rig.quiet();
    assert_eq!(rig.half(), PeerHalf::Unconfirmed);
    rig.closed(lane, lost());
    assert!(rig.core.is_over());
    assert_eq!(rig.core.next_wake(), None);
}

/// A shutdown in the middle of a probe of a failed session leaves no alarm that never goes off.
#[test]
fn a_shutdown_stops_the_probing() {
    let fail_fast = HealthPolicy { failure_threshold: 1, ..policy().health };
    let mut rig = Rig::up_with(Policy { health: fail_fast, ..policy() });
    let lane = rig.first_lane();
    rig.write_once(1, 1);
    rig.dies(lane, record(0));
    rig.quiet();
    assert_eq!(rig.state(), State::Failed);
    rig.wake();
    let lane = rig.open_lane();
    assert_eq!(rig.sent.len(), 2, "a probe is under way");
    rig.feed(Event::Shutdown(cancelled()));
    rig.quiet();
    rig.feed(Event::Stopped(rig.sent[1].transfer));
    assert!(rig.is_empty() && !rig.core.is_over(), "a lane is left");
    assert_eq!(rig.core.next_wake(), None);
    rig.closed(lane, lost());
    assert!(rig.core.is_over());
}

#[test]
fn figures_of_a_transfer_that_did_not_end_well_are_never_too_high() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 3);
    rig.processed(lane, 2, 3);
    rig.cancel(1);
    rig.quiet();
    rig.processed(lane, 4, 4);
    let report = &rig.finished[0];
    assert_eq!((report.slices, report.slices_done), (1, 0));
    assert_eq!((report.bytes, report.bytes_done), (3 << 20, 2 << 20));
    rig.open_session_again();
}

impl Rig {
    /// A session that has seen an end serves the next transfer as if nothing had been.
    fn open_session_again(&mut self) {
        self.finished.clear();
        self.control_ends(Reason::ConnectionLost);
        for lane in take(&mut self.closes) {
            self.closed(lane, lost());
        }
        self.write(9, 1);
        self.open(Opened { boot: NEXT_BOOT, ..opened() });
        let lane = self.open_lane();
        self.processed(lane, 1, 1);
        assert_eq!(self.finished(), [(9, Outcome::Done)]);
    }
}

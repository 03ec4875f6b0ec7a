//! Which table a plan is made from, and when it is made anew.

use std::mem::take;

use super::rig::*;
use crate::{
    domain::{Outcome, PeerHalf, Reason},
    session::outbound::{Event, Opened},
};

fn up_with_an_empty_table() -> Rig {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.open(Opened { table: empty_table(1), ..opened() });
    rig
}

/// Engines talk faster than tables: a look-up that misses is refused only after the newest table was seen.
#[test]
fn a_miss_asks_for_the_newest_table_exactly_once() {
    let mut rig = up_with_an_empty_table();
    let [nonce] = take(&mut rig.table_requests)[..] else { panic!("asked once") };
    rig.feed(Event::Table(empty_table(2), 0));
    assert!(rig.finished.is_empty(), "a push is no answer");
    rig.feed(Event::Table(empty_table(3), nonce));
    assert!(rig.table_requests.is_empty());
    assert_eq!(rig.finished[0].peer_half, PeerHalf::Confirmed);
    assert_eq!(rig.failures(), [(1, Reason::Unregistered)]);
}

#[test]
fn a_miss_is_cured_by_the_newest_table() {
    let mut rig = up_with_an_empty_table();
    let [nonce] = take(&mut rig.table_requests)[..] else { panic!("asked once") };
    rig.feed(Event::Table(peer_table(2), nonce));
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

#[test]
fn an_older_table_replaces_no_newer_one() {
    let mut rig = Rig::up();
    rig.feed(Event::Table(peer_table(5), 0));
    rig.feed(Event::Table(empty_table(4), 0));
    rig.write(1, 1);
    assert_eq!(rig.opens.len(), 1, "planned from the newer table");
}

#[test]
fn each_asks_for_itself_and_is_answered_for_itself() {
    let mut rig = up_with_an_empty_table();
    rig.write(2, 1);
    let nonces = take(&mut rig.table_requests);
    assert_eq!(nonces.len(), 2);
    rig.feed(Event::Table(empty_table(2), nonces[1]));
    assert_eq!(rig.failures(), [(2, Reason::Unregistered)]);
    rig.feed(Event::Table(empty_table(2), nonces[0]));
    assert_eq!(rig.failures(), [(1, Reason::Unregistered)]);
}

#[test]
fn a_plan_from_the_tables_of_another_boot_is_made_again() {
    let mut rig = Rig::up();
    rig.plans_at_once = false;
    rig.write(1, 1);
    let order = rig.plans.remove(0);
    let stale = rig.planned(&order);
    rig.control_ends(Reason::ConnectionLost);
    rig.open(Opened { boot: NEXT_BOOT, ..opened() });
    rig.feed(stale);
    assert!(rig.opens.is_empty(), "numbers of another boot mean nothing");
    rig.plans_at_once = true;
    while !rig.plans.is_empty() {
        rig.make_plan();
    }
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

/// The stream may end and come back while a plan is made: two are under way then, and one counts.
#[test]
fn i3_a_transfer_planned_twice_is_sent_once() {
    let mut rig = Rig::up();
    rig.plans_at_once = false;
    rig.write(1, 2);
    rig.control_ends(Reason::ConnectionLost);
    rig.open(opened());
    assert_eq!(rig.plans.len(), 2);
    rig.make_plan();
    let lane = rig.open_lane();
    rig.make_plan();
    assert_eq!(rig.parts(), [(1, 0), (1, 1)]);
    rig.processed(lane, 1, 2);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

#[test]
fn a_miss_that_is_told_while_the_stream_is_down_waits_for_the_next_table() {
    let mut rig = Rig::new();
    rig.plans_at_once = false;
    rig.write(1, 1);
    rig.open(Opened { table: empty_table(1), ..opened() });
    rig.control_ends(Reason::ConnectionLost);
    rig.make_plan();
    assert_eq!((rig.finished.len(), rig.table_requests.len()), (0, 0));
    rig.plans_at_once = true;
    rig.open(Opened { table: peer_table(2), ..opened() });
    assert_eq!(rig.opens.len(), 1);
}

#[test]
fn the_answer_to_a_request_of_the_stream_before_is_not_waited_for() {
    let mut rig = up_with_an_empty_table();
    rig.control_ends(Reason::ConnectionLost);
    rig.open(Opened { table: peer_table(9), ..opened() });
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

#[test]
fn a_local_miss_is_told_at_once() {
    let mut rig = Rig::up();
    rig.write(1, 1 << 20);
    assert_eq!(rig.failures(), [(1, Reason::OutOfBounds)]);
    assert!(rig.table_requests.is_empty());
}

#[test]
fn i3_nothing_to_move_is_done_at_once() {
    let mut rig = Rig::up();
    rig.write(1, 0);
    assert_eq!(rig.finished[0].peer_half, PeerHalf::Confirmed);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
    assert!(rig.opens.is_empty());
}

/// A plan for a transfer that ended meanwhile, or that nobody knows, starts nothing.
#[test]
fn a_plan_that_comes_too_late_is_passed_over() {
    let mut rig = Rig::up();
    rig.plans_at_once = false;
    rig.write(1, 1);
    rig.cancel(1);
    assert_eq!(rig.finished(), [(1, Outcome::Cancelled)]);
    rig.make_plan();
    rig.feed(Event::Planned(id(9), BOOT, Ok(Rig::payload(id(9)))));
    assert!(rig.is_empty() && rig.opens.is_empty() && rig.finished.is_empty());
}

/// I4: addresses name the registration that was there when the transfer was admitted, not whatever lies there by
/// the time the session is open.
#[test]
fn i4_memory_unregistered_before_there_is_a_plan_ends_the_transfer() {
    let mut rig = Rig::new();
    rig.write_holding(1, 1);
    rig.retire_regions();
    assert_eq!(rig.failures(), [(1, Reason::RegionChanged)]);
    // Its leases are gone with it, and the next one of the same kind is refused at once.
    rig.write_holding(2, 1);
    assert_eq!(rig.failures(), [(2, Reason::RegionChanged)]);
    assert!(rig.is_empty());
}

#[test]
fn i4_a_plan_made_with_a_newer_registration_is_not_used() {
    let mut rig = Rig::up();
    rig.plans_at_once = false;
    rig.write_holding(1, 1);
    rig.retire_quietly();
    rig.make_plan();
    assert!(rig.opens.is_empty());
    assert_eq!(rig.failures(), [(1, Reason::RegionChanged)]);
}

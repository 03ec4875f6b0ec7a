//! Outages, giving up, failing, probing and healing.

use std::mem::take;

use super::rig::*;
use crate::{
    domain::{Failure, LaneId, Op, Outcome, Reason},
    policy::RetryPolicy,
    session::outbound::{Event, Policy, State},
    transfer::run::Admitted,
    transport::LaneKind,
};

fn failures_in_a_row(rig: &Rig) -> u32 {
    rig.core.summary().consecutive_failures
}

/// A session of which two outages took transfers with them: FAILED.
fn failed() -> Rig {
    let mut rig = Rig::new();
    for number in 1..=2 {
        rig.write_once(number, 1);
        rig.wake_until_connecting();
        rig.refuse(Reason::ConnectRefused);
    }
    assert_eq!(rig.failures(), [(1, Reason::ConnectRefused), (2, Reason::ConnectRefused)]);
    assert_eq!(rig.state(), State::Failed);
    rig
}

/// A transfer's own threshold comes before the session's.
#[test]
fn one_transfer_that_fails_fast_fails_the_session() {
    let mut rig = Rig::new();
    let once = RetryPolicy { attempts: 1, ..policy().retry };
    let hasty = Admitted { failure_threshold: Some(1), ..admitted(id(1), Op::Write, 1, once, rig.now) };
    rig.feed(Event::Submit(Box::new(hasty)));
    rig.refuse(Reason::ConnectRefused);
    assert_eq!((failures_in_a_row(&rig), rig.state()), (1, State::Failed));
}

#[test]
fn opens_are_spaced_and_given_up_once_for_all_who_wait() {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.read(2, 1);
    let begun = rig.now;
    let mut opens = 0;
    while rig.finished.is_empty() {
        rig.refuse(Reason::ConnectRefused);
        opens += 1;
        if opens == 3 {
            rig.write(3, 1);
        }
        if rig.finished.is_empty() {
            rig.wake();
        }
    }
    assert!((5..20).contains(&opens), "{opens} opens");
    assert!(rig.now - begun <= policy().retry.reconnect);
    let mut failures = rig.failures();
    failures.sort_unstable_by_key(|(number, _)| *number);
    assert_eq!(failures, [1, 2, 3].map(|number| (number, Reason::ConnectRefused)));
    assert_eq!(failures_in_a_row(&rig), 1, "one outage");
    assert_eq!((rig.state(), rig.core.next_wake()), (State::Idle, None));
}

/// The cycle ends on time, whatever an open in progress may still bring; what comes later serves others.
#[test]
fn giving_up_does_not_wait_for_an_open_in_progress() {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.refuse(Reason::ConnectRefused);
    rig.wake();
    rig.pass(policy().retry.reconnect);
    assert_eq!(rig.failures(), [(1, Reason::ConnectRefused)]);
    rig.write(2, 1);
    rig.open(opened());
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(2, Outcome::Done)]);
    assert_eq!(failures_in_a_row(&rig), 0);
}

#[test]
fn a_slow_open_does_not_shorten_the_next_cycle() {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.refuse(Reason::ConnectRefused);
    rig.wake();
    rig.pass(policy().retry.reconnect);
    rig.write(2, 1);
    rig.refuse(Reason::ConnectTimeout);
    rig.pass(ms(1000));
    assert_eq!(rig.failures(), [(1, Reason::ConnectRefused)], "2 has a cycle of its own");
}

/// A cycle that began with a lane and ran out while the stream was up says nothing about the stream.
#[test]
fn a_lost_stream_has_its_whole_time_whatever_was_lost_before() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 9);
    rig.closed(lane, lost());
    let next = rig.open_lane();
    // The first lane's fence never comes, so the outage never ends.
    for moved in 1..9 {
        rig.pass(ms(1000));
        rig.feed(Event::Moved(next, moved));
    }
    rig.control_ends(Reason::ConnectionLost);
    assert!(rig.finished.is_empty());
    rig.refuse(Reason::ConnectRefused);
    assert!(rig.finished.is_empty());
    rig.pass(policy().retry.reconnect);
    rig.quiet();
    assert_eq!(rig.failures(), [(1, Reason::ConnectRefused)]);
}

/// However many transfers an outage takes with it, it counts once, and for its direction.
#[test]
fn an_outage_counts_once() {
    let (mut rig, lane) = Rig::with_lane();
    for number in 1..=4 {
        rig.write_once(number, 1);
    }
    rig.closed(lane, lost());
    rig.quiet();
    rig.control_ends(Reason::ConnectionLost);
    assert_eq!(rig.failures().len(), 4);
    assert_eq!((failures_in_a_row(&rig), rig.state()), (1, State::Idle));
}

#[test]
fn a_success_resets_the_count_of_its_direction_only() {
    let mut rig = Rig::with(Policy { tcp_lanes: 1, ..policy() });
    rig.write_once(1, 1);
    rig.submit(2, Op::Read, 1, RetryPolicy { attempts: 1, ..policy().retry });
    rig.refuse(Reason::ConnectRefused);
    rig.write(3, 1);
    rig.wake_until_connecting();
    rig.open(opened());
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(failures_in_a_row(&rig), 1, "READ has not been seen to work");
    rig.read(4, 1);
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(failures_in_a_row(&rig), 0);
}

#[test]
fn what_recovers_is_not_counted() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    assert_eq!(rig.parts(), [(1, 0)]);
    rig.dies(lane, record(0));
    rig.control_ends(Reason::ConnectionLost);
    rig.refuse(Reason::ConnectRefused);
    assert_eq!(rig.state(), State::Recovering);
    rig.wake();
    rig.open(opened());
    let lane = rig.open_lane();
    rig.wake_until_sent();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
    assert_eq!((failures_in_a_row(&rig), rig.state()), (0, State::Healthy));
}

#[test]
fn a_failed_session_refuses_at_once_and_says_when_it_is_probed() {
    let mut rig = failed();
    rig.write(3, 1);
    let failure = rig.finished[0].failure.clone().expect("refused");
    assert_eq!(failure.reason, Reason::SessionFailed);
    assert!(failure.message.contains("next probe in 87 ms"), "{failure}");
    assert!(rig.connects.is_empty());
    rig.finished.clear();
    // Also while a probe is under way: nobody but the probe tries the path.
    rig.wake_until_connecting();
    rig.write(4, 1);
    assert_eq!(rig.failures(), [(4, Reason::SessionFailed)]);
}

#[test]
fn a_failed_session_heals_by_a_probe_both_ways() {
    let mut rig = failed();
    rig.wake_until_connecting();
    rig.open(opened());
    let write = rig.take_lane(LaneKind::Write);
    rig.processed(write, 1, 1);
    assert_eq!(rig.state(), State::Failed, "half a probe is no probe");
    let read = rig.take_lane(LaneKind::Read);
    rig.processed(read, 1, 1);
    assert_eq!((rig.state(), failures_in_a_row(&rig)), (State::Healthy, 0));
    assert!(rig.finished.is_empty(), "a probe is nobody's transfer");
    rig.write(3, 1);
    rig.processed(write, 2, 2);
    assert_eq!(rig.finished(), [(3, Outcome::Done)]);
    assert_eq!(rig.states, [State::Opening, State::Idle, State::Opening, State::Failed, State::Healthy]);
}

#[test]
fn a_probe_that_fails_is_followed_by_another_later() {
    let mut rig = failed();
    let mut waits = vec![];
    for _ in 0..6 {
        let since = rig.now;
        rig.wake_until_connecting();
        waits.push((rig.now - since).as_millis());
        rig.refuse(Reason::ConnectRefused);
        assert_eq!(rig.state(), State::Failed);
    }
    assert_eq!(waits, [87, 175, 350, 700, 875, 875]);
}

#[test]
fn a_probe_that_nobody_answers_ends_in_time() {
    let mut rig = failed();
    rig.wake_until_connecting();
    rig.open(opened());
    rig.take_lane(LaneKind::Write);
    rig.pass(ms(3000));
    rig.quiet();
    rig.pass(ms(3000));
    assert!(rig.is_empty());
    assert_eq!(rig.state(), State::Failed);
    assert!(rig.core.next_wake().is_some(), "there will be another");
}

#[test]
fn an_engines_probe_runs_at_once_and_others_join_it() {
    let mut rig = failed();
    rig.probe(7);
    rig.probe(8);
    rig.pass(ms(100));
    rig.open(opened());
    let write = rig.take_lane(LaneKind::Write);
    rig.probe(9);
    rig.processed(write, 1, 1);
    let read = rig.take_lane(LaneKind::Read);
    assert!(rig.probed.is_empty());
    rig.processed(read, 1, 1);
    assert_eq!(rig.probed, [7, 8, 9].map(|ticket| (ticket, Ok(()))));
    assert_eq!(rig.state(), State::Healthy);
}

#[test]
fn a_probe_of_a_healthy_session_counts_for_nothing() {
    let mut rig = Rig::new();
    for ticket in 0..5 {
        rig.probe(ticket);
        rig.refuse(Reason::ConnectRefused);
        let [(_, Err(failure))] = &take(&mut rig.probed)[..] else { panic!("it failed") };
        assert_eq!(failure.reason, Reason::ConnectRefused);
    }
    assert_eq!((failures_in_a_row(&rig), rig.state()), (0, State::Idle));
}

/// I8: callers that wait for one probe are bounded.
#[test]
fn i8_too_many_askers_are_told_so() {
    let mut rig = Rig::new();
    for ticket in 0..1025 {
        rig.probe(ticket);
    }
    let [(1024, Err(failure))] = &take(&mut rig.probed)[..] else { panic!("one too many") };
    assert_eq!(failure.reason, Reason::Limit);
    rig.refuse(Reason::ConnectRefused);
    assert_eq!(rig.probed.len(), 1024);
}

#[test]
fn a_reset_forgets_the_failures() {
    let mut rig = failed();
    rig.feed(Event::Reset);
    assert_eq!((rig.state(), failures_in_a_row(&rig)), (State::Idle, 0));
    rig.write(3, 1);
    rig.open(opened());
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(3, Outcome::Done)]);
}

/// A reset ends the stream itself: nothing that follows from that is held against the session or the transfers.
#[test]
fn a_reset_is_no_outage() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write_once(1, 1);
    rig.feed(Event::Reset);
    rig.closed(lane, cancelled());
    rig.open(opened());
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    let report = &rig.finished[0];
    assert_eq!((report.outcome, report.attempts), (Outcome::Done, 1));
    // A reset during which an open takes its time is no reason to call anything cancelled.
    let mut rig =
        Rig::with(Policy { retry: RetryPolicy { reconnect: ms(10), ..policy().retry }, ..policy() });
    rig.write(2, 0);
    rig.open(opened());
    rig.finished.clear();
    rig.write(3, 1);
    rig.feed(Event::Reset);
    rig.pass(ms(10));
    assert_eq!(rig.failures(), [(3, Reason::ConnectionLost)]);
}

#[test]
fn a_lane_that_cannot_be_had_is_an_outage() {
    let mut rig = Rig::up();
    for number in 1..=2 {
        rig.write_once(number, 1);
        let (lane, _) = rig.opens.remove(0);
        rig.feed(Event::LaneOpenFailed(lane, Failure::plain(Reason::ConnectRefused)));
        rig.pass(ms(1000));
    }
    assert_eq!(rig.failures().len(), 2);
    assert_eq!(rig.state(), State::Failed);
}

#[test]
fn a_lane_that_cannot_be_had_is_tried_again_until_the_cycle_gives_up() {
    let mut rig = Rig::up();
    rig.write(1, 1);
    let mut tries = 0;
    while rig.finished.is_empty() {
        let (lane, _) = rig.opens.remove(0);
        rig.feed(Event::LaneOpenFailed(lane, lost()));
        tries += 1;
        if rig.finished.is_empty() {
            assert!(rig.opens.is_empty(), "not at once");
            rig.wake();
        }
    }
    assert!((5..20).contains(&tries), "{tries} tries");
    assert_eq!((rig.failures(), failures_in_a_row(&rig)), (vec![(1, Reason::ConnectionLost)], 1));
}

#[test]
fn what_is_no_fault_of_the_path_fails_nobodys_session() {
    let (mut rig, lane) = Rig::with_lane();
    for (number, sequence) in (1..=10).zip(2..) {
        rig.write(number, 1);
        rig.refused(lane, sequence, Reason::RegionChanged);
        rig.processed(lane, sequence, sequence);
        rig.quiet();
    }
    assert_eq!(rig.finished().len(), 10);
    assert_eq!((failures_in_a_row(&rig), rig.state()), (0, State::Healthy));
}

impl Rig {
    fn take_lane(&mut self, kind: LaneKind) -> LaneId {
        let lane = self.open_lane();
        assert_eq!(self.core.lanes[&lane].kind, kind);
        lane
    }

    fn wake_until_connecting(&mut self) {
        while self.connects.is_empty() {
            self.wake();
        }
    }

    fn wake_until_sent(&mut self) {
        while self.sent.is_empty() {
            self.wake();
        }
    }
}

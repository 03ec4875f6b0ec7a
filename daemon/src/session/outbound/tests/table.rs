//! Every state of the link meets every event: nothing panics, and no transfer ends twice.

use std::sync::Arc;

use super::rig::*;
use crate::{
    domain::{Failure, LaneId, Op, Reason},
    session::outbound::{Event, Opened, PlanFailure, State},
    transport::{LaneEvent, LaneRecord},
};

/// What a state is called, and how it is reached.
type Story = (&'static str, fn() -> Rig);

/// In each, transfers 1 and 2 were submitted.
const STATES: [Story; 10] = [
    ("idle", idle),
    ("opening", opening),
    ("backing off", backing_off),
    ("up, lane asked for", up),
    ("up, moving", moving),
    ("up, cancelled", cancelled_in_flight),
    ("up, lane lost", lane_lost),
    ("down, lane in doubt", down),
    ("failed", failed),
    ("shut down", shut_down),
];

fn idle() -> Rig {
    let mut rig = Rig::new();
    for number in [1, 2] {
        rig.write(number, 1);
        rig.cancel(number);
    }
    rig.refuse(Reason::ConnectRefused);
    rig.wake();
    assert_eq!(rig.state(), State::Idle);
    rig
}

fn opening() -> Rig {
    let mut rig = Rig::new();
    rig.write(1, 1);
    rig.read(2, 1);
    rig
}

fn backing_off() -> Rig {
    let mut rig = opening();
    rig.refuse(Reason::ConnectTimeout);
    rig
}

fn up() -> Rig {
    let mut rig = opening();
    rig.open(opened());
    rig
}

fn moving() -> Rig {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 2);
    rig.write(2, 9);
    rig
}

fn cancelled_in_flight() -> Rig {
    let mut rig = moving();
    rig.cancel(1);
    rig
}

fn lane_lost() -> Rig {
    let mut rig = moving();
    rig.closed(LaneId(1), lost());
    rig
}

fn down() -> Rig {
    let mut rig = moving();
    rig.cancel(1);
    rig.control_ends(Reason::PeerSilent);
    rig
}

fn failed() -> Rig {
    let mut rig = Rig::new();
    for number in [1, 2] {
        rig.write_once(number, 1);
        while rig.connects.is_empty() {
            rig.wake();
        }
        rig.refuse(Reason::ConnectRefused);
    }
    assert_eq!(rig.state(), State::Failed);
    rig
}

fn shut_down() -> Rig {
    let mut rig = moving();
    rig.feed(Event::Shutdown(Failure::plain(Reason::EngineGone)));
    rig
}

/// Every event, those that fit nothing too. Transfer 3 and lane 99 are nobody's.
fn events(rig: &Rig) -> Vec<Event> {
    let failures = [Reason::ConnectionLost, Reason::Draining, Reason::PeerRestarted, Reason::Cancelled];
    let mut events = vec![
        Event::Submit(Box::new(admitted(id(4), Op::Write, 3, policy().retry, rig.now))),
        Event::Shutdown(Failure::plain(Reason::Draining)),
        Event::LocalRegionsRetired,
        revoked_elsewhere(1),
        Event::Table(peer_table(0), 0),
        Event::Table(empty_table(9), 1),
        Event::Probe(5),
        Event::Reset,
        Event::Tick,
        Event::Opened(Box::new(opened())),
        Event::Revoked(Box::new(revocations(8, &[(8, 2), (8, 3)]))),
        Event::RevokedHere(1, Arc::new(revocations(8, &[(8, 1)]))),
        Event::Opened(Box::new(Opened { revocations: revocations(8, &[(8, 1)]), ..opened() })),
        Event::Opened(Box::new(Opened { incarnation: BOB, ..opened() })),
        Event::Opened(Box::new(Opened { boot: NEXT_BOOT, ..opened() })),
        Event::Opened(Box::new(Opened { fenced: vec![(LaneId(1), record(3))], ..opened() })),
    ];
    for transfer in [id(1), id(2), id(3)] {
        let miss = || PlanFailure { failure: Failure::plain(Reason::Unregistered), wants_newer_table: true };
        events.extend([
            Event::End(transfer, cancelled()),
            Event::Planned(transfer, BOOT, Ok(Rig::payload(transfer))),
            Event::Planned(transfer, NEXT_BOOT, Ok(Rig::payload(transfer))),
            Event::Planned(transfer, BOOT, Err(miss())),
            Event::LocalQuiet(transfer),
            Event::Stopped(transfer),
        ]);
    }
    for reason in failures {
        events.push(Event::OpenFailed(Failure::plain(reason)));
        events.push(Event::ControlEnded(Failure::plain(reason)));
    }
    for lane in [1, 2, 3, 99].map(LaneId) {
        events.extend([
            Event::LaneFenced(lane, LaneRecord { processed: u64::MAX, refused: vec![(2, lost())] }),
            Event::LaneFenced(lane, LaneRecord { processed: 0, refused: vec![(0, lost()), (9, lost())] }),
            Event::LaneOpened(lane),
            Event::LaneOpenFailed(lane, lost()),
            Event::LaneOpenFailed(lane, Failure::plain(Reason::Limit)),
            Event::Lane(lane, LaneEvent::Processed { from: 0, through: u64::MAX }),
            Event::Lane(lane, LaneEvent::Processed { from: 5, through: 2 }),
            Event::Lane(lane, LaneEvent::Refused { sequence: 2, failure: lost().at(u64::MAX / 2) }),
            Event::Lane(lane, LaneEvent::Refused { sequence: 0, failure: lost() }),
            Event::Lane(lane, LaneEvent::Closed { cause: lost() }),
            Event::Lane(lane, LaneEvent::Closed { cause: cancelled() }),
            Event::Moved(lane, u64::MAX),
        ]);
    }
    events
}

fn ends_of_each_once(rig: &Rig, story: &str) {
    for report in &rig.finished {
        let ends = rig.finished.iter().filter(|other| other.transfer == report.transfer).count();
        assert_eq!(ends, 1, "{story}: {:?} ended twice", report.transfer);
        assert!(!rig.core.runs.contains_key(&report.transfer), "{story}: it is over and still there");
    }
}

#[test]
fn every_state_takes_every_event() {
    for (state, reach) in STATES {
        for at in 0..events(&reach()).len() {
            let mut rig = reach();
            let event = events(&rig).swap_remove(at);
            let story = format!("{state}, then {event:?}");
            rig.feed(event);
            ends_of_each_once(&rig, &story);
            // What time brings afterwards is as sound: no alarm goes off for nothing, and it comes to rest.
            let mut alarms = 0;
            while let Some(at) = rig.core.next_wake().filter(|_| alarms < 1000) {
                rig.now = rig.now.max(at);
                rig.feed(Event::Tick);
                assert!(rig.core.next_wake() != Some(at), "{story}: an alarm that goes on");
                alarms += 1;
                if let State::Failed = rig.state() {
                    break;
                }
            }
            assert!(alarms < 1000, "{story}: it never comes to rest");
            ends_of_each_once(&rig, &story);
        }
    }
}

/// Two events in a row, whatever they are: an answer may overtake a question, or come twice.
#[test]
fn every_state_takes_every_pair_of_events() {
    for (state, reach) in STATES {
        let count = events(&reach()).len();
        for (first, second) in (0..count).flat_map(|first| (0..count).map(move |second| (first, second))) {
            let mut rig = reach();
            let (one, other) = (events(&rig).swap_remove(first), events(&rig).swap_remove(second));
            if matches!((&one, &other), (Event::Submit(_), Event::Submit(_))) {
                // An id runs once: the engine's log sees to that.
                continue;
            }
            let story = format!("{state}, then {} and {}", one.name(), other.name());
            rig.feed(one);
            rig.feed(other);
            rig.quiet();
            ends_of_each_once(&rig, &story);
        }
    }
}

//! Daemons and engines that go and come back: who is who afterwards, how fast, and whether a byte went astray.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod daemons;
mod engines;

use std::{
    sync::{Barrier, mpsc::Receiver},
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{Arrangement, Move},
    scene::{Peer, assert_reason, failed, request},
};
use kvferry_client::{Engine, Error, Event, Op, Outcome, Reason, Report, Transfer};

const LENGTH: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

fn megabytes(count: u64) -> Vec<Move> {
    Arrangement::Adjacent.moves(count, MIB)
}

/// Asks again until a transfer is DONE. Whatever ends otherwise must have ended for a reason that a restart is.
fn first_good(engine: &Engine, transfer: impl Fn() -> Transfer) -> Report {
    let begin = Instant::now();
    loop {
        assert!(begin.elapsed() < LIMIT, "no good transfer within {LIMIT:?}");
        match engine.transfer(transfer()) {
            Ok(report) if report.outcome == Outcome::Done => return report,
            Ok(report) => ends_by_a_restart(engine, report),
            Err(Error::NoDaemon { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A transfer struck by a restart: it may be DONE, else it is settled in time, for a reason that a restart is.
fn ends_by_a_restart(engine: &Engine, report: Report) {
    const REASONS: [Reason; 5] = [
        Reason::OwnDaemonGone,
        Reason::PeerDaemonRestarted,
        Reason::ConnectRefused,
        Reason::ConnectionLost,
        Reason::HandshakeFailed,
    ];
    let report = match report.outcome {
        Outcome::Unsettled => engine.wait(report.id, LIMIT).unwrap(),
        _ => report,
    };
    if report.outcome != Outcome::Done {
        let (_, failure) = failed(Ok(report));
        assert_reason(&failure, &REASONS);
    }
}

fn reattached(events: &Receiver<Event>, session: &str) {
    loop {
        if let Event::Reattached { session_id, moved_from, .. } = events.recv_timeout(LIMIT).unwrap() {
            assert_eq!((session_id.as_str(), moved_from), (session, None));
            return;
        }
    }
}

fn both_ways(one: &Peer, other: &Peer, there: &str, back: &str, moves: &[Move]) {
    let start = Barrier::new(2);
    let write = |from: &Peer, to: &Peer, session: &str| {
        start.wait();
        first_good(&from.engine, || request(Op::Write, session, moves, &from.pool, &to.pool));
    };
    thread::scope(|scope| {
        scope.spawn(|| write(one, other, there));
        scope.spawn(|| write(other, one, back));
    });
}

//! The network fails, daemons stop, engines change their mind: what has ended stays ended, what can recover does,
//! and every byte is accounted for.
//!
//! Each test stands between two real daemons with a proxy. I1, I2 and I3 are what the oracle checks throughout.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use harness::{
    batch::{self, Arrangement, Move},
    eventually,
    faulty::{CONFIG, Faulty, WINDOW, megabytes},
    oracle,
    pattern::Stamp,
    process::Signal,
    proxy::{Cut, Fault, Kind, Passed, Rule, Toward},
    scene::{Peer, assert_reason, done, failed, once, request},
};
use kvferry_client::{Failure, Op, Outcome, Reason, SessionState, Transfer};
use kvferry_proto::engine::v1::SessionInfo;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_millis(3000);
/// What a verdict may cost beyond the time that its rule names.
const SLACK: Duration = Duration::from_millis(500);

fn cut(toward: Toward, bytes: u64, how: Cut, times: u32) -> Rule {
    Rule { kind: Kind::Data, fault: Fault::CutAfter { toward, bytes, how }, times }
}

/// A lane is cut in the middle of a part after `at` bytes: the transfer is DONE, and what was acknowledged was
/// not sent again (I2, I3).
fn recovers_from_a_cut(op: Op, how: Cut) {
    let at = 40 * MIB + 12_345;
    let mut faulty = Faulty::new(80 * MIB);
    let toward = if op == Op::Read { Toward::Client } else { Toward::Target };
    faulty.proxy.script(cut(toward, at, how, 1));
    let moves = megabytes(64);
    let report = done(faulty.transfer(faulty.request(op, &moves)), &moves);
    faulty.expect(op, &moves);
    faulty.scene.verify("after a cut");
    assert_eq!(faulty.lanes_lost(), 1);
    assert!(report.bytes_resent > 0, "the cut struck a part under way: {report:?}");
    assert!(report.bytes_resent <= WINDOW, "more was re-sent than was in flight: {report:?}");
    assert!(report.attempts > 1, "{report:?}");
}

#[test]
fn b1_a_write_recovers_from_a_reset() {
    recovers_from_a_cut(Op::Write, Cut::Reset);
}

#[test]
fn b1_a_write_recovers_from_a_closed_connection() {
    recovers_from_a_cut(Op::Write, Cut::Fin);
}

#[test]
fn b1_a_read_recovers_from_a_reset() {
    recovers_from_a_cut(Op::Read, Cut::Reset);
}

/// Progress is what counts: any number of cuts is survived as long as parts get through between them. Closed and not
/// reset: a reset takes with it what the target has not read yet, which on a busy machine may be all of it.
#[test]
fn b1_many_cuts_and_every_byte_right() {
    const CUTS: u32 = 10;
    let mut faulty = Faulty::new(80 * MIB);
    faulty.proxy.script(cut(Toward::Target, 4 * MIB + 777, Cut::Fin, CUTS));
    let moves = Arrangement::Reversed.moves(4096, 16 << 10);
    faulty.works(&moves);
    assert_eq!(faulty.lanes_lost(), CUTS as usize);
}

#[test]
fn b1_without_a_retry_a_cut_fails_with_the_bytes_counted() {
    let mut faulty = Faulty::new(80 * MIB);
    faulty.proxy.script(cut(Toward::Target, 10 * MIB + 1, Cut::Reset, 1));
    let moves = megabytes(64);
    let transfer = Transfer { policy: once(), ..faulty.request(Op::Write, &moves) };
    let (report, failure) = failed(faulty.transfer(transfer));
    assert_reason(&failure, &[Reason::ConnectionLost]);
    assert_eq!(report.attempts, 1);
    assert!(report.bytes_done < report.bytes, "{report:?}");
    // What a failed transfer leaves at its destination is undefined; around it nothing changed.
    faulty.scene.target.pool.forget(batch::destination(&moves));
    faulty.scene.verify("after a failure");
    faulty.works(&moves);
}

/// The control connection dies with the lanes: the session opens again and the transfer carries on.
#[test]
fn b1_a_lost_session_is_opened_again() {
    let mut faulty = Faulty::new(80 * MIB);
    let moves = megabytes(32);
    let pending = faulty.begin(faulty.request(Op::Write, &moves));
    faulty.proxy.cut_all(Cut::Reset);
    faulty.proxy.throttle(None);
    done(pending.wait(), &moves);
    faulty.expect(Op::Write, &moves);
    faulty.scene.verify("after the session was opened again");
}

/// I1: after the reply nobody touches the transfer's memory. Both ends give it away at once, with bytes still in
/// every buffer between them; the other transfers of the session do not notice.
fn cancelled_means_ended(op: Op) {
    let mut faulty = Faulty::new(80 * MIB);
    let victim_moves = megabytes(32);
    let others: Vec<Vec<Move>> = (0..3u64)
        .map(|number| {
            let offset = (36 + 4 * number) * MIB;
            let place = |each: &Move| Move { from: each.from + offset, to: each.to + offset, ..*each };
            megabytes(3).iter().map(place).collect()
        })
        .collect();
    let victim = faulty.begin(faulty.request(op, &victim_moves));
    let pending: Vec<_> = others.iter().map(|moves| faulty.submit(faulty.request(op, moves))).collect();

    let id = victim.id();
    faulty.scene.initiator.engine.cancel(id).unwrap();
    let range = 0..35 * MIB;
    faulty.scene.initiator.pool.hand_over(range.clone(), Stamp { owner: 3, transfer: 1 });
    let report = victim.wait().unwrap();
    assert_eq!(report.outcome, Outcome::Cancelled, "{report:?}");
    assert_eq!(report.failure.map(|failure| failure.reason), Some(Reason::Cancelled));
    assert!(report.peer_confirmed, "the target was there to say so");
    assert!(report.bytes_done < report.bytes, "it was cancelled in flight");
    faulty.scene.target.pool.hand_over(range, Stamp { owner: 4, transfer: 1 });

    faulty.proxy.throttle(None);
    for (pending, moves) in pending.into_iter().zip(&others) {
        let report = done(pending.wait(), moves);
        assert_eq!((report.attempts, report.bytes_resent), (1, 0), "another's cancel cost it something");
        faulty.expect(op, moves);
    }
    faulty.proxy.drain(LIMIT);
    faulty.scene.verify("after a cancel");
    assert_eq!(faulty.lanes_lost(), 0, "the lane lives on");

    // Idempotent, and the outcome stands.
    faulty.scene.initiator.engine.cancel(id).unwrap();
    let again = faulty.scene.initiator.engine.wait(id, LIMIT).unwrap();
    assert_eq!(again.outcome, Outcome::Cancelled);
}

#[test]
fn i1_a_cancelled_write_lands_nowhere() {
    cancelled_means_ended(Op::Write);
}

#[test]
fn i1_a_cancelled_read_lands_nowhere() {
    cancelled_means_ended(Op::Read);
}

#[test]
fn a6_cancelling_what_is_done_changes_nothing() {
    let mut faulty = Faulty::new(4 * MIB);
    let report = faulty.works(&megabytes(1));
    faulty.scene.initiator.engine.cancel(report.id).unwrap();
    let waited = faulty.scene.initiator.engine.wait(report.id, LIMIT).unwrap();
    assert_eq!(waited.outcome, Outcome::Done);
}

#[test]
fn i9_a_stopped_daemon_is_given_up_in_time_and_taken_back() {
    let mut faulty = Faulty::new(80 * MIB);
    let moves = megabytes(32);
    let pending = faulty.begin(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) });
    let target = faulty.scene.nodes.target().process();
    target.signal(Signal::STOP).unwrap();
    let stopped = Instant::now();
    let (report, failure) = failed(pending.wait());
    let took = stopped.elapsed();
    assert_reason(&failure, &[Reason::PeerSilent]);
    assert!(took < SILENCE + SLACK, "the verdict took {took:?}");
    assert!(!report.peer_confirmed, "nobody could confirm it: {report:?}");
    target.signal(Signal::CONT).unwrap();
    faulty.proxy.throttle(None);
    faulty.scene.target.pool.forget(batch::destination(&moves));
    faulty.works(&moves);
}

/// A black hole, and what it held back comes out after both sides have given each other up.
#[test]
fn i1_what_a_black_hole_held_back_lands_nowhere() {
    let mut faulty = Faulty::new(80 * MIB);
    let moves = megabytes(32);
    let pending = faulty.begin(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) });
    faulty.proxy.hold(true);
    let begun = Instant::now();
    let (_, failure) = failed(pending.wait());
    let took = begun.elapsed();
    assert_reason(&failure, &[Reason::PeerSilent]);
    assert!(took < SILENCE + SLACK, "the verdict took {took:?}");
    // The target proves its own half by itself, by the same rule.
    eventually("the target has dropped the session", SILENCE + SLACK, || {
        let sessions = faulty.scene.nodes.target().node().unwrap().sessions().unwrap();
        sessions.iter().all(|session| !session.inbound)
    });
    faulty.scene.target.pool.hand_over(0..40 * MIB, Stamp::of(4));
    faulty.proxy.throttle(None);
    faulty.proxy.hold(false);
    faulty.proxy.drain(LIMIT);
    faulty.works(&[Move { from: 60 * MIB, to: 60 * MIB, length: MIB }]);
    faulty.scene.verify("after a black hole opened");
}

#[test]
fn d1_an_endpoint_that_went_away_is_given_up_within_the_reconnect_budget() {
    let config = format!("{CONFIG}[retry]\nreconnect_ms = 1000\n");
    let mut faulty = Faulty::with_config(80 * MIB, &config);
    let moves = megabytes(32);
    let pending = faulty.begin(faulty.request(Op::Write, &moves));
    faulty.proxy.refuse(true);
    faulty.proxy.cut_all(Cut::Reset);
    let begun = Instant::now();
    let (report, failure) = failed(pending.wait());
    let took = begun.elapsed();
    assert_reason(&failure, &[Reason::ConnectRefused]);
    assert!(took < Duration::from_millis(1000) + 2 * SLACK, "the verdict took {took:?}");
    assert!(!report.peer_confirmed, "nobody could confirm it: {report:?}");
    faulty.proxy.refuse(false);
    faulty.proxy.throttle(None);
    faulty.scene.target.pool.forget(batch::destination(&moves));
    faulty.works(&moves);
}

/// So many outages fail a session; then callers are told at once, and it heals by itself.
#[test]
fn d1_a_failed_session_says_so_at_once_and_heals() {
    let config = format!("{CONFIG}[session]\nfailure_threshold = 2\n[retry]\nreconnect_ms = 300\n");
    let mut faulty = Faulty::with_config(4 * MIB, &config);
    let moves = megabytes(1);
    faulty.works(&moves);
    faulty.proxy.refuse(true);
    faulty.proxy.cut_all(Cut::Reset);
    let give_up = |faulty: &Faulty| -> (Duration, Failure) {
        let begin = Instant::now();
        let transfer = Transfer { policy: once(), ..faulty.request(Op::Write, &moves) };
        let (_, failure) = failed(faulty.transfer(transfer));
        (begin.elapsed(), failure)
    };
    for _ in 0..2 {
        let (_, failure) = give_up(&faulty);
        assert_reason(&failure, &[Reason::ConnectRefused, Reason::ConnectionLost]);
    }
    let (took, failure) = give_up(&faulty);
    assert_reason(&failure, &[Reason::SessionFailed]);
    assert!(took < Duration::from_millis(200), "SESSION_FAILED took {took:?}");
    faulty.proxy.refuse(false);
    eventually("the session is healthy again, unasked", LIMIT, || {
        let sessions = faulty.scene.nodes.initiator().node().unwrap().sessions().unwrap();
        let ours = |session: &&SessionInfo| session.session_id == faulty.proxy.address();
        sessions.iter().find(ours).is_some_and(|ours| ours.state() == SessionState::Healthy)
    });
    faulty.scene.target.pool.forget(batch::destination(&moves));
    faulty.works(&moves);
}

/// I4: an address proves nothing. Another engine answers at a known session id: it is refused, with no byte
/// moved, until the engine says that it knows.
#[test]
fn c3_another_engine_at_a_pinned_session_id_is_refused_until_the_session_is_reset() {
    let mut faulty = Faulty::new(4 * MIB);
    let moves = megabytes(1);
    faulty.works(&moves);
    let other = Peer::attach(faulty.scene.nodes.target(), oracle::Kind::Shared, 4 * MIB, Stamp::of(6));
    let mut other = other.unwrap();
    faulty.proxy.retarget(other.engine.session_id()).unwrap();
    faulty.proxy.cut_all(Cut::Reset);

    let to_other = |faulty: &Faulty, other: &Peer| {
        let source = &faulty.scene.initiator;
        let transfer = request(Op::Write, &faulty.proxy.address(), &moves, &source.pool, &other.pool);
        source.engine.transfer(transfer)
    };
    let (report, failure) = failed(to_other(&faulty, &other));
    assert_reason(&failure, &[Reason::PeerRestarted]);
    assert_eq!(report.bytes_done, 0);
    other.pool.verify().assert_clean("before the reset");

    faulty.scene.initiator.engine.reset_session(&faulty.proxy.address()).unwrap();
    done(to_other(&faulty, &other), &moves);
    other.pool.expect(&faulty.scene.initiator.pool, &moves);
    other.pool.verify().assert_clean("after the reset");
    faulty.scene.verify("the engine that was there before");
}

/// The bytes of a whole acknowledged part come again on its lane, after its memory was given away.
#[test]
fn b4_a_repeated_part_lands_nowhere() {
    let mut faulty = Faulty::new(8 * MIB);
    faulty.works(&megabytes(1));
    faulty.proxy.drain(LIMIT);
    let before = faulty.proxy.data().last().unwrap().to_target;
    let part = [Move { from: 3 * MIB, to: 3 * MIB, length: 64 << 10 }];
    faulty.works(&part);
    faulty.proxy.drain(LIMIT);
    faulty.scene.target.pool.hand_over(3 * MIB..4 * MIB, Stamp::of(4));
    let again = faulty.proxy.replay_data(before).unwrap();
    assert!(again >= 64 << 10, "{again} bytes are less than the part");
    // Behind it on the same lane, or on the lane that took its place.
    faulty.works(&[Move { from: 6 * MIB, to: 6 * MIB, length: 4096 }]);
    faulty.scene.verify("after a repeated part");
}

/// One bit of damage where lanes and sessions begin: refused, opened again, nothing wrong.
#[test]
fn d5_a_damaged_greeting_is_refused_and_the_transfer_recovers() {
    for (kind, at) in [(Kind::Data, 5), (Kind::Data, 20), (Kind::Data, 51), (Kind::Control, 3)] {
        let mut faulty = Faulty::new(4 * MIB);
        faulty.proxy.script(Rule { kind, fault: Fault::Flip { at }, times: 1 });
        faulty.works(&megabytes(2));
        let of_kind = |passed: &&Passed| passed.kind == Some(kind);
        let connections = faulty.proxy.stats().iter().filter(of_kind).count();
        assert!(connections > 1, "{kind:?} byte {at}: the damaged connection was used");
    }
}

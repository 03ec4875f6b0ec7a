//! Two lanes, one of which hangs with a transfer's bytes in it, while the other brings the transfer to its end: A3, A9.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::Move,
    eventually,
    faulty::{Faulty, WINDOW, megabytes},
    pattern::Stamp,
    proxy::Toward,
    scene::done,
};
use kvferry_client::{Op, Pending};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// A lane that moves nothing for so long is given up; well below a peer's silence.
const CONFIG: &str = "[tcp]\nlanes = 2\nwindow_parts = 8\n[retry]\nprogress_timeout_ms = 1000\n";
const TOTAL: u64 = 48;

/// A WRITE of which only the parts in the second lane are missing, and these hang in the proxy.
fn hanging() -> (Faulty, Vec<Move>, Pending) {
    let faulty = Faulty::with_config(64 * MIB, CONFIG);
    let moves = megabytes(TOTAL);
    let pending = faulty.begin(faulty.request(Op::Write, &moves));
    eventually("both lanes carry parts", LIMIT, || {
        let data = faulty.proxy.data();
        data.len() == 2 && data.iter().all(|lane| lane.to_target > MIB)
    });
    faulty.proxy.hold_data(1, true);
    faulty.proxy.throttle(None);
    let carried = || faulty.proxy.data()[0].to_target;
    let (mut sent, mut since) = (carried(), Instant::now());
    eventually("the first lane has carried the rest", LIMIT, || {
        if sent != carried() {
            (sent, since) = (carried(), Instant::now());
        }
        since.elapsed() > Duration::from_millis(150)
    });
    assert!(faulty.proxy.data()[1].held > 0, "nothing hangs in the second lane");
    (faulty, moves, pending)
}

/// Both ends give the memory away at once; only then does the held lane let go of what was in it.
fn nothing_lands_later(mut faulty: Faulty, moves: &[Move]) {
    faulty.expect(Op::Write, moves);
    faulty.scene.verify("when the transfer was done");
    let range = 0..harness::batch::destination(moves).end;
    faulty.scene.initiator.pool.hand_over(range.clone(), Stamp::of(3));
    faulty.scene.target.pool.hand_over(range, Stamp::of(4));
    faulty.proxy.hold_data(1, false);
    faulty.proxy.drain(LIMIT);
    faulty.scene.verify("after the held lane let go");
    // On the lanes that the session has now.
    faulty.works(&[Move { from: 60 * MIB, to: 60 * MIB, length: MIB }]);
    faulty.scene.verify("at the end");
}

/// A3. The second attempt could succeed at once on the lane that works. It is not made before the target has confirmed
/// that the first one's lane is fenced, and the transfer is not done before.
#[test]
fn a3_no_success_before_the_first_attempts_lane_is_fenced() {
    let (faulty, moves, pending) = hanging();
    let waiting = thread::spawn(move || pending.wait());
    // The target's word cannot come: its daemon lives, but for less than its silence nothing of it is heard.
    faulty.proxy.hold_toward(Toward::Client, true);
    let (begun, sent) = (Instant::now(), faulty.proxy.data()[0].to_target);
    // The time in which something would be sent again, were the lane's end not waited for.
    thread::sleep(Duration::from_millis(1900));
    assert!(!waiting.is_finished(), "{:?}", waiting.join());
    assert_eq!(faulty.proxy.data()[0].to_target, sent, "sent again on a hunch");
    faulty.proxy.hold_toward(Toward::Client, false);
    let report = done(waiting.join().unwrap(), &moves);
    println!("{:?} after the second lane hung: {report:?}", begun.elapsed());
    assert!(report.attempts > 1 && (1..=WINDOW).contains(&report.bytes_resent), "{report:?}");
    nothing_lands_later(faulty, &moves);
}

/// A9. A rail's packets stay in a switch while the transfer ends on another rail, and come out long after.
#[test]
fn a9_what_a_held_lane_lets_go_after_the_end_lands_nowhere() {
    let (faulty, moves, pending) = hanging();
    let report = done(pending.wait(), &moves);
    assert!(report.attempts > 1 && (1..=WINDOW).contains(&report.bytes_resent), "{report:?}");
    nothing_lands_later(faulty, &moves);
}

/// A9. The same where the transfer was cancelled and never sent again.
#[test]
fn a9_what_a_held_lane_of_a_cancelled_transfer_lets_go_lands_nowhere() {
    let (mut faulty, moves, pending) = hanging();
    faulty.scene.initiator.engine.cancel(pending.id()).unwrap();
    let report = pending.wait().unwrap();
    assert_eq!(report.outcome, kvferry_client::Outcome::Cancelled, "{report:?}");
    assert!(report.peer_confirmed, "the control stream was there to say so: {report:?}");
    let range = 0..harness::batch::destination(&moves).end;
    faulty.scene.initiator.pool.hand_over(range.clone(), Stamp::of(3));
    faulty.scene.target.pool.hand_over(range, Stamp::of(4));
    faulty.proxy.hold_data(1, false);
    faulty.proxy.drain(LIMIT);
    faulty.works(&[Move { from: 60 * MIB, to: 60 * MIB, length: MIB }]);
    faulty.scene.verify("after the held lane let go");
}

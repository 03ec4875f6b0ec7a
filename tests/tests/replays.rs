//! What was said before, said again: by a stranger who listened, or by a caller who changed his mind too late.
//!
//! Named after the rows of the fault list: A2, A6, B4, C7, C7b.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{self, Move},
    dice::Dice,
    faulty::{CONFIG, Faulty, megabytes},
    pattern::Stamp,
    proxy::Kind,
    scene::{assert_reason, done, failed, once},
    stranger::Stranger,
};
use kvferry_client::{Error, Op, Outcome, Reason, Transfer};
use kvferry_proto::peer::v1::{self as wire, to_initiator::Message as Heard, to_target::Message as Said};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// Of the preface of a data lane.
const PREFACE: usize = 52;

/// Says something to the target's endpoint on a connection of its own, and waits until that is closed.
fn say(faulty: &Faulty, bytes: &[u8]) {
    let mut stream = TcpStream::connect(faulty.scene.session()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // It may be closed while we talk.
    let _ = stream.write_all(bytes);
    let begun = Instant::now();
    let mut scrap = [0; 4096];
    loop {
        match stream.read(&mut scrap) {
            Ok(0) => return,
            Ok(_) => assert!(begun.elapsed() < LIMIT, "it is listened to for ever"),
            Err(error) => {
                let waited = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::TimedOut];
                assert!(!waited.contains(&error.kind()), "it is listened to for ever");
                return;
            }
        }
    }
}

/// A session with something of everything behind it, and a transfer under way while `meanwhile` happens: which must
/// cost it nothing.
fn undisturbed(kind: Kind, meanwhile: impl FnOnce(&Faulty, Vec<u8>)) {
    let config = format!("{CONFIG}[endpoint]\nhandshake_timeout_ms = 1000\n");
    let mut faulty = Faulty::with_config(80 * MIB, &config);
    let early = [Move { from: 0, to: 0, length: 4096 }];
    faulty.works(&early);
    faulty.proxy.drain(LIMIT);
    let head = faulty.proxy.head(kind).unwrap();
    assert!(head.len() > PREFACE, "{} bytes are no beginning", head.len());
    // The early transfer's pages belong to somebody else by now.
    faulty.scene.target.pool.hand_over(0..MIB, Stamp { owner: 4, transfer: 1 });
    let moves: Vec<Move> = megabytes(12)
        .iter()
        .map(|each| Move { from: each.from + 8 * MIB, to: each.to + 8 * MIB, ..*each })
        .collect();
    let pending = faulty.begin(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) });
    let connections = faulty.proxy.stats().len();
    meanwhile(&faulty, head);
    faulty.proxy.throttle(None);
    let report = done(pending.wait(), &moves);
    assert_eq!((report.attempts, report.bytes_resent), (1, 0), "{report:?}");
    faulty.expect(Op::Write, &moves);
    faulty.works(&[Move { from: 40 * MIB, to: 40 * MIB, length: MIB }]);
    assert_eq!(faulty.proxy.stats().len(), connections, "the session was opened again");
    assert_eq!(faulty.lanes_lost(), 0);
}

/// B4. A lane's token works once: neither its preface alone nor with the parts that followed is a lane.
#[test]
fn b4_a_replayed_lane_is_refused_and_its_parts_land_nowhere() {
    undisturbed(Kind::Data, |faulty, head| {
        for _ in 0..3 {
            say(faulty, &head);
            say(faulty, &head[..PREFACE]);
        }
    });
}

/// B4. Nor does it work after the session it belonged to is over.
#[test]
fn b4_a_lane_of_a_session_that_is_over_is_refused() {
    let mut faulty = Faulty::new(8 * MIB);
    faulty.works(&[Move { from: 0, to: 0, length: 4096 }]);
    faulty.proxy.drain(LIMIT);
    let head = faulty.proxy.head(Kind::Data).unwrap();
    faulty.proxy.cut_all(harness::proxy::Cut::Reset);
    faulty.works(&[Move { from: 4 * MIB, to: 4 * MIB, length: 4096 }]);
    faulty.scene.target.pool.hand_over(0..MIB, Stamp { owner: 4, transfer: 1 });
    say(&faulty, &head);
    faulty.works(&[Move { from: 6 * MIB, to: 6 * MIB, length: 4096 }]);
}

/// C7b. Everything an initiator has ever said on its control stream, said again by somebody without its key: Open,
/// Confirm and all. Nothing is fenced before a fresh challenge is answered, so nobody who lives is disturbed.
#[test]
fn c7b_a_replayed_session_open_disturbs_nobody() {
    undisturbed(Kind::Control, |faulty, head| {
        let lengths = [head.len(), head.len() / 2, head.len() * 3 / 4];
        let strangers = lengths.map(|length| {
            let mut stream = TcpStream::connect(faulty.scene.session()).unwrap();
            let _ = stream.write_all(&head[..length]);
            stream
        });
        // Beyond the time of a handshake. The connections themselves end later, when they answer no ping.
        thread::sleep(Duration::from_millis(1500));
        drop(strangers);
    });
}

/// C7. The messages of an opening in every order but the right one, each by somebody who could sign the right one:
/// a typed refusal and the end of that stream; and the session that lives there does not notice.
#[test]
fn c7_handshake_messages_out_of_order_are_refused() {
    let ready = || Said::Ready(wire::Ready {});
    let no_confirm = || Said::Confirm(wire::Confirm { signature: vec![0; 64], proof: vec![] });
    let request = || Said::LaneRequest(wire::LaneRequest { lane_id: 1, kind: 1, path: 2 });
    let beat = || Said::Beat(wire::Beat { sequence: 1 });
    undisturbed(Kind::Control, |faulty, _| {
        let endpoint = faulty.scene.session();
        let stranger = || Stranger::connect(endpoint, [7; 32]).unwrap();
        let refused = |what: &str, stranger: Stranger| {
            let reason = stranger.refused().unwrap_or_else(|error| panic!("{what}: {error:#}"));
            assert_eq!(reason, Reason::HandshakeFailed, "{what}");
        };
        for (what, first) in
            [("confirm", no_confirm()), ("ready", ready()), ("request", request()), ("beat", beat())]
        {
            let one = stranger();
            one.say(first);
            one.say(one.open());
            refused(&format!("{what}, then open"), one);
        }
        for (what, second) in
            [("ready", ready()), ("confirm of nothing", no_confirm()), ("request", request())]
        {
            let mut one = stranger();
            one.meet().unwrap();
            one.say(second);
            refused(&format!("open, then {what}"), one);
        }
        let mut twice = stranger();
        twice.meet().unwrap();
        twice.say(twice.open());
        refused("open, open", twice);
        let mut again = stranger();
        let confirm = again.meet().and_then(|challenge| again.confirm(&challenge)).unwrap();
        again.say(confirm.clone());
        again.say(confirm);
        refused("open, confirm, confirm", again);
        let mut late = stranger();
        let confirm = late.meet().and_then(|challenge| late.confirm(&challenge)).unwrap();
        late.say(confirm);
        late.say(ready());
        late.say(late.open());
        refused("open, confirm, ready, open", late);
    });
}

/// C7. A good Confirm on another connection than its challenge's, or after the time of a handshake, is none.
#[test]
fn c7_a_confirm_from_elsewhere_or_too_late_is_refused() {
    undisturbed(Kind::Control, |faulty, _| {
        let stranger = || Stranger::connect(faulty.scene.session(), [7; 32]).unwrap();
        let (mut one, mut other) = (stranger(), stranger());
        let confirm = one.meet().and_then(|challenge| one.confirm(&challenge)).unwrap();
        other.meet().unwrap();
        other.say(confirm.clone());
        assert_eq!(other.refused().unwrap(), Reason::HandshakeFailed);
        thread::sleep(Duration::from_millis(1200));
        one.say(confirm);
        assert_eq!(one.refused().unwrap(), Reason::ConnectTimeout);
        // Or the test would show nothing: in order and in time it is let in.
        let mut proper = stranger();
        let confirm = proper.meet().and_then(|challenge| proper.confirm(&challenge)).unwrap();
        proper.say(confirm);
        assert!(matches!(proper.hear().unwrap(), Heard::Accept(_)));
        proper.say(Said::Ready(wire::Ready {}));
        assert!(matches!(proper.hear().unwrap(), Heard::Welcome(_)));
    });
}

/// A6. Cancels at any moment, from two threads at once, and again: one end each, and it stays.
#[test]
fn a6_a_transfer_has_one_end_however_often_it_is_cancelled() {
    let count = if harness::long() { 2000 } else { 200 };
    let mut faulty = Faulty::new(8 * MIB);
    let seed = Dice::seed().unwrap();
    println!("seed {seed}");
    let mut dice = Dice::new(seed);
    let moves = [Move { from: 0, to: 0, length: MIB }];
    faulty.works(&moves);
    let (mut finished, mut cancelled) = (0, 0);
    for _ in 0..count {
        let pending = faulty.submit(faulty.request(Op::Write, &moves));
        let id = pending.id();
        let engine = &faulty.scene.initiator.engine;
        let (first, second) = (dice.within(0..3000), dice.within(0..3000));
        let report = thread::scope(|scope| {
            for after in [first, second] {
                scope.spawn(move || {
                    thread::sleep(Duration::from_micros(after));
                    match engine.cancel(id) {
                        // Too early: the daemon had not heard of it.
                        Ok(_) | Err(Error::Refused(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                });
            }
            pending.wait().unwrap()
        });
        match report.outcome {
            Outcome::Done => finished += 1,
            Outcome::Cancelled => cancelled += 1,
            _ => panic!("{report:?}"),
        }
        engine.cancel(id).unwrap();
        let again = engine.wait(id, LIMIT).unwrap();
        assert_eq!((again.outcome, again.bytes_done), (report.outcome, report.bytes_done));
    }
    println!("{finished} done, {cancelled} cancelled");
    assert!(finished > 0 && cancelled > 0, "{finished} done, {cancelled} cancelled: one side was never seen");
    // What a cancelled transfer leaves is undefined, but here it could only bring what was there.
    faulty.works(&moves);
}

/// A2. A deadline strikes while writes are in flight: FAILED and settled on both sides, so both may reuse their pages
/// at once. Nobody is to blame, and the lane lives.
#[test]
fn a2_a_deadline_in_mid_flight_is_settled() {
    let mut faulty = Faulty::new(80 * MIB);
    faulty.works(&[Move { from: 70 * MIB, to: 70 * MIB, length: 4096 }]);
    faulty.proxy.throttle(Some(8 * MIB));
    let moves = megabytes(32);
    let transfer = faulty.request(Op::Write, &moves);
    let begun = Instant::now();
    let deadline = Some(Duration::from_millis(700));
    let (report, failure) = failed(faulty.transfer(Transfer { deadline, ..transfer }));
    let took = begun.elapsed();
    faulty.scene.initiator.pool.hand_over(0..40 * MIB, Stamp::of(3));
    assert_reason(&failure, &[Reason::Deadline]);
    assert!(report.peer_confirmed, "the target was there to say so: {report:?}");
    assert!(took < Duration::from_secs(3), "0.7 s of time and {took:?} to its end");
    assert!(report.bytes_done < batch::bytes(&moves), "it was to be in flight: {report:?}");
    faulty.scene.target.pool.hand_over(0..40 * MIB, Stamp::of(4));
    faulty.proxy.throttle(None);
    faulty.proxy.drain(LIMIT);
    faulty.works(&[Move { from: 60 * MIB, to: 60 * MIB, length: MIB }]);
    assert_eq!(faulty.lanes_lost(), 0);
}

//! Peers that say nothing: stopped daemons and engines, black holes in both directions or one, paths so slow that they
//! look like one. Nobody waits for the dead (I9), nobody who lives is buried, and each side proves its own half.
//!
//! Named after the rows of the fault list: A4, C2, C5, D2, D3, D4.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{self, Arrangement, Move},
    daemon::Daemon,
    engine::EngineProcess,
    eventually,
    faulty::{CONFIG, Faulty, megabytes},
    oracle::Kind,
    pattern::Stamp,
    process::Signal,
    proxy::{Proxy, Toward},
    scene::{Nodes, Peer, SOURCE, TARGET, assert_reason, done, failed, once, request},
    wire::Command,
};
use kvferry_client::{Op, Outcome, Path, Reason, Settlement, Transfer};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// I9: what a verdict over a silent peer may take, with what a busy machine may add.
const NOTICED: Duration = Duration::from_millis(3500);
const HEARTBEAT: Duration = Duration::from_millis(500);

/// The target's daemon has dropped every session that reached it: its half is proven by itself.
fn forgotten_by(daemon: &Daemon) {
    eventually("the target has dropped the session", NOTICED + HEARTBEAT, || {
        daemon.node().unwrap().sessions().unwrap().iter().all(|session| !session.inbound)
    });
}

/// C5. A daemon stands still for long, with bytes for it in every buffer, and goes on as if nothing had happened.
#[test]
fn c5_a_daemon_that_was_stopped_for_long_lets_nothing_stale_land() {
    let long = Duration::from_secs(if harness::long() { 30 } else { 6 });
    let mut faulty = Faulty::new(80 * MIB);
    let moves = megabytes(32);
    let pending = faulty.begin(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) });
    let target = faulty.scene.nodes.target().process();
    let stopped = Instant::now();
    target.signal(Signal::STOP).unwrap();
    let (report, failure) = failed(pending.wait());
    assert_reason(&failure, &[Reason::PeerSilent]);
    assert!(stopped.elapsed() < NOTICED, "the verdict took {:?}", stopped.elapsed());
    assert!(!report.peer_confirmed, "{report:?}");
    // The source is the caller's again: what is in it from now on must never be seen at the target.
    faulty.scene.initiator.pool.overwrite(0..40 * MIB, Stamp { owner: 3, transfer: 1 });
    faulty.proxy.throttle(None);
    thread::sleep(long.saturating_sub(stopped.elapsed()));
    target.signal(Signal::CONT).unwrap();
    forgotten_by(faulty.scene.nodes.target());
    faulty.scene.target.pool.hand_over(0..40 * MIB, Stamp { owner: 4, transfer: 1 });
    faulty.proxy.drain(LIMIT);
    // Its engines may have given it up meanwhile; it serves whoever comes.
    let other = Peer::attach(faulty.scene.nodes.target(), Kind::Shared, 80 * MIB, Stamp::of(6));
    let mut other = other.unwrap();
    let (session, own) = (other.engine.session_id(), &faulty.scene.initiator);
    let transfer = request(Op::Write, session, &moves, &own.pool, &other.pool);
    done(own.engine.transfer(transfer), &moves);
    other.pool.expect(&own.pool, &moves);
    other.pool.verify().assert_clean("after the daemon went on");
    faulty.scene.verify("the engine that was there before");
}

/// C5 from the other end: it is the own daemon that slept. It buries its sessions once and no more: the session that it
/// opens then is left alone.
#[test]
fn c5_a_daemon_that_slept_buries_its_sessions_once() {
    // Less than what the client library takes for the end of the lease, more than what ends sessions.
    let config = format!("{CONFIG}[session]\nheartbeat_ms = 250\nsilence_ms = 1000\n");
    let mut faulty = Faulty::with_config(80 * MIB, &config);
    faulty.works(&[Move { from: 70 * MIB, to: 70 * MIB, length: MIB }]);
    let own = faulty.scene.nodes.initiator().process();
    own.signal(Signal::STOP).unwrap();
    thread::sleep(Duration::from_millis(1600));
    own.signal(Signal::CONT).unwrap();
    lives_on(&mut faulty, "the own daemon slept");
}

/// A transfer without retries that lasts for several heartbeats.
fn lives_on(faulty: &mut Faulty, what: &str) {
    let first = [Move { from: 60 * MIB, to: 60 * MIB, length: MIB }];
    faulty.works(&first);
    faulty.proxy.throttle(Some(4 * MIB));
    let place = |each: &Move| Move { from: each.from + 62 * MIB, to: each.to + 62 * MIB, ..*each };
    let moves: Vec<Move> = megabytes(7).iter().map(place).collect();
    let report =
        done(faulty.transfer(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) }), &moves);
    assert_eq!((report.attempts, report.bytes_resent), (1, 0), "{what}: {report:?}");
    faulty.proxy.throttle(None);
    faulty.expect(Op::Write, &moves);
    faulty.scene.verify(what);
}

/// An engine with peers on three daemons of which one falls silent.
struct Trio {
    initiator: Peer,
    well: Peer,
    sick: Peer,
    proxy: Proxy,
    /// Dropped last: the initiator's, the healthy peer's, the sick peer's.
    _daemons: [Daemon; 3],
}

impl Trio {
    fn new() -> Self {
        let daemons = [(); 3].map(|()| Daemon::with_config(CONFIG).unwrap());
        let peer = |daemon, stamp| Peer::attach(daemon, Kind::Shared, 64 * MIB, stamp).unwrap();
        let initiator = peer(&daemons[0], SOURCE);
        let (well, sick) = (peer(&daemons[1], TARGET), peer(&daemons[2], Stamp::of(4)));
        let proxy = Proxy::start(sick.engine.session_id()).unwrap();
        Self { initiator, well, sick, proxy, _daemons: daemons }
    }

    fn to_well(&self, moves: &[Move]) -> Duration {
        let begun = Instant::now();
        let session = self.well.engine.session_id();
        let transfer = request(Op::Write, session, moves, &self.initiator.pool, &self.well.pool);
        let report = done(self.initiator.engine.transfer(transfer), moves);
        assert_eq!(report.attempts, 1, "another peer's silence cost it something: {report:?}");
        begun.elapsed()
    }

    fn to_sick(&self, moves: &[Move]) -> Transfer {
        let session = self.proxy.address();
        let transfer = request(Op::Write, &session, moves, &self.initiator.pool, &self.sick.pool);
        Transfer { policy: once(), ..transfer }
    }

    /// What the transfers to the healthy peer take while `during` is going on, in order of size.
    fn healthy_meanwhile(&self, during: impl FnOnce() + Send) -> Vec<Duration> {
        let moves = Arrangement::Reversed.moves(64, 4096);
        thread::scope(|scope| {
            let running = scope.spawn(during);
            let mut took = Vec::new();
            while !running.is_finished() {
                took.push(self.to_well(&moves));
            }
            took.sort_unstable();
            took
        })
    }

    /// The p99 of healthy transfers while a dozen wait for a peer that says nothing, over what it was just before. Too
    /// short for a verdict: those who wait are served when it is over.
    fn cost_of_a_sick_neighbour(&self, moves: &[Move]) -> f64 {
        const WINDOW: Duration = Duration::from_millis(400);
        let before = self.healthy_meanwhile(|| thread::sleep(WINDOW));
        self.proxy.hold(true);
        let waits = || done(self.initiator.engine.transfer(self.to_sick(moves)), moves);
        let during = thread::scope(|scope| {
            let waiting: Vec<_> = (0..12).map(|_| scope.spawn(waits)).collect();
            let during = self.healthy_meanwhile(|| thread::sleep(WINDOW));
            assert!(!waiting.iter().any(thread::ScopedJoinHandle::is_finished), "nobody waited");
            self.proxy.hold(false);
            during
        });
        let p99 = |took: &[Duration]| took[took.len() * 99 / 100].as_secs_f64();
        p99(&during) / p99(&before)
    }
}

/// D2. A peer behind a black hole, with a dozen callers waiting for it: all are told in time, and whoever talks to
/// somebody else does not notice.
#[test]
fn d2_a_black_holed_peer_is_noticed_in_time_and_slows_nobody() {
    // What else runs beside the short suite is not the daemon's doing, and has cost 4.5 times as much; a queue shared
    // with the sick would cost a thousand times.
    let (windows, bound) = if harness::long() { (25, 1.25) } else { (5, 30.0) };
    let mut trio = Trio::new();
    let moves = megabytes(4);
    done(trio.initiator.engine.transfer(trio.to_sick(&moves)), &moves);
    let mut ratios: Vec<f64> = (0..windows).map(|_| trio.cost_of_a_sick_neighbour(&moves)).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let median = ratios[windows / 2];
    println!("p99 of healthy transfers beside a black hole over before: {median:.3}, median of {ratios:.2?}");
    assert!(median <= bound, "a black hole costs healthy peers {median:.2} times their p99");

    trio.proxy.hold(true);
    let meanwhile = a_dozen_wait_for_the_sick(&trio, &moves);
    println!("slowest transfer to a healthy peer until the verdict: {meanwhile:?}");
    assert!(meanwhile < Duration::from_secs(1), "a healthy peer waited {meanwhile:?}");
    trio.proxy.hold(false);
    eventually("the sick peer is well again", LIMIT, || {
        let report = trio.initiator.engine.transfer(trio.to_sick(&moves)).unwrap();
        report.outcome == Outcome::Done
    });
    trio.sick.pool.expect(&trio.initiator.pool, &moves);
    trio.sick.pool.verify().assert_clean("the sick peer");
    trio.well.pool.expect(&trio.initiator.pool, &Arrangement::Reversed.moves(64, 4096));
    trio.well.pool.verify().assert_clean("the healthy peer");
}

/// All are told in time. The slowest of the healthy transfers meanwhile.
fn a_dozen_wait_for_the_sick(trio: &Trio, moves: &[Move]) -> Duration {
    let told: Mutex<Vec<Duration>> = Mutex::default();
    let meanwhile = trio.healthy_meanwhile(|| {
        thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    let begun = Instant::now();
                    let (_, failure) = failed(trio.initiator.engine.transfer(trio.to_sick(moves)));
                    assert_reason(&failure, &[Reason::PeerSilent, Reason::ConnectTimeout]);
                    told.lock().unwrap().push(begun.elapsed());
                });
            }
        });
    });
    let mut told = told.into_inner().unwrap();
    told.sort_unstable();
    println!("told after {told:?}");
    // Without retries, whoever waits ends with the session that fell silent, also who had no part under way.
    assert!(told.iter().all(|took| *took < NOTICED), "a verdict took {:?}", told.last());
    meanwhile[meanwhile.len() - 1]
}

/// A4. The peer cannot be asked when a transfer is cancelled: the own half is proven without it, the report does not
/// pretend to more, and the peer proves its half by itself.
#[test]
fn a4_a_peer_black_holed_while_fencing_delays_only_its_own_half() {
    let mut faulty = Faulty::new(80 * MIB);
    let moves = megabytes(32);
    let pending = faulty.begin(faulty.request(Op::Write, &moves));
    faulty.proxy.hold(true);
    let begun = Instant::now();
    let settlement = faulty.scene.initiator.engine.cancel(pending.id()).unwrap();
    let settled = begun.elapsed();
    assert_eq!(settlement, Settlement::Settled);
    let report = pending.wait().unwrap();
    let took = begun.elapsed();
    println!("cancel answered after {settled:?}, the report came after {took:?}");
    assert_eq!(report.outcome, Outcome::Cancelled, "{report:?}");
    assert!(!report.peer_confirmed, "nobody could confirm it: {report:?}");
    assert!(took < NOTICED, "the report took {took:?}");
    faulty.scene.initiator.pool.hand_over(0..40 * MIB, Stamp::of(3));
    forgotten_by(faulty.scene.nodes.target());
    faulty.scene.target.pool.hand_over(0..40 * MIB, Stamp::of(4));
    faulty.proxy.throttle(None);
    faulty.proxy.hold(false);
    faulty.proxy.drain(LIMIT);
    faulty.works(&[Move { from: 60 * MIB, to: 60 * MIB, length: MIB }]);
    faulty.scene.verify("after a black hole while fencing");
}

/// D3. A partition that lets one direction pass. The initiator has its outcome in time, each side proves its own half,
/// and what was held back lands nowhere.
fn one_way(toward: Toward) {
    let mut faulty = Faulty::new(80 * MIB);
    let moves = megabytes(32);
    let pending = faulty.begin(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) });
    let begun = Instant::now();
    faulty.proxy.hold_toward(toward, true);
    let (report, failure) = failed(pending.wait());
    let took = begun.elapsed();
    println!("{toward:?} held: {:?} after {took:?}", failure.reason);
    assert_reason(&failure, &[Reason::PeerSilent, Reason::ConnectionLost]);
    assert!(took < NOTICED + HEARTBEAT, "the verdict took {took:?}");
    assert!(!report.peer_confirmed, "{report:?}");
    faulty.scene.initiator.pool.hand_over(0..40 * MIB, Stamp::of(3));
    forgotten_by(faulty.scene.nodes.target());
    faulty.scene.target.pool.hand_over(0..40 * MIB, Stamp::of(4));
    faulty.proxy.throttle(None);
    faulty.proxy.hold_toward(toward, false);
    faulty.proxy.drain(LIMIT);
    faulty.works(&[Move { from: 60 * MIB, to: 60 * MIB, length: MIB }]);
    faulty.scene.verify("after a one-way partition");
}

#[test]
fn d3_the_target_hears_nothing() {
    one_way(Toward::Target);
}

#[test]
fn d3_the_initiator_hears_nothing() {
    one_way(Toward::Client);
}

/// D4. Slow is not dead: while bytes move, however few, nobody runs out of patience; and it holds nobody else up.
#[test]
fn d4_a_slow_path_is_no_reason_to_give_up_and_slows_nobody() {
    // As 1 Mbit/s is to ten seconds of patience, but sooner.
    let (config, rate, size) = if harness::long() {
        (CONFIG.to_owned(), 125_000, 3)
    } else {
        (format!("{CONFIG}[retry]\nprogress_timeout_ms = 2500\n"), 500_000, 4)
    };
    let mut faulty = Faulty::with_config(80 * MIB, &config);
    faulty.works(&[Move { from: 70 * MIB, to: 70 * MIB, length: 4096 }]);
    // On the same pair of daemons, by a way of its own.
    let neighbour = Peer::attach(faulty.scene.nodes.target(), Kind::Shared, 80 * MIB, Stamp::of(6));
    let mut neighbour = neighbour.unwrap();
    faulty.proxy.throttle(Some(rate));
    let moves = megabytes(size);
    let slow = faulty.submit(Transfer { policy: once(), ..faulty.request(Op::Write, &moves) });
    let begun = Instant::now();
    let other = [Move { from: 50 * MIB, to: 50 * MIB, length: MIB }];
    let mut slowest = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(3) {
        let begun = Instant::now();
        let (own, session) = (&faulty.scene.initiator, neighbour.engine.session_id());
        let transfer = request(Op::Write, session, &other, &own.pool, &neighbour.pool);
        done(own.engine.transfer(transfer), &other);
        slowest = slowest.max(begun.elapsed());
    }
    let report = done(slow.wait(), &moves);
    println!("slow: {:?}; slowest neighbour: {slowest:?}", begun.elapsed());
    assert_eq!((report.attempts, report.bytes_resent), (1, 0), "{report:?}");
    assert!(slowest < Duration::from_secs(1), "a neighbour waited {slowest:?}");
    faulty.proxy.throttle(None);
    faulty.expect(Op::Write, &moves);
    neighbour.pool.expect(&faulty.scene.initiator.pool, &other);
    neighbour.pool.verify().assert_clean("the neighbour");
    faulty.scene.verify("after a slow transfer");
}

/// C2. A stopped engine is alive: it stays attached, its memory is written all the same, and every byte is right when
/// it goes on.
#[test]
fn c2_a_stopped_engine_keeps_its_memory_and_its_session() {
    let stopped_for = Duration::from_secs(if harness::long() { 60 } else { 6 });
    let nodes = Nodes::start(Path::Tcp, "").unwrap();
    let source = Stamp::of(1);
    let mut sender = EngineProcess::attach(nodes.initiator().socket(), "sender").unwrap();
    sender.pool(Kind::Shared, 64 * MIB, source).unwrap();
    let mut receiver = EngineProcess::attach(nodes.target().socket(), "receiver").unwrap();
    let remote = receiver.pool(Kind::Shared, 64 * MIB, Stamp::of(2)).unwrap();
    let session = receiver.session().to_owned();
    receiver.process().signal(Signal::STOP).unwrap();
    let begun = Instant::now();
    let mut moved = Vec::new();
    let mut at = 0;
    while begun.elapsed() < stopped_for {
        let length = MIB;
        let moves = vec![Move { from: at, to: at, length }];
        at = (at + length) % (64 * MIB);
        let session = session.clone();
        sender.send(&Command::Transfer { session, write: true, remote, moves: moves.clone() }).unwrap();
        let ended = sender.ended().unwrap();
        assert!(ended.done, "after {:?}: {}", begun.elapsed(), ended.text);
        moved.extend(moves);
        assert!(nodes.target().lists(receiver.session()).unwrap(), "it is alive");
        thread::sleep(Duration::from_millis(100));
    }
    receiver.process().signal(Signal::CONT).unwrap();
    receiver.expect(source, moved.clone()).unwrap();
    let verdict = receiver.verify().unwrap();
    verdict.assert_clean("written while it was stopped");
    assert!(verdict.moved >= batch::bytes(&moved).min(64 * MIB));
}

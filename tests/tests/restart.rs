//! Daemons and engines that go and come back: who is who afterwards, how fast, and whether a byte went astray.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{
        Barrier,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{self, Arrangement, Move},
    daemon::{Daemon, Launch},
    engine::EngineProcess,
    eventually,
    oracle::{Kind, Pool},
    pattern::Stamp,
    process::Signal,
    proxy::Proxy,
    scene::{Nodes, Peer, SOURCE, Scene, TARGET, assert_reason, done, failed, request},
    wire::Command,
};
use kvferry_client::{
    Engine, EngineOptions, Error, Event, Op, Outcome, Path, Pending, Reason, Report, Transfer,
};

const LENGTH: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Initiator,
    Target,
}

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

/// One scene in which a daemon is killed under load, again and again.
struct Struck {
    scene: Scene,
    proxy: Proxy,
    generation: u32,
}

impl Struck {
    fn new() -> Self {
        let scene = Scene::new(Path::Tcp, LENGTH).unwrap();
        let proxy = Proxy::start(scene.session()).unwrap();
        Self { scene, proxy, generation: 0 }
    }

    fn write(&self, moves: &[Move]) -> Transfer {
        self.scene.write_to(&self.proxy.address(), moves)
    }

    /// Transfers under way, with the buffers between the daemons full.
    fn load(&self) -> Vec<Pending> {
        self.proxy.throttle(Some(8 * MIB));
        let before = self.proxy.data_bytes();
        let submit = |_| self.scene.initiator.engine.submit(self.write(&megabytes(16))).unwrap();
        let pending = (0..4).map(submit).collect();
        eventually("payload flows", LIMIT, || self.proxy.data_bytes() > before + MIB);
        pending
    }

    /// Kills under load and restarts at once; returns the time from the kill to the end of the first good
    /// transfer, which moves other bytes to the same places.
    fn strike(&mut self, side: Side) -> Duration {
        let pending = self.load();
        let victim = match side {
            Side::Initiator => &self.scene.initiator.engine,
            Side::Target => &self.scene.target.engine,
        };
        let (events, session, boot) = (victim.events(), victim.session_id().to_owned(), victim.boot_id());
        let killed = Instant::now();
        match side {
            Side::Initiator => self.scene.nodes.initiator_mut().kill_and_restart().unwrap(),
            Side::Target => self.scene.nodes.target_mut().kill_and_restart().unwrap(),
        }
        self.proxy.throttle(None);
        let engine = &self.scene.initiator.engine;
        pending.into_iter().for_each(|pending| ends_by_a_restart(engine, pending.wait().unwrap()));

        // What was in flight is over: its source is overwritten at once, and its target gets new bytes.
        self.generation += 1;
        let Stamp { owner, .. } = SOURCE;
        self.scene.initiator.pool.overwrite(0..LENGTH, Stamp { owner, transfer: self.generation });
        let moves = megabytes(16);
        first_good(&self.scene.initiator.engine, || self.write(&moves));
        let took = killed.elapsed();
        self.scene.target.pool.expect(&self.scene.initiator.pool, &moves);
        self.scene.verify("after the first good transfer");

        reattached(&events, &session);
        let victim = match side {
            Side::Initiator => &self.scene.initiator.engine,
            Side::Target => &self.scene.target.engine,
        };
        assert_ne!(victim.boot_id(), boot);
        self.proxy.drain(LIMIT);
        self.scene.verify("after the last stale byte has come out of the buffers");
        took
    }
}

/// C4, C4b's ground: the daemon is gone in mid-transfer and another is there at once. The engine comes back by
/// itself, under the same session id, and no byte of before lands over what was written after.
fn c4_comes_back(side: Side) {
    let runs = if harness::long() { 20 } else { 3 };
    let mut struck = Struck::new();
    let mut times: Vec<Duration> = (0..runs).map(|_| struck.strike(side)).collect();
    times.sort_unstable();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{side:?} killed {runs} times: first good transfer after {median:?} (median), {longest:?} (longest)"
    );
    assert!(median < Duration::from_secs(1) && longest < Duration::from_secs(3), "{times:?}");
}

#[test]
fn c4_the_initiators_daemon_is_killed_under_load() {
    c4_comes_back(Side::Initiator);
}

#[test]
fn c4_the_targets_daemon_is_killed_under_load() {
    c4_comes_back(Side::Target);
}

/// C4 for memory of every kind, on the local path, with an engine that is a process of its own.
#[test]
fn c4_engines_of_one_node_come_back_with_memory_of_both_kinds() {
    for kind in Kind::ALL {
        let mut daemon = Daemon::start().unwrap();
        let source = Peer::attach(&daemon, kind, LENGTH, SOURCE).unwrap();
        let mut target = EngineProcess::attach(daemon.socket(), "target").unwrap();
        let remote = target.pool(kind, LENGTH, TARGET).unwrap();
        let events = source.engine.events();
        daemon.kill_and_restart().unwrap();
        let moves = megabytes(4);
        let write = || {
            let slices = batch::slices(Op::Write, &moves, source.pool.address(), remote);
            let spare = request(Op::Write, target.session(), &[], &source.pool, &source.pool);
            Transfer { slices, ..spare }
        };
        reattached(&events, source.engine.session_id());
        first_good(&source.engine, write);
        target.expect(SOURCE, moves.clone()).unwrap();
        let verdict = target.verify().unwrap();
        verdict.assert_clean("after a restart");
        assert_eq!(verdict.moved, 4 * MIB);
    }
}

/// C6: both daemons at once, and both engines call each other as soon as they can.
#[test]
fn c6_both_daemons_restart_at_once() {
    let mut scene = Scene::new(Path::Tcp, LENGTH).unwrap();
    let moves = megabytes(2);
    let rounds = if harness::long() { 20 } else { 2 };
    for _ in 0..rounds {
        let (there, back) = (scene.target.engine.session_id(), scene.initiator.engine.session_id());
        let (there, back) = (there.to_owned(), back.to_owned());
        scene.nodes.initiator_mut().kill_and_spawn().unwrap();
        scene.nodes.target_mut().kill_and_spawn().unwrap();
        let begin = Instant::now();
        both_ways(&scene.initiator, &scene.target, &there, &back, &moves);
        println!("both daemons restarted: good transfers both ways after {:?}", begin.elapsed());
        scene.nodes.initiator_mut().listens().unwrap();
        scene.nodes.target_mut().listens().unwrap();
    }
    // Each wrote the first half to the other's; what one sent is what the other had then.
    scene.initiator.pool.overwrite(0..LENGTH, Stamp::of(3));
    scene.target.pool.overwrite(0..LENGTH, Stamp::of(4));
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &moves);
}

/// C6: two engines that have never met open sessions to each other in the same moment.
#[test]
fn c6_both_engines_open_sessions_to_each_other_at_once() {
    let nodes = Nodes::start(Path::Tcp, "").unwrap();
    for _ in 0..if harness::long() { 100 } else { 10 } {
        let one = Peer::attach(nodes.initiator(), Kind::Shared, 4 * MIB, SOURCE).unwrap();
        let other = Peer::attach(nodes.target(), Kind::Shared, 4 * MIB, TARGET).unwrap();
        let (there, back) = (other.engine.session_id(), one.engine.session_id());
        let begin = Instant::now();
        both_ways(&one, &other, there, back, &megabytes(1));
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
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

/// C3: another engine at the same `host:port`. Twelve threads still have transfers for the dead one: none of them
/// moves a byte, not even after the own daemon was restarted, until the engine says that it means the new one.
#[test]
fn c3_another_engine_at_the_same_port_gets_nothing_until_the_session_is_reset() {
    let mut scene = Scene::with_config(Path::Tcp, LENGTH, "[endpoint]\nport_quarantine_s = 0\n").unwrap();
    let session = scene.session().to_owned();
    let moves = megabytes(4);
    scene.write_and_verify(&session, &moves);
    let events = scene.initiator.engine.events();

    let port = session.rsplit_once(':').unwrap().1.parse().unwrap();
    let again = |name: &str, daemon: &Daemon| {
        Engine::attach(EngineOptions { preferred_port: Some(port), ..daemon.options(name) }).unwrap()
    };
    // The memory is the same, and so are its addresses: only who owns them tells.
    let pool = Pool::new(Kind::Shared, LENGTH, Stamp::of(4)).unwrap();
    let old =
        std::mem::replace(&mut scene.target.engine, again("a stranger meanwhile", scene.nodes.target()));
    drop(old);
    eventually("the port is free", LIMIT, || {
        let engine = again("the successor", scene.nodes.target());
        let same = engine.session_id() == session;
        if same {
            scene.target.engine = engine;
        }
        same
    });
    scene.target.engine.register(&[pool.memory()]).unwrap();
    scene.target.pool = pool;
    let stays_refused = |scene: &Scene| {
        thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    let report = scene.initiator.engine.transfer(scene.write_to(&session, &moves));
                    let (report, failure) = failed(report);
                    assert_reason(&failure, &[Reason::PeerRestarted]);
                    assert_eq!(report.bytes_done, 0);
                });
            }
        });
        scene.target.pool.verify().assert_clean("memory of another engine");
    };
    // The first ones may meet the old stream's end; the reason must settle on who is there.
    eventually("the session notices", LIMIT, || {
        let report = scene.initiator.engine.transfer(scene.write_to(&session, &moves)).unwrap();
        let failure = report.failure.unwrap();
        assert_reason(&failure, &[Reason::PeerRestarted, Reason::ConnectionLost, Reason::EngineGone]);
        failure.reason == Reason::PeerRestarted
    });
    stays_refused(&scene);
    scene.nodes.initiator_mut().kill_and_restart().unwrap();
    reattached(&events, scene.initiator.engine.session_id());
    stays_refused(&scene);

    scene.initiator.engine.reset_session(&session).unwrap();
    scene.write_and_verify(&session, &moves);
}

/// C8: engines come and go; the daemon is as it was.
#[test]
fn c8_engine_restarts_leave_nothing_behind() {
    let (restarts, warm_up) = if harness::long() { (1000, 50) } else { (30, 10) };
    let config = "[endpoint]\nport_quarantine_s = 1\n";
    let nodes = Nodes::start(Path::Tcp, config).unwrap();
    let mut target = Peer::attach(nodes.target(), Kind::Shared, 4 * MIB, TARGET).unwrap();
    let daemons = [nodes.initiator().process(), nodes.target().process()];
    let moves = [Move { from: 0, to: 0, length: MIB }];
    let mut one_life = |_| {
        let mut engine = EngineProcess::attach(nodes.initiator().socket(), "short-lived").unwrap();
        engine.pool(Kind::Shared, 4 * MIB, SOURCE).unwrap();
        let (session, remote) = (target.engine.session_id().to_owned(), target.pool.address());
        let moves = moves.to_vec();
        engine.send(&Command::Transfer { session, write: true, remote, moves }).unwrap();
        let ended = engine.ended().unwrap();
        assert!(ended.done, "{:?}: {}", ended.reason(), ended.text);
        engine.kill().unwrap();
    };
    let nobody = || {
        let engines = nodes.initiator().node().unwrap().engines().unwrap().len();
        let sessions = nodes.target().node().unwrap().sessions().unwrap().len();
        engines + sessions == 0
    };
    (0..warm_up).for_each(&mut one_life);
    eventually("all of them are gone", LIMIT, nobody);
    let count = || daemons.map(|daemon| (daemon.descriptors().unwrap(), daemon.threads().unwrap()));
    let resident = || daemons.map(|daemon| daemon.resident().unwrap());
    let (before, bytes_before) = (count(), resident());
    (0..restarts).for_each(&mut one_life);
    eventually("all of them are gone", LIMIT, nobody);
    // A connection that just asked may not be closed at the other end yet.
    let flat = |now: [(usize, u64); 2]| {
        now.iter().zip(&before).all(|(now, before)| now.0 <= before.0 + 1 && now.1 <= before.1)
    };
    eventually("descriptors and threads are as before", LIMIT, || flat(count()));
    let bytes = resident();
    println!("{restarts} restarts: {before:?} -> {:?}, resident {bytes_before:?} -> {bytes:?}", count());
    for (now, before) in bytes.into_iter().zip(bytes_before) {
        assert!(now < before + 8 * MIB, "{before} bytes resident before, {now} after");
    }
    target.pool.expect_stamp(SOURCE, &moves);
    target.pool.verify().assert_clean("after many engines wrote the same");
}

/// C5, A10: the own daemon is stopped, not dead. Nothing is invented; when it goes on, it lets go of the engine
/// first, and then what was in flight has its end.
#[test]
fn a10_a_stopped_daemon_proves_nothing_until_it_goes_on() {
    let struck = Struck::new();
    let engine = &struck.scene.initiator.engine;
    let events = engine.events();
    struck.proxy.throttle(Some(4 * MIB));
    let pending = engine.submit(struck.write(&megabytes(16))).unwrap();
    let id = pending.id();
    eventually("payload flows", LIMIT, || struck.proxy.data_bytes() > MIB);
    let daemon = struck.scene.nodes.initiator().process();
    daemon.signal(Signal::STOP).unwrap();
    let stopped = Instant::now();
    let report = pending.wait().unwrap();
    assert_eq!(report.outcome, Outcome::Unsettled, "{report:?}");
    assert!(stopped.elapsed() < LIMIT, "{:?}", stopped.elapsed());
    let report = engine.wait(id, Duration::from_secs(2)).unwrap();
    assert_eq!(report.outcome, Outcome::Unsettled, "{report:?}");
    let ended = |event: &Event| matches!(event, Event::TransferSettled(_) | Event::Reattached { .. });
    assert!(!events.try_iter().any(|event| ended(&event)), "nothing has changed yet");

    daemon.signal(Signal::CONT).unwrap();
    reattached(&events, engine.session_id());
    loop {
        match events.recv_timeout(LIMIT) {
            Ok(Event::TransferSettled(told)) => {
                assert_eq!((told.id, told.outcome), (id, Outcome::Failed));
                break;
            }
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!("its end was not told"),
        }
    }
    struck.proxy.throttle(None);
    let moves = megabytes(4);
    first_good(engine, || struck.write(&moves));
}

/// J1: what a leaving daemon did not take goes to the next one.
#[test]
fn j1_a_transfer_submitted_while_the_daemon_drains_is_done_by_the_next_one() {
    let mut struck = Struck::new();
    let events = struck.scene.initiator.engine.events();
    struck.proxy.throttle(Some(8 * MIB));
    let under_way = struck.scene.initiator.engine.submit(struck.write(&megabytes(8))).unwrap();
    eventually("payload flows", LIMIT, || struck.proxy.data_bytes() > MIB);
    struck.scene.nodes.initiator().process().signal(Signal::TERM).unwrap();
    while !matches!(events.recv_timeout(LIMIT).unwrap(), Event::Draining { .. }) {}
    let held_back = struck.scene.initiator.engine.submit(struck.write(&megabytes(16))).unwrap();
    struck.proxy.throttle(None);
    done(under_way.wait(), &megabytes(8));
    struck.scene.nodes.initiator_mut().start_again().unwrap();
    done(held_back.wait(), &megabytes(16));
    let Scene { initiator, target, .. } = &mut struck.scene;
    target.pool.expect(&initiator.pool, &megabytes(16));
    struck.scene.verify("after a restart in between");
}

/// The proof that a predecessor has exited is the exit of its process.
#[test]
fn a_daemon_does_not_start_before_its_predecessor_has_exited() {
    let daemon = Daemon::start().unwrap();
    let pid = daemon.process().0;
    // Its lock is let go of, as by a process that is on its way out; its record says that it is still there.
    let lock = daemon.state_dir().join("lock");
    std::fs::remove_file(lock).unwrap();
    let config = "[restart]\npredecessor_ms = 300\n";
    let rival = Launch::new().unwrap().config(config).state_dir(daemon.state_dir());
    let refusal = rival.refused().unwrap();
    assert_eq!(refusal.code, Some(3), "{}", refusal.said);
    assert!(refusal.said.contains(&format!("pid {pid}")), "{}", refusal.said);
    daemon.attach("served all the time").unwrap();
}

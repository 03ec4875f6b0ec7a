//! Daemons that are killed, stopped or asked to leave, and come back.

use std::{
    sync::mpsc::RecvTimeoutError,
    time::{Duration, Instant},
};

use harness::{
    batch::{self, Move},
    daemon::{Daemon, Launch},
    engine::EngineProcess,
    eventually,
    oracle::Kind,
    pattern::Stamp,
    process::Signal,
    proxy::Proxy,
    raw::{RawEngine, refusal},
    scene::{Peer, SOURCE, Scene, TARGET, done, request},
};
use kvferry_client::{Event, Op, Outcome, Path, Pending, Reason, Transfer};
use kvferry_proto::engine::v1 as wire;

use crate::{LENGTH, LIMIT, MIB, both_ways, ends_by_a_restart, first_good, megabytes, reattached};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Initiator,
    Target,
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

/// C4: of a transfer of an earlier boot the daemon knows that it is settled, and nothing else.
#[test]
fn c4_a_transfer_of_an_earlier_boot_is_over_and_its_peer_unconfirmed() {
    let daemon = Daemon::start().unwrap();
    let engine = RawEngine::attach(daemon.socket()).unwrap();
    let wait = |boot_id: Vec<u8>| {
        let request = wire::WaitRequest { boot_id, transfer_id: vec![7; 16], timeout_ms: 1000 };
        engine.call(async |mut client, token| client.wait(token.request(request)).await)
    };
    let report = wait(vec![9; 16]).unwrap();
    assert_eq!((report.outcome(), report.peer_half()), (wire::Outcome::Failed, wire::PeerHalf::Unconfirmed));
    assert_eq!(report.failure.unwrap().reason(), Reason::OwnDaemonGone);
    let (reason, _) = refusal(wait(engine.attached().boot_id.clone()), |_| None).unwrap();
    assert_eq!(reason, Reason::BadArgument, "no transfer of this boot has that id");
    let (reason, _) = refusal(wait(vec![]), |_| None).unwrap();
    assert_eq!(reason, Reason::BadArgument, "no boot id at all");
}

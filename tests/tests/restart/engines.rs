//! Engines that go and come back, and engines that meet.

use std::{
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::Move,
    daemon::Daemon,
    engine::EngineProcess,
    eventually,
    oracle::{Kind, Pool},
    pattern::Stamp,
    scene::{Nodes, Peer, SOURCE, Scene, TARGET, assert_reason, failed},
    wire::Command,
};
use kvferry_client::{Engine, EngineOptions, Path, Reason};

use crate::{LENGTH, LIMIT, MIB, both_ways, megabytes, reattached};

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

//! Many at once: cancels (A5), slices and peers (L1). Nothing leaks, nothing waits for long, memory stays bounded.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashSet,
    fs,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::Move,
    daemon::Daemon,
    eventually,
    oracle::Kind,
    process::Process,
    scene::{Nodes, Peer, SOURCE, Scene, TARGET, request},
};
use kvferry_client::{Engine, Error, Op, Outcome, Path, Settlement, Transfer};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
const CALLERS: u64 = 8;

/// What a daemon holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Held {
    descriptors: usize,
    threads: u64,
    regions: u64,
    active_transfers: u64,
}

fn held(daemon: &Daemon) -> Held {
    let engines = daemon.node().unwrap().engines().unwrap();
    let sessions = daemon.node().unwrap().sessions().unwrap();
    Held {
        descriptors: daemon.process().descriptors().unwrap(),
        threads: daemon.process().threads().unwrap(),
        regions: engines.iter().map(|engine| engine.regions).sum(),
        active_transfers: sessions.iter().map(|session| session.transfers_active).sum(),
    }
}

/// One caller's share of the cancels, in handfuls: what each took, and how the transfers ended.
fn cancel_many(scene: &Scene, number: u64, share: u64) -> (Vec<Duration>, Vec<Outcome>) {
    const HANDFUL: u64 = 50;
    let engine = &scene.initiator.engine;
    let place = number * 4 * MIB;
    let moves = [Move { from: place, to: place, length: 4 * MIB }];
    let (mut took, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..share / HANDFUL {
        let pending: Vec<_> =
            (0..HANDFUL).map(|_| engine.submit(scene.write_to(scene.session(), &moves)).unwrap()).collect();
        for one in &pending {
            let begun = Instant::now();
            assert_eq!(engine.cancel(one.id()).unwrap(), Settlement::Settled);
            took.push(begun.elapsed());
        }
        for one in pending {
            let id = one.id();
            let report = one.wait().unwrap();
            assert!(matches!(report.outcome, Outcome::Done | Outcome::Cancelled), "{report:?}");
            // The one end it has: it may be forgotten, and never another.
            match engine.wait(id, LIMIT) {
                Ok(again) => assert_eq!(again.outcome, report.outcome, "{report:?}"),
                Err(Error::Refused(_)) => {}
                Err(other) => panic!("{other:?}"),
            }
            ends.push(report.outcome);
        }
    }
    (took, ends)
}

/// A5.
#[test]
fn a5_thousands_of_cancels_leave_nothing_behind() {
    let cancels = if harness::long() { 10_000 } else { 2_000 };
    let mut scene = Scene::new(Path::Tcp, (CALLERS + 1) * 4 * MIB).unwrap();
    let last = [Move { from: CALLERS * 4 * MIB, to: CALLERS * 4 * MIB, length: MIB }];
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &last);
    // As many connections as there will be.
    let round = |scene: &Scene, count: u64| {
        let all: Mutex<(Vec<Duration>, Vec<Outcome>)> = Mutex::default();
        thread::scope(|scope| {
            for number in 0..CALLERS {
                let all = &all;
                scope.spawn(move || {
                    let (took, ends) = cancel_many(scene, number, count / CALLERS);
                    let mut all = all.lock().unwrap();
                    all.0.extend(took);
                    all.1.extend(ends);
                });
            }
        });
        all.into_inner().unwrap()
    };
    round(&scene, CALLERS * 50);
    let daemons = |scene: &Scene| [held(scene.nodes.initiator()), held(scene.nodes.target())];
    let at_rest = |now: &[Held; 2]| now.iter().all(|held| held.active_transfers == 0);
    let mut before = daemons(&scene);
    eventually("nothing is under way", LIMIT, || {
        before = daemons(&scene);
        at_rest(&before)
    });
    let begun = Instant::now();
    let (mut took, ends) = round(&scene, cancels);
    let all = begun.elapsed();
    took.sort_unstable();
    let cancelled = ends.iter().filter(|end| **end == Outcome::Cancelled).count();
    let (median, p99, worst) = (took[took.len() / 2], took[took.len() * 99 / 100], took[took.len() - 1]);
    println!(
        "{} cancels in {all:?}, {cancelled} in time; answered after {median:?}, p99 {p99:?}, worst {worst:?}",
        took.len()
    );
    assert_eq!(ends.len() as u64, cancels, "each ended once");
    assert!(cancelled > ends.len() / 10, "they were over before they could be cancelled");
    assert!(worst < Duration::from_secs(1), "an answer took {worst:?}");
    let no_more = |now: [Held; 2]| {
        let pairs = now.into_iter().zip(before);
        // A connection that just asked may not be closed at the other end yet.
        at_rest(&now)
            && pairs.into_iter().all(|(now, before)| {
                now.descriptors <= before.descriptors + 2
                    && now.threads <= before.threads
                    && now.regions == before.regions
            })
    };
    let mut now = daemons(&scene);
    for _ in 0..100 {
        if no_more(now) {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        now = daemons(&scene);
    }
    assert!(no_more(now), "before: {before:?}, now: {now:?}");
    scene.target.pool.forget(0..CALLERS * 4 * MIB);
    scene.write_and_verify(&session, &last);
}

/// The most memory that a process ever had, bytes.
fn peak(process: Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.0)).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * KIB
}

/// L1: 200,000 slices of one transfer, scattered so that none can be joined.
#[test]
fn l1_200000_slices_take_bounded_memory() {
    const SLICES: u64 = 200_000;
    const SIZE: u64 = 256;
    let mut scene = Scene::new(Path::Tcp, SLICES * SIZE).unwrap();
    let session = scene.session().to_owned();
    let place = |index: u64, stride: u64| index * stride % SLICES * SIZE;
    let moves: Vec<_> = (0..SLICES)
        .map(|index| Move { from: place(index, 2731), to: place(index, 1237), length: SIZE })
        .collect();
    let targets: HashSet<u64> = moves.iter().map(|each| each.to).collect();
    assert_eq!(targets.len() as u64, SLICES, "each has a place of its own");
    scene.write_and_verify(&session, &moves[..1]);
    let daemons = [scene.nodes.initiator().process(), scene.nodes.target().process()];
    let before = daemons.map(peak);
    let begun = Instant::now();
    for _ in 0..3 {
        scene.write_and_verify(&session, &moves);
    }
    let grown: Vec<_> = daemons.iter().zip(before).map(|(daemon, before)| peak(*daemon) - before).collect();
    println!("3 x {SLICES} slices in {:?}; the daemons grew by {grown:?} bytes at most", begun.elapsed());
    // 24 bytes a slice as they come, as much again as they are resolved, and the parts of one window.
    let bound = 64 * MIB;
    assert!(grown.iter().all(|grown| *grown < bound), "{grown:?}");
}

/// Asks until it is DONE.
fn first_good(engine: &Engine, transfer: impl Fn() -> Transfer) {
    let begun = Instant::now();
    loop {
        match engine.transfer(transfer()) {
            Ok(report) if report.outcome == Outcome::Done => return,
            Ok(_) | Err(Error::NoDaemon { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < 3 * LIMIT, "no good transfer after {:?}", begun.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
}

/// L1: all peers of an engine lose their daemons in the same moment, and come back together.
#[test]
fn l1_many_peers_that_restart_together_converge() {
    const DAEMONS: usize = 3;
    let each = if harness::long() { 86 } else { 12 };
    let moves = [Move { from: 0, to: 0, length: 64 * KIB }];
    let own = Daemon::start().unwrap();
    let mut theirs: Vec<_> =
        (0..DAEMONS).map(|_| Daemon::with_config("[limits]\nengines = 128\n").unwrap()).collect();
    let source = Peer::attach(&own, Kind::Shared, 128 * KIB, SOURCE).unwrap();
    let attach = |daemon: &Daemon| Peer::attach(daemon, Kind::Shared, 128 * KIB, TARGET).unwrap();
    let peers: Vec<Peer> = theirs.iter().flat_map(|daemon| (0..each).map(|_| attach(daemon))).collect();
    // Everybody is asked at once, by a dozen threads.
    let all_good = || {
        thread::scope(|scope| {
            for share in peers.chunks(peers.len().div_ceil(12)) {
                let (source, moves) = (&source, &moves);
                scope.spawn(move || {
                    for peer in share {
                        let session = peer.engine.session_id();
                        let write = || request(Op::Write, session, moves, &source.pool, &peer.pool);
                        first_good(&source.engine, write);
                    }
                });
            }
        });
    };
    let begun = Instant::now();
    all_good();
    println!("{} sessions opened in {:?}", peers.len(), begun.elapsed());
    let begun = Instant::now();
    theirs.iter_mut().for_each(|daemon| daemon.kill_and_spawn().unwrap());
    theirs.iter_mut().for_each(|daemon| daemon.listens().unwrap());
    let back = begun.elapsed();
    all_good();
    let took = begun.elapsed();
    println!(
        "{} peers on {DAEMONS} daemons: daemons back after {back:?}, all well after {took:?}",
        peers.len()
    );
    assert!(took < Duration::from_secs(10), "converged after {took:?}");
    let engines: usize = theirs.iter().map(|daemon| daemon.node().unwrap().engines().unwrap().len()).sum();
    assert_eq!(engines, DAEMONS * each);
    for mut peer in peers {
        peer.pool.expect(&source.pool, &moves);
        peer.pool.verify().assert_clean("after they all came back");
    }
}

/// The nodes of a scene are two daemons: what `held` sums up is not one counted twice.
#[test]
fn a5_what_is_held_is_seen() {
    let nodes = Nodes::start(Path::Tcp, "").unwrap();
    let before = held(nodes.initiator());
    let peer = Peer::attach(nodes.initiator(), Kind::Shared, MIB, SOURCE).unwrap();
    let now = held(nodes.initiator());
    assert!(now.regions > before.regions && now.descriptors > before.descriptors, "{before:?}, {now:?}");
    drop(peer);
}

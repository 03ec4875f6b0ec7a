//! Private memory that engines copy for their daemons: how it is chosen, and engines that stand still, die and come back.
//!
//! That the bytes are right is the conformance suite's matter, and that none is late the late-write probes'. Engines that
//! can be reached in no other way are in `strangers.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{Arrangement, Move},
    daemon::Daemon,
    engine::EngineProcess,
    eventually,
    oracle::Kind,
    pattern::Stamp,
    process::Signal,
    scene::{Nodes, Peer, SOURCE, TARGET, assert_reason, done, failed},
    wire::{Answer, Command},
};
use kvferry_client::{
    Error, Lengths, Memory, Op, Outcome, Path, Policy, ProcessAccess, Reason, Report, SessionState, Slices,
    Transfer,
};

const ASSISTED: &str = "[process]\nmode = \"assisted\"\nanswer_ms = 300\n";
const MIB: u64 = 1 << 20;
const POOL: u64 = 16 * MIB;
const LIMIT: Duration = Duration::from_secs(15);

fn access(daemon: &Daemon, session: &str) -> ProcessAccess {
    let engines = daemon.node().unwrap().engines().unwrap();
    engines.iter().find(|engine| engine.session_id == session).unwrap().process_access()
}

#[test]
fn the_way_is_settled_at_attach_and_shown() {
    for (mode, expected) in [
        ("auto", ProcessAccess::Direct),
        ("direct", ProcessAccess::Direct),
        ("assisted", ProcessAccess::Assisted),
    ] {
        let daemon = Daemon::with_config(&format!("[process]\nmode = \"{mode}\"\n")).unwrap();
        let engine = daemon.attach("one").unwrap();
        assert_eq!(
            (engine.process_access(), access(&daemon, engine.session_id())),
            (expected, expected),
            "{mode}"
        );
    }
}

/// One bad region takes the others with it, and the next call is as good as the first.
#[test]
fn an_address_that_is_not_there_is_refused_by_index() {
    let daemon = Daemon::with_config(ASSISTED).unwrap();
    let engine = daemon.attach("one").unwrap();
    let (good, other) = (vec![1u8; 8192], vec![2u8; 4096]);
    let memory =
        |bytes: &[u8]| Memory::Process { address: bytes.as_ptr().addr() as u64, length: bytes.len() as u64 };
    let absent = Memory::Process { address: 1 << 20, length: 4096 };
    // It begins where there is memory and ends where there is none.
    let long = Memory::Process { address: other.as_ptr().addr() as u64, length: 1 << 38 };
    for (bad, index) in [(vec![memory(&good), absent], 1), (vec![long], 0)] {
        match engine.register(&bad) {
            Err(Error::Refused(failure)) => {
                let told = (failure.reason, failure.index);
                assert_eq!(told, (Reason::UnsupportedMemory, Some(index)), "{failure:?}");
            }
            other => panic!("{other:?}"),
        }
    }
    let regions = engine.register(&[memory(&good), memory(&other)]).unwrap();
    assert_eq!(regions.len(), 2);
    assert_eq!(daemon.node().unwrap().engines().unwrap()[0].regions, 2);
}

/// As many as a rank of sglang has small buffers, from eight ranks.
#[test]
fn g3_many_regions_of_many_processes_are_registered_at_once() {
    const RANKS: usize = 8;
    const EACH: usize = 170;
    let daemon = Daemon::with_config("[process]\nmode = \"assisted\"\n").unwrap();
    let engines: Vec<_> = (0..RANKS)
        .map(|rank| EngineProcess::attach(daemon.socket(), &format!("rank-{rank}")).unwrap())
        .collect();
    let register = |mut engine: EngineProcess| {
        let command = Command::RegisterAtOnce { kind: Kind::Process, buffers: EACH, length: 4096 };
        match engine.ask(&command).unwrap() {
            Answer::Registered { regions } => assert_eq!(regions, EACH),
            other => panic!("{other:?}"),
        }
        engine
    };
    let threads: Vec<_> = engines.into_iter().map(|engine| thread::spawn(move || register(engine))).collect();
    let engines: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let listed = daemon.node().unwrap().engines().unwrap();
    assert_eq!(listed.iter().map(|engine| engine.regions).sum::<u64>(), (RANKS * EACH) as u64);
    drop(engines);
    eventually("I10: all is released", Duration::from_secs(5), || {
        daemon.node().unwrap().engines().unwrap().is_empty()
    });
}

/// An engine process that will stand still, and those who deal with it or with its neighbour.
struct Stage {
    sick: EngineProcess,
    others: Others,
}

/// A source, and a third engine beside the sick one.
struct Others {
    source: Peer,
    well: Peer,
    nodes: Nodes,
    /// The sick one's session id and pool.
    sick: (String, u64),
}

impl Others {
    fn send(&self, session: &str, address: u64, moves: &[Move]) -> Result<Report, Error> {
        let local = moves.iter().map(|each| self.source.pool.address() + each.from).collect();
        let remote = moves.iter().map(|each| address + each.to).collect();
        let lengths = Lengths::Each(moves.iter().map(|each| each.length).collect());
        self.source.engine.transfer(Transfer {
            session: session.to_owned(),
            op: Op::Write,
            slices: Slices { local, remote, lengths },
            tag: None,
            deadline: Some(Duration::from_secs(60)),
            policy: Policy::default(),
            id: None,
        })
    }

    fn to_sick(&self, moves: &[Move]) -> Result<Report, Error> {
        self.send(&self.sick.0, self.sick.1, moves)
    }

    /// What a transfer to the engine beside the sick one takes.
    fn to_well(&self) -> Duration {
        let begun = Instant::now();
        let moves = Arrangement::Reversed.moves(64, 4096);
        let report = done(self.send(self.well.engine.session_id(), self.well.pool.address(), &moves), &moves);
        assert_eq!(report.attempts, 1);
        begun.elapsed()
    }

    /// Nobody was held responsible for an engine that stands still.
    fn assert_not_counted(&self) {
        for session in self.nodes.initiator().node().unwrap().sessions().unwrap() {
            assert_eq!(session.consecutive_failures, 0, "{session:?}");
            assert_ne!(session.state(), SessionState::Failed, "{session:?}");
        }
    }
}

impl Stage {
    fn new(path: Path) -> Self {
        let nodes = Nodes::start(path, ASSISTED).unwrap();
        let source = Peer::attach(nodes.initiator(), Kind::Process, POOL, SOURCE).unwrap();
        let mut sick = EngineProcess::attach(nodes.target().socket(), "sick").unwrap();
        let address = sick.pool(Kind::Process, POOL, TARGET).unwrap();
        let well = Peer::attach(nodes.target(), Kind::Process, POOL, Stamp::of(4)).unwrap();
        let others = Others { source, well, nodes, sick: (sick.session().to_owned(), address) };
        let moves = Arrangement::Adjacent.moves(4, 4096);
        done(others.to_sick(&moves), &moves);
        others.to_well();
        Self { sick, others }
    }

    fn signal(&self, signal: Signal) {
        self.sick.process().signal(signal).unwrap();
    }

    /// Returns when it stands still: a signal is only sent, and takes effect when the process next runs.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.sick.process().0);
        eventually("it stands still", LIMIT, || fs::read_to_string(&stat).unwrap().contains(") T "));
    }

    /// The sick one goes on; it may be refused once more before it has shown life.
    fn recovers(&mut self, moves: &[Move]) {
        eventually("it goes on", LIMIT, || self.others.to_sick(moves).unwrap().outcome == Outcome::Done);
        self.sick.expect(SOURCE, moves.to_vec()).unwrap();
        self.sick.verify().unwrap().assert_clean("after it went on");
    }
}

/// Asked, it says nothing: its peers hear so soon, and whatever was refused does not arrive when it goes on.
fn a_silent_engine_costs_its_own_transfers_and_nothing_else(path: Path) {
    let mut stage = Stage::new(path);
    let known = Arrangement::Adjacent.moves(4, 4096);
    stage.sick.expect(SOURCE, known).unwrap();
    stage.stop();
    let place = |each: &Move| Move { to: each.to + 4 * MIB, ..*each };
    let moves: Vec<Move> = Arrangement::Adjacent.moves(64, 16_384).iter().map(place).collect();
    let begun = Instant::now();
    let (report, failure) = failed(stage.others.to_sick(&moves));
    assert_reason(&failure, &[Reason::EngineSilent]);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(report.attempts, 1, "not retried: {report:?}");
    assert!(report.peer_confirmed, "taken back: nobody touches it. {report:?}");
    // Known to be silent by now: not even waited for.
    let begun = Instant::now();
    assert_reason(&failed(stage.others.to_sick(&moves)).1, &[Reason::EngineSilent]);
    assert!(begun.elapsed() < Duration::from_millis(250), "{:?}", begun.elapsed());
    let slowest = (0..20).map(|_| stage.others.to_well()).max().unwrap();
    assert!(slowest < Duration::from_secs(1), "the neighbour waited {slowest:?}");
    stage.others.assert_not_counted();
    stage.signal(Signal::CONT);
    thread::sleep(Duration::from_millis(100));
    stage.sick.verify().unwrap().assert_clean("nothing of what was refused has arrived");
    stage.recovers(&moves);
}

#[test]
fn c2_a_silent_engine_costs_its_own_transfers_and_nothing_else_over_tcp() {
    a_silent_engine_costs_its_own_transfers_and_nothing_else(Path::Tcp);
}

#[test]
fn c2_a_silent_engine_costs_its_own_transfers_and_nothing_else_within_a_node() {
    a_silent_engine_costs_its_own_transfers_and_nothing_else(Path::Local);
}

/// Stopped wherever it just is, a copy perhaps begun: then that one is waited for, because nobody can know. Others do
/// not notice, and when it goes on all is well.
fn an_engine_stopped_in_the_middle_holds_up_nobody_else(path: Path) {
    let mut stage = Stage::new(path);
    let moves = Arrangement::Reversed.moves(200, 20_000);
    let over = AtomicBool::new(false);
    let (mut silent, mut whole, mut slowest) = (0, 0, Duration::ZERO);
    let others = &stage.others;
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let (mut silent, mut whole) = (0, 0);
            while !over.load(SeqCst) {
                let report = others.to_sick(&moves).unwrap();
                match report.outcome {
                    Outcome::Done => whole += 1,
                    Outcome::Failed => {
                        assert_reason(&report.failure.unwrap(), &[Reason::EngineSilent]);
                        silent += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
            (silent, whole)
        });
        for round in 0..6 {
            thread::sleep(Duration::from_millis(37 * (round % 3) + 5));
            stage.stop();
            let stopped = Instant::now();
            while stopped.elapsed() < Duration::from_millis(600) {
                slowest = slowest.max(stage.others.to_well());
            }
            stage.signal(Signal::CONT);
        }
        over.store(true, SeqCst);
        (silent, whole) = traffic.join().unwrap();
    });
    println!("{silent} refused, {whole} whole; the neighbour's slowest transfer took {slowest:?}");
    assert!(
        whole > 0 && slowest < Duration::from_millis(550),
        "{whole} whole, the neighbour waited {slowest:?}"
    );
    stage.others.assert_not_counted();
    stage.recovers(&moves);
}

#[test]
fn c2_an_engine_stopped_in_the_middle_holds_up_nobody_else_over_tcp() {
    an_engine_stopped_in_the_middle_holds_up_nobody_else(Path::Tcp);
}

#[test]
fn c2_an_engine_stopped_in_the_middle_holds_up_nobody_else_within_a_node() {
    an_engine_stopped_in_the_middle_holds_up_nobody_else(Path::Local);
}

/// I10, with copies under way, and a child that has inherited ring and descriptors and serves nobody.
#[test]
fn c1_an_engine_that_dies_in_the_middle_is_released() {
    let mut stage = Stage::new(Path::Tcp);
    let child = stage.sick.fork().unwrap();
    let moves = Arrangement::Reversed.moves(200, 20_000);
    done(stage.others.to_sick(&moves), &moves);
    let session = stage.sick.session().to_owned();
    let others = &stage.others;
    thread::scope(|scope| {
        let traffic = scope.spawn(|| while others.to_sick(&moves).unwrap().outcome == Outcome::Done {});
        thread::sleep(Duration::from_millis(50));
        stage.signal(Signal::KILL);
        eventually("it is released", Duration::from_secs(1), || {
            !stage.others.nodes.target().lists(&session).unwrap()
        });
        traffic.join().unwrap();
    });
    child.signal(Signal::KILL).unwrap();
    stage.others.to_well();
}

/// Threads of a daemon that serve engines which copy for it.
fn own_threads(daemon: &Daemon) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.process().0)).unwrap();
    // One that ends meanwhile has no name any more.
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|name| name.trim_end().ends_with("-own")).count()
}

/// Lanes of an engine that copies have threads of their own, on both paths, for as long as there are such lanes.
#[test]
fn threads_of_their_own_end_with_the_last_lane() {
    for path in [Path::Tcp, Path::Local] {
        let nodes = Nodes::start(path, ASSISTED).unwrap();
        let source = Peer::attach(nodes.initiator(), Kind::Process, POOL, SOURCE).unwrap();
        let target = Peer::attach(nodes.target(), Kind::Process, POOL, TARGET).unwrap();
        let moves = Arrangement::Adjacent.moves(4, 4096);
        for op in [Op::Write, Op::Read] {
            let session = target.engine.session_id();
            let transfer = harness::scene::request(op, session, &moves, &source.pool, &target.pool);
            done(source.engine.transfer(transfer), &moves);
        }
        assert_eq!(own_threads(nodes.target()), 1, "{path:?}: both lanes touch the same engines");
        drop((source, target));
        eventually("the threads have ended", LIMIT, || own_threads(nodes.target()) == 0);
    }
}

/// A daemon that is killed with requests posted: its successor finds an engine that does not carry them out any more.
#[test]
fn c4_engines_come_back_to_the_next_daemon() {
    let daemon = Daemon::with_config(ASSISTED).unwrap();
    let target_daemon = Daemon::with_config(ASSISTED).unwrap();
    let source = Peer::attach(&daemon, Kind::Process, POOL, SOURCE).unwrap();
    let mut target = Peer::attach(&target_daemon, Kind::Process, POOL, TARGET).unwrap();
    let moves = Arrangement::Reversed.moves(200, 20_000);
    let session = target.engine.session_id().to_owned();
    let send = || {
        source.engine.transfer(harness::scene::request(
            Op::Write,
            &session,
            &moves,
            &source.pool,
            &target.pool,
        ))
    };
    done(send(), &moves);
    let mut target_daemon = target_daemon;
    for _ in 0..3 {
        thread::scope(|scope| {
            let traffic = scope.spawn(|| while send().is_ok_and(|report| report.outcome == Outcome::Done) {});
            thread::sleep(Duration::from_millis(60));
            target_daemon.kill_and_restart().unwrap();
            traffic.join().unwrap();
        });
        eventually("the engine is back", LIMIT, || {
            send().is_ok_and(|report| report.outcome == Outcome::Done)
        });
    }
    target.pool.expect(&source.pool, &moves);
    target.pool.verify().assert_clean("after three daemons");
    source.pool.verify().assert_clean("the source");
}

//! Beginnings and ends: engines that die in every way, daemons that are asked to leave, and what it costs to do
//! nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{ErrorKind, Write},
    net::TcpStream,
    process::{self, Child},
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::{Arrangement, Move},
    daemon::Daemon,
    engine::EngineProcess,
    eventually,
    metrics::counted,
    oracle::{Kind, Pool},
    pattern::Stamp,
    process::{Process, Signal},
    proxy::Proxy,
    scene::{Nodes, Peer, SOURCE, Scene, TARGET, assert_reason, done, failed, request},
    wire::Command,
};
use kvferry_client::{Event, Op, Path, Pending, Policy, Reason, Transfer};

const LENGTH: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// I10: fenced and peers told within this.
const TOLD: Duration = Duration::from_secs(1);

/// An engine of this process that writes, through a proxy, to an engine process.
struct Victim {
    initiator: Peer,
    process: EngineProcess,
    remote: u64,
    proxy: Proxy,
    nodes: Nodes,
}

impl Victim {
    fn new() -> Self {
        Self::of(Kind::Shared)
    }

    fn of(kind: Kind) -> Self {
        let nodes = Nodes::start(Path::Tcp, "").unwrap();
        let initiator = Peer::attach(nodes.initiator(), Kind::Shared, LENGTH, SOURCE).unwrap();
        let mut process = EngineProcess::attach(nodes.target().socket(), "victim").unwrap();
        let remote = process.pool(kind, LENGTH, TARGET).unwrap();
        let proxy = Proxy::start(process.session()).unwrap();
        Self { initiator, process, remote, proxy, nodes }
    }

    fn write(&self, session: String, moves: &[Move]) -> Transfer {
        let slices = harness::batch::slices(Op::Write, moves, self.initiator.pool.address(), self.remote);
        let policy = Policy::default();
        Transfer { session, op: Op::Write, slices, tag: None, deadline: None, policy, id: None }
    }

    /// Begins a transfer that would take long and returns when its payload flows.
    fn begin_writing(&self) -> Pending {
        self.proxy.throttle(Some(4 << 20));
        let moves = Arrangement::Adjacent.moves(32, 1 << 20);
        let pending = self.initiator.engine.submit(self.write(self.proxy.address(), &moves)).unwrap();
        eventually("payload flows", LIMIT, || self.proxy.data_bytes() > 1 << 20);
        pending
    }

    /// Endpoint closed, engine forgotten and its memory given back, all within a second from now.
    fn is_gone_within_a_second(&self) {
        let session = self.process.session();
        let closed = eventually("the endpoint refuses", TOLD, || refuses(session));
        eventually("the daemon lists it no more", TOLD.saturating_sub(closed), || {
            !self.nodes.target().lists(session).unwrap()
        });
        eventually("its memory is given back", TOLD.saturating_sub(closed), || {
            counted(self.nodes.target(), "kvferry_registered_bytes") == 0
        });
    }
}

fn refuses(address: &str) -> bool {
    TcpStream::connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// What a peer may be told of an engine that went.
const GONE: [Reason; 4] =
    [Reason::EngineGone, Reason::ConnectionLost, Reason::ConnectRefused, Reason::PeerRestarted];

#[test]
fn c1_a_killed_target_is_gone_within_a_second_and_its_peers_are_told() {
    let mut victim = Victim::new();
    let pending = victim.begin_writing();
    let events = victim.initiator.engine.events();
    let killed = Instant::now();
    victim.process.kill().unwrap();
    victim.is_gone_within_a_second();
    // What the peer was told, while its transfer still hopes that the engine comes back.
    let told = loop {
        let left = TOLD.saturating_sub(killed.elapsed());
        let event = events.recv_timeout(left).expect("its peer is told within a second");
        if let Event::SessionChanged { cause: Some(cause), .. } = event {
            break cause;
        }
    };
    assert!([Reason::EngineGone, Reason::ConnectionLost].contains(&told.reason), "{told:?}");
    let (report, failure) = failed(pending.wait());
    assert_reason(&failure, &GONE);
    assert!(report.bytes_done < report.bytes, "{report:?}");
    both_daemons_serve_on(&victim.nodes);
}

#[test]
fn c3b_a_forked_child_that_holds_its_sockets_delays_nothing() {
    let mut victim = Victim::new();
    let child = victim.process.fork().unwrap();
    let pending = victim.begin_writing();
    victim.process.kill().unwrap();
    victim.is_gone_within_a_second();
    let (_, failure) = failed(pending.wait());
    assert_reason(&failure, &GONE);
    // Or the test would have shown nothing.
    assert!(child.threads().is_ok(), "the child did not outlive its parent");
    both_daemons_serve_on(&victim.nodes);
}

/// Whoever gets the dead engine's process id is a stranger: nothing that was meant for the engine reaches it, and its
/// life does not prolong the engine's. The memory is reached through `/proc/<pid>/mem`, where it would show.
#[test]
fn c3b_a_reused_pid_is_a_stranger() {
    let mut victim = Victim::of(Kind::Process);
    let pid = victim.process.process().0;
    let pending = victim.begin_writing();
    victim.process.kill().unwrap();
    let Some(mut stranger) = process_with_pid(pid) else {
        println!("skipped: this user may not choose process ids (/proc/sys/kernel/ns_last_pid)");
        return;
    };
    victim.is_gone_within_a_second();
    victim.proxy.throttle(None);
    let (_, failure) = failed(pending.wait());
    assert_reason(&failure, &GONE);
    victim.proxy.drain(LIMIT);
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger was harmed");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    both_daemons_serve_on(&victim.nodes);
}

/// A process that does nothing, with this id, which is free; nothing where the kernel does not let us choose.
fn process_with_pid(pid: u32) -> Option<Child> {
    for _ in 0..500 {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        let mut child = process::Command::new("sleep").arg("60").spawn().unwrap();
        if child.id() == pid {
            return Some(child);
        }
        // Somebody else was quicker; the id may be his, for a while.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    panic!("process id {pid} was never free");
}

#[test]
fn c3b_an_engine_that_execs_is_gone() {
    let mut victim = Victim::new();
    victim.process.send(&Command::Exec).unwrap();
    victim.is_gone_within_a_second();
    assert!(victim.process.process().threads().is_ok(), "the process itself lives on");
    both_daemons_serve_on(&victim.nodes);
}

/// The one who writes dies. Nobody tells the target engine, but its daemon has fenced the session before it lists
/// it no more; what is still on its way must not arrive.
#[test]
fn c1_nothing_of_a_killed_source_lands_after_its_session_is_gone() {
    let nodes = Nodes::start(Path::Tcp, "").unwrap();
    let mut target = Peer::attach(nodes.target(), Kind::Shared, LENGTH, TARGET).unwrap();
    let proxy = Proxy::start(target.engine.session_id()).unwrap();
    proxy.throttle(Some(4 << 20));
    let mut process = EngineProcess::attach(nodes.initiator().socket(), "source").unwrap();
    process.pool(Kind::Shared, LENGTH, SOURCE).unwrap();
    let moves = Arrangement::Adjacent.moves(32, 1 << 20);
    let (session, remote) = (proxy.address(), target.pool.address());
    process.send(&Command::Transfer { session, write: true, remote, moves }).unwrap();
    eventually("payload flows", LIMIT, || proxy.data_bytes() > 1 << 20);

    process.kill().unwrap();
    eventually("the target's daemon has dropped the session", TOLD, || {
        nodes.target().node().unwrap().sessions().unwrap().iter().all(|session| !session.inbound)
    });
    target.pool.hand_over(0..LENGTH, Stamp::of(4));
    proxy.throttle(None);
    proxy.drain(LIMIT);
    both_daemons_serve_on(&nodes);
    target.pool.verify().assert_clean("memory handed over after the initiator's death");
}

/// A stopped engine is alive: its memory is the daemon's to write.
#[test]
fn c2_a_stopped_engine_keeps_its_memory_and_receives() {
    let mut victim = Victim::new();
    let moves = Arrangement::Reversed.moves(64, 65_536);
    victim.process.expect(SOURCE, moves.clone()).unwrap();
    victim.process.process().signal(Signal::STOP).unwrap();
    let session = victim.process.session().to_owned();
    done(victim.initiator.engine.transfer(victim.write(session, &moves)), &moves);
    victim.process.process().signal(Signal::CONT).unwrap();
    let verdict = victim.process.verify().unwrap();
    verdict.assert_clean("written while stopped");
    assert_eq!(verdict.moved, 64 * 65_536);
}

#[test]
fn j1_a_daemon_asked_to_leave_exits_0() {
    let mut daemon = Daemon::start().unwrap();
    let engine = daemon.attach("there at the end").unwrap();
    let pool = Pool::new(Kind::Shared, 1 << 20, SOURCE).unwrap();
    engine.register(&[pool.memory()]).unwrap();
    daemon.process().signal(Signal::TERM).unwrap();
    let status = daemon.wait_exit(LIMIT).unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn j1_a_daemon_asked_to_leave_lets_what_is_in_flight_finish() {
    for leaving in [Leaving::Initiator, Leaving::Target] {
        let mut scene = Scene::new(Path::Tcp, LENGTH).unwrap();
        let proxy = Proxy::start(scene.session()).unwrap();
        proxy.throttle(Some(8 << 20));
        let moves = Arrangement::Adjacent.moves(12, 1 << 20);
        let pending = scene.initiator.engine.submit(scene.write_to(&proxy.address(), &moves)).unwrap();
        eventually("payload flows", LIMIT, || proxy.data_bytes() > 1 << 20);
        let daemon = match leaving {
            Leaving::Initiator => scene.nodes.initiator(),
            Leaving::Target => scene.nodes.target(),
        };
        daemon.process().signal(Signal::TERM).unwrap();
        done(pending.wait(), &moves);
        scene.target.pool.expect(&scene.initiator.pool, &moves);
        scene.verify("after a drain");
        let status = match leaving {
            Leaving::Initiator => scene.nodes.initiator_mut().wait_exit(LIMIT),
            Leaving::Target => scene.nodes.target_mut().wait_exit(LIMIT),
        };
        assert_eq!(status.unwrap().code(), Some(0));
    }
}

/// What a killed daemon leaves behind (its socket files, its state) does not stop the next one.
#[test]
fn a_killed_daemon_is_followed_by_another_on_the_same_socket() {
    let daemon = Daemon::start().unwrap();
    let before = daemon.node().unwrap().info().unwrap();
    let daemon = daemon.restart_after_kill().unwrap();
    let after = daemon.node().unwrap().info().unwrap();
    assert_eq!(before.node_id, after.node_id, "the node is the same");
    assert_ne!(before.boot_id, after.boot_id, "the daemon is not");
    daemon.attach("after the restart").unwrap();
}

#[derive(Clone, Copy)]
enum Leaving {
    Initiator,
    Target,
}

/// Nobody spins, nobody polls: four idle sessions, and a hundred connections that said three bytes and fell
/// silent.
#[test]
fn idleness_is_nearly_free() {
    // The release build is measured; the quick case, with its neighbours' tests beside it, only shows that nobody
    // spins.
    let (window, limit) = match harness::long() {
        true => (Duration::from_secs(60), Duration::from_millis(300)),
        false => (Duration::from_secs(5), Duration::from_millis(2000)),
    };
    let nodes = Nodes::start(Path::Tcp, "").unwrap();
    let pairs: Vec<_> = (0..4).map(|_| pair(&nodes)).collect();
    let strangers: Vec<_> = (0..100)
        .map(|index| {
            let session = pairs[index % pairs.len()].1.engine.session_id();
            let mut stream = TcpStream::connect(session).unwrap();
            stream.write_all(b"KVF").unwrap();
            stream
        })
        .collect();
    let daemons = [nodes.initiator().process(), nodes.target().process()];
    let used = |process: Process| process.cpu().unwrap();
    let before = daemons.map(used);
    // Not a wait for something to happen: the window in which nothing may.
    thread::sleep(window);
    for (daemon, before) in daemons.into_iter().zip(before) {
        let a_minute = (used(daemon) - before).mul_f64(60.0 / window.as_secs_f64());
        println!("{a_minute:?} of processor time in 60 s");
        assert!(a_minute < limit, "{a_minute:?} of processor time in 60 s");
    }
    drop(strangers);
}

/// Two peers with an open session between them.
fn pair(nodes: &Nodes) -> (Peer, Peer) {
    let source = Peer::attach(nodes.initiator(), Kind::Shared, 1 << 20, SOURCE).unwrap();
    let target = Peer::attach(nodes.target(), Kind::Shared, 1 << 20, TARGET).unwrap();
    let moves = [Move { from: 0, to: 0, length: 4096 }];
    let session = target.engine.session_id();
    let transfer = request(Op::Write, session, &moves, &source.pool, &target.pool);
    done(source.engine.transfer(transfer), &moves);
    (source, target)
}

/// New engines on both daemons move bytes as if nothing had happened.
fn both_daemons_serve_on(nodes: &Nodes) {
    let (_source, mut target) = pair(nodes);
    target.pool.expect_stamp(SOURCE, &[Move { from: 0, to: 0, length: 4096 }]);
    target.pool.verify().assert_clean("a new pair after the end of another");
}

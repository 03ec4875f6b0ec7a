//! A machine that has no more to give: descriptors (H1), threads (H1), memory that may be pinned (G2). Whoever comes
//! too late is refused with the cause; whoever is there does not notice; and it passes.
//!
//! Needs root (a cgroup of its own) and util-linux; without them these tests fail and say so.
//!
//! A memory cgroup is not tested: the daemon asks for no memory that it could be refused (engines touch their pages
//! first, so theirs are charged), and what a group that is full does to a process is kill it, which is C4.
//!
//! G2 is only half here. Nothing of shared or process memory is pinned, so RLIMIT_MEMLOCK cannot refuse it: that is
//! what is tested. Pages are pinned by `ibv_reg_mr`, and MEMLOCK, with needed and available bytes, is told by the
//! driver call that makes it; the row's other half comes with rdma.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::Arrangement,
    daemon::{Daemon, Launch},
    eventually,
    faulty::megabytes,
    oracle::Kind,
    pattern::Stamp,
    process::Process,
    scene::{Peer, SOURCE, TARGET, assert_reason, done, request},
};
use kvferry_client::{Error, Op, Reason};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);

/// Two peers on two daemons, of which the target's is the one in need.
struct Pair {
    source: Peer,
    sink: Peer,
    needy: Daemon,
    _other: Daemon,
}

impl Pair {
    fn new(needy: Daemon) -> Self {
        let other = Daemon::start().unwrap();
        let source = Peer::attach(&other, Kind::Shared, 16 * MIB, SOURCE).unwrap();
        let sink = Peer::attach(&needy, Kind::Shared, 16 * MIB, TARGET).unwrap();
        let mut pair = Self { source, sink, needy, _other: other };
        pair.works("before");
        pair
    }

    /// A transfer without a second attempt, and every byte of it.
    fn works(&mut self, what: &str) {
        let moves = megabytes(4);
        let session = self.sink.engine.session_id();
        let transfer = request(Op::Write, session, &moves, &self.source.pool, &self.sink.pool);
        let report = done(self.source.engine.transfer(transfer), &moves);
        assert_eq!(report.attempts, 1, "{what}: {report:?}");
        self.sink.pool.expect(&self.source.pool, &moves);
        self.sink.pool.verify().assert_clean(what);
    }
}

/// Nobody waits for a condition by trying for ever.
fn does_not_spin(daemon: Process) {
    let before = daemon.cpu().unwrap();
    thread::sleep(Duration::from_secs(1));
    let used = daemon.cpu().unwrap() - before;
    assert!(used < Duration::from_millis(300), "{used:?} of processor time in a second of want");
}

/// What a count stays at: whoever was turned away is gone by then.
fn steady(count: impl Fn() -> usize) -> usize {
    const LONG_ENOUGH: Duration = Duration::from_millis(300);
    let (mut last, mut since) = (count(), Instant::now());
    eventually("the count is steady", LIMIT, || {
        let now = count();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > LONG_ENOUGH
    });
    last
}

/// H1.
#[test]
fn h1_a_daemon_without_descriptors_refuses_newcomers_and_keeps_who_is_there() {
    let needy = Launch::new().unwrap().under(&["prlimit", "--nofile=128:128", "--"]).start().unwrap();
    let mut pair = Pair::new(needy);
    let mut guests = Vec::new();
    let refused = loop {
        assert!(guests.len() < 128, "no limit of 128 descriptors refuses anybody");
        match pair.needy.attach("guest") {
            Ok(engine) => guests.push(engine),
            Err(error) => break error,
        }
    };
    let Error::Refused(failure) = refused else { panic!("not a typed refusal: {refused:?}") };
    println!("{} guests, then: {failure}", guests.len());
    assert_reason(&failure, &[Reason::Limit]);
    assert!(failure.retryable && failure.message.contains("RLIMIT_NOFILE"), "{failure:?}");
    assert!(guests.len() > 2, "it was nearly empty");
    pair.works("with no room for a newcomer");

    // Connections that say nothing take more, and an early guest leaves a hole below them.
    let used = || pair.needy.process().descriptors().unwrap();
    let before = steady(used);
    let crowd: Vec<_> = (0..20).map_while(|_| UnixStream::connect(pair.needy.socket()).ok()).collect();
    eventually("the crowd is let in", LIMIT, || used() >= before + crowd.len());
    let crowded = used();
    drop(guests.remove(0));
    // Room for the newcomer's connection, and below for one more.
    eventually("a guest has left", LIMIT, || used() + 1 < crowded);
    match pair.needy.attach("into the hole") {
        Err(Error::Refused(failure)) => assert_reason(&failure, &[Reason::Limit]),
        other => panic!("{} of 128 descriptors are in use: {other:?}", used()),
    }
    pair.works("with a hole below");
    drop(crowd);

    // Who does not even ask takes what is left: connections that say nothing.
    let strangers: Vec<_> = (0..128).map_while(|_| UnixStream::connect(pair.needy.socket()).ok()).collect();
    eventually("no descriptor is free", LIMIT, || pair.needy.process().descriptors().unwrap() >= 127);
    pair.works("with no descriptor at all");
    does_not_spin(pair.needy.process());
    drop(strangers);
    guests.clear();
    eventually("a newcomer is welcome again", LIMIT, || pair.needy.attach("newcomer").is_ok());
    pair.works("afterwards");
}

/// A cgroup of the pids controller, gone when dropped.
struct Crowded(PathBuf);

impl Crowded {
    /// Nobody is in it.
    fn new(name: u32) -> Self {
        let roots = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
        let made = roots.iter().find_map(|root| {
            let group = PathBuf::from(root).join(format!("kvferry-{name}"));
            fs::create_dir(&group).ok()?;
            let group = Self(group);
            group.0.join("pids.max").exists().then_some(group)
        });
        made.expect("this test needs root and the pids controller of cgroups")
    }

    /// Nobody in it may make another thread from now on.
    fn around(process: Process) -> Self {
        let group = Self::new(process.0);
        group.write("cgroup.procs", &process.0.to_string());
        group.limit(&process.threads().unwrap().to_string());
        group
    }

    fn limit(&self, threads: &str) {
        self.write("pids.max", threads);
    }

    fn refused(&self) -> u64 {
        let events = fs::read_to_string(self.0.join("pids.events")).unwrap();
        let max = events.lines().find_map(|line| line.strip_prefix("max "));
        max.unwrap().parse().unwrap()
    }

    fn write(&self, file: &str, text: &str) {
        let mut file = fs::OpenOptions::new().write(true).open(self.0.join(file)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
}

impl Drop for Crowded {
    fn drop(&mut self) {
        // Whoever is left goes back to where it came from.
        let parent = self.0.parent().unwrap().join("cgroup.procs");
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(&parent, pid);
        }
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{} is left: {error}", self.0.display());
        }
    }
}

/// H1. All threads that a daemon needs are there from its start: none more is no reason to refuse anything.
#[test]
fn h1_a_daemon_that_may_have_no_more_threads_serves_all_the_same() {
    let initiator = Daemon::start().unwrap();
    let target = Daemon::start().unwrap();
    let crowded = [Crowded::around(initiator.process()), Crowded::around(target.process())];
    let source = Peer::attach(&initiator, Kind::Shared, 16 * MIB, SOURCE).unwrap();
    let mut sink = Peer::attach(&target, Kind::Shared, 16 * MIB, TARGET).unwrap();
    // Large enough to be planned beside the control runtime, several at once.
    let moves = Arrangement::Reversed.moves(20_000, 512);
    let session = sink.engine.session_id().to_owned();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let transfer = request(Op::Write, &session, &moves, &source.pool, &sink.pool);
                done(source.engine.transfer(transfer), &moves);
            });
        }
    });
    sink.pool.expect(&source.pool, &moves);
    sink.pool.verify().assert_clean("without another thread");
    println!("{} threads refused", crowded[0].refused() + crowded[1].refused());
    crowded.iter().for_each(|group| group.limit("max"));
    let late = Peer::attach(&target, Kind::Shared, MIB, Stamp::of(4)).unwrap();
    drop(late);
}

/// H1.
#[test]
fn h1_a_daemon_that_may_have_no_thread_says_so_and_does_not_start() {
    let crowded = Crowded::new(std::process::id());
    crowded.limit("1");
    let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", crowded.0.display());
    let refusal = Launch::new().unwrap().under(&["sh", "-c", &join, "sh"]).refused().unwrap();
    assert_eq!(refusal.code, Some(70), "{refusal:?}");
    assert!(refusal.said.contains("the control runtime: "), "{refusal:?}");
    assert!(crowded.refused() > 0, "it was given a thread");
}

/// G2, as far as it goes without rdma.
#[test]
fn g2_a_daemon_that_may_pin_nothing_pins_nothing() {
    let without =
        ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=0:0", "--"];
    let mut pair = Pair::new(Launch::new().unwrap().under(&without).start().unwrap());
    let status = fs::read_to_string(format!("/proc/{}/status", pair.needy.process().0)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in\n{status}")).trim().to_owned()
    };
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let capabilities = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
    assert_eq!(capabilities & CAP_IPC_LOCK, 0, "this test needs the right to drop CAP_IPC_LOCK");
    assert_eq!((field("VmLck:").as_str(), field("VmPin:").as_str()), ("0 kB", "0 kB"));
    let begun = Instant::now();
    let process = Peer::attach(&pair.needy, Kind::Process, MIB, Stamp::of(6)).unwrap();
    println!("private memory registered in {:?}", begun.elapsed());
    drop(process);
    pair.works("with nothing pinned");
}

//! H2: clocks that jump, or that two daemons read differently. Time namespaces shift the two clocks that count since
//! boot; the wall clock is jumped where a daemon reads it, in what its predecessor recorded. Nothing expires early,
//! and nothing lives for ever.
//!
//! Needs the right to make a time namespace (root, `unshare` of util-linux 2.36); without it these tests fail and say so.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path as File,
    thread,
    time::{Duration, Instant},
};

use harness::{
    batch::Arrangement,
    daemon::{Daemon, Launch},
    eventually,
    oracle::Kind,
    process::Process,
    proxy::Proxy,
    scene::{Peer, SOURCE, TARGET, assert_reason, done, failed, request},
};
use kvferry_client::{EngineOptions, Op, Outcome, Reason, Transfer};

const HOUR: i64 = 3600;
const LIMIT: Duration = Duration::from_secs(15);

/// Runs a program in a time namespace whose clocks are shifted by so many seconds.
fn shifted(seconds: i64) -> [String; 6] {
    let words =
        ["unshare", "--time", "--monotonic", &seconds.to_string(), "--boottime", &seconds.to_string()];
    words.map(str::to_owned)
}

fn words(command: &[String]) -> Vec<&str> {
    command.iter().map(String::as_str).collect()
}

/// # Panics
/// When the process reads the same clocks as this test does.
fn assert_shifted(process: Process) {
    let namespace = |who: &str| fs::read_link(format!("/proc/{who}/ns/time")).unwrap();
    let own = namespace("self");
    assert_ne!(namespace(&process.0.to_string()), own, "no time namespace: it needs root and Linux 6.1");
}

fn uptime() -> i64 {
    let text = fs::read_to_string("/proc/uptime").unwrap();
    text.split('.').next().unwrap().parse().unwrap()
}

/// One daemon an hour ahead, one whose machine seems to have just booted, engines that live on a third clock: beats,
/// deadlines and tombstones are the same for all.
#[test]
fn h2_daemons_and_engines_may_read_different_clocks() {
    let config = "[session]\nheartbeat_ms = 250\nsilence_ms = 1000\n";
    let start = |shift| {
        let command = shifted(shift);
        let daemon = Launch::new().unwrap().config(config).under(&words(&command)).start().unwrap();
        assert_shifted(daemon.process());
        daemon
    };
    let daemons = [start(HOUR), start(1 - uptime())];
    let source = Peer::attach(&daemons[0], Kind::Shared, 8 << 20, SOURCE).unwrap();
    let mut sink = Peer::attach(&daemons[1], Kind::Shared, 8 << 20, TARGET).unwrap();
    let proxy = Proxy::start(sink.engine.session_id()).unwrap();
    let moves = Arrangement::Reversed.moves(16, 64 << 10);
    let write =
        |tag| Transfer { tag, ..request(Op::Write, &proxy.address(), &moves, &source.pool, &sink.pool) };
    done(source.engine.transfer(write(None)), &moves);
    let connections = proxy.stats().len();
    // Several times the silence: only a clock that misleads would end the session now.
    thread::sleep(Duration::from_millis(2000));
    done(source.engine.transfer(write(None)), &moves);
    assert_eq!(proxy.stats().len(), connections, "the session was opened anew");

    let tag = [7; 16];
    sink.engine.revoke_tag(tag).unwrap();
    let (_, failure) = failed(source.engine.transfer(write(Some(tag))));
    assert_reason(&failure, &[Reason::Revoked]);

    // Against a peer that is not heard, a deadline that comes before the silence ends it.
    proxy.hold(true);
    let begun = Instant::now();
    let patience = Duration::from_millis(400);
    let report = source.engine.transfer(Transfer { deadline: Some(patience), ..write(None) });
    let (_, failure) = failed(report);
    let took = begun.elapsed();
    assert_reason(&failure, &[Reason::Deadline]);
    assert!(took >= patience && took < patience + Duration::from_secs(4), "the deadline took {took:?}");
    proxy.hold(false);
    eventually("it moves again", LIMIT, || {
        source.engine.transfer(write(None)).unwrap().outcome == Outcome::Done
    });
    sink.pool.expect(&source.pool, &moves);
    sink.pool.verify().assert_clean("different clocks");
}

/// The proof that a predecessor has exited reads its start time, which is told by the reader's own clock. One that
/// seems to have begun at another time is still the one that was recorded, and is waited for.
#[test]
fn h2_a_successor_with_another_clock_knows_its_living_predecessor() {
    let predecessor = Daemon::start().unwrap();
    let pid = predecessor.process().0;
    for shift in [0, HOUR, 1 - uptime()] {
        // As if the kernel had let go of it already: the record alone must tell.
        fs::remove_file(predecessor.state_dir().join("lock")).unwrap();
        let launch = Launch::new().unwrap().config("[restart]\npredecessor_ms = 300\n");
        let refusal =
            launch.state_dir(predecessor.state_dir()).under(&words(&shifted(shift))).refused().unwrap();
        assert_eq!(refusal.code, Some(3), "{refusal:?}");
        assert!(refusal.said.contains(&format!("pid {pid}")), "{refusal:?}");
    }
}

/// Moves the wall-clock ends of all rests in a record of ports: as far as a daemon can tell, that is its own wall
/// clock jumping the other way.
fn jump(record: &File, by: i64) {
    let text = fs::read_to_string(record).unwrap();
    let mut rests = 0;
    let line = |line: &str| match line.split(' ').collect::<Vec<_>>()[..] {
        ["rests", port, who, boot, wall] => {
            rests += 1;
            let wall: i64 = wall.parse().unwrap();
            format!("rests {port} {who} {boot} {}\n", wall - by * 1000)
        }
        _ => format!("{line}\n"),
    };
    let text: String = text.lines().map(line).collect();
    assert!(rests > 0, "no port rests:\n{text}");
    fs::write(record, text).unwrap();
}

/// A port rests as long as it must, whatever clocks the next daemons read.
#[test]
fn h2_a_port_rests_neither_shorter_nor_longer() {
    const QUARANTINE: Duration = Duration::from_secs(4);
    let config = "[endpoint]\nport_quarantine_s = 4\n[restart]\ngrace_ms = 100\n";
    let mut daemon = Launch::new().unwrap().config(config).start().unwrap();
    let first = daemon.attach("first").unwrap();
    let port = first.session_id().rsplit_once(':').unwrap().1.parse().unwrap();
    // By itself at the end, not by a restart.
    let keeps = daemon.attach("keeps the daemon's record busy").unwrap();
    let before = Instant::now();
    drop(first);
    let record = daemon.state_dir().join("ports");
    let rests = format!("rests {port} ");
    eventually("the rest is recorded", LIMIT, || fs::read_to_string(&record).unwrap().contains(&rests));
    let began = Instant::now();
    drop(keeps);
    let gets_it = |daemon: &Daemon| {
        let options = EngineOptions { preferred_port: Some(port), ..daemon.options("stranger") };
        let stranger = kvferry_client::Engine::attach(options).unwrap();
        stranger.session_id().ends_with(&format!(":{port}"))
    };
    for (shift, wall) in [(HOUR, 0), (0, HOUR), (1 - uptime(), -HOUR)] {
        daemon.process().signal(harness::process::Signal::KILL).unwrap();
        daemon.wait_exit(LIMIT).unwrap();
        jump(&record, wall);
        let command = shifted(shift);
        daemon.set_under(&words(&command));
        daemon.start_again().unwrap();
        let early = gets_it(&daemon);
        assert!(!early || before.elapsed() >= QUARANTINE, "{port} after {:?}", before.elapsed());
    }
    println!("refused for {:?}", before.elapsed());
    eventually("its rest is over", LIMIT, || {
        // Each try uses up a port.
        thread::sleep(Duration::from_millis(250));
        gets_it(&daemon)
    });
    let took = began.elapsed();
    println!("given to another after {took:?}");
    assert!(before.elapsed() >= QUARANTINE && took < QUARANTINE + Duration::from_secs(3), "{took:?}");
}

//! The own daemon lost: UNSETTLED, until its process is proven to have exited.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use kvferry_client::{
    Engine, EngineOptions, Error, Event, Memory, Outcome, Reason, Report, Settlement, TransferId,
};
use rustix::process::{Pid, Signal};

use crate::fake::{Answer, Fake, transfer};

/// Set for a copy of this test program that is to be a daemon.
const ROLE: &str = "KVFERRY_TEST_DAEMON";

fn assert_lost(report: &Report, outcome: Outcome) {
    assert_eq!(report.outcome, outcome, "{report:?}");
    assert_eq!(report.failure.as_ref().unwrap().reason, Reason::OwnDaemonGone);
    assert!(!report.peer_confirmed);
}

#[test]
fn a_transfer_is_unsettled_when_the_daemon_is_gone_and_its_process_is_not() {
    let mut fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let events = engine.events();
    fake.answer(Answer::Nothing);
    let pending = engine.submit(transfer(3)).unwrap();
    let (blocked, cut_off) = std::thread::scope(|scope| {
        let blocked = scope.spawn(|| engine.transfer(transfer(3)).unwrap());
        let waiting = scope.spawn(|| engine.wait(TransferId([1; 16]), Duration::MAX).unwrap());
        fake.await_transfers(2);
        fake.die();
        (blocked.join().unwrap(), waiting.join().unwrap())
    });
    assert_lost(&blocked, Outcome::Unsettled);
    assert_eq!((blocked.slices, blocked.bytes), (3, 300));
    assert_lost(&cut_off, Outcome::Unsettled);
    assert_lost(&pending.wait().unwrap(), Outcome::Unsettled);
    assert!(matches!(events.recv_timeout(Duration::from_secs(20)), Ok(Event::Detached { .. })));
}

#[test]
fn after_the_lease_calls_return_promptly_and_none_invents_an_end() {
    let mut fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let events = engine.events();
    fake.die();
    assert!(matches!(events.recv_timeout(Duration::from_secs(20)), Ok(Event::Detached { .. })));
    let started = Instant::now();
    let no_daemon = |result: Result<(), Error>| {
        assert!(matches!(&result, Err(Error::NoDaemon { path, .. }) if *path == fake.socket()), "{result:?}");
    };
    no_daemon(engine.register(&[Memory::Process { address: 4096, length: 1 }]).map(drop));
    no_daemon(engine.unregister(&[1]).map(drop));
    no_daemon(engine.probe("127.0.0.1:1", Duration::from_secs(60)).map(drop));
    no_daemon(engine.reset_session("127.0.0.1:1"));
    no_daemon(engine.transfer(transfer(1)).map(drop));
    no_daemon(engine.submit(transfer(1)).unwrap().wait().map(drop));
    let id = TransferId([2; 16]);
    assert_lost(&engine.wait(id, Duration::from_secs(60)).unwrap(), Outcome::Unsettled);
    assert_eq!(engine.cancel(id).unwrap(), Settlement::Unsettled);
    let mut known = transfer(1);
    known.id = Some(id);
    assert_lost(&engine.transfer(known).unwrap(), Outcome::Unsettled);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn a_daemon_that_ends_the_lease_alone_ends_the_calls_too() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Nothing);
    let pending = engine.submit(transfer(1)).unwrap();
    fake.await_transfers(1);
    fake.end_lease();
    assert_lost(&pending.wait().unwrap(), Outcome::Unsettled);
}

#[test]
#[ignore = "not a test: what the tests below run in a process of its own"]
fn daemon_process() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let fake = Fake::start();
    fake.answer(Answer::Nothing);
    let say = |line: String| {
        let mut out = std::io::stdout();
        writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
    };
    say(format!("socket {}", fake.socket().display()));
    fake.await_transfers(1);
    say("transfer".into());
    std::thread::sleep(Duration::from_secs(60));
}

/// A daemon with a process of its own, killed at the end of the test if not before.
struct Daemon {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Daemon {
    fn start() -> (Self, Engine) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lost::daemon_process", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Self { child, said };
        let socket = daemon.hear("socket ").into();
        let engine =
            Engine::attach(EngineOptions { socket, reattach: false, ..EngineOptions::default() }).unwrap();
        (daemon, engine)
    }

    /// The rest of the next line that begins like this.
    fn hear(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.said.read_line(&mut line).unwrap(), 0, "the daemon ended without {start:?}");
            // The test runner writes the beginning of its own line before ours.
            if let Some((_, rest)) = line.trim_end().split_once(start) {
                return rest.to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn a_transfer_has_failed_when_the_daemons_process_has_exited() {
    let (mut daemon, engine) = Daemon::start();
    let pending = engine.submit(transfer(3)).unwrap();
    let id = pending.id();
    daemon.hear("transfer");
    daemon.signal(Signal::KILL);
    assert_lost(&pending.wait().unwrap(), Outcome::Failed);
    assert_eq!(engine.cancel(id).unwrap(), Settlement::Settled);
    assert_eq!(engine.unregister(&[1]).unwrap(), Settlement::Settled);
}

#[test]
fn a_stopped_daemon_is_silent_and_unsettled_until_it_has_exited() {
    let (mut daemon, engine) = Daemon::start();
    let events = engine.events();
    let pending = engine.submit(transfer(3)).unwrap();
    let id = pending.id();
    daemon.hear("transfer");
    daemon.signal(Signal::STOP);
    let stopped = Instant::now();
    assert_lost(&pending.wait().unwrap(), Outcome::Unsettled);
    assert!(stopped.elapsed() < Duration::from_secs(20), "{:?}", stopped.elapsed());
    match events.recv_timeout(Duration::from_secs(20)) {
        Ok(Event::Detached { cause }) => assert!(cause.contains("silent"), "{cause}"),
        other => panic!("{other:?}"),
    }
    assert_lost(&engine.wait(id, Duration::from_secs(60)).unwrap(), Outcome::Unsettled);
    daemon.signal(Signal::KILL);
    let _status = daemon.child.wait().unwrap();
    assert_lost(&engine.wait(id, Duration::from_secs(60)).unwrap(), Outcome::Failed);
}

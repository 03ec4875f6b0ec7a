//! Engines that their daemon cannot reach by itself: of another user, in another pid namespace, behind Yama. They copy for
//! it, under `auto`, without anybody having said so.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path as File,
    process::Command as Program,
    thread,
    time::Duration,
};

use harness::{
    batch::{Arrangement, Move},
    daemon::{Daemon, Launch},
    engine::EngineProcess,
    eventually,
    oracle::Kind,
    process::{Process, Signal},
    scene::{Peer, SOURCE, TARGET, done},
    wire::{Answer, Command},
};
use kvferry_client::{Op, Outcome, Policy, ProcessAccess, Report, Transfer};

const MIB: u64 = 1 << 20;
const POOL: u64 = 16 * MIB;

fn access(daemon: &Daemon, session: &str) -> ProcessAccess {
    let engines = daemon.node().unwrap().engines().unwrap();
    engines.iter().find(|engine| engine.session_id == session).unwrap().process_access()
}

/// Whether this machine lets a test start programs as other users and in other namespaces.
fn may_unshare() -> bool {
    let tried = Program::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child", "setpriv", "--reuid", "65534", "true"])
        .status();
    let may = tried.is_ok_and(|status| status.success());
    if !may {
        println!("skipped: no other users and namespaces here (root, unshare and setpriv are needed)");
    }
    may
}

/// Lets other users in, as a Kubernetes host path would.
fn open_to_all(daemon: &Daemon) {
    let folder = daemon.socket().parent().unwrap();
    fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    for socket in [daemon.socket(), &daemon.fd_socket()] {
        fs::set_permissions(socket, Permissions::from_mode(0o666)).unwrap();
    }
}

/// An engine of nobody, who is process 1 in a namespace of its own. `folder` can be read by nobody.
fn strange_engine(daemon: &Daemon, folder: &File) -> EngineProcess {
    let program = folder.join("engine-peer");
    if !program.exists() {
        fs::copy(EngineProcess::binary().unwrap(), &program).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    }
    let program = program.to_string_lossy();
    let words = [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        "setpriv",
        "--reuid",
        "65534",
        "--regid",
    ];
    let command = [&words[..], &["65534", "--clear-groups", &program]].concat();
    EngineProcess::attach_under(&command, daemon.socket(), "stranger").unwrap()
}

/// Under `auto`, a daemon that may not reach the engine: bytes go both ways all the same, and its death is noticed.
fn a_stranger_is_served(under: &[&str]) {
    let config = "[security]\nallow_uids = [0, 65534]\n";
    let daemon = Launch::new().unwrap().config(config).under(under).start().unwrap();
    open_to_all(&daemon);
    let folder = tempfile::tempdir().unwrap();
    let mut stranger = strange_engine(&daemon, folder.path());
    assert_eq!(access(&daemon, stranger.session()), ProcessAccess::Assisted, "under {under:?}");
    let address = stranger.pool(Kind::Process, POOL, TARGET).unwrap();
    let mut peer = Peer::attach(&daemon, Kind::Shared, POOL, SOURCE).unwrap();
    let moves = Arrangement::Reversed.moves(300, 10_000);
    let (source, to) = (peer.pool.address(), stranger.session().to_owned());
    let there = || Transfer {
        session: to.clone(),
        op: Op::Write,
        slices: harness::batch::slices(Op::Write, &moves, source, address),
        tag: None,
        deadline: None,
        policy: Policy::default(),
        id: None,
    };
    done(peer.engine.transfer(there()), &moves);
    stranger.expect(SOURCE, moves.clone()).unwrap();
    stranger.verify().unwrap().assert_clean("written to the stranger");
    let back: Vec<Move> = (0..300)
        .map(|at| Move { from: 12 * MIB + at * 7000, to: 8 * MIB + at * 9000, length: 7000 })
        .collect();
    let (write, remote) = (true, peer.pool.address());
    let session = peer.engine.session_id().to_owned();
    let command = Command::Transfer { session, write, remote, moves: back.clone() };
    match stranger.ask(&command).unwrap() {
        Answer::Report(ended) => assert!(ended.done, "{}", ended.text),
        other => panic!("{other:?}"),
    }
    peer.pool.expect_stamp(TARGET, &back);
    peer.pool.verify().assert_clean("written by the stranger");
    let session = stranger.session().to_owned();
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let done = |report: Report| report.outcome == Outcome::Done;
            while peer.engine.transfer(there()).is_ok_and(done) {}
        });
        thread::sleep(Duration::from_millis(50));
        // The first word of its command line; the engine itself is the child of that.
        let wrapper = stranger.process().0;
        let children = fs::read_to_string(format!("/proc/{wrapper}/task/{wrapper}/children")).unwrap();
        Process(children.trim().parse().unwrap()).signal(Signal::KILL).unwrap();
        eventually("its death is noticed", Duration::from_secs(2), || !daemon.lists(&session).unwrap());
        traffic.join().unwrap();
    });
}

/// A daemon without CAP_SYS_PTRACE sees the stranger's process, and may not look into it.
#[test]
fn an_engine_of_another_user_is_served_without_privileges() {
    if may_unshare() {
        a_stranger_is_served(&["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"]);
    }
}

/// A daemon in a namespace of its own does not even see it: no pid, no pidfd.
#[test]
fn an_engine_that_cannot_be_seen_is_served() {
    if may_unshare() {
        a_stranger_is_served(&["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]);
    }
}

/// Where Yama lets nobody but a parent look into a process, the client library names the daemon as one that may.
#[test]
fn yama_is_told_of_the_daemon() {
    const SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";
    let Ok(scope) = fs::read_to_string(SCOPE) else {
        println!("skipped: this kernel has no Yama");
        return;
    };
    if scope.trim() != "1" && fs::write(SCOPE, "1").is_err() {
        println!("skipped: ptrace_scope is {} and cannot be set", scope.trim());
        return;
    }
    // Without the capability that makes Yama look away.
    let under = ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"];
    let daemon = Launch::new().unwrap().under(&under).start().unwrap();
    let engine = daemon.attach("one").unwrap();
    assert_eq!(engine.process_access(), ProcessAccess::Direct);
    let _ = fs::write(SCOPE, scope);
}

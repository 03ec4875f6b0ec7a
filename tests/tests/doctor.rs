//! `kvferry doctor` against real daemons: what is wrong is named, with what helps, and it comes to an end.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use harness::{
    batch::Arrangement,
    daemon::{Daemon, Launch},
    eventually,
    process::Signal,
    proxy::Proxy,
    scene::{Scene, done},
};
use kvferry_client as client;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(15);

/// Somebody who is neither root nor the one who runs the tests.
const STRANGER: u32 = 54_321;

/// What one run of it said.
struct Report {
    code: Option<i32>,
    json: Value,
}

impl Report {
    /// Status, why and fix of a check.
    fn check(&self, what: &str) -> (&str, &str, &str) {
        let checks = self.json["checks"].as_array().unwrap();
        let found = checks.iter().find(|check| check["check"] == what);
        let check = found.unwrap_or_else(|| panic!("{what} is not among {:#}", self.json));
        let text = |key: &str| check[key].as_str().unwrap_or_default();
        (text("status"), text("why"), text("fix"))
    }

    fn assert_fails(&self, what: &str, says: &str, helps: &str) {
        let (status, why, fix) = self.check(what);
        assert_eq!((status, self.code), ("FAIL", Some(1)), "{:#}", self.json);
        assert!(why.contains(says), "{why}");
        assert!(fix.contains(helps), "{fix}");
        assert_eq!(self.json["ok"], false);
    }
}

fn doctor(socket: &Path) -> Command {
    let mut command = Command::new(harness::kvferry().unwrap());
    command.args(["doctor", "--json", "--socket"]).arg(socket);
    for name in ["SGLANG_HOST_IP", "HOST_IP", "MC_FORCE_TCP", "MOONCAKE_PROTOCOL"] {
        command.env_remove(name);
    }
    command
}

fn report(mut command: Command) -> Report {
    let begun = Instant::now();
    let output = command.output().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60), "it took {:?}", begun.elapsed());
    let said = String::from_utf8(output.stdout).unwrap();
    let json = serde_json::from_str(&said)
        .unwrap_or_else(|error| panic!("{error}: {said}{}", String::from_utf8_lossy(&output.stderr)));
    Report { code: output.status.code(), json }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can run a command as somebody else");
    }
    root
}

/// A daemon whose socket lies in a folder of this mode.
fn in_folder(mode: u32) -> (tempfile::TempDir, Daemon) {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
    let daemon = Launch::new().unwrap().socket(folder.path().join("engine.sock")).start().unwrap();
    (folder, daemon)
}

#[test]
fn where_all_is_well_nothing_fails() {
    let daemon = Daemon::start().unwrap();
    let mut command = doctor(daemon.socket());
    command.env("SGLANG_HOST_IP", "127.0.0.1").env("MC_FORCE_TCP", "1");
    let report = report(command);
    assert_eq!((report.code, &report.json["ok"]), (Some(0), &Value::Bool(true)), "{:#}", report.json);
    for what in ["socket", "fd socket", "version", "daemon", "transports", "attach", "endpoint", "fd passing"]
    {
        assert_eq!(report.check(what).0, "ok", "{what}: {:#}", report.json);
    }
    assert!(report.check("private memory").1.contains("direct"), "{:#}", report.json);
    assert_eq!(report.check("sglang's host").0, "ok");
    // Known to others by a loopback address: true here, and rarely meant.
    assert_eq!(report.check("address").0, "warn");
    assert!(daemon.node().unwrap().engines().unwrap().is_empty(), "it leaves nothing behind");
}

#[test]
fn lines_say_the_same() {
    let daemon = Daemon::start().unwrap();
    let mut command = Command::new(harness::kvferry().unwrap());
    let output = command.args(["doctor", "--socket"]).arg(daemon.socket()).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    assert!(lines.lines().any(|line| line.starts_with("ok    attach")), "{lines}");
    assert!(lines.lines().all(|line| line.starts_with("ok ") || line.contains("  Fix: ")), "{lines}");
}

#[test]
fn no_socket_and_a_dead_one() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = folder.path().join("nobody.sock");
    let path = nobody.display().to_string();
    report(doctor(&nobody)).assert_fails("socket", &path, "KVFERRY_SOCKET");
    drop(std::os::unix::net::UnixListener::bind(&nobody).unwrap());
    report(doctor(&nobody)).assert_fails("socket", "a daemon that is gone", "start kvferryd");
}

#[test]
fn a_user_that_may_not_enter_or_write_or_speak() {
    if !is_root() {
        return;
    }
    let as_stranger = |socket: &Path| {
        let mut command = doctor(socket);
        command.uid(STRANGER).gid(STRANGER);
        report(command)
    };
    let (_hidden_folder, hidden) = in_folder(0o700);
    as_stranger(hidden.socket()).assert_fails("socket", "may not look into", "enter the folder");

    let (_folder, daemon) = in_folder(0o755);
    let refused = as_stranger(daemon.socket());
    let owner = format!("(mode 0660, owner 0:{})", rustix::process::getegid().as_raw());
    refused.assert_fails("socket", &owner, "security.allow_uids");
    let who = format!("uid {STRANGER}, gid {STRANGER}, no other groups may not write to it");
    assert!(refused.check("socket").1.contains(&who), "{:#}", refused.json);

    fs::set_permissions(daemon.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let heard = as_stranger(daemon.socket());
    heard.assert_fails("socket", &format!("hangs up on uid {STRANGER}"), "security.allow_gids");
}

#[test]
fn a_daemon_that_leaves_takes_no_engine() {
    let scene = Scene::new(client::Path::Tcp, 64 << 20).unwrap();
    let proxy = Proxy::start(scene.session()).unwrap();
    proxy.throttle(Some(4 << 20));
    let moves = Arrangement::Adjacent.moves(32, 1 << 20);
    let pending = scene.initiator.engine.submit(scene.write_to(&proxy.address(), &moves)).unwrap();
    eventually("payload flows", LIMIT, || proxy.data_bytes() > 1 << 20);
    let daemon = scene.nodes.initiator();
    daemon.process().signal(Signal::TERM).unwrap();
    eventually("it drains", LIMIT, || daemon.node().unwrap().info().unwrap().draining);
    let report = report(doctor(daemon.socket()));
    report.assert_fails("daemon", "draining", "start it again");
    proxy.throttle(None);
    done(pending.wait(), &moves);
}

/// Stopped, it still accepts: the kernel does that for it.
#[test]
fn a_stopped_daemon_does_not_hang_the_doctor() {
    let daemon = Daemon::start().unwrap();
    daemon.process().signal(Signal::STOP).unwrap();
    let report = report(doctor(daemon.socket()));
    daemon.process().signal(Signal::CONT).unwrap();
    report.assert_fails("daemon", "does not answer", "stopped or stuck");
}

#[test]
fn a_host_that_the_daemon_does_not_serve() {
    let daemon = Daemon::start().unwrap();
    for name in ["SGLANG_HOST_IP", "HOST_IP"] {
        let mut command = doctor(daemon.socket());
        command.env(name, "127.0.0.9");
        report(command).assert_fails(
            "sglang's host",
            &format!("{name}=127.0.0.9: the daemon does not answer there"),
            "set SGLANG_HOST_IP=127.0.0.1",
        );
    }
}

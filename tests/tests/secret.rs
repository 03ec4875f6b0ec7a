//! K1: daemons of one cluster share a secret; who does not know it opens no session, and moves nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use harness::{
    batch::Move,
    daemon::{Daemon, Launch},
    oracle::Kind,
    scene::{Peer, SOURCE, TARGET, assert_reason, request},
};
use kvferry_client::{Op, Outcome, Reason};

const LENGTH: u64 = 1 << 20;

/// Secret files, gone when dropped.
struct Secrets(tempfile::TempDir);

impl Secrets {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, text: &str, mode: u32) -> PathBuf {
        let path = self.0.path().join(format!("{mode:o}-{text}"));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn daemon(&self, secret: Option<&str>) -> Daemon {
        let config = secret.map_or_else(String::new, |text| configured(&self.write(text, 0o600)));
        Daemon::with_config(&config).unwrap()
    }
}

fn configured(path: &std::path::Path) -> String {
    format!("[security]\nsecret_file = {path:?}\n")
}

/// One transfer from an engine of the one to an engine of the other; what came of it, and whether a byte moved.
fn transfer(from: &Daemon, to: &Daemon) -> (kvferry_client::Report, bool) {
    let initiator = Peer::attach(from, Kind::Shared, LENGTH, SOURCE).unwrap();
    let target = Peer::attach(to, Kind::Shared, LENGTH, TARGET).unwrap();
    let moves = [Move { from: 0, to: 0, length: LENGTH }];
    let session = target.engine.session_id().to_owned();
    let order = request(Op::Write, &session, &moves, &initiator.pool, &target.pool);
    let report = initiator.engine.transfer(order).unwrap();
    let untouched = target.pool.verify().is_clean();
    (report, !untouched)
}

#[test]
fn k1_daemons_that_share_a_secret_serve_each_other() {
    let secrets = Secrets::new();
    let (one, other) =
        (secrets.daemon(Some("a secret of this cluster")), secrets.daemon(Some("a secret of this cluster")));
    let (report, moved) = transfer(&one, &other);
    assert_eq!(report.outcome, Outcome::Done, "{:?}", report.failure);
    assert!(moved);
}

#[test]
fn k1_whoever_lacks_the_secret_is_refused_on_either_side() {
    let secrets = Secrets::new();
    let ours = Some("a secret of this cluster");
    for (from, to) in [(ours, None), (None, ours), (ours, Some("a secret of another cluster"))] {
        let (one, other) = (secrets.daemon(from), secrets.daemon(to));
        let (report, moved) = transfer(&one, &other);
        assert_eq!(report.outcome, Outcome::Failed);
        assert!(report.peer_confirmed, "nothing was started");
        let failure = report.failure.unwrap();
        assert_reason(&failure, &[Reason::Unauthorised]);
        let message = failure.message;
        assert!(message.contains("security.secret_file"), "{from:?} to {to:?}: {message}");
        assert!(!moved, "{from:?} to {to:?}");
    }
}

#[test]
fn k1_a_secret_that_cannot_be_used_stops_the_start() {
    let secrets = Secrets::new();
    for (path, wrong) in [
        (secrets.write("readable by everybody", 0o644), "0644"),
        (secrets.write("short", 0o600), "5 bytes"),
        (secrets.0.path().join("missing"), "No such file"),
    ] {
        let refusal = Launch::new().unwrap().config(&configured(&path)).refused().unwrap();
        assert_eq!(refusal.code, Some(2), "{}", refusal.said);
        assert!(refusal.said.contains("security.secret_file"), "{}", refusal.said);
        assert!(refusal.said.contains(wrong), "{wrong}: {}", refusal.said);
    }
}

//! `kvferry doctor`: what to run first when something does not work.
//!
//! Run it where the engine runs: in its container, as its user, with its environment. It attaches an engine that is
//! thrown away afterwards, because what a real one would meet is what must be known. On the node itself it says the
//! same for engines outside of containers.
//!
//! Checks run on a thread of their own and tell what they find as they find it; one that hangs is a finding too.

mod daemon;
mod door;
mod engine;
mod finding;
mod process;
mod rdma;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::Duration,
};

use anyhow::Context;
use kvferry_client::EngineOptions;
use serde_json::json;

use finding::{Finding, Status};

/// Longest wait for the next finding. Single questions give up sooner.
const PATIENCE: Duration = Duration::from_secs(20);

/// Findings that wait to be shown: more than there are.
const QUEUE: usize = 64;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The daemon's socket; default: KVFERRY_SOCKET, else /run/kvferry/engine.sock
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// One JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// Exit code 1 if anything is FAIL.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let socket = args.socket.unwrap_or_else(|| EngineOptions::default().socket);
    let findings = gather(socket, PATIENCE, |finding| {
        if !args.json {
            println!("{finding}");
        }
    })?;
    let failed = findings.iter().filter(|finding| finding.status == Status::Fail).count();
    if args.json {
        let checks: Vec<_> = findings.iter().map(Finding::to_json).collect();
        println!("{:#}", json!({ "ok": failed == 0, "checks": checks }));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where checks tell what they found.
#[derive(Clone, Debug)]
struct Findings(SyncSender<Finding>);

impl Findings {
    fn tell(&self, finding: Finding) {
        // Nobody hears it when the limit has passed.
        let _ = self.0.send(finding);
    }
}

fn gather(socket: PathBuf, limit: Duration, show: impl Fn(&Finding)) -> anyhow::Result<Vec<Finding>> {
    let (tell, told) = mpsc::sync_channel(QUEUE);
    let checks = thread::Builder::new()
        .name("checks".into())
        .spawn(move || examine(&socket, &Findings(tell)))
        .context("a thread for the checks")?;
    let findings = listen(&told, limit, show);
    if findings.last().is_none_or(|last| last.what != HANGS) && checks.join().is_err() {
        anyhow::bail!("a check panicked");
    }
    Ok(findings)
}

const HANGS: &str = "deadline";

fn listen(told: &Receiver<Finding>, limit: Duration, show: impl Fn(&Finding)) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    loop {
        let finding = match told.recv_timeout(limit) {
            Ok(finding) => finding,
            Err(RecvTimeoutError::Disconnected) => return findings,
            Err(RecvTimeoutError::Timeout) => {
                let last = findings.last().map_or("the beginning", |finding| finding.what);
                let why = format!("nothing more was found within {} s of {last}", limit.as_secs());
                let hangs =
                    Finding::fail(HANGS, why, "the daemon is stopped or stuck: see its log, restart it");
                show(&hangs);
                findings.push(hangs);
                return findings;
            }
        };
        show(&finding);
        findings.push(finding);
    }
}

/// Every check, in the order in which one thing needs another.
fn examine(socket: &Path, findings: &Findings) {
    findings.tell(process::shared_memory());
    findings.tell(process::descriptors());
    let Some(door) = door::check("socket", socket, findings) else { return };
    let fd_socket = {
        let mut path = socket.as_os_str().to_owned();
        path.push(".fd");
        PathBuf::from(path)
    };
    if door::check("fd socket", &fd_socket, findings).is_none() {
        return;
    }
    let Some(info) = daemon::check(socket, findings) else { return };
    let visible = door.daemon.filter(|pid| *pid == info.pid);
    findings.tell(rdma::transports(&info, &rdma::Machine::here(), &variable));
    findings.tell(process::locked_memory(&info, visible));
    if !info.draining {
        engine::check(socket, &info, visible.is_some(), &variable, findings);
    }
}

/// A variable of the environment that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn without_a_daemon_it_says_where_it_looked_and_what_helps() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("engine.sock");
        let findings = gather(socket.clone(), PATIENCE, |_| ()).unwrap();
        let last = findings.last().unwrap();
        assert_eq!((last.what, last.status), ("socket", Status::Fail));
        assert!(last.why.contains(&socket.display().to_string()), "{last}");
        assert!(last.fix.as_ref().is_some_and(|fix| fix.contains("KVFERRY_SOCKET")), "{last}");
        assert!(findings.iter().all(|finding| finding.what != "fd socket"), "nothing more can be said");
    }

    #[test]
    fn what_hangs_is_a_finding() {
        let (tell, told) = mpsc::sync_channel(1);
        tell.send(Finding::ok("socket", "there")).unwrap();
        let begun = Instant::now();
        let findings = listen(&told, Duration::from_millis(50), |_| ());
        assert!(begun.elapsed() < Duration::from_secs(10));
        let last = findings.last().unwrap();
        assert_eq!((findings.len(), last.status), (2, Status::Fail));
        assert!(last.why.ends_with("of socket"), "{last}");
        drop(tell);
    }
}

//! A `kvferryd` of this command's own: started in the temporary folder, ended with this command.

use std::{
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal};

use crate::children::Children;

const READY_WITHIN: Duration = Duration::from_secs(10);
const STOP_WITHIN: Duration = Duration::from_secs(8);
const LOOK: Duration = Duration::from_millis(10);
/// Lines of its log shown when it does not start.
const TAIL_LINES: usize = 15;
/// The daemon's own variables; the caller's must not change what is shown here.
const VARIABLES: &str = "KVFERRYD__";

#[derive(Debug)]
pub(crate) struct Daemon<'a> {
    children: &'a Children,
    pid: Pid,
    socket: PathBuf,
    log: PathBuf,
}

/// The program beside this command, unless another is named.
pub(crate) fn program(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => {
            std::env::current_exe().context("the path of this command is unknown")?.with_file_name("kvferryd")
        }
    };
    ensure!(path.is_file(), "no kvferryd at {}; build it or name it with --kvferryd", path.display());
    Ok(path)
}

impl<'a> Daemon<'a> {
    /// Starts it and waits until its socket accepts.
    pub(crate) fn start(children: &'a Children, program: &Path, name: &str) -> anyhow::Result<Self> {
        let folder = children.folder().join(name);
        fs::create_dir_all(&folder)?;
        let (socket, log) = (folder.join("engine.sock"), folder.join("log"));
        let output = File::create(&log)?;
        let mut command = Command::new(program);
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .args(["--bind-host", "127.0.0.1", "--advertise-host", "127.0.0.1", "--admin", ""])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with(VARIABLES) {
                command.env_remove(key);
            }
        }
        let (pid, ()) = children
            .spawn(&mut command, |_| ())
            .with_context(|| format!("{} could not be started", program.display()))?;
        let daemon = Self { children, pid, socket, log };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    fn wait_ready(&self) -> anyhow::Result<()> {
        let end = Instant::now() + READY_WITHIN;
        while UnixStream::connect(&self.socket).is_err() {
            if !self.children.is_running(self.pid) {
                bail!("kvferryd ended at start; its last lines:\n{}", self.tail());
            }
            if Instant::now() > end {
                bail!("kvferryd is not ready after {READY_WITHIN:?}; its last lines:\n{}", self.tail());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The end of its log, for an error message.
    pub(crate) fn tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        if lines.is_empty() {
            return "(it said nothing)".to_owned();
        }
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Stops its processes from running until the guard is dropped.
    pub(crate) fn pause(&self) -> anyhow::Result<Paused<'_>> {
        ensure!(self.children.signal(self.pid, Signal::STOP), "the daemon has ended");
        Ok(Paused { daemon: self })
    }

    /// Asks it to drain and end; whether it did so by itself.
    pub(crate) fn stop(self) -> bool {
        self.children.signal(self.pid, Signal::TERM);
        self.children.reap(self.pid, STOP_WITHIN)
    }
}

/// A stopped daemon; goes on when this is dropped.
#[derive(Debug)]
pub(crate) struct Paused<'a> {
    daemon: &'a Daemon<'a>,
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.daemon.children.signal(self.daemon.pid, Signal::CONT);
    }
}

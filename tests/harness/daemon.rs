//! A real `kvferryd` in a temporary directory, on ports of its own, gone when dropped.

use std::{
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use kvferry_client as client;
use kvferry_client::{Engine, EngineOptions, Node};
use tempfile::TempDir;

use crate::process::{Process, Signal};

/// How long a daemon may take to start or to end by itself.
const PATIENCE: Duration = Duration::from_secs(15);

/// How to start a daemon.
#[derive(Debug)]
pub struct Launch {
    directory: TempDir,
    socket: PathBuf,
    config: String,
    environment: Vec<(String, String)>,
    admin: String,
    prefix: Vec<String>,
    host: String,
    ports: (u16, u16),
    state_dir: PathBuf,
}

impl Launch {
    /// A daemon with the default configuration in a directory of its own.
    pub fn new() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("kvferry-").tempdir()?;
        let socket = directory.path().join("engine.sock");
        let state_dir = directory.path().join("state");
        Ok(Self {
            directory,
            socket,
            config: String::new(),
            environment: Vec::new(),
            admin: "127.0.0.1:0".to_owned(),
            prefix: Vec::new(),
            host: "127.0.0.1".to_owned(),
            ports: ports(),
            state_dir,
        })
    }

    /// The configuration file's text (TOML).
    pub fn config(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.config);
        self
    }

    /// One more environment variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Another socket path than `engine.sock` in the directory.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.socket = path.into();
        self
    }

    /// Another daemon's state directory.
    pub fn state_dir(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.state_dir);
        self
    }

    /// Where the admin port shall listen.
    pub fn admin(mut self, address: impl Into<String>) -> Self {
        self.admin = address.into();
        self
    }

    /// A program that runs the daemon, with its arguments: `strace -cf -o FILE`.
    pub fn under(mut self, program: &[&str]) -> Self {
        self.prefix = program.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Another address than 127.0.0.1 for endpoints: beyond loopback the configuration must allow it.
    pub fn host(mut self, address: &str) -> Self {
        address.clone_into(&mut self.host);
        self
    }

    /// Starts it and waits until its socket accepts.
    pub fn start(self) -> anyhow::Result<Daemon> {
        let child = self.command()?.spawn().context("starting kvferryd")?;
        let mut daemon = Daemon { launch: self, child, exit: None };
        daemon.listens()?;
        Ok(daemon)
    }

    /// Starts it where it must refuse to run: its exit code and what it said.
    ///
    /// # Errors
    /// When it is still running after 15 s.
    pub fn refused(self) -> anyhow::Result<Refusal> {
        let child = self.command()?.spawn().context("starting kvferryd")?;
        let mut daemon = Daemon { launch: self, child, exit: None };
        let status = daemon.wait_exit(PATIENCE).context("kvferryd was to refuse")?;
        Ok(Refusal { code: status.code(), said: daemon.log() })
    }

    fn command(&self) -> anyhow::Result<Command> {
        let binary = crate::binary("kvferryd", "KVFERRYD_BIN", "kvferryd")?;
        let folder = self.directory.path();
        let config = folder.join("kvferryd.toml");
        fs::write(&config, &self.config)?;
        let (first, last) = self.ports;
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let mut command = match self.prefix.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(binary);
                command
            }
            None => Command::new(binary),
        };
        command
            .arg("--config")
            .arg(config)
            .arg("--socket")
            .arg(&self.socket)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(["--bind-host", &self.host, "--advertise-host", &self.host])
            .args(["--endpoint-ports", &format!("{first}-{last}"), "--admin", &self.admin])
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(command)
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("kvferryd.log")
    }
}

/// What a daemon that would not run left behind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// None: ended by a signal.
    pub code: Option<i32>,
    /// Everything it printed.
    pub said: String,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    launch: Launch,
    child: Child,
    exit: Option<ExitStatus>,
}

impl Daemon {
    /// One with the default configuration.
    pub fn start() -> anyhow::Result<Self> {
        Launch::new()?.start()
    }

    /// One with this configuration file.
    pub fn with_config(toml: &str) -> anyhow::Result<Self> {
        Launch::new()?.config(toml).start()
    }

    /// Where engines attach.
    pub fn socket(&self) -> &Path {
        &self.launch.socket
    }

    /// Where engines hand over descriptors.
    pub fn fd_socket(&self) -> PathBuf {
        let mut path = self.launch.socket.clone().into_os_string();
        path.push(".fd");
        path.into()
    }

    /// The process (of the program it runs under, where there is one).
    pub fn process(&self) -> Process {
        Process(self.child.id())
    }

    /// Attaches an engine of this process.
    pub fn attach(&self, name: &str) -> Result<Engine, client::Error> {
        Engine::attach(self.options(name))
    }

    /// Options for an engine of this daemon, to be changed and attached.
    pub fn options(&self, name: &str) -> EngineOptions {
        EngineOptions { socket: self.socket().to_owned(), name: name.to_owned(), ..EngineOptions::default() }
    }

    /// For questions to the daemon.
    pub fn node(&self) -> Result<Node, client::Error> {
        Node::connect(self.socket())
    }

    /// Whether the daemon lists the engine.
    pub fn lists(&self, session: &str) -> anyhow::Result<bool> {
        Ok(self.node()?.engines()?.iter().any(|engine| engine.session_id == session))
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.poll_exit()? {
                return Ok(status);
            }
            if begin.elapsed() > limit {
                bail!("kvferryd is still running after {limit:?}:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// What outlives it.
    pub fn state_dir(&self) -> &Path {
        &self.launch.state_dir
    }

    /// Kills it and starts another at once, with the same files, socket, configuration and ports: while the first
    /// is still on its way out.
    pub fn kill_and_restart(&mut self) -> anyhow::Result<()> {
        self.kill_and_spawn()?;
        self.listens()
    }

    /// As [`Daemon::kill_and_restart`], without waiting until the other one serves.
    pub fn kill_and_spawn(&mut self) -> anyhow::Result<()> {
        self.process().signal(Signal::KILL)?;
        let next = self.launch.command()?.spawn().context("starting kvferryd")?;
        std::mem::replace(&mut self.child, next).wait()?;
        self.exit = None;
        Ok(())
    }

    /// Starts another after it has ended by itself, with the same files, socket, configuration and ports.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        self.wait_exit(PATIENCE)?;
        self.child = self.launch.command()?.spawn().context("starting kvferryd")?;
        self.exit = None;
        self.listens()
    }

    /// Returns when it serves engines.
    pub fn listens(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        // A stale socket file refuses; only a listening daemon accepts.
        while UnixStream::connect(self.socket()).is_err() {
            if let Some(status) = self.poll_exit()? {
                bail!("kvferryd ended at its start with {status}:\n{}", self.log());
            }
            if begin.elapsed() > PATIENCE {
                bail!("kvferryd does not listen after {PATIENCE:?}:\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What the next one runs under ([`Launch::under`]); nothing: by itself.
    pub fn set_under(&mut self, program: &[&str]) {
        self.launch.prefix = program.iter().map(|&word| word.to_owned()).collect();
    }

    /// Kills it and starts another with the same files, socket, configuration and ports.
    pub fn restart_after_kill(mut self) -> anyhow::Result<Self> {
        self.stop()?;
        let mut other = Launch::new()?;
        std::mem::swap(&mut other, &mut self.launch);
        other.start()
    }

    /// Everything it has printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.launch.log_file()).unwrap_or_default()
    }

    fn poll_exit(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        // Kept: after the process was reaped its id may be anybody's.
        if self.exit.is_none() {
            self.exit = self.child.try_wait()?;
        }
        Ok(self.exit)
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        if self.poll_exit()?.is_none() {
            // SIGKILL ends stopped processes too.
            self.process().signal(Signal::KILL)?;
            self.exit = Some(self.child.wait()?);
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("kvferryd {} could not be stopped: {error:#}", self.child.id());
        }
        if let Some(kept) = std::env::var_os("KVFERRY_KEEP_LOGS") {
            let name = format!("kvferryd-{}.log", self.child.id());
            let _ = fs::copy(self.launch.log_file(), Path::new(&kept).join(name));
        }
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines.len().saturating_sub(60);
            eprintln!("-- last lines of kvferryd {}\n{}", self.child.id(), lines[tail..].join("\n"));
        }
    }
}

/// A range of endpoint ports that no other daemon of this test process was given, within 20000-27999. Test
/// processes that run at the same time begin at different places, and the daemon skips what is taken.
fn ports() -> (u16, u16) {
    const FIRST: u32 = 20_000;
    const RANGE: u32 = 100;
    const RANGES: u32 = 80;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(17);
    let slot = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % RANGES;
    let first = (FIRST + slot * RANGE) as u16;
    (first, first + (RANGE - 1) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges_of_one_process_do_not_meet() {
        let first = ports();
        let second = ports();
        assert!(first.1 < second.0 || second.1 < first.0);
        assert!([first, second].iter().all(|range| range.0 >= 20_000 && range.1 <= 27_999));
    }
}

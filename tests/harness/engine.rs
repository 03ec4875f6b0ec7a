//! Engine processes: for what only a process can do (die, stop, fork, exec, be many).
//!
//! Tests that need none of that attach engines of their own process ([`crate::scene`]).

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command as Program, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{
    batch::Move,
    oracle::{Kind, Verdict},
    pattern::Stamp,
    process::{Process, Signal},
    wire::{Answer, Command, Ended},
};

/// How long an engine process may take for an answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that is one engine; killed when dropped, with the child it forked.
#[derive(Debug)]
pub struct EngineProcess {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
    session: String,
    forked: Option<Process>,
    reaped: bool,
}

impl EngineProcess {
    /// Starts a process and attaches it to the daemon at this socket.
    pub fn attach(socket: &Path, name: &str) -> anyhow::Result<Self> {
        let binary = Self::binary()?;
        Self::attach_under(&[&binary.to_string_lossy()], socket, name)
    }

    /// The program that is started.
    pub fn binary() -> anyhow::Result<PathBuf> {
        crate::binary("engine-peer", "KVFERRY_ENGINE_PEER", "kvferry-tests")
    }

    /// The same by a command line of its own, which ends with a path of that program. [`EngineProcess::process`] is
    /// then whatever the first word started.
    pub fn attach_under(command: &[&str], socket: &Path, name: &str) -> anyhow::Result<Self> {
        let (program, arguments) = command.split_first().context("no command")?;
        let mut child = Program::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting an engine process")?;
        let commands = child.stdin.take().context("no pipe to the engine process")?;
        let output = child.stdout.take().context("no pipe from the engine process")?;
        let answers = lines(output)?;
        let session = String::new();
        let mut engine = Self { child, commands, answers, session, forked: None, reaped: false };
        let attach = Command::Attach { socket: socket.to_owned(), name: name.to_owned() };
        match engine.ask(&attach)? {
            Answer::Attached { session } => engine.session = session,
            other => bail!("{name} did not attach: {other:?}"),
        }
        Ok(engine)
    }

    /// What peers call it.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// The process.
    pub fn process(&self) -> Process {
        Process(self.child.id())
    }

    /// Allocates and registers the process's pool and says where it begins there.
    pub fn pool(&mut self, kind: Kind, length: u64, stamp: Stamp) -> anyhow::Result<u64> {
        match self.ask(&Command::Pool { kind, length, stamp })? {
            Answer::Pool { address } => Ok(address),
            other => bail!("no pool: {other:?}"),
        }
    }

    /// Tells the process's oracle what a peer will send.
    pub fn expect(&mut self, source: Stamp, moves: Vec<Move>) -> anyhow::Result<()> {
        match self.ask(&Command::Expect { source, moves })? {
            Answer::Noted => Ok(()),
            other => bail!("not noted: {other:?}"),
        }
    }

    /// Has the process read its whole pool.
    pub fn verify(&mut self) -> anyhow::Result<Verdict> {
        match self.ask(&Command::Verify)? {
            Answer::Verdict(verdict) => Ok(verdict),
            other => bail!("no verdict: {other:?}"),
        }
    }

    /// The end of a transfer begun with [`EngineProcess::send`].
    pub fn ended(&mut self) -> anyhow::Result<Ended> {
        match self.receive()? {
            Answer::Report(ended) => Ok(ended),
            other => bail!("no report: {other:?}"),
        }
    }

    /// Has the process fork a child that holds all its descriptors.
    pub fn fork(&mut self) -> anyhow::Result<Process> {
        match self.ask(&Command::Fork)? {
            Answer::Child { pid } => {
                self.forked = Some(Process(pid));
                Ok(Process(pid))
            }
            other => bail!("no child: {other:?}"),
        }
    }

    /// Kills and reaps the process; a child it forked lives on.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process().signal(Signal::KILL)?;
        self.child.wait()?;
        self.reaped = true;
        Ok(())
    }

    /// Gives a command and waits for its answer.
    pub fn ask(&mut self, command: &Command) -> anyhow::Result<Answer> {
        self.send(command)?;
        self.receive()
    }

    /// Gives a command; the answer is fetched later, or never.
    pub fn send(&mut self, command: &Command) -> anyhow::Result<()> {
        let mut line = serde_json::to_string(command)?;
        line.push('\n');
        self.commands.write_all(line.as_bytes()).context("the engine process is gone")
    }

    /// The next answer.
    pub fn receive(&mut self) -> anyhow::Result<Answer> {
        let line = self.answers.recv_timeout(PATIENCE).context("no answer from the engine process")?;
        serde_json::from_str(&line).with_context(|| format!("not an answer: {line}"))
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        if let Some(child) = self.forked {
            // It ends by itself after a minute: then there is nobody to signal.
            let _ = child.signal(Signal::KILL);
        }
        if !self.reaped && self.kill().is_err() {
            eprintln!("the engine process {} could not be killed", self.child.id());
        }
    }
}

/// A thread reads, so that waiting for a line can have a limit. It ends with the process's output.
fn lines(output: ChildStdout) -> anyhow::Result<Receiver<String>> {
    let (sender, receiver) = sync_channel(16);
    thread::Builder::new().name("engine-answers".to_owned()).spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    })?;
    Ok(receiver)
}

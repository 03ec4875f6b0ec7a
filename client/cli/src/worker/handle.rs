//! The parent's end of an engine process: typed questions, bounded waits.

use std::{
    io::{BufRead, BufReader, Write},
    process::{ChildStdin, Command as Program, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::process::Pid;

use super::protocol::{Command, Moved, Reply, Tally, Verdict};
use crate::children::Children;

/// Longer than any command takes, the deadline of a transfer (30 s) and its settling included.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// Detaching and freeing the pools.
const QUIT_WITHIN: Duration = Duration::from_secs(5);

/// A running engine process.
#[derive(Debug)]
pub(crate) struct Worker<'a> {
    children: &'a Children,
    name: String,
    pid: Pid,
    commands: ChildStdin,
    /// One reply per command, so one slot is enough; the reading thread ends with the process.
    replies: Receiver<String>,
}

impl<'a> Worker<'a> {
    pub(crate) fn start(children: &'a Children, name: &str) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("the path of this command is unknown")?;
        let mut program = Program::new(own);
        program.arg("engine-worker").stdin(Stdio::piped()).stdout(Stdio::piped());
        let (pid, (stdin, stdout)) = children
            .spawn(&mut program, |child| (child.stdin.take(), child.stdout.take()))
            .with_context(|| format!("engine {name} could not be started"))?;
        let (commands, answers) = stdin.zip(stdout).context("an engine process without pipes")?;
        let (send, replies) = sync_channel(1);
        let read = move || {
            for line in BufReader::new(answers).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        };
        std::thread::Builder::new().name(format!("{name}-replies")).spawn(read)?;
        Ok(Self { children, name: name.to_owned(), pid, commands, replies })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends a command without waiting: two engines can work at the same time. `answer` must follow.
    pub(crate) fn tell(&mut self, command: &Command) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        self.commands.write_all(&line).with_context(|| format!("engine {} has ended", self.name))
    }

    pub(crate) fn answer(&mut self) -> anyhow::Result<Reply> {
        let line = self.replies.recv_timeout(ANSWER_WITHIN).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                anyhow::anyhow!("engine {} gave no answer within {ANSWER_WITHIN:?}", self.name)
            }
            RecvTimeoutError::Disconnected => anyhow::anyhow!("engine {} has ended", self.name),
        })?;
        match serde_json::from_str(&line)? {
            Reply::Failed { message } => bail!("engine {}: {message}", self.name),
            reply => Ok(reply),
        }
    }

    pub(crate) fn ask(&mut self, command: &Command) -> anyhow::Result<Reply> {
        self.tell(command)?;
        self.answer()
    }

    fn unexpected<T>(&self, reply: &Reply) -> anyhow::Result<T> {
        bail!("engine {} gave an answer to another question: {reply:?}", self.name)
    }

    pub(crate) fn attach(&mut self, socket: &std::path::Path, tcp_only: bool) -> anyhow::Result<String> {
        let command = Command::Attach { socket: socket.to_owned(), name: self.name.clone(), tcp_only };
        match self.ask(&command)? {
            Reply::Attached { session } => Ok(session),
            reply => self.unexpected(&reply),
        }
    }

    /// The answer to `Pool`: base addresses of the buffers.
    pub(crate) fn bases(&mut self) -> anyhow::Result<Vec<u64>> {
        match self.answer()? {
            Reply::Pool { bases } => Ok(bases),
            reply => self.unexpected(&reply),
        }
    }

    /// The answer to `Transfer` or `Wait`.
    pub(crate) fn moved(&mut self, command: &Command) -> anyhow::Result<Moved> {
        match self.ask(command)? {
            Reply::Moved(moved) => Ok(moved),
            reply => self.unexpected(&reply),
        }
    }

    pub(crate) fn verify(&mut self, transfer: u64) -> anyhow::Result<Verdict> {
        match self.ask(&Command::Verify { transfer })? {
            Reply::Verdict(verdict) => Ok(verdict),
            reply => self.unexpected(&reply),
        }
    }

    pub(crate) fn tally(&mut self, transfer: u64, later: u64) -> anyhow::Result<Tally> {
        match self.ask(&Command::Tally { transfer, later })? {
            Reply::Tally(tally) => Ok(tally),
            reply => self.unexpected(&reply),
        }
    }

    /// Whether the cancel is settled.
    pub(crate) fn cancel(&mut self) -> anyhow::Result<bool> {
        match self.ask(&Command::Cancel)? {
            Reply::Cancelled { settled } => Ok(settled),
            reply => self.unexpected(&reply),
        }
    }

    pub(crate) fn raw_sink(&mut self, bytes: u64) -> anyhow::Result<u16> {
        match self.ask(&Command::RawSink { bytes })? {
            Reply::Listening { port } => Ok(port),
            reply => self.unexpected(&reply),
        }
    }

    /// Lets the engine detach and free its memory, and waits until it has.
    pub(crate) fn quit(mut self) {
        // A worker that has ended already cannot be told, and need not be.
        let _ = self.tell(&Command::Quit);
        self.children.reap(self.pid, QUIT_WITHIN);
    }
}

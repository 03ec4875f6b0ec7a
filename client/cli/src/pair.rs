//! Two engine processes and the plan they replay: who asks, who answers, who checks.

use std::path::Path;

use crate::{
    children::Children,
    worker::{
        handle::Worker,
        protocol::{Command, Direction, Moved, Order, Reply, Sabotage, Side, Tally, Verdict},
    },
};

/// Both sides make their slices from it; any constant would do.
const SEED: u64 = 1;

/// Where the two engines attach.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sockets<'a> {
    pub(crate) initiator: &'a Path,
    pub(crate) target: &'a Path,
    /// Refuse the local path although both engines may have the same daemon.
    pub(crate) tcp_only: bool,
}

/// The initiator asks for transfers; bytes flow from it (write) or to it (read).
#[derive(Debug)]
pub(crate) struct Pair<'a> {
    initiator: Worker<'a>,
    target: Worker<'a>,
    session: String,
    direction: Direction,
    /// The target's buffers.
    remote: Vec<u64>,
}

impl<'a> Pair<'a> {
    pub(crate) fn start(
        children: &'a Children,
        sockets: Sockets<'_>,
        direction: Direction,
    ) -> anyhow::Result<Self> {
        let mut initiator = Worker::start(children, "initiator")?;
        let mut target = Worker::start(children, "target")?;
        initiator.attach(sockets.initiator, sockets.tcp_only)?;
        let session = target.attach(sockets.target, sockets.tcp_only)?;
        Ok(Self { initiator, target, session, direction, remote: Vec::new() })
    }

    /// The target's session id: its endpoint's `host:port`.
    pub(crate) fn session(&self) -> &str {
        &self.session
    }

    /// From now on the target is addressed by another `host:port`, such as a proxy's.
    pub(crate) fn address_by(&mut self, session: String) {
        self.session = session;
    }

    /// Process ids of sender and receiver.
    pub(crate) fn pids(&self) -> (i32, i32) {
        match self.direction {
            Direction::Write => (self.initiator.pid(), self.target.pid()),
            Direction::Read => (self.target.pid(), self.initiator.pid()),
        }
    }

    fn source(&mut self) -> &mut Worker<'a> {
        match self.direction {
            Direction::Write => &mut self.initiator,
            Direction::Read => &mut self.target,
        }
    }

    fn sink(&mut self) -> &mut Worker<'a> {
        match self.direction {
            Direction::Write => &mut self.target,
            Direction::Read => &mut self.initiator,
        }
    }

    /// Both engines make and register their half of the workload's pool, at the same time.
    pub(crate) fn load(&mut self, workload: &str) -> anyhow::Result<()> {
        let pool = |side| Command::Pool { workload: workload.to_owned(), seed: SEED, side };
        self.source().tell(&pool(Side::Source))?;
        self.sink().tell(&pool(Side::Sink))?;
        self.initiator.bases()?;
        self.remote = self.target.bases()?;
        Ok(())
    }

    pub(crate) fn release(&mut self) -> anyhow::Result<()> {
        self.initiator.ask(&Command::Release)?;
        self.target.ask(&Command::Release)?;
        Ok(())
    }

    /// The source gets the content of `transfer`, the sink nothing but background.
    pub(crate) fn prepare(&mut self, transfer: u64) -> anyhow::Result<()> {
        self.source().tell(&Command::Fill { transfer })?;
        self.sink().tell(&Command::Clear)?;
        self.initiator.answer()?;
        self.target.answer()?;
        Ok(())
    }

    /// The source gets new content, whatever is going on.
    pub(crate) fn overwrite(&mut self, transfer: u64) -> anyhow::Result<Reply> {
        self.source().ask(&Command::Fill { transfer })
    }

    fn order(&self, repeat: u32, attempts: Option<u32>) -> Order {
        let (session, remote) = (self.session.clone(), self.remote.clone());
        Order { session, direction: self.direction, remote, attempts, repeat }
    }

    pub(crate) fn transfer(&mut self, repeat: u32) -> anyhow::Result<Moved> {
        let order = self.order(repeat, None);
        self.initiator.moved(&Command::Transfer { order })
    }

    /// Starts it in the background. `attempts` None: the daemon's policy.
    pub(crate) fn start_transfer(&mut self, attempts: Option<u32>) -> anyhow::Result<Reply> {
        let order = self.order(1, attempts);
        self.initiator.ask(&Command::Start { order })
    }

    pub(crate) fn cancel(&mut self) -> anyhow::Result<bool> {
        self.initiator.cancel()
    }

    pub(crate) fn wait(&mut self) -> anyhow::Result<Moved> {
        self.initiator.moved(&Command::Wait)
    }

    pub(crate) fn sabotage(&mut self, how: Sabotage, transfer: u64) -> anyhow::Result<Reply> {
        self.sink().ask(&Command::Sabotage { how, transfer })
    }

    pub(crate) fn verify(&mut self, transfer: u64) -> anyhow::Result<Verdict> {
        self.sink().verify(transfer)
    }

    pub(crate) fn tally(&mut self, transfer: u64, later: u64) -> anyhow::Result<Tally> {
        self.sink().tally(transfer, later)
    }

    pub(crate) fn quit(self) {
        self.initiator.quit();
        self.target.quit();
    }
}

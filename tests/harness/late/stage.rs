//! Where a probe happens: two engine processes with a canvas each, their daemons, and a proxy that remembers.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use kvferry_client::Path;

use super::Memory;
use crate::{
    canvas::{Census, Judge, Shade},
    engine::EngineProcess,
    oracle::Kind,
    proxy::Proxy,
    scene::Nodes,
    wire::{Answer, Begin, Command, Ended},
};

/// Long enough to be struck in the middle.
const TCP_PAYLOAD: u64 = 64 << 20;
/// Copies within a node are an order of magnitude faster.
const LOCAL_PAYLOAD: u64 = 256 << 20;
/// Behind the canvas, for the transfers that show that the session is well.
const MARGIN: u64 = 64 << 10;
/// Slices of the payload.
const SLICE: u64 = 1 << 20;
/// A byte a millisecond from the proxy's point of view: it sleeps about that long for each chunk of 64 KiB.
const SLOW: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// Whatever was left in buffers at the end of a run has landed by then, or been dropped.
const WATCH: Duration = Duration::from_millis(50);

/// Silence is noticed early, so that a hundred stopped daemons do not take ten minutes. One thread copies, so that
/// copying lasts.
const CONFIG: &str = "[session]\nheartbeat_ms = 150\nsilence_ms = 600\n[local]\nthreads = 1\n";

/// How long a daemon must be stopped for its peers to bury it.
pub(super) const BURIED: Duration = Duration::from_millis(900);

/// One engine process and the judge of its memory.
#[derive(Debug)]
pub(super) struct Side {
    pub engine: EngineProcess,
    pub judge: Judge,
    address: u64,
}

impl Side {
    fn attach(socket: &std::path::Path, name: &str, kind: Kind, length: u64) -> anyhow::Result<Self> {
        let mut engine = EngineProcess::attach(socket, name)?;
        match engine.ask(&Command::Canvas { kind, length, margin: MARGIN })? {
            Answer::Canvas { address, descriptor } => {
                let judge = Judge::open(engine.process(), descriptor, length)?;
                Ok(Self { engine, judge, address })
            }
            other => bail!("{name} has no canvas: {other:?}"),
        }
    }

    pub(super) fn paint(&mut self, shade: Shade) -> anyhow::Result<Census> {
        match self.engine.ask(&Command::Paint { shade })? {
            Answer::Painted(found) => Ok(found),
            other => bail!("not painted: {other:?}"),
        }
    }

    pub(super) fn noted(&mut self, command: &Command) -> anyhow::Result<()> {
        match self.engine.ask(command)? {
            Answer::Noted => Ok(()),
            other => bail!("{command:?}: {other:?}"),
        }
    }

    pub(super) fn outcome(&mut self) -> anyhow::Result<Ended> {
        self.engine.send(&Command::Outcome)?;
        self.engine.ended()
    }
}

/// See the module. The initiator is dropped first.
#[derive(Debug)]
pub(super) struct Stage {
    pub initiator: Side,
    pub target: Side,
    /// None within a node.
    pub proxy: Option<Proxy>,
    pub nodes: Nodes,
    pub payload: u64,
}

impl Stage {
    pub(super) fn new(path: Path, memory: Memory) -> anyhow::Result<Self> {
        let payload = if path == Path::Local { LOCAL_PAYLOAD } else { TCP_PAYLOAD };
        let (kind, config) = match memory {
            Memory::Shared => (Kind::Shared, CONFIG.to_owned()),
            Memory::Assisted => (Kind::Process, format!("{CONFIG}[process]\nmode = \"assisted\"\n")),
        };
        let nodes = Nodes::start(path, &config)?;
        let initiator = Side::attach(nodes.initiator().socket(), "initiator", kind, payload)?;
        let target = Side::attach(nodes.target().socket(), "target", kind, payload)?;
        let proxy = match path {
            Path::Local => None,
            _ => Some(Proxy::start(target.engine.session())?),
        };
        let mut stage = Self { initiator, target, proxy, nodes, payload };
        stage.is_well()?;
        Ok(stage)
    }

    fn session(&self) -> String {
        match &self.proxy {
            Some(proxy) => proxy.address(),
            None => self.target.engine.session().to_owned(),
        }
    }

    /// All of the canvas, in the order of addresses.
    pub(super) fn whole(&self, write: bool, once: bool, shade: Shade) -> Begin {
        let local: Vec<u64> = (0..self.payload).step_by(SLICE as usize).collect();
        let remote = local.iter().map(|offset| self.target.address + offset).collect();
        Begin { session: self.session(), write, local, remote, length: SLICE, once, shade: Some(shade) }
    }

    /// A transfer in the margin is DONE: it follows on the lane whatever came before it, and shows that the
    /// session has recovered. It is begun again until it is, because a session may be failed for a moment.
    pub(super) fn is_well(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let remote = vec![self.target.address + self.payload];
            let local = vec![self.payload];
            let session = self.session();
            let (write, once) = (true, false);
            let begin = Begin { session, write, local, remote, length: MARGIN, once, shade: None };
            self.initiator.noted(&Command::Begin(begin))?;
            let ended = self.initiator.outcome()?;
            if ended.done {
                return Ok(());
            }
            ensure!(begun.elapsed() < LIMIT, "the session does not recover: {}", ended.text);
        }
    }

    /// Makes the path slow enough to be struck, or lets it run.
    pub(super) fn slow(&self, on: bool) {
        if let Some(proxy) = &self.proxy {
            proxy.throttle(on.then_some(SLOW));
        }
    }

    /// What the proxy has passed over lanes until now.
    pub(super) fn passed(&self) -> u64 {
        self.proxy.as_ref().map_or(0, Proxy::data_bytes)
    }

    /// Lets everything that is still under way arrive, and says what the proxy has passed then.
    pub(super) fn drain(&self) -> u64 {
        if let Some(proxy) = &self.proxy {
            proxy.drain(LIMIT);
        }
        std::thread::sleep(WATCH);
        self.passed()
    }
}

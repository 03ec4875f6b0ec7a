//! One engine as a process of its own: `kvferry engine-worker`.
//!
//! Driven by its parent over stdin and stdout (see [`protocol`]). It attaches to a daemon like any engine, owns
//! its pools, and checks with its own eyes what arrived. It ends when stdin does; a parent that may be killed
//! also has the kernel end it (see `children`), because a worker inside a transfer does not read stdin.

pub(crate) mod handle;
mod moves;
mod pool;
pub(crate) mod protocol;
mod verify;

use std::io::{BufRead, Write};

use anyhow::{Context, ensure};
use kvferry_client::{Engine, EngineOptions, Path, Pending, Settlement, TransferId};

use crate::{bench::limits, workloads};
use pool::Pool;
use protocol::{Command, Order, Reply, Side};

/// Serves commands until `Quit` or the end of stdin.
pub(crate) fn serve() -> anyhow::Result<()> {
    let mut worker = Worker::default();
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?).context("a command that cannot be understood")?;
        if matches!(command, Command::Quit) {
            break;
        }
        let reply =
            worker.carry_out(command).unwrap_or_else(|error| Reply::Failed { message: format!("{error:#}") });
        serde_json::to_writer(&mut out, &reply)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    worker.release()
}

/// Field order is drop order: the engine detaches before the memory it registered goes.
#[derive(Default)]
struct Worker {
    started: Option<(TransferId, Pending)>,
    engine: Option<Engine>,
    regions: Vec<u32>,
    pool: Option<Pool>,
}

impl Worker {
    fn carry_out(&mut self, command: Command) -> anyhow::Result<Reply> {
        match command {
            Command::Attach { socket, name, tcp_only } => self.attach(socket, name, tcp_only),
            Command::Pool { workload, seed, side } => self.make_pool(&workload, seed, side),
            Command::Release => self.release().map(|()| Reply::Done),
            Command::Fill { transfer } => {
                self.pool(Side::Source)?.fill(transfer);
                Ok(Reply::Done)
            }
            Command::Clear => {
                self.pool(Side::Sink)?.clear();
                Ok(Reply::Done)
            }
            Command::Sabotage { how, transfer } => {
                self.pool(Side::Sink)?.sabotage(how, transfer)?;
                Ok(Reply::Done)
            }
            Command::Verify { transfer } => {
                let pool = self.pool(Side::Sink)?;
                Ok(Reply::Verdict(verify::verify(&pool.plan, &pool.bytes(), transfer)))
            }
            Command::Tally { transfer, later } => {
                let pool = self.pool(Side::Sink)?;
                Ok(Reply::Tally(verify::tally(&pool.plan, &pool.bytes(), transfer, later)))
            }
            Command::Transfer { order } => {
                moves::replay(self.engine()?, self.pool.as_ref().context("there is no pool")?, &order)
                    .map(Reply::Moved)
            }
            Command::Start { order } => self.start(&order),
            Command::Cancel => self.cancel(),
            Command::Wait => self.wait(),
            Command::RawSink { bytes } => {
                limits::serve_socket_sink(bytes).map(|port| Reply::Listening { port })
            }
            Command::Quit => Ok(Reply::Done),
        }
    }

    fn attach(&mut self, socket: std::path::PathBuf, name: String, tcp_only: bool) -> anyhow::Result<Reply> {
        ensure!(self.engine.is_none(), "already attached");
        let transports = if tcp_only { vec![Path::Tcp] } else { Vec::new() };
        let engine = Engine::attach(EngineOptions { socket, name, transports, ..EngineOptions::default() })?;
        let session = engine.session_id().to_owned();
        self.engine = Some(engine);
        Ok(Reply::Attached { session })
    }

    fn engine(&self) -> anyhow::Result<&Engine> {
        self.engine.as_ref().context("not attached")
    }

    fn pool(&mut self, side: Side) -> anyhow::Result<&mut Pool> {
        let pool = self.pool.as_mut().context("there is no pool")?;
        ensure!(pool.side == side, "the pool is a {:?}, not a {side:?}", pool.side);
        Ok(pool)
    }

    fn make_pool(&mut self, workload: &str, seed: u64, side: Side) -> anyhow::Result<Reply> {
        ensure!(self.pool.is_none(), "there is a pool already");
        let pool = Pool::new(workloads::plan(workload, seed)?, side)?;
        let regions = self.engine()?.register(&pool.memory())?;
        self.regions = regions.iter().map(|region| region.id).collect();
        Ok(Reply::Pool { bases: self.pool.insert(pool).bases.clone() })
    }

    /// Memory is freed only when the daemon says that nothing can touch it any more.
    fn release(&mut self) -> anyhow::Result<()> {
        let regions = std::mem::take(&mut self.regions);
        if let (Some(engine), false) = (&self.engine, regions.is_empty()) {
            let settlement = engine.unregister(&regions)?;
            ensure!(settlement == Settlement::Settled, "the regions are still in use");
        }
        self.pool = None;
        Ok(())
    }

    fn start(&mut self, order: &Order) -> anyhow::Result<Reply> {
        ensure!(self.started.is_none(), "a transfer is under way already");
        let pool = self.pool.as_ref().context("there is no pool")?;
        let call = moves::transfers(pool, order)?.into_iter().next().context("the plan has no calls")?;
        let pending = self.engine()?.submit(call)?;
        self.started = Some((pending.id(), pending));
        Ok(Reply::Done)
    }

    fn cancel(&mut self) -> anyhow::Result<Reply> {
        let (id, _) = self.started.as_ref().context("no transfer is under way")?;
        let settlement = self.engine()?.cancel(*id)?;
        Ok(Reply::Cancelled { settled: settlement == Settlement::Settled })
    }

    fn wait(&mut self) -> anyhow::Result<Reply> {
        let (_, pending) = self.started.take().context("no transfer is under way")?;
        let report = pending.wait()?;
        let ns = report.total.as_nanos() as u64;
        moves::sum(&[report], ns).map(Reply::Moved).context("a transfer without a report")
    }
}

//! `kvferry demo`: real workloads between real processes on this machine, every byte checked.
//!
//! Two daemons and their engines start on loopback; four workloads go across the daemons over tcp and through
//! one daemon locally; three acts show what kvferry is for. Limits are measured first and freed, and one pair
//! of engines lives at a time, so that memory stays within a few pools.

mod acts;
mod table;

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

use crate::{
    bench::{limits::Limit, stats::median},
    children::Children,
    daemon::{self, Daemon},
    pair::{Pair, Sockets},
    proxy::Proxy,
    worker::protocol::{Direction, End, Sabotage, Way},
    workloads,
};
use acts::Stage;
use table::{Progress, Row};

const WORKLOADS: [&str; 4] = ["W2", "W3", "W1c", "aux"];
/// The acts need a transfer that lasts.
const ACT_WORKLOAD: &str = "W2";
/// Replays of a workload and of its limit; the median is shown.
const REPLAYS: u32 = 3;
/// Workloads over two paths, three acts.
const STEPS: u64 = 2 * WORKLOADS.len() as u64 + 3;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Plant one error in a receiver; the demo must find it and exit 1
    #[arg(long, value_enum)]
    sabotage: Option<Sabotage>,
    /// The daemon to start; default: kvferryd beside this command
    #[arg(long, value_name = "PATH")]
    kvferryd: Option<PathBuf>,
}

/// The running demo. `transfer` numbers every content, so none is ever mistaken for another.
struct Demo<'a> {
    children: &'a Children,
    progress: Progress,
    sabotage: Option<Sabotage>,
    transfer: u64,
    rows: Vec<Row>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let children = Children::new()?;
    let program = daemon::program(args.kvferryd.as_deref())?;
    let first = Daemon::start(&children, &program, "a")?;
    let second = Daemon::start(&children, &program, "b")?;
    let progress = Progress::new(STEPS);
    progress.tell(&format!(
        "two daemons, pids {} and {}; engines are processes of their own",
        first.pid(),
        second.pid()
    ));
    let mut demo =
        Demo { children: &children, progress, sabotage: args.sabotage, transfer: 0, rows: Vec::new() };
    if let Err(error) = demo.play(&first, &second) {
        drop(demo);
        // A planted error is the demo's own; for any other the daemons' last words help.
        if args.sabotage.is_none() {
            eprintln!("daemon a:\n{}\ndaemon b:\n{}", first.tail(), second.tail());
        }
        return Err(error);
    }
    let Demo { rows, progress, .. } = demo;
    drop(progress);
    println!("{}", table::table(&rows));
    ensure!(first.stop() & second.stop(), "a daemon had to be killed at the end");
    Ok(())
}

impl Demo<'_> {
    fn play(&mut self, first: &Daemon<'_>, second: &Daemon<'_>) -> anyhow::Result<()> {
        self.workloads(Way::Tcp, first, second)?;
        self.acts(first, second)?;
        self.workloads(Way::Local, first, first)
    }

    fn next_transfer(&mut self) -> u64 {
        self.transfer += 1;
        self.transfer
    }

    fn workloads(&mut self, way: Way, from: &Daemon<'_>, to: &Daemon<'_>) -> anyhow::Result<()> {
        let daemons = if way == Way::Local { vec![from.pid()] } else { vec![from.pid(), to.pid()] };
        let mut pair = start_pair(self.children, from, to)?;
        for workload in WORKLOADS {
            self.progress.step(&format!("{workload} over {way}"));
            let row = self
                .workload(workload, way, &daemons, &mut pair)
                .with_context(|| format!("{workload} over {way}"))?;
            self.rows.push(row);
        }
        pair.quit();
        Ok(())
    }

    fn workload(
        &mut self,
        workload: &'static str,
        way: Way,
        daemons: &[i32],
        pair: &mut Pair<'_>,
    ) -> anyhow::Result<Row> {
        let limit_ns = self.limit(workload, way)?;
        let transfer = self.next_transfer();
        pair.load(workload)?;
        pair.prepare(transfer)?;
        let moved = pair.transfer(REPLAYS)?;
        ensure!(moved.end == End::Done, "the transfer ended {}", moved.end);
        ensure!(moved.path == way, "the transfer went over {}", moved.path);
        // One error is planted, in the first receiver.
        if let Some(how) = self.sabotage.take() {
            pair.sabotage(how, transfer)?;
        }
        let verdict = pair.verify(transfer)?;
        if !verdict.is_clean() {
            bail!("the receiver found {verdict}");
        }
        pair.release()?;
        let (slices, bytes) = table::per_replay(&moved);
        let (sender, receiver) = pair.pids();
        let pids = [&[sender], daemons, &[receiver]].concat();
        Ok(Row { workload, path: way, pids, slices, bytes, ns: median(&moved.ns), limit_ns, verdict })
    }

    /// Measured and freed before the engines make their pools.
    fn limit(&self, workload: &str, way: Way) -> anyhow::Result<f64> {
        let mut limit = Limit::new(self.children, way, &workloads::plan(workload, 1)?)?;
        limit.measure()?;
        let ns = (0..REPLAYS).map(|_| limit.measure()).collect::<anyhow::Result<Vec<_>>>()?;
        limit.finish();
        Ok(median(&ns))
    }

    /// A pair of its own: a second address for a target would fence the sessions of the first.
    fn acts(&mut self, first: &Daemon<'_>, second: &Daemon<'_>) -> anyhow::Result<()> {
        let mut pair = start_pair(self.children, first, second)?;
        let proxy = Proxy::start(pair.session().parse().context("the session id is no host:port")?)?;
        pair.address_by(proxy.address().to_string());
        pair.load(ACT_WORKLOAD)?;
        let bytes = workloads::plan(ACT_WORKLOAD, 1)?.bytes();
        let mut stage = Stage { pair: &mut pair, proxy: &proxy, bytes };

        self.progress.step("act 1: the connection is cut in mid-transfer");
        let told = stage.cut(self.next_transfer()).context("act 1")?;
        self.progress.tell(&told);
        self.progress.step("act 2: a transfer is cancelled half-way and its source overwritten");
        let (transfer, later) = (self.next_transfer(), self.next_transfer());
        let told = stage.cancel(transfer, later).context("act 2")?;
        self.progress.tell(&told);
        self.progress.step("act 3: the target daemon stops answering");
        let told = stage.stop(self.next_transfer(), second).context("act 3")?;
        self.progress.tell(&told);
        pair.quit();
        Ok(())
    }
}

fn start_pair<'a>(children: &'a Children, from: &Daemon<'_>, to: &Daemon<'_>) -> anyhow::Result<Pair<'a>> {
    let sockets = Sockets { initiator: from.socket(), target: to.socket(), tcp_only: false };
    Pair::start(children, sockets, Direction::Write)
}

//! `kvferry bench`: any workload over one path, beside the raw limit of that path.
//!
//! Limit and kvferry alternate (limit, kvferry, limit, ...) in one run on one machine: a figure from another
//! moment is no yardstick. Every byte is verified before and after the timed runs.

pub(crate) mod limits;
mod report;
pub(crate) mod stats;

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::{
    children::Children,
    daemon::{self, Daemon},
    pair::{Pair, Sockets},
    worker::protocol::{Direction, End, Way},
    workloads,
};
use limits::Limit;
use report::{BenchReport, Cell};
use stats::{Comparison, Pairing, median};

const ALL: &str = "all";
/// Sizes that it adds to the recorded workloads.
const SIZES: [&str; 5] = ["4KiB", "64KiB", "1MiB", "16MiB", "256MiB"];
/// Transfers up to this size are judged by latency: many calls a pair, and the median of each side.
const SMALL_BYTES: u64 = 64 << 10;
/// Calls of a small size on each side, over all pairs.
const SMALL_CALLS: u32 = 2000;
/// Untimed runs of both before the first pair: sessions, lanes and page tables are made once.
const WARM_UP: u32 = 2;
/// Share of the free memory that a workload may use.
const MEMORY_SHARE: f64 = 0.8;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// local: both engines at one daemon; tcp: at two
    #[arg(long, value_enum, default_value = "tcp")]
    path: Way,
    /// W1 W1b W1c W2 W3 W4 W5 aux, a full name of workloads.json, a size such as 4KiB, or all
    #[arg(long, default_value = ALL, value_parser = workload_name)]
    workload: String,
    #[arg(long, value_enum, default_value = "write")]
    op: Direction,
    /// Pairs (raw limit, kvferry) per workload
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pairs: u32,
    /// Write the results here as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Use this running daemon for both engines (over tcp too) instead of starting daemons
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// With --socket: the target engine's daemon
    #[arg(long, value_name = "PATH", requires = "socket")]
    target_socket: Option<PathBuf>,
    /// The daemon to start; default: kvferryd beside this command
    #[arg(long, value_name = "PATH")]
    kvferryd: Option<PathBuf>,
}

/// A mistyped name is a mistake of usage, found before anything is started.
fn workload_name(text: &str) -> Result<String, workloads::WorkloadError> {
    if text != ALL {
        workloads::plan(text, 1)?;
    }
    Ok(text.to_owned())
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let names = match args.workload.as_str() {
        ALL => workloads::names()?.into_iter().chain(SIZES.map(str::to_owned)).collect(),
        name => vec![name.to_owned()],
    };
    let children = Children::new()?;
    let daemons = start_daemons(args, &children)?;
    let sockets = sockets(args, &daemons)?;
    let mut report = BenchReport::new(args.path, args.op);
    for name in &names {
        bench_one(args, &children, sockets, name, &mut report)?;
    }
    daemons.into_iter().for_each(|daemon| {
        daemon.stop();
    });
    println!("{}", report.table());
    report.skipped.iter().for_each(|line| println!("skipped {line}"));
    args.json.as_deref().map_or(Ok(()), |file| report.write_json(file))
}

/// None with `--socket`, one for local, two for tcp.
fn start_daemons<'a>(args: &Args, children: &'a Children) -> anyhow::Result<Vec<Daemon<'a>>> {
    if args.socket.is_some() {
        return Ok(Vec::new());
    }
    let program = daemon::program(args.kvferryd.as_deref())?;
    let names: &[&str] = if args.path == Way::Local { &["a"] } else { &["a", "b"] };
    names.iter().map(|name| Daemon::start(children, &program, name)).collect()
}

fn sockets<'a>(args: &'a Args, daemons: &'a [Daemon<'_>]) -> anyhow::Result<Sockets<'a>> {
    let own = args.socket.as_deref().or_else(|| daemons.first().map(Daemon::socket)).context("no daemon")?;
    let other: &Path =
        args.target_socket.as_deref().or_else(|| daemons.get(1).map(Daemon::socket)).unwrap_or(own);
    Ok(Sockets { initiator: own, target: other, tcp_only: args.path == Way::Tcp && own == other })
}

/// Runs one workload, or notes why it was skipped. The engines are new each time: their memory differs.
fn bench_one(
    args: &Args,
    children: &Children,
    sockets: Sockets<'_>,
    name: &str,
    report: &mut BenchReport,
) -> anyhow::Result<()> {
    let plan = workloads::plan(name, 1)?;
    let pools: u64 = plan.source.iter().chain(&plan.sink).sum();
    let needed = pools + Limit::footprint(args.path, &plan);
    let free = free_memory()?;
    if needed as f64 > free as f64 * MEMORY_SHARE {
        report.skipped.push(format!(
            "{name}: needs {} MiB of memory, {} MiB are free",
            needed >> 20,
            free >> 20
        ));
        return Ok(());
    }
    eprintln!("{}: {} slices, {} bytes", workloads::short(name), plan.slices.len(), plan.bytes());
    let mut limit = Limit::new(children, args.path, &plan)?;
    let mut pair = Pair::start(children, sockets, args.op)?;
    pair.load(name)?;
    let (pairs, repeat) = rounds(plan.bytes(), args.pairs);
    let series = measure(args.path, &mut pair, &mut limit, pairs, repeat)
        .with_context(|| format!("{name} over {}", args.path))?;
    pair.quit();
    limit.finish();
    let comparison = Comparison::of(&series).context("no pairs")?;
    let target = report::target(args.path, name);
    report.cells.push(Cell {
        workload: name.to_owned(),
        slices: plan.slices.len(),
        calls: plan.calls.len(),
        bytes: plan.bytes(),
        pairs: series.len(),
        repeat,
        comparison,
        target,
        judgement: report::judge(target, &comparison),
        verified_bytes: plan.bytes(),
        load: report::load(),
    });
    Ok(())
}

/// Pairs, and runs of each side in a pair. Small sizes need thousands of calls to have a median worth comparing.
fn rounds(bytes: u64, pairs: u32) -> (u32, u32) {
    if bytes <= SMALL_BYTES { (pairs, SMALL_CALLS.div_ceil(pairs)) } else { (pairs, 1) }
}

/// `pairs` timed pairs between two checks of every byte.
fn measure(
    path: Way,
    pair: &mut Pair<'_>,
    limit: &mut Limit<'_>,
    pairs: u32,
    repeat: u32,
) -> anyhow::Result<Vec<Pairing>> {
    const TRANSFER: u64 = 1;
    pair.prepare(TRANSFER)?;
    transfer(pair, path, WARM_UP)?;
    for _ in 0..WARM_UP {
        limit.measure()?;
    }
    let before = pair.verify(TRANSFER)?;
    ensure!(before.is_clean(), "wrong bytes before the timed runs: {before}");
    let mut series = Vec::with_capacity(pairs as usize);
    for _ in 0..pairs {
        let raw = (0..repeat).map(|_| limit.measure()).collect::<anyhow::Result<Vec<_>>>()?;
        let ours = transfer(pair, path, repeat)?;
        series.push(Pairing { limit: median(&raw), kvferry: median(&ours) });
    }
    let after = pair.verify(TRANSFER)?;
    ensure!(after.is_clean(), "wrong bytes after the timed runs: {after}");
    Ok(series)
}

/// ns of each repetition; anything but DONE over the expected path is an error.
fn transfer(pair: &mut Pair<'_>, path: Way, repeat: u32) -> anyhow::Result<Vec<u64>> {
    let moved = pair.transfer(repeat)?;
    ensure!(moved.end == End::Done, "the transfer ended {}", moved.end);
    ensure!(moved.path == path, "the transfer went over {}, not {path}", moved.path);
    Ok(moved.ns)
}

/// What the kernel says could be allocated without swapping, bytes.
fn free_memory() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo cannot be read")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_sizes_get_two_thousand_calls_whatever_the_pairs() {
        for pairs in [1, 9, 20, 3000] {
            let (pairs, repeat) = rounds(4096, pairs);
            assert!(pairs * repeat >= SMALL_CALLS);
        }
        assert_eq!(rounds(1 << 20, 9), (9, 1));
    }
}

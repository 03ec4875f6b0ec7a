//! From a plan to calls on the client library, and from its reports to one answer.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use anyhow::{Context, ensure};
use kvferry_client::{Engine, Lengths, Op, Policy, Report, Slices, Transfer};

use super::{
    pool::Pool,
    protocol::{Direction, End, Moved, Order, Side, Way},
};
use crate::workloads::Slice;

/// The transfers that replay the pool's plan once, one per call of the recorded engine.
///
/// Made before the clock starts: making slice lists is the engine's own cost on every transfer path.
pub(crate) fn transfers(pool: &Pool, order: &Order) -> anyhow::Result<Vec<Transfer>> {
    let (side, peer) = match order.direction {
        Direction::Write => (Side::Source, &pool.plan.sink),
        Direction::Read => (Side::Sink, &pool.plan.source),
    };
    ensure!(pool.side == side, "a {:?} needs a {side:?} pool here", order.direction);
    ensure!(
        order.remote.len() == peer.len(),
        "the peer has {} buffers, not {}",
        peer.len(),
        order.remote.len()
    );
    let one = |range: &std::ops::Range<usize>| Transfer {
        session: order.session.clone(),
        op: match order.direction {
            Direction::Write => Op::Write,
            Direction::Read => Op::Read,
        },
        slices: columns(pool, &order.remote, &pool.plan.slices[range.clone()]),
        tag: None,
        deadline: None,
        policy: Policy { attempts: order.attempts, ..Policy::default() },
        id: None,
    };
    Ok(pool.plan.calls.iter().map(one).collect())
}

fn columns(pool: &Pool, remote: &[u64], slices: &[Slice]) -> Slices {
    let source = |slice: &Slice, bases: &[u64]| bases[slice.source_buffer as usize] + slice.source_offset;
    let sink = |slice: &Slice, bases: &[u64]| bases[slice.sink_buffer as usize] + slice.sink_offset;
    let uniform = slices.windows(2).all(|pair| pair[0].length == pair[1].length);
    let (local, remote) = slices
        .iter()
        .map(|slice| match pool.side {
            Side::Source => (source(slice, &pool.bases), sink(slice, remote)),
            Side::Sink => (sink(slice, &pool.bases), source(slice, remote)),
        })
        .unzip();
    let lengths = match slices.first() {
        Some(first) if uniform => Lengths::Uniform(first.length),
        _ => Lengths::Each(slices.iter().map(|slice| slice.length).collect()),
    };
    Slices { local, remote, lengths }
}

/// Replays the plan `order.repeat` times; stops at the first repetition that does not end DONE.
pub(crate) fn replay(engine: &Engine, pool: &Pool, order: &Order) -> anyhow::Result<Moved> {
    let calls = transfers(pool, order)?;
    let mut total: Option<Moved> = None;
    for _ in 0..order.repeat.max(1) {
        let calls = calls.clone();
        let start = Instant::now();
        let reports = run(engine, &calls, pool.plan.threads)?;
        let ns = start.elapsed().as_nanos() as u64;
        let moved = sum(&reports, ns).context("the plan has no calls")?;
        total = Some(match total {
            Some(total) => add(total, moved),
            None => moved,
        });
        if total.as_ref().is_some_and(|total| total.end != End::Done) {
            break;
        }
    }
    total.context("nothing was replayed")
}

/// Makes the calls from as many threads as the recorded engine did.
fn run(engine: &Engine, calls: &[Transfer], threads: usize) -> anyhow::Result<Vec<Report>> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<Report>, kvferry_client::Error> {
        let mut reports = Vec::new();
        while let Some(call) = calls.get(next.fetch_add(1, Ordering::Relaxed)) {
            reports.push(engine.transfer(call.clone())?);
        }
        Ok(reports)
    };
    // The usual single caller stays on this thread: a thread per replay would be measured with small sizes.
    if threads <= 1 {
        return Ok(work()?);
    }
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut reports = Vec::new();
        for thread in running {
            let done = thread.join().map_err(|_| anyhow::anyhow!("a calling thread panicked"))?;
            reports.extend(done?);
        }
        Ok(reports)
    })
}

/// One replay's answer; None if there were no calls. The first call that is not DONE speaks for all.
pub(crate) fn sum(reports: &[Report], ns: u64) -> Option<Moved> {
    let first = reports.first()?;
    let telling = reports.iter().find(|report| End::of(report) != End::Done).unwrap_or(first);
    Some(Moved {
        end: End::of(telling),
        slices: reports.iter().map(|report| report.slices_done).sum(),
        bytes: reports.iter().map(|report| report.bytes_done).sum(),
        bytes_resent: reports.iter().map(|report| report.bytes_resent).sum(),
        attempts: reports.iter().map(|report| report.attempts).max().unwrap_or(0),
        peer_confirmed: reports.iter().all(|report| report.peer_confirmed),
        path: Way::from(telling.path),
        ns: vec![ns],
    })
}

fn add(mut total: Moved, more: Moved) -> Moved {
    total.slices += more.slices;
    total.bytes += more.bytes;
    total.bytes_resent += more.bytes_resent;
    total.attempts = total.attempts.max(more.attempts);
    total.peer_confirmed &= more.peer_confirmed;
    total.end = more.end;
    total.path = more.path;
    total.ns.extend(more.ns);
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads;

    fn order(direction: Direction, buffers: usize) -> Order {
        let remote = (1..=buffers as u64).map(|at| at << 40).collect();
        Order { session: "h:1".into(), direction, remote, attempts: None, repeat: 1 }
    }

    #[test]
    fn a_write_goes_from_the_local_source_to_the_remote_sink_and_a_read_back() {
        let plan = workloads::plan("aux", 3).unwrap();
        for (side, direction) in [(Side::Source, Direction::Write), (Side::Sink, Direction::Read)] {
            let pool = Pool::new(plan.clone(), side).unwrap();
            let calls = transfers(&pool, &order(direction, 10)).unwrap();
            let [call] = calls.as_slice() else { panic!("aux is one call") };
            for (at, slice) in plan.slices.iter().enumerate() {
                let (mine, theirs) = match side {
                    Side::Source => (slice.source_offset, slice.sink_offset),
                    Side::Sink => (slice.sink_offset, slice.source_offset),
                };
                assert_eq!(call.slices.local[at], pool.bases[at] + mine);
                assert_eq!(call.slices.remote[at], ((at as u64 + 1) << 40) + theirs);
            }
            assert!(matches!(&call.slices.lengths, Lengths::Each(each) if each.len() == 10));
        }
    }

    #[test]
    fn the_wrong_half_or_the_wrong_peer_is_refused() {
        let pool = Pool::new(workloads::plan("aux", 3).unwrap(), Side::Source).unwrap();
        assert!(transfers(&pool, &order(Direction::Read, 10)).is_err());
        assert!(transfers(&pool, &order(Direction::Write, 9)).is_err());
    }
}

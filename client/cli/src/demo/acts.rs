//! The three acts: a connection is cut, a transfer is cancelled, a daemon stops answering.
//!
//! All three go through one proxy, because "in mid-transfer" must be a fact and not a lucky moment: the proxy
//! counts bytes, slows down and cuts where the act needs it. An act that does not end as promised is an error.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kvferry_client::Reason;

use super::table::mb;
use crate::{
    daemon::Daemon,
    pair::Pair,
    proxy::Proxy,
    worker::protocol::{End, Moved},
};

/// Slow enough that half-way lasts, fast enough not to bore: W2 takes two seconds.
const SLOW: u64 = 150_000_000;
const HALF_WAY_WITHIN: Duration = Duration::from_secs(20);
/// Nothing under way survives so long a silence of the proxy.
const QUIET: Duration = Duration::from_millis(300);
const QUIET_WITHIN: Duration = Duration::from_secs(5);
/// "Within seconds": silence (3 s), confirmation of the fence, a margin for a busy machine.
const VERDICT_WITHIN: Duration = Duration::from_secs(10);

/// A loaded pair whose initiator reaches its target through the proxy.
#[derive(Debug)]
pub(crate) struct Stage<'a, 'b> {
    pub(crate) pair: &'b mut Pair<'a>,
    pub(crate) proxy: &'b Proxy,
    /// Payload of the plan.
    pub(crate) bytes: u64,
}

impl Stage<'_, '_> {
    /// Act 1: data connections die half-way; only what was not acknowledged is sent again.
    pub(crate) fn cut(&mut self, transfer: u64) -> anyhow::Result<String> {
        let half = self.bytes / 2;
        self.pair.prepare(transfer)?;
        self.proxy.cut_after(half);
        let moved = self.pair.transfer(1)?;
        ensure!(moved.end == End::Done, "the cut transfer did not recover: it ended {}", moved.end);
        ensure!(self.proxy.has_cut(), "the transfer ended before the connection could be cut");
        let verdict = self.pair.verify(transfer)?;
        ensure!(verdict.is_clean(), "the recovered transfer left wrong bytes: {verdict}");
        ensure!(
            (1..half).contains(&moved.bytes_resent),
            "{} were sent again of the {} that had gone before the cut",
            mb(moved.bytes_resent),
            mb(half)
        );
        Ok(format!(
            "connection cut after {} of {}: recovered, {} sent again, {} bytes verified, 0 stray",
            mb(half),
            mb(self.bytes),
            mb(moved.bytes_resent),
            verdict.verified
        ))
    }

    /// Act 2: cancelled half-way; the source is overwritten the moment the cancel is settled.
    pub(crate) fn cancel(&mut self, transfer: u64, later: u64) -> anyhow::Result<String> {
        self.pair.prepare(transfer)?;
        self.start_and_reach(self.bytes / 2, None)?;
        let start = Instant::now();
        ensure!(self.pair.cancel()?, "the cancel could not be settled");
        let took = start.elapsed();
        self.pair.overwrite(later)?;
        let moved = self.pair.wait()?;
        ensure!(moved.end == End::Cancelled, "the cancelled transfer ended {}", moved.end);
        let at_once = self.pair.tally(transfer, later)?;
        // Whatever still is on the way gets every chance to arrive.
        self.proxy.limit_rate(0);
        ensure!(self.proxy.wait_quiet(QUIET, QUIET_WITHIN), "the proxy is still busy long after the cancel");
        let finally = self.pair.tally(transfer, later)?;
        ensure!(finally.later == 0, "{} late bytes reached the target after the cancel", finally.later);
        ensure!(finally.stray == 0, "{} stray bytes after the cancel", finally.stray);
        ensure!(
            !moved.peer_confirmed || at_once.digest == finally.digest,
            "the target's memory changed after the cancel was confirmed"
        );
        Ok(format!(
            "cancelled half-way: settled in {:.1} ms, {} had arrived, source overwritten at once, 0 late bytes{}",
            took.as_secs_f64() * 1e3,
            mb(finally.arrived),
            if moved.peer_confirmed { ", target's half confirmed" } else { "" }
        ))
    }

    /// Act 3: the target daemon is stopped in mid-transfer. One attempt, so that the verdict is not a retry's.
    pub(crate) fn stop(&mut self, transfer: u64, target: &Daemon<'_>) -> anyhow::Result<String> {
        self.pair.prepare(transfer)?;
        self.start_and_reach(self.bytes / 4, Some(1))?;
        let paused = target.pause()?;
        let start = Instant::now();
        let moved = self.pair.wait();
        let took = start.elapsed();
        drop(paused);
        self.proxy.limit_rate(0);
        let moved = moved?;
        ensure!(is_verdict(&moved), "the transfer to a stopped daemon ended {}", moved.end);
        ensure!(took < VERDICT_WITHIN, "the verdict on a stopped daemon took {took:.1?}");
        Ok(format!("target daemon stopped: {} after {:.1} s", moved.end, took.as_secs_f64()))
    }

    /// Starts the transfer at a rate that can be watched and returns when so many bytes have passed.
    fn start_and_reach(&mut self, bytes: u64, attempts: Option<u32>) -> anyhow::Result<()> {
        let goal = self.proxy.forwarded() + bytes;
        self.proxy.limit_rate(SLOW);
        self.pair.start_transfer(attempts)?;
        self.proxy
            .wait_forwarded(goal, HALF_WAY_WITHIN)
            .then_some(())
            .context("the transfer makes no progress")
    }
}

/// A transfer that could still touch the caller's memory must not be called FAILED, but either is a verdict.
fn is_verdict(moved: &Moved) -> bool {
    matches!(moved.end, End::Failed { .. } | End::Unsettled { .. })
        && moved.end.reason() == Reason::PeerSilent
}

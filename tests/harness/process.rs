//! Signals to one process, and what the kernel says about it.

use std::{fs, time::Duration};

use anyhow::Context;
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

/// A process by its id. Only ever made of ids of processes that the harness started and not yet reaped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process(pub u32);

impl Process {
    /// Sends a signal.
    pub fn signal(self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.0).ok().and_then(Pid::from_raw).context("no process id")?;
        kill_process(pid, signal).with_context(|| format!("signal {signal:?} to {}", self.0))
    }

    /// Processor time used so far, user and system, all threads.
    pub fn cpu(self) -> anyhow::Result<Duration> {
        // utime and stime are fields 14 and 15, counted from 1.
        let ticks = self.stat(14)? + self.stat(15)?;
        let a_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_millis(ticks * 1000 / a_second))
    }

    /// Threads alive now.
    pub fn threads(self) -> anyhow::Result<u64> {
        self.stat(20)
    }

    /// Open file descriptors.
    pub fn descriptors(self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.0))?.count())
    }

    /// Private and shared memory in RAM, bytes.
    pub fn resident(self) -> anyhow::Result<u64> {
        let pages = fs::read_to_string(format!("/proc/{}/statm", self.0))?;
        let pages: u64 = pages.split(' ').nth(1).context("statm has no second field")?.parse()?;
        Ok(pages * rustix::param::page_size() as u64)
    }

    fn stat(self, field: usize) -> anyhow::Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        // The name in parentheses may hold spaces and parentheses; what follows its end starts at field 3.
        let (_, rest) = stat.rsplit_once(") ").context("stat names no program")?;
        let value = rest.split(' ').nth(field - 3).context("stat is too short")?;
        Ok(value.parse()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_sees_itself() {
        let own = Process(std::process::id());
        assert!(own.threads().unwrap() >= 1);
        assert!(own.descriptors().unwrap() >= 3);
        assert!(own.resident().unwrap() > 64 * 1024);
        crate::eventually("work costs time", Duration::from_secs(20), || {
            std::hint::black_box((0..5_000_000u64).fold(0, |a, b| a ^ b.wrapping_mul(a | 1)));
            own.cpu().unwrap() > Duration::ZERO
        });
    }
}

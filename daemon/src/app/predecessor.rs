//! Proof that the daemon before this one has exited, before anything of this one starts.
//!
//! A lock on a file is not that proof: the kernel lets go of it while a killed process is still on its way out,
//! and a thread of it may yet finish a copy into an engine's memory. So each daemon records which process it is,
//! and the next one waits for that process, by a pidfd, which becomes readable only when its last thread is gone.
//! A process id alone proves nothing: it counts with the process's start time, within one pid namespace of one
//! boot of the kernel. Where the two daemons do not share those (containers), the held lock is all there is.

use std::{
    fmt, io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, PidfdFlags},
};

use crate::kernel::{self, start_time};

const HEADER: &str = "kvferry daemon 1";

/// Pause between two looks whether it has exited.
const LOOK: Duration = Duration::from_millis(10);

/// Which process a daemon is, or was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    kernel_boot: String,
    pid_namespace: String,
    pid: i32,
    /// Clock ticks after the kernel's boot, in whatever time namespace they are read.
    started: u64,
}

impl Identity {
    /// Of this process.
    pub(super) fn own() -> io::Result<Self> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let unknown = || io::Error::other("/proc does not say when this process started");
        Ok(Self {
            kernel_boot: kernel::boot_id()?,
            pid_namespace: std::fs::read_link("/proc/self/ns/pid")?.display().to_string(),
            pid,
            started: start_time(pid).ok_or_else(unknown)?,
        })
    }

    /// From a record; nothing where it is not one.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next()? != HEADER {
            return None;
        }
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        let identity = Self {
            kernel_boot: field("kernel-boot")?.to_owned(),
            pid_namespace: field("pid-namespace")?.to_owned(),
            pid: field("pid")?.parse().ok().filter(|pid| *pid > 0)?,
            started: field("started")?.parse().ok()?,
        };
        Some(identity)
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until the process has exited, as far as `own` can tell it from here. Returns whether it has by `end`.
    pub(super) async fn exited(&self, own: &Self, end: Instant) -> bool {
        if self.kernel_boot != own.kernel_boot || self.pid_namespace != own.pid_namespace {
            return true;
        }
        let process = match Pid::from_raw(self.pid).map(watch) {
            Some(Ok(process)) => process,
            Some(Err(Errno::SRCH)) | None => return true,
            Some(Err(error)) => {
                tracing::debug!(%error, "pidfd_open: the predecessor is watched through /proc");
                None
            }
        };
        // After the descriptor was had: if the start time is right now, it was the recorded process all along.
        if !self.runs() {
            return true;
        }
        loop {
            let gone = match &process {
                Some(process) => is_over(process),
                None => !self.runs(),
            };
            if gone || Instant::now() >= end {
                return gone;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether the process with this id is the recorded one. Within a tick: no process id comes round in that time.
    fn runs(&self) -> bool {
        start_time(self.pid).is_some_and(|started| started.abs_diff(self.started) <= 1)
    }
}

impl fmt::Display for Identity {
    /// The record.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel_boot, pid_namespace, pid, started } = self;
        write!(
            f,
            "{HEADER}\nkernel-boot {kernel_boot}\npid-namespace {pid_namespace}\npid {pid}\nstarted {started}\n"
        )
    }
}

fn watch(pid: Pid) -> Result<Option<OwnedFd>, Errno> {
    rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map(Some)
}

fn is_over(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut polled, Some(&at_once)), Ok(1..))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> (Child, Identity) {
        let child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = child.id().cast_signed();
        let started = start_time(pid).expect("it runs");
        (child, Identity { pid, started, ..Identity::own().expect("/proc") })
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[tokio::test]
    async fn a_process_has_exited_when_it_is_dead_and_not_before() {
        let own = Identity::own().expect("/proc");
        let (mut child, identity) = sleeper();
        assert!(!identity.exited(&own, soon()).await);
        child.kill().expect("killed");
        // Not reaped: its id and its entry in /proc are still there.
        assert!(identity.exited(&own, Instant::now() + Duration::from_secs(10)).await);
        child.wait().expect("reaped");
        assert!(identity.exited(&own, soon()).await);
    }

    #[tokio::test]
    async fn a_stranger_with_the_same_pid_is_not_waited_for() {
        let own = Identity::own().expect("/proc");
        let (mut child, identity) = sleeper();
        let others = [
            Identity { started: identity.started - 2, ..identity.clone() },
            Identity { kernel_boot: "another".into(), ..identity.clone() },
            Identity { pid_namespace: "pid:[1]".into(), ..identity.clone() },
        ];
        for other in others {
            assert!(other.exited(&own, soon()).await, "{other:?}");
        }
        child.kill().and_then(|()| child.wait()).expect("reaped");
    }

    #[test]
    fn a_record_comes_back_and_what_is_none_does_not() {
        let own = Identity::own().expect("/proc");
        let text = own.to_string();
        assert_eq!(Identity::parse(&text), Some(own));
        for at in 0..text.trim_end().len() {
            let cut = &text[..at];
            let parsed = Identity::parse(cut);
            assert!(parsed.is_none() || cut.contains("\nstarted "), "{cut:?}");
        }
        for (good, bad) in
            [("daemon 1", "daemon 2"), ("pid ", "pid -"), ("started ", "started x"), ("boot", "b")]
        {
            assert_eq!(Identity::parse(&text.replace(good, bad)), None, "{bad}");
        }
    }
}

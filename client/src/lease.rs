//! One attachment to one run of the daemon: who we are there, and whether it still holds.
//!
//! The daemon being *gone* and it being *proven gone* are two things. A socket closes while its process is
//! still about to write into our memory; only a process that has exited entirely touches nothing any more.
//! So a lost daemon makes transfers UNSETTLED, and FAILED only once its pidfd says that it has exited, or the
//! engine is attached again: a daemon starts only after its predecessor has exited, and one that lives releases
//! an engine's earlier attachment before it grants another.

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};
use tokio::{
    sync::{OnceCell, watch},
    time,
};
use tonic::{
    Request,
    metadata::{Binary, MetadataValue},
};

use crate::{Failure, Outcome, ProcessAccess, Reason, Report, Settlement, TransferId, assist::Assistant};

/// What the daemon takes at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Slices of one transfer. Larger batches are cut into several by this library.
    pub slices: u64,
    /// Slices of one message. Larger transfers are sent in chunks by this library.
    pub chunk_slices: u64,
    /// Live regions of an engine.
    pub regions: u64,
    /// Transfers of an engine under way at once.
    pub transfers: u64,
}

/// How long replies already on their way may still arrive after the lease has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// A process closes its sockets some milliseconds before it has exited: how long to wait for the latter.
const EXIT_WAIT: Duration = Duration::from_secs(1);
/// Pause between two looks whether it has.
const EXIT_LOOK: Duration = Duration::from_millis(5);
/// Pause between two looks whether a lost daemon is proven gone.
pub(crate) const PROOF_LOOK: Duration = Duration::from_millis(50);
/// How long a call whose own connection broke waits for the lease to notice as well.
const VERDICT_WAIT: Duration = Duration::from_secs(2);

/// Why a lease ended.
#[derive(Clone, Debug)]
pub(crate) struct Ending {
    /// For people.
    pub(crate) cause: String,
    /// The daemon keeps its connections and says nothing: no reply is on its way.
    pub(crate) silent: bool,
}

/// The facts of an attachment. They die with the daemon's boot.
#[derive(Debug)]
pub(crate) struct Lease {
    /// Counts this engine's attachments.
    pub(crate) number: u64,
    pub(crate) engine_id: u64,
    pub(crate) session_id: String,
    pub(crate) boot_id: [u8; 16],
    pub(crate) token: [u8; 32],
    pub(crate) token_metadata: MetadataValue<Binary>,
    pub(crate) limits: Limits,
    pub(crate) daemon_version: String,
    pub(crate) daemon_pid: u32,
    pub(crate) fd_socket: PathBuf,
    /// How the daemon reaches private memory.
    pub(crate) process_access: ProcessAccess,
    /// Where it needs one, and private memory was registered.
    pub(crate) assistant: OnceCell<Assistant>,
    pub(crate) process: DaemonProcess,
    pub(crate) ended: watch::Receiver<Option<Ending>>,
    /// The daemon said that it leaves.
    pub(crate) draining: AtomicBool,
    /// The engine is attached again: this attachment is released.
    pub(crate) released: AtomicBool,
}

/// What is known of the end of a lost daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// Its process has exited, or has released us: nobody on this node touches our memory for it.
    Exited,
    /// It may still run.
    Unproven,
}

impl Lease {
    /// A message of ours: the token says so.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert_bin(kvferry_proto::TOKEN_METADATA, self.token_metadata.clone());
        request
    }

    pub(crate) fn ending(&self) -> Option<Ending> {
        self.ended.borrow().clone()
    }

    /// Returns when no reply is to be expected any more.
    pub(crate) async fn over(&self) {
        let silent = self.wait_ended().await;
        if !silent {
            time::sleep(LAST_WORDS).await;
        }
    }

    /// Whether it ended in silence.
    pub(crate) async fn wait_ended(&self) -> bool {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(ending) => ending.as_ref().is_some_and(|ending| ending.silent),
            // The thread that would say so is gone: so is the lease.
            Err(_) => false,
        }
    }

    /// For a call that got no reply.
    pub(crate) async fn verdict(&self) -> Verdict {
        // Running into the limit means that only the call's own connection broke: nothing is proven then.
        let _noticed = time::timeout(VERDICT_WAIT, self.wait_ended()).await;
        self.standing()
    }

    /// Whether it is proven that nobody touches our memory for this attachment. Meaningful once it has ended.
    pub(crate) fn standing(&self) -> Verdict {
        let daemon_is_out = self.released.load(SeqCst) || self.process.has_exited();
        // What it had posted must not be done after this, by our own hand.
        if daemon_is_out && self.assistant.get().is_none_or(Assistant::retire) {
            Verdict::Exited
        } else {
            Verdict::Unproven
        }
    }

    /// Whether it has ended, or ends within a moment.
    pub(crate) async fn ends_soon(&self) -> bool {
        time::timeout(VERDICT_WAIT, self.wait_ended()).await.is_ok()
    }

    /// Whether the daemon leaves: by its own word, or because it is gone.
    pub(crate) async fn leaves(&self) -> bool {
        // Its word may come after an answer that it gave because of it.
        let said = async {
            while !self.draining.load(SeqCst) {
                time::sleep(PROOF_LOOK).await;
            }
        };
        tokio::select! {
            () = said => true,
            ended = self.ends_soon() => ended,
        }
    }
}

impl From<Verdict> for Settlement {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Exited => Self::Settled,
            Verdict::Unproven => Self::Unsettled,
        }
    }
}

impl Verdict {
    /// The end of a transfer that the daemon did not tell. Its peer half is unknown in any case.
    pub(crate) fn report(self, id: TransferId) -> Report {
        let (outcome, message) = match self {
            Self::Exited => {
                (Outcome::Failed, "the daemon of this node has exited, or has released this engine")
            }
            Self::Unproven => (
                Outcome::Unsettled,
                "the daemon of this node does not answer, and is not proven to have exited",
            ),
        };
        Report::untold(id, outcome, Failure::new(Reason::OwnDaemonGone, message))
    }
}

/// The daemon's process, where the kernel lets us watch it.
#[derive(Debug, Default)]
pub(crate) struct DaemonProcess(Option<OwnedFd>);

impl DaemonProcess {
    /// Without it (another pid namespace, an old kernel) an exit is never proven.
    pub(crate) fn open(pid: Pid) -> Self {
        let file = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK);
        Self(
            file.inspect_err(|error| {
                tracing::warn!(%error, "the daemon's process cannot be watched: its exit is never proven");
            })
            .ok(),
        )
    }

    /// Known to run. False where nothing is known.
    pub(crate) fn is_alive(&self) -> bool {
        self.0.is_some() && !self.has_exited()
    }

    pub(crate) fn has_exited(&self) -> bool {
        let Some(file) = &self.0 else { return false };
        let mut polled = [PollFd::new(file, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut polled, Some(&at_once)), Ok(1..))
    }

    /// Gives a daemon whose connection has ended a moment to exit. Asks again and again, because registering a
    /// pidfd with the runtime would take unsafe code for a wait of milliseconds once per lease.
    pub(crate) async fn wait_exit(&self) {
        let looks = EXIT_WAIT.as_millis() / EXIT_LOOK.as_millis();
        for _ in 0..looks {
            if self.0.is_none() || self.has_exited() {
                return;
            }
            time::sleep(EXIT_LOOK).await;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use super::*;

    /// Of a daemon whose process nobody can watch.
    pub(crate) fn lease(number: u64) -> Arc<Lease> {
        lost(number).1
    }

    /// The same, and what ends it.
    pub(crate) fn lost(number: u64) -> (watch::Sender<Option<Ending>>, Arc<Lease>) {
        let (end, ended) = watch::channel(None);
        let lease = Lease {
            number,
            engine_id: 1,
            session_id: "127.0.0.1:20000".into(),
            boot_id: [0; 16],
            token: [0; 32],
            token_metadata: MetadataValue::from_bytes(&[0; 32]),
            limits: Limits { slices: 1, chunk_slices: 1, regions: 1, transfers: 1 },
            daemon_version: String::new(),
            daemon_pid: 0,
            fd_socket: PathBuf::new(),
            process_access: ProcessAccess::Unspecified,
            assistant: OnceCell::new(),
            process: DaemonProcess::default(),
            ended,
            draining: AtomicBool::new(false),
            released: AtomicBool::new(false),
        };
        (end, Arc::new(lease))
    }
}

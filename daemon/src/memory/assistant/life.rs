//! Whether the process behind an assistant has ended: then no thread of it can be inside a copy any more.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::{FlockOperation, fcntl_lock},
};

use crate::domain::{Failure, Reason};

/// What tells.
#[derive(Debug)]
pub(super) enum Life {
    /// The process's pidfd: readable when its last thread has gone.
    Process(Arc<OwnedFd>),
    /// The ring's memfd, of which the engine holds a record lock: where its process cannot be seen from here (another
    /// pid namespace). The kernel lets go of such a lock when the process's last thread has left its memory and then
    /// closes its files; children do not inherit it.
    Lock(Arc<OwnedFd>),
}

impl Life {
    /// BAD_ARGUMENT where the only proof would be a lock, and the engine does not hold it.
    pub(super) fn of(process: Option<Arc<OwnedFd>>, ring: Arc<OwnedFd>) -> Result<Self, Failure> {
        if let Some(process) = process {
            return Ok(Self::Process(process));
        }
        let life = Self::Lock(ring);
        if life.has_ended() {
            let message = "the engine's process cannot be seen from here, and it does not lock its ring";
            return Err(Failure::new(Reason::BadArgument, message));
        }
        Ok(life)
    }

    /// Never true too early.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            Self::Process(pidfd) => {
                let mut polled = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
                let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
                matches!(rustix::event::poll(&mut polled, Some(&at_once)), Ok(1..))
            }
            Self::Lock(ring) => {
                let free = fcntl_lock(ring, FlockOperation::NonBlockingLockExclusive).is_ok();
                if free {
                    // Whoever asks next must find it free as well.
                    let _ = fcntl_lock(ring, FlockOperation::NonBlockingUnlock);
                }
                free
            }
        }
    }
}

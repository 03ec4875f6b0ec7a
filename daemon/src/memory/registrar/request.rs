//! What waits at the registrar: requests of engines, taken forward one driver call at a time.
//!
//! Synchronous and without a lock: a worker takes a request out of the queue, makes one step and puts it
//! back. A request that fails, or that nobody waits for any more, gives back what it got in the same way.

use std::{
    collections::VecDeque,
    mem,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
    time::Instant,
};

use tokio::sync::oneshot;

use super::{
    super::{Backing, ProcessMemory},
    RegionDriver, Shared,
    caller::Caller,
};
use crate::domain::Failure;

/// Memory to be made reachable: one driver call.
#[derive(Clone, Debug)]
pub enum Acquire {
    /// Map this much of a memfd.
    Shared {
        /// The memfd.
        fd: Arc<OwnedFd>,
        /// Where the range begins in it.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// See that the range is there.
    Process {
        /// The engine's memory.
        memory: Arc<ProcessMemory>,
        /// First address.
        base: u64,
        /// Bytes.
        length: u64,
    },
    /// Nothing: whoever asks has seen that the range is there.
    Probed {
        /// The engine's memory.
        memory: Arc<ProcessMemory>,
    },
}

impl Acquire {
    fn call(self, driver: &dyn RegionDriver) -> Result<Backing, Failure> {
        match self {
            Self::Shared { fd, offset, length } => {
                driver.map(fd.as_fd(), offset, length).map(Backing::Shared)
            }
            Self::Process { memory, base, length } => {
                driver.probe_process(&memory, base, length)?;
                Ok(Backing::Process(memory))
            }
            Self::Probed { memory } => Ok(Backing::Process(memory)),
        }
    }
}

/// Who goes first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Urgency {
    /// In turn with the others.
    Ordinary,
    /// The memory of a dead engine: ahead of all that is ordinary (I10).
    Dead,
}

/// What a request acquired. Dropped instead of taken, it goes back to the registrar: no driver call is made
/// where a future happened to be dropped (I7).
#[derive(Debug, Default)]
pub struct Grant {
    backings: Vec<Backing>,
    registrar: Weak<Shared>,
}

impl Grant {
    /// Takes over what was acquired, in the order asked for.
    pub fn into_backings(mut self) -> Vec<Backing> {
        mem::take(&mut self.backings)
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let backings = mem::take(&mut self.backings);
        if let Some(shared) = self.registrar.upgrade()
            && !backings.is_empty()
        {
            // Whoever asked is gone, most likely with its engine: so with the haste of the dead.
            shared.push(Request::release(backings, Urgency::Dead, oneshot::channel().0));
        }
    }
}

type Reply = oneshot::Sender<Result<Grant, Failure>>;

/// One engine call's worth of driver calls.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) urgency: Urgency,
    /// When it began to wait for its turn.
    pub(super) since: Instant,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// Calls to make, and what the earlier ones gave.
    Acquire { calls: VecDeque<Acquire>, made: Grant, reply: Reply },
    /// Taking back what a request got before it failed; then its answer.
    Rollback { made: Vec<Backing>, failure: Failure, reply: Reply },
    /// Releasing, then telling so.
    Release { backings: Vec<Backing>, done: oneshot::Sender<()> },
}

impl Request {
    pub(super) fn acquire(calls: Vec<Acquire>, registrar: Weak<Shared>, reply: Reply) -> Self {
        let made = Grant { backings: Vec::with_capacity(calls.len()), registrar };
        Self::new(Urgency::Ordinary, Work::Acquire { calls: calls.into(), made, reply })
    }

    pub(super) fn release(backings: Vec<Backing>, urgency: Urgency, done: oneshot::Sender<()>) -> Self {
        Self::new(urgency, Work::Release { backings, done })
    }

    fn new(urgency: Urgency, work: Work) -> Self {
        Self { urgency, since: Instant::now(), work }
    }

    /// Driver calls it still wants.
    pub(super) fn calls(&self) -> usize {
        match &self.work {
            Work::Acquire { calls, .. } => calls.len(),
            Work::Rollback { made, .. } => made.len(),
            Work::Release { backings, .. } => backings.len(),
        }
    }

    /// Makes at most one driver call. Gives the request back where more are to be made.
    pub(super) fn step(self, caller: &Caller) -> Option<Self> {
        let waited = self.since.elapsed();
        let work = match self.work {
            // Nobody waits any more: what was made goes back as a request of its own.
            Work::Acquire { reply, .. } if reply.is_closed() => None,
            Work::Acquire { mut calls, mut made, reply } => {
                let index = made.backings.len() as u64;
                match calls.pop_front().map(|call| caller.call(waited, |driver| call.call(driver))) {
                    Some(Ok(backing)) => made.backings.push(backing),
                    Some(Err(failure)) => {
                        let made = made.into_backings();
                        return Some(Self::new(
                            self.urgency,
                            Work::Rollback { made, failure: failure.at(index), reply },
                        ));
                    }
                    None => {}
                }
                acquired(calls, made, reply)
            }
            Work::Rollback { mut made, failure, reply } => match made.pop() {
                Some(backing) => {
                    release(backing, caller, waited);
                    Some(Work::Rollback { made, failure, reply })
                }
                None => {
                    // Fails where the caller stopped waiting, and then nobody needs the failure.
                    let _ = reply.send(Err(failure));
                    None
                }
            },
            Work::Release { mut backings, done } => match backings.pop() {
                Some(backing) => {
                    release(backing, caller, waited);
                    Some(Work::Release { backings, done })
                }
                None => {
                    // Fails where the caller stopped waiting, which is theirs to decide.
                    let _ = done.send(());
                    None
                }
            },
        };
        work.map(|work| Self::new(self.urgency, work))
    }
}

/// Answers where nothing is left to be made. A grant that nobody waits for goes back by being dropped, at once
/// and not after another turn.
fn acquired(calls: VecDeque<Acquire>, made: Grant, reply: Reply) -> Option<Work> {
    if reply.is_closed() {
        return None;
    }
    if calls.is_empty() {
        let _ = reply.send(Ok(made));
        return None;
    }
    Some(Work::Acquire { calls, made, reply })
}

fn release(backing: Backing, caller: &Caller, waited: std::time::Duration) {
    // A way into a process's memory costs no driver call: the last one to drop it closes its descriptor, or unmaps its
    // ring, which no device knows.
    let Backing::Shared(mapping) = backing else { return };
    let released = caller.call(waited, |driver| {
        driver.unmap(mapping);
        Ok(())
    });
    if let Err(failure) = released {
        // The mapping went with the call that was not made: better outside of the lock than not at all.
        tracing::error!(%failure, "memory was released without the registrar's lock");
    }
}

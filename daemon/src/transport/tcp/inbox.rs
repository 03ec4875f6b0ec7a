//! How sessions reach a lane's thread.

use std::{
    collections::VecDeque,
    fmt, io, mem,
    net::TcpStream,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::event::{EventfdFlags, eventfd};

use super::role::Role;
use crate::{
    domain::Failure,
    transport::{SequencedPart, ending::Ending},
};

/// A lane with its connection. Dropped from top to bottom: its end is told when all else is gone.
pub(super) struct NewLane {
    pub(super) key: u64,
    pub(super) socket: TcpStream,
    pub(super) role: Box<dyn Role>,
    pub(super) ending: Ending,
}

/// What a thread is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve this lane.
    Add(Box<NewLane>),
    /// More parts for a lane.
    Submit(u64, Vec<SequencedPart>),
    /// A lane shall end.
    Close(u64, Failure),
    /// All lanes shall end, and the thread.
    Shutdown,
}

/// A queue with a bell.
///
/// Bounded by what it carries: a lane is added once and closed once, and each submission holds at least one
/// part of the lane's window, which its session bounds.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    commands: VecDeque<Command>,
    /// The thread waits, or is about to: it must be rung.
    asleep: bool,
    /// The thread is gone: nothing is taken any more.
    shut: bool,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { state: Mutex::default(), bell })
    }

    /// Puts a command in. Where the thread is gone it is dropped, and a lane's [`Ending`] with it.
    pub(super) fn push(&self, command: Command) {
        let mut state = self.state();
        if state.shut {
            drop(state);
            return;
        }
        state.commands.push_back(command);
        let ring = mem::take(&mut state.asleep);
        drop(state);
        if ring && let Err(error) = rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            // Only a full counter can refuse, and a full counter is a rung bell.
            tracing::debug!(%error, "a lane thread's bell is full");
        }
    }

    /// Takes all commands, in exchange for an empty queue.
    pub(super) fn take(&self, into: &mut VecDeque<Command>) {
        mem::swap(&mut self.state().commands, into);
    }

    /// Whether there is anything to take.
    pub(super) fn is_empty(&self) -> bool {
        self.state().commands.is_empty()
    }

    /// The thread counts as asleep from now on, unless there is something to take: then false.
    pub(super) fn doze(&self) -> bool {
        let mut state = self.state();
        state.asleep = state.commands.is_empty();
        state.asleep
    }

    /// The thread is awake and will look by itself.
    pub(super) fn awake(&self) {
        self.state().asleep = false;
    }

    /// The thread is going. What was never taken is dropped.
    pub(super) fn shut(&self) {
        let mut state = self.state();
        state.shut = true;
        let left = mem::take(&mut state.commands);
        // Endings tell their sinks, which is not to happen under the lock.
        drop(state);
        drop(left);
    }

    /// What to wait for. Edge-triggered it needs no reading.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for NewLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewLane")
            .field("key", &self.key)
            .field("ending", &self.ending)
            .finish_non_exhaustive()
    }
}

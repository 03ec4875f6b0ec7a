//! The assistant: a thread of this library that copies private memory for a daemon which cannot reach it.
//!
//! Where the daemon says so at attach, registering private memory starts the thread, `kvferry-assist`. It copies between
//! the ring and this process's own memory, which needs no privilege, through `/proc/self/mem`: a page that is not there
//! is an error, not a crash. It touches nothing but registered regions of private memory.
//!
//! Each attachment has an assistant of its own. When its daemon is gone the assistant is *retired*: it claims nothing
//! any more, so that what the daemon had posted does not happen late, and is quiet when the copy under way is over. Only
//! then does the library say that nobody touches the memory for that daemon (`Lease::standing`).

mod ring;
mod serve;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use self::{
    ring::{Bell, Ring},
    serve::Server,
};
use crate::{Error, regions::Regions};

/// A ring and the thread that serves it. Dropped, it waits for the copy under way.
#[derive(Debug)]
pub(crate) struct Assistant {
    bell: Bell,
    duty: Arc<Duty>,
    thread: Option<JoinHandle<()>>,
    /// A forked child has no such thread.
    owner: u32,
}

/// Whether the thread may claim, and whether it copies. The lock is held for single steps.
#[derive(Debug, Default)]
struct Duty {
    state: Mutex<State>,
    quiet: Condvar,
}

#[derive(Debug, Default)]
struct State {
    retired: bool,
    copying: bool,
}

impl Assistant {
    /// Begins to serve.
    pub(crate) fn start(regions: Arc<Regions>) -> Result<Self, Error> {
        let ring = Ring::new()?;
        let memory = File::options()
            .read(true)
            .write(true)
            .open("/proc/self/mem")
            .map_err(|source| Error::System { doing: "opening the memory of this process", source })?;
        let (bell, duty) = (ring.bell(), Arc::<Duty>::default());
        let mut server = Server::new(ring, memory, regions, duty.clone());
        let thread = thread::Builder::new()
            .name("kvferry-assist".into())
            .spawn(move || server.run())
            .map_err(Error::system("starting the thread of the assistant"))?;
        Ok(Self { bell, duty, thread: Some(thread), owner: std::process::id() })
    }

    /// From now on nothing is claimed. True when nothing is copied either: it touches no memory any more.
    pub(crate) fn retire(&self) -> bool {
        let mut state = self.duty.lock();
        if !state.retired {
            state.retired = true;
            self.bell.ring();
        }
        !state.copying
    }

    /// The same, and waits for the copy under way: milliseconds.
    pub(crate) fn stop(&self) {
        self.retire();
        let copying = |state: &mut State| state.copying;
        drop(self.duty.quiet.wait_while(self.duty.lock(), copying).unwrap_or_else(PoisonError::into_inner));
    }
}

impl AsFd for Assistant {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Drop for Assistant {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            return;
        }
        self.retire();
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(?panic, "the thread of the assistant panicked");
        }
    }
}

impl Duty {
    /// The right to claim and to copy, until it is dropped; nothing once retired.
    fn begin(&self) -> Option<OnDuty<'_>> {
        let mut state = self.lock();
        if state.retired {
            return None;
        }
        state.copying = true;
        Some(OnDuty(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory may be touched.
#[derive(Debug)]
struct OnDuty<'a>(&'a Duty);

impl Drop for OnDuty<'_> {
    fn drop(&mut self) {
        self.0.lock().copying = false;
        self.0.quiet.notify_all();
    }
}

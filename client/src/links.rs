//! A connection and a current-thread runtime for every thread that calls.
//!
//! A blocking call then runs on the caller's own thread from the first byte to the last, without a hand-over
//! to another one: that is about half of a small call's time. A link goes with its thread or with its engine,
//! whichever ends first, so there are never more of them than threads.

use std::{
    cell::RefCell,
    collections::HashMap,
    future::Future,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread::{self, ThreadId},
};

use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;

use crate::{Error, connection, pipe::Pipe};

/// One thread's way to the daemon.
#[derive(Debug)]
pub(crate) struct Link {
    /// The attachment it was made for.
    attachment: u64,
    pub(crate) channel: Channel,
    pub(crate) pipe: Arc<Pipe>,
    /// Taken in `drop` alone.
    runtime: Option<Runtime>,
}

impl Link {
    /// Connects when first used.
    pub(crate) fn new(socket: &Path, attachment: u64) -> Result<Self, Error> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::system("starting a runtime for this thread"))?;
        let channel = {
            let _inside = runtime.enter();
            connection::lazy(socket)
        };
        Ok(Self { attachment, channel, pipe: Arc::default(), runtime: Some(runtime) })
    }

    /// Panics inside an async context, as every blocking call of tokio does.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.as_ref().expect("the runtime is taken only when the link is dropped").block_on(future)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The last handle of an engine may be dropped inside somebody else's runtime, where waiting panics.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The links of one engine. The lock is held for single map operations.
#[derive(Debug, Default)]
pub(crate) struct Links(Mutex<HashMap<ThreadId, Arc<Link>>>);

impl Links {
    /// This thread's link, made on its first call, and anew for every attachment: between calls nobody drives
    /// the connection, so the first call after a restart would be the one to find it broken.
    pub(crate) fn mine(self: &Arc<Self>, socket: &Path, attachment: u64) -> Result<Arc<Link>, Error> {
        let thread = thread::current().id();
        if let Some(link) = self.lock().get(&thread).filter(|link| link.attachment == attachment) {
            return Ok(link.clone());
        }
        let link = Arc::new(Link::new(socket, attachment)?);
        self.lock().insert(thread, link.clone());
        // A thread that is just ending has no farewell any more; its link goes with the engine.
        let _farewell = FAREWELL.try_with(|farewell| farewell.note(self));
        Ok(link)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Arc<Link>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    static FAREWELL: Farewell = Farewell::new();
}

/// Drops a thread's links when it ends.
struct Farewell {
    thread: ThreadId,
    /// A forked child has the same thread, but none of its links.
    process: u32,
    engines: RefCell<Vec<Weak<Links>>>,
}

impl Farewell {
    fn new() -> Self {
        Self { thread: thread::current().id(), process: std::process::id(), engines: RefCell::default() }
    }

    fn note(&self, links: &Arc<Links>) {
        let mut engines = self.engines.borrow_mut();
        engines.retain(|links| links.strong_count() > 0);
        engines.push(Arc::downgrade(links));
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        for links in self.engines.borrow().iter().filter_map(Weak::upgrade) {
            let link = links.lock().remove(&self.thread);
            drop(link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_its_link_and_takes_it_along_when_it_ends() {
        let links = Arc::new(Links::default());
        let socket = Path::new("/nonexistent/engine.sock");
        let (mine, again) = (links.mine(socket, 0).unwrap(), links.mine(socket, 0).unwrap());
        assert!(Arc::ptr_eq(&mine, &again));
        let next = links.mine(socket, 1).unwrap();
        assert!(!Arc::ptr_eq(&mine, &next), "the connection to a daemon goes with it");
        let other = links.clone();
        let link = thread::spawn(move || Arc::downgrade(&other.mine(socket, 1).unwrap())).join().unwrap();
        assert_eq!(link.strong_count(), 0, "the thread has ended");
        assert_eq!(links.lock().len(), 1);
        let mine = Arc::downgrade(&{ mine });
        drop((again, next));
        drop(links);
        assert_eq!(mine.strong_count(), 0, "the engine has ended");
    }
}

//! Which thread carries a lane.
//!
//! Lanes are spread over as many threads as there are to be, but those of an engine that copies for itself, which have
//! one of their own ([`Own`]).

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

use super::{
    by_hand::HandCarrier,
    carrier::{Carrier, Farewell},
    inbox::{Command, Inbox},
};
use crate::{
    memory::EngineMemory,
    transport::own::{Own, Owned},
};

/// All threads.
#[derive(Debug)]
pub(super) struct Threads {
    shared: Vec<Thread>,
    own: Own<OwnThread>,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    spin: Duration,
    damaged: Counter,
}

#[derive(Debug)]
struct Thread {
    inbox: Arc<Inbox>,
    lanes: Arc<AtomicUsize>,
    alive: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A thread that ends when its last lane is let go. Nobody waits for that: it may itself be waiting for a stopped
/// engine.
#[derive(Debug)]
pub(super) struct OwnThread(Thread);

impl Drop for OwnThread {
    fn drop(&mut self) {
        self.0.inbox.push(Command::Shutdown);
    }
}

/// Where a lane is carried.
#[derive(Debug)]
pub(super) struct Berth {
    pub(super) inbox: Arc<Inbox>,
    /// Lanes of the thread.
    pub(super) load: Arc<AtomicUsize>,
    /// Keeps a thread of its own.
    _own: Option<Arc<Owned<OwnThread>>>,
}

impl Threads {
    /// Starts so many, at least one.
    pub(super) fn start(threads: usize, spin: Duration, damaged: &Counter) -> io::Result<Self> {
        let settings = Settings { spin, damaged: damaged.clone() };
        let thread = |number| Thread::start(format!("lane-{number}"), &settings);
        let shared = (0..threads.max(1)).map(thread).collect::<io::Result<_>>()?;
        Ok(Self { shared, own: Own::default(), settings })
    }

    /// None: whoever holds the other half gives lanes their turns.
    pub(super) fn by_hand() -> io::Result<(Self, HandCarrier)> {
        let inbox = Arc::new(Inbox::new()?);
        let alive = Arc::new(AtomicBool::new(true));
        let farewell = Farewell { inbox: inbox.clone(), alive: alive.clone() };
        let settings = Settings { spin: Duration::ZERO, damaged: Counter::default() };
        let carrier = Carrier::new(inbox.clone(), settings.spin, settings.damaged.clone())?;
        let thread = Thread { inbox, lanes: Arc::default(), alive, handle: None };
        let threads = Self { shared: vec![thread], own: Own::default(), settings };
        Ok((threads, HandCarrier::new(carrier, farewell)))
    }

    /// A thread for a lane that touches this memory. With an error, it is one that the lane can only end on.
    pub(super) fn berth(&self, memory: &Arc<EngineMemory>) -> (Berth, Option<io::Error>) {
        let start = || Thread::start("lane-own".to_owned(), &self.settings).map(OwnThread);
        let (own, error) = match self.own.of(&[memory], start) {
            Ok(own) => (own, None),
            Err(error) => (None, Some(error)),
        };
        let load = |thread: &&Thread| (!thread.alive.load(SeqCst), thread.lanes.load(SeqCst));
        let thread = match &own {
            Some(own) => &own.thread.0,
            None => self.shared.iter().min_by_key(load).expect("`start` made at least one thread"),
        };
        (Berth { inbox: thread.inbox.clone(), load: thread.lanes.clone(), _own: own }, error)
    }

    /// Lanes that are carried now.
    pub(super) fn lanes(&self) -> usize {
        let own: usize = self.own.living().iter().map(|own| own.thread.0.lanes.load(SeqCst)).sum();
        self.shared.iter().map(|thread| thread.lanes.load(SeqCst)).sum::<usize>() + own
    }

    /// False once a thread has died.
    pub(super) fn are_alive(&self) -> bool {
        self.shared.iter().all(|thread| thread.alive.load(SeqCst))
            && self.own.living().iter().all(|own| own.thread.0.alive.load(SeqCst))
    }
}

impl Drop for Threads {
    /// Closes every lane with `Draining` and waits for the threads, but not for those that may wait for an engine: the
    /// end of the process is the end of them.
    fn drop(&mut self) {
        self.own.living().iter().for_each(|own| own.thread.0.inbox.push(Command::Shutdown));
        self.shared.iter().for_each(|thread| thread.inbox.push(Command::Shutdown));
        for thread in &mut self.shared {
            if let Some(Err(_)) = thread.handle.take().map(JoinHandle::join) {
                tracing::error!("a lane thread had panicked");
            }
        }
    }
}

impl Thread {
    fn start(name: String, settings: &Settings) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new()?);
        let alive = Arc::new(AtomicBool::new(true));
        let carrier = Carrier::new(inbox.clone(), settings.spin, settings.damaged.clone())?;
        let farewell = Farewell { inbox: inbox.clone(), alive: alive.clone() };
        let serve = move || {
            let _farewell = farewell;
            carrier.run();
        };
        let handle = std::thread::Builder::new().name(name).spawn(serve)?;
        Ok(Self { inbox, lanes: Arc::default(), alive, handle: Some(handle) })
    }
}

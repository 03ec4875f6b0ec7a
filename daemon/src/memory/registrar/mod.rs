//! The one registrar of the node (I7).
//!
//! Registering GPU memory from several processes at once crashes kernel modules, so every driver call that
//! makes memory reachable or releases it is made here, one at a time, and an advisory file lock extends that
//! to a second daemon. The queue is served one *call* at a time: memory of dead engines is released first
//! (I10), all other requests take turns, so that a request of 4096 regions does not hold up one of a single
//! region. No call waits for a peer, a lane or a transfer; one that hangs shows in
//! [`Registrar::longest_running`].
//!
//! What it deliberately does not know: regions, engines, quotas. It deals in [`Backing`]s.

mod caller;
mod driver;
mod request;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

pub use driver::{RegionDriver, SystemDriver};
pub use request::{Acquire, Grant, Urgency};

use self::{
    caller::{Caller, NodeLock},
    request::Request,
};
use super::Backing;
use crate::domain::{Failure, Generation, Reason};

/// How many driver calls may run at once without the lock.
const UNLOCKED_WORKERS: usize = 16;

/// What is serialised (`registration.lock`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LockPolicy {
    /// Every driver call of this node.
    Node {
        /// Held during each call, so that another daemon of this node waits too.
        lock_file: Option<PathBuf>,
    },
    /// Nothing: up to 16 calls at once, for drivers that are known to bear it.
    Off,
}

/// What the registrar has seen since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RegistrarStats {
    /// Driver calls that wait for their turn.
    pub queue_length: u64,
    /// Turns that were waited for.
    pub waits: u64,
    /// Time they waited, together, the lock file included.
    pub wait_sum: Duration,
    /// Driver calls that returned.
    pub calls: u64,
    /// Time they took, together.
    pub call_sum: Duration,
    /// Driver calls under way.
    pub calls_in_progress: u64,
    /// Most driver calls that were under way at once.
    pub calls_high_water: u64,
    /// Driver calls that failed.
    pub failures: u64,
}

/// The queue and those who serve it.
#[derive(Debug)]
pub struct Registrar {
    shared: Arc<Shared>,
    /// The last one given out.
    generations: AtomicU32,
}

/// What the workers share with those who ask.
#[derive(Debug)]
pub(super) struct Shared {
    /// Short and synchronous: held to take a request out or to put one in, never during a call.
    queue: Mutex<Queue>,
    work: Condvar,
    caller: Caller,
    /// Requests that may wait.
    limit: usize,
}

#[derive(Debug, Default)]
struct Queue {
    dead: VecDeque<Request>,
    ordinary: VecDeque<Request>,
    /// What each worker is at.
    running: Vec<Option<Running>>,
    closed: bool,
}

/// A step being made.
#[derive(Clone, Copy, Debug)]
struct Running {
    /// Since when, the wait for the lock file included.
    since: Instant,
    /// Driver calls that the request still wants after it.
    calls_behind: usize,
}

impl Registrar {
    /// Starts it. `queue_limit` bounds the acquiring requests that wait (`limits.registrar_queue`).
    pub fn start(
        policy: &LockPolicy,
        driver: Arc<dyn RegionDriver>,
        queue_limit: usize,
    ) -> io::Result<Arc<Self>> {
        let (workers, lock_file) = match policy {
            LockPolicy::Node { lock_file } => (1, lock_file.as_deref()),
            LockPolicy::Off => (UNLOCKED_WORKERS, None),
        };
        let lock = lock_file.map(NodeLock::open).transpose()?;
        let shared = Shared::new(workers, Caller::new(driver, lock), queue_limit);
        // Made before the workers, so that they end where one of them cannot be started.
        let registrar = Arc::new(Self::of(shared.clone()));
        for worker in 0..workers {
            let shared = shared.clone();
            thread::Builder::new().name("registrar".into()).spawn(move || shared.serve(worker))?;
        }
        Ok(registrar)
    }

    /// One without a thread: whoever holds the other half makes the calls, one at a time.
    pub fn by_hand(driver: Arc<dyn RegionDriver>, queue_limit: usize) -> (Arc<Self>, HandRegistrar) {
        let shared = Shared::new(1, Caller::new(driver, None), queue_limit);
        (Arc::new(Self::of(shared.clone())), HandRegistrar(shared))
    }

    fn of(shared: Arc<Shared>) -> Self {
        Self { shared, generations: AtomicU32::new(0) }
    }

    /// This many generations, none given out before by this run of the daemon: an engine that attaches again
    /// numbers its regions anew, and a part planned against its earlier ones must not find itself in them (I4).
    ///
    /// LIMIT once 2^32 are used up.
    pub fn generations(&self, count: usize) -> Result<impl Iterator<Item = Generation> + use<>, Failure> {
        let after = |last: u32| u32::try_from(count).ok().and_then(|count| last.checked_add(count));
        let last = self.generations.fetch_update(SeqCst, SeqCst, after).map_err(|_| {
            Failure::new(Reason::Limit, "the node's generations are used up: restart the daemon")
        })?;
        // `after` has seen that the count fits.
        Ok((1..=count as u32).map(move |at| Generation(last + at)))
    }

    /// Makes all of it reachable, or nothing. Dropped while it waits, it gives back what it has.
    ///
    /// LIMIT where too many requests wait; otherwise the failure of the call at its `index`, after everything
    /// acquired before it was released again.
    pub async fn acquire(&self, calls: Vec<Acquire>) -> Result<Grant, Failure> {
        if calls.is_empty() {
            return Ok(Grant::default());
        }
        let (reply, answer) = oneshot::channel();
        let request = Request::acquire(calls, Arc::downgrade(&self.shared), reply);
        self.shared.push_bounded(request)?;
        answer.await.unwrap_or_else(|_| Err(Failure::new(Reason::Draining, "the registrar has ended")))
    }

    /// Releases memory that nobody can touch any more. Never refused: there is no more of it than was
    /// acquired. Dropped while it waits, it goes on all the same.
    pub async fn release(&self, backings: Vec<Backing>, urgency: Urgency) {
        let (done, released) = oneshot::channel();
        self.shared.push(Request::release(backings, urgency, done));
        // An error means that the registrar had ended and the memory was released on the spot.
        drop(released.await);
    }

    /// What it has seen.
    pub fn stats(&self) -> RegistrarStats {
        let queue = self.shared.lock();
        let waiting: usize = queue.dead.iter().chain(&queue.ordinary).map(Request::calls).sum();
        let behind: usize = queue.running.iter().flatten().map(|running| running.calls_behind).sum();
        self.shared.caller.stats(waiting + behind)
    }

    /// How long the oldest driver call in progress has been under way: for the watchdog.
    pub fn longest_running(&self) -> Option<Duration> {
        self.shared.lock().running.iter().flatten().map(|running| running.since.elapsed()).max()
    }
}

impl Drop for Registrar {
    /// The workers finish what waits and end; the calls are made there, so nothing blocks here.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
    }
}

/// Makes the calls of a registrar that has no thread.
#[derive(Debug)]
pub struct HandRegistrar(Arc<Shared>);

impl HandRegistrar {
    /// Makes the next driver call; false where none waits.
    pub fn step(&self) -> bool {
        let Some(request) = self.0.lock().begin(0) else { return false };
        self.0.make(0, request);
        true
    }
}

impl Shared {
    fn new(workers: usize, caller: Caller, limit: usize) -> Arc<Self> {
        let queue = Mutex::new(Queue { running: vec![None; workers], ..Queue::default() });
        Arc::new(Self { queue, work: Condvar::new(), caller, limit })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push_bounded(&self, request: Request) -> Result<(), Failure> {
        let mut queue = self.lock();
        if queue.dead.len() + queue.ordinary.len() >= self.limit {
            return Err(Failure::new(
                Reason::Limit,
                format!("{} requests wait at the registrar", self.limit),
            ));
        }
        queue.put(request);
        self.work.notify_one();
        Ok(())
    }

    /// Where the workers have ended the request is dropped, and its memory with it.
    fn push(&self, request: Request) {
        let mut queue = self.lock();
        if !queue.closed {
            queue.put(request);
            self.work.notify_one();
        }
    }

    fn serve(&self, worker: usize) {
        while let Some(request) = self.next(worker) {
            self.make(worker, request);
        }
    }

    /// One step of a request; what is left of it goes to the end of its line.
    fn make(&self, worker: usize, request: Request) {
        let rest = request.step(&self.caller);
        let mut queue = self.lock();
        queue.running[worker] = None;
        if let Some(request) = rest {
            queue.put(request);
        }
    }

    /// Waits for the next request; nothing once the registrar has ended and nothing waits.
    fn next(&self, worker: usize) -> Option<Request> {
        let mut queue = self.lock();
        loop {
            if let Some(request) = queue.begin(worker) {
                return Some(request);
            }
            if queue.closed {
                return None;
            }
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Queue {
    /// At the end of its line: whoever came before has a turn first.
    fn put(&mut self, request: Request) {
        match request.urgency {
            Urgency::Dead => self.dead.push_back(request),
            Urgency::Ordinary => self.ordinary.push_back(request),
        }
    }

    /// The next request, for this worker.
    fn begin(&mut self, worker: usize) -> Option<Request> {
        let request = self.take()?;
        let calls_behind = request.calls().saturating_sub(1);
        self.running[worker] = Some(Running { since: Instant::now(), calls_behind });
        Some(request)
    }

    fn take(&mut self) -> Option<Request> {
        self.dead.pop_front().or_else(|| self.ordinary.pop_front())
    }
}

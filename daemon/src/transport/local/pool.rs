//! The workers, and the lanes' parts that wait for them.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    thread::JoinHandle,
};

use super::{
    LocalSetup,
    chunk::{self, Copied},
};
use crate::{
    domain::{Failure, Reason},
    memory::Seat,
    transport::{
        LaneEvent, PART_BYTES, SequencedPart,
        ending::Ending,
        own::{Own, Owned},
    },
};

/// For parts with process memory; one part fits.
const BOUNCE_BYTES: usize = PART_BYTES as usize;

/// The threads that copy.
#[derive(Debug)]
pub struct CopyPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    own: Own<OwnPool>,
}

/// One worker, which ends when its last lane is let go. Nobody waits for that: it may itself be waiting for a stopped
/// engine.
#[derive(Debug)]
pub(super) struct OwnPool(Arc<Shared>);

impl OwnPool {
    fn start() -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        start("copy-own".to_owned(), &shared)?;
        Ok(Self(shared))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for OwnPool {
    fn drop(&mut self) {
        self.0.shut(&Failure::plain(Reason::Draining));
    }
}

fn start(name: String, shared: &Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    let worker = Farewell(shared.clone());
    std::thread::Builder::new().name(name).spawn(move || work(&worker.0))
}

impl CopyPool {
    /// Starts so many threads, named `copy-0` and up; at least one.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let start = |number: usize| start(format!("copy-{number}"), &shared);
        let threads = (0..threads.max(1)).map(start).collect::<std::io::Result<_>>()?;
        Ok(Self { shared, threads, own: Own::default() })
    }

    /// False once a thread has died.
    pub fn is_healthy(&self) -> bool {
        let own = self.own.living();
        !own.iter().map(|own| own.thread.shared()).chain([&self.shared]).any(|pool| pool.broken.load(SeqCst))
    }

    /// What serves a lane between engines that may make it wait. With an error there is none, and the lane can only end.
    pub(super) fn own(&self, setup: &LocalSetup) -> (Option<Arc<Owned<OwnPool>>>, Option<std::io::Error>) {
        match self.own.of(&[&setup.source, &setup.target], OwnPool::start) {
            Ok(own) => (own, None),
            Err(error) => (None, Some(error)),
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for CopyPool {
    /// Closes every lane with `Draining` and waits for the threads, but not for those that may wait for an engine: the
    /// end of the process is the end of them.
    fn drop(&mut self) {
        for own in self.own.living() {
            own.thread.shared().shut(&Failure::plain(Reason::Draining));
            own.thread.shared().end_all();
        }
        self.shared.shut(&Failure::plain(Reason::Draining));
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a copy thread had panicked");
            }
        }
        self.shared.end_all();
    }
}

/// What a lane is, apart from its queue.
#[derive(Debug)]
pub(super) struct Line {
    setup: LocalSetup,
    pub(super) moved: AtomicU64,
    /// Pairs of seats (initiator's, target's) that no worker uses at the moment; at most one for each worker.
    seats: Mutex<Vec<(Seat, Seat)>>,
}

/// A lane's queue. Bounded by its session's window.
#[derive(Debug)]
struct Queue {
    line: Arc<Line>,
    parts: VecDeque<SequencedPart>,
    submitted: u64,
    /// Parts in workers' hands.
    out: usize,
    closing: bool,
    ending: Ending,
}

#[derive(Debug, Default)]
struct State {
    lanes: HashMap<u64, Queue>,
    /// Lanes with parts, each once, in the order in which they are served.
    round: VecDeque<u64>,
    /// Lanes that are over. A worker tells it, so that nobody is called back from within his own call.
    over: Vec<Queue>,
    next_key: u64,
    shut: bool,
}

/// What a worker does next.
enum Job {
    Copy(u64, Arc<Line>, SequencedPart),
    End(Queue),
}

/// What workers and lanes share. The lock is held to move a part in or out, never while bytes are copied.
#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    broken: AtomicBool,
}

impl Shared {
    pub(super) fn open(&self, setup: LocalSetup, ending: Ending) -> (u64, Arc<Line>) {
        let line = Arc::new(Line { setup, moved: AtomicU64::new(0), seats: Mutex::default() });
        let parts = VecDeque::new();
        let queue = Queue { line: line.clone(), parts, submitted: 0, out: 0, closing: false, ending };
        let mut state = self.state();
        state.next_key += 1;
        let key = state.next_key;
        if state.shut {
            // Nobody is left to tell it.
            drop(state);
            drop(queue);
        } else {
            state.lanes.insert(key, queue);
        }
        (key, line)
    }

    pub(super) fn submit(&self, key: u64, parts: Vec<SequencedPart>) {
        let mut state = self.state();
        let State { lanes, round, .. } = &mut *state;
        let Some(queue) = lanes.get_mut(&key).filter(|queue| !queue.closing) else { return };
        let count = parts.len();
        let was_empty = queue.parts.is_empty();
        for part in parts {
            if part.sequence != queue.submitted + 1 {
                let message = format!("part {} was submitted after {}", part.sequence, queue.submitted);
                drop(state);
                return self.close(key, Failure::new(Reason::BadArgument, message));
            }
            queue.submitted = part.sequence;
            queue.parts.push_back(part);
        }
        if was_empty && count > 0 {
            round.push_back(key);
        }
        drop(state);
        match count {
            0 => {}
            1 => self.wake.notify_one(),
            _ => self.wake.notify_all(),
        }
    }

    /// No further part of the lane starts. Its end is told when those in workers' hands are done.
    pub(super) fn close(&self, key: u64, cause: Failure) {
        let mut state = self.state();
        let State { lanes, round, over, .. } = &mut *state;
        let Some(queue) = lanes.get_mut(&key).filter(|queue| !queue.closing) else { return };
        queue.closing = true;
        queue.ending.cause = Some(cause);
        // Payloads hold leases, whose release is not to happen under the lock.
        let dropped = mem::take(&mut queue.parts);
        round.retain(|&waiting| waiting != key);
        if queue.out == 0 {
            over.extend(lanes.remove(&key));
            self.wake.notify_one();
        }
        drop(state);
        drop(dropped);
    }

    /// The end of a lane, or the next part of the lane whose turn it is; nothing when the pool is shut.
    fn take(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(taken) = state.take() {
                return Some(taken);
            }
            if state.shut {
                return None;
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A worker's part is over.
    fn put_back(&self, key: u64) {
        let mut state = self.state();
        let Some(queue) = state.lanes.get_mut(&key) else { return };
        queue.out -= 1;
        let over = if queue.closing && queue.out == 0 { state.lanes.remove(&key) } else { None };
        drop(state);
        over.into_iter().for_each(Queue::end);
    }

    fn shut(&self, cause: &Failure) {
        let mut state = self.state();
        state.shut = true;
        let keys: Vec<u64> = state.lanes.keys().copied().collect();
        drop(state);
        self.wake.notify_all();
        keys.into_iter().for_each(|key| self.close(key, cause.clone()));
    }

    /// Tells what no worker is left to tell.
    fn end_all(&self) {
        let over = mem::take(&mut self.state().over);
        over.into_iter().for_each(Queue::end);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self) -> Option<Job> {
        if let Some(over) = self.over.pop() {
            return Some(Job::End(over));
        }
        let key = self.round.pop_front()?;
        let queue = self.lanes.get_mut(&key)?;
        let part = queue.parts.pop_front()?;
        queue.out += 1;
        if !queue.parts.is_empty() {
            self.round.push_back(key);
        }
        Some(Job::Copy(key, queue.line.clone(), part))
    }
}

impl Queue {
    /// The lane is over: its seats go before its end is told.
    fn end(self) {
        self.line.seats().clear();
        drop(self.ending);
    }
}

impl Line {
    fn seats(&self) -> MutexGuard<'_, Vec<(Seat, Seat)>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies a part and tells how it ended. An error ends the lane.
    fn carry(&self, part: SequencedPart, bounce: &mut [u8]) -> Result<(), Failure> {
        let (source, target) = (&self.setup.source, &self.setup.target);
        let pair = self.seats().pop();
        let mut pair = pair.unwrap_or_else(|| (source.gate().seat(), target.gate().seat()));
        let copied = {
            let (_here, _there) = (pair.0.enter(), pair.1.enter());
            let revoked = target.revocations();
            let (source, target) = (source.view(), target.view());
            if source.closed {
                return Err(Failure::plain(Reason::EngineGone));
            }
            if target.closed {
                return Err(Failure::new(Reason::ConnectionLost, "the target engine is gone"));
            }
            chunk::copy(&part.part, self.setup.kind, &source, (&target, revoked), bounce)
        };
        self.seats().push(pair);
        let sequence = part.sequence;
        match copied {
            Ok(Copied::Whole) => _ = self.moved.fetch_add(part.part.bounds().bytes.into(), Relaxed),
            Ok(Copied::Stopped) => {}
            Err(failure) => self.tell(LaneEvent::Refused { sequence, failure }),
        }
        // The lease goes before its part counts as settled.
        drop(part);
        self.tell(LaneEvent::Processed { from: sequence, through: sequence });
        Ok(())
    }

    fn tell(&self, event: LaneEvent) {
        self.setup.sink.lane_event(self.setup.lane, event);
    }
}

/// Tells the process when a worker dies of a panic, and ends the pool: a part may be lost.
struct Farewell(Arc<Shared>);

impl Drop for Farewell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a copy thread panicked; all local lanes are closed");
            self.0.broken.store(true, SeqCst);
            self.0.shut(&Failure::new(Reason::Driver, "a copy thread panicked"));
            self.0.end_all();
        }
    }
}

fn work(shared: &Shared) {
    let mut bounce = vec![0; BOUNCE_BYTES];
    while let Some(job) = shared.take() {
        let (key, line, part) = match job {
            Job::Copy(key, line, part) => (key, line, part),
            Job::End(queue) => {
                queue.end();
                continue;
            }
        };
        let _out = Out { shared, key };
        if let Err(failure) = line.carry(part, &mut bounce) {
            shared.close(key, failure);
        }
    }
}

/// A part in a worker's hands; put back by whatever way the worker leaves it.
struct Out<'a> {
    shared: &'a Shared,
    key: u64,
}

impl Drop for Out<'_> {
    fn drop(&mut self) {
        self.shared.put_back(self.key);
    }
}

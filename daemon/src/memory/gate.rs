//! The gate of one engine's memory: how a fence becomes a proof.
//!
//! Whoever touches an engine's memory (the owner of a TCP lane, a copy worker) holds a [`Seat`] and *enters*
//! before each call that touches it: one non-blocking system call, or one chunk copied. Entering tells which
//! version of the rules (regions, revocations, stopped transfers) holds; a seat that sees a new version
//! looks at the rules again before it goes on. Whoever changes the rules *raises* the version and then waits
//! until the gate is quiet: every seat is outside, or entered after the change. From then on nobody can touch
//! what the change put out of reach (invariants I1, I4, I6), however long a peer or a socket stays stuck.
//!
//! This is a grace period as in RCU, so nobody needs to be woken to prove that they are idle, and the hot path
//! pays two stores and a load per system call. Settlement is never derived from a clock: [`Gate::quiet`]
//! returns only on proof, its caller bounds the wait and answers UNSETTLED.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
};

use tokio::sync::Notify;

/// Which state of the rules a seat acted under. Rises with each change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(u64);

const OUTSIDE: u64 = 0;

/// The gate of one engine's memory.
#[derive(Debug, Default)]
pub struct Gate {
    version: AtomicU64,
    /// Held for a push, a removal or a scan; never while memory is touched.
    seats: Mutex<Vec<Arc<AtomicU64>>>,
    waiting: AtomicUsize,
    left: Notify,
}

impl Gate {
    /// A gate with nobody at it.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A new seat, outside.
    pub fn seat(self: &Arc<Self>) -> Seat {
        let state = Arc::new(AtomicU64::new(OUTSIDE));
        self.seats().push(state.clone());
        Seat { gate: self.clone(), state }
    }

    /// Seats there are: one for each lane and copy worker that may touch the memory.
    pub fn seat_count(&self) -> usize {
        self.seats().len()
    }

    /// Makes a change count. The change itself must be visible (stored) before this call.
    pub fn raise(&self) -> Version {
        Version(self.version.fetch_add(1, SeqCst) + 1)
    }

    /// Whether nobody is inside under rules older than `version`.
    pub fn is_quiet(&self, version: Version) -> bool {
        self.seats().iter().all(|seat| match seat.load(SeqCst) {
            OUTSIDE => true,
            entered => entered > version.0,
        })
    }

    /// Waits for the proof that nobody is inside under rules older than `version`.
    pub async fn quiet(&self, version: Version) {
        if self.is_quiet(version) {
            return;
        }
        let _waiting = Waiting::new(&self.waiting);
        loop {
            // Registered before the look, so that a seat left in between is not missed.
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            if self.is_quiet(version) {
                return;
            }
            left.await;
        }
    }

    fn seats(&self) -> std::sync::MutexGuard<'_, Vec<Arc<AtomicU64>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// The right to enter a gate; one per lane or copy worker.
#[derive(Debug)]
pub struct Seat {
    gate: Arc<Gate>,
    state: Arc<AtomicU64>,
}

impl Seat {
    /// Goes inside. The guard tells under which version; the caller must have seen those rules before it
    /// touches memory.
    pub fn enter(&mut self) -> Inside<'_> {
        loop {
            let version = self.gate.version.load(SeqCst);
            self.state.store(version + 1, SeqCst);
            // A change between the load and the store may not have seen us: try again under its rules.
            if self.gate.version.load(SeqCst) == version {
                return Inside { seat: self, version: Version(version) };
            }
        }
    }

    /// The version that holds now, without entering.
    pub fn version(&self) -> Version {
        Version(self.gate.version.load(SeqCst))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.gate.seats().retain(|state| !Arc::ptr_eq(state, &self.state));
        self.gate.left.notify_waiters();
    }
}

/// Inside a gate until dropped.
#[derive(Debug)]
pub struct Inside<'a> {
    seat: &'a Seat,
    version: Version,
}

impl Inside<'_> {
    /// The rules that hold for this visit.
    pub fn version(&self) -> Version {
        self.version
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.seat.state.store(OUTSIDE, SeqCst);
        if self.seat.gate.waiting.load(SeqCst) > 0 {
            self.seat.gate.left.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, AtomicU32},
        thread,
        time::Duration,
    };

    use super::*;

    #[tokio::test]
    async fn a_seat_outside_is_proof_enough() {
        let gate = Gate::new();
        let _idle = gate.seat();
        let version = gate.raise();
        gate.quiet(version).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_seat_inside_is_waited_for_however_long_it_takes() {
        let gate = Gate::new();
        let mut seat = gate.seat();
        let inside = seat.enter();
        let version = gate.raise();
        let quiet = gate.quiet(version);
        tokio::pin!(quiet);
        assert!(tokio::time::timeout(Duration::from_secs(3600), &mut quiet).await.is_err());
        drop(inside);
        quiet.await;
    }

    #[test]
    fn a_seat_that_entered_after_the_change_is_no_obstacle() {
        let gate = Gate::new();
        let mut seat = gate.seat();
        let version = gate.raise();
        let inside = seat.enter();
        assert_eq!(inside.version(), version);
        assert!(gate.is_quiet(version));
    }

    #[test]
    fn a_dropped_seat_leaves_nothing_behind() {
        let gate = Gate::new();
        drop(gate.seat());
        assert!(gate.seats().is_empty());
    }

    /// I1: whatever a worker does after `quiet`, it does under the new rules.
    #[test]
    fn nobody_touches_memory_after_quiet() {
        let gate = Gate::new();
        let forbidden = Arc::new(AtomicBool::new(false));
        let touched = Arc::new(AtomicU32::new(0));
        let done = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (mut seat, forbidden) = (gate.seat(), forbidden.clone());
                let (touched, done) = (touched.clone(), done.clone());
                thread::spawn(move || {
                    while !done.load(SeqCst) {
                        let _inside = seat.enter();
                        if !forbidden.load(SeqCst) {
                            touched.fetch_add(1, SeqCst);
                        }
                    }
                })
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        for _ in 0..2000 {
            forbidden.store(true, SeqCst);
            let version = gate.raise();
            runtime.block_on(gate.quiet(version));
            let before = touched.load(SeqCst);
            thread::yield_now();
            assert_eq!(touched.load(SeqCst), before);
            forbidden.store(false, SeqCst);
            gate.raise();
        }
        done.store(true, SeqCst);
        workers.into_iter().for_each(|worker| worker.join().expect("a worker"));
    }
}

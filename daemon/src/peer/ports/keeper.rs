//! Writes the table to its file, on a thread of its own: attaching and detaching never wait for a disk.
//!
//! Changes that come while a write is under way are written together by the next one.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;

use super::{
    record::{self, Clocks},
    table::Table,
};
use crate::durable;

/// Pause after a write, so that a storm of attaches is not a storm of writes.
const PAUSE: Duration = Duration::from_millis(20);

/// Pause after a write that failed.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// The table and its way into the file.
#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    /// Taken in `drop` alone. Nothing where the table is not recorded.
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Locked for table steps, and while a free port is looked for.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    table: Table,
    /// Counts changes.
    version: u64,
    /// The version that the file has.
    written: u64,
    ending: bool,
}

impl Keeper {
    /// Records into `file`, if there is one; `failures` counts the writes that did not work out.
    pub(super) fn start(table: Table, file: Option<PathBuf>, failures: Counter) -> io::Result<Self> {
        // What was restored is written at once: it holds for the next start as well.
        let state = State { table, version: 1, written: 0, ending: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let thread = match file {
            Some(file) => {
                let shared = shared.clone();
                let body = move || shared.record(&file, &failures);
                Some(thread::Builder::new().name("port-record".into()).spawn(body)?)
            }
            None => None,
        };
        Ok(Self { shared, thread })
    }

    /// A look at the table.
    pub(super) fn read<T>(&self, look: impl FnOnce(&Table) -> T) -> T {
        look(&self.shared.state().table)
    }

    /// A change of the table, recorded soon.
    pub(super) fn change<T>(&self, step: impl FnOnce(&mut Table) -> T) -> T {
        let mut state = self.shared.state();
        let result = step(&mut state.table);
        state.version += 1;
        drop(state);
        self.shared.changed.notify_all();
        result
    }

    /// Waits until all changes so far are in the file. Returns whether they are.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        if self.thread.is_none() {
            return true;
        }
        let state = self.shared.state();
        let version = state.version;
        let waits = |state: &mut State| state.written < version;
        let waited = self.shared.changed.wait_timeout_while(state, limit, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The body of the thread. What is not written when it ends is tried once more.
    fn record(&self, file: &std::path::Path, failures: &Counter) {
        loop {
            let idle = |state: &mut State| state.written == state.version && !state.ending;
            let state = self.changed.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
            let (version, ending) = (state.version, state.ending);
            if state.written == version {
                return;
            }
            let text = record::write(&state.table, Instant::now(), &Clocks::now());
            drop(state);
            let pause = match durable::replace(file, text.as_bytes()) {
                Ok(()) => {
                    self.state().written = version;
                    self.changed.notify_all();
                    PAUSE
                }
                Err(error) => {
                    failures.inc();
                    tracing::warn!(file = %file.display(), %error, "ports could not be recorded");
                    PAUSE_AFTER_FAILURE
                }
            };
            if ending {
                return;
            }
            let ended = |state: &mut State| !state.ending;
            let paused = self.changed.wait_timeout_while(self.state(), pause, ended);
            drop(paused);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.state().ending = true;
        self.shared.changed.notify_all();
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(?panic, "the thread that records ports panicked");
        }
    }
}

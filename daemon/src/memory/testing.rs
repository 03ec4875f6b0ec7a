//! Memory as an engine would offer it, and a driver that can be watched, held and made to fail: for the tests
//! of this folder and of those who use it.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use rustix::fs::{MemfdFlags, SealFlags};

use super::{Mapping, ProcessMemory, RegionDriver, SystemDriver};
use crate::domain::{Failure, Reason};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A memfd with these seals.
pub(crate) fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("kvferry-test", flags).expect("a memfd");
    rustix::fs::ftruncate(&fd, bytes).expect("a size");
    if !seals.is_empty() {
        rustix::fs::fcntl_add_seals(&fd, seals).expect("seals");
    }
    fd
}

/// A memfd as engines should make it.
pub(crate) fn sealed_memfd(bytes: u64) -> OwnedFd {
    memfd(bytes, SealFlags::SHRINK | SealFlags::GROW)
}

/// A driver call, as the test driver saw it begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DriverCall {
    Map { length: u64 },
    Probe { base: u64 },
    Unmap { length: u64 },
}

/// What a test driver has seen.
#[derive(Clone, Default, Debug)]
pub(crate) struct Seen {
    pub(crate) calls: Vec<DriverCall>,
    pub(crate) in_progress: usize,
    pub(crate) high_water: usize,
    /// Mappings made and not released yet.
    pub(crate) live: usize,
    held: bool,
    /// A call waited for company in vain: the others need not.
    lonely: bool,
}

/// How a test driver behaves.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Behaviour {
    /// How long each call takes at least.
    pub(crate) pause: Duration,
    /// Which acquiring call fails, counted from 0.
    pub(crate) fail_at: Option<usize>,
    /// Calls wait until two of them run side by side.
    pub(crate) wants_company: bool,
}

/// The system's driver, watched.
#[derive(Default, Debug)]
pub(crate) struct TestDriver {
    system: SystemDriver,
    seen: Mutex<Seen>,
    changed: Condvar,
    behaviour: Behaviour,
}

impl TestDriver {
    pub(crate) fn new(behaviour: Behaviour) -> Arc<Self> {
        Arc::new(Self { behaviour, ..Self::default() })
    }

    pub(crate) fn seen(&self) -> Seen {
        self.lock().clone()
    }

    /// Calls that begin from now on do not end before [`TestDriver::let_go`].
    pub(crate) fn hold(&self) {
        self.lock().held = true;
    }

    pub(crate) fn let_go(&self) {
        self.lock().held = false;
        self.changed.notify_all();
    }

    /// Waits until so many calls are under way.
    pub(crate) fn wait_in_progress(&self, count: usize) {
        let waiting = |seen: &mut Seen| seen.in_progress != count;
        let (_seen, result) =
            self.changed.wait_timeout_while(self.lock(), PATIENCE, waiting).expect("no test panicked");
        assert!(!result.timed_out(), "{count} calls are never under way");
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no test panicked")
    }

    fn around<T>(&self, call: DriverCall, make: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut seen = self.lock();
        let index = seen.calls.iter().filter(|call| !matches!(call, DriverCall::Unmap { .. })).count();
        let fails = !matches!(call, DriverCall::Unmap { .. }) && self.behaviour.fail_at == Some(index);
        seen.calls.push(call);
        seen.in_progress += 1;
        seen.high_water = seen.high_water.max(seen.in_progress);
        self.changed.notify_all();
        let alone = |seen: &mut Seen| {
            seen.held || (self.behaviour.wants_company && seen.high_water < 2 && !seen.lonely)
        };
        let (mut seen, waited) =
            self.changed.wait_timeout_while(seen, PATIENCE, alone).expect("no test panicked");
        seen.lonely |= waited.timed_out();
        drop(seen);
        thread::sleep(self.behaviour.pause);
        let result = if fails { Err(Failure::new(Reason::Driver, "made to fail")) } else { make() };
        self.lock().in_progress -= 1;
        self.changed.notify_all();
        result
    }
}

impl RegionDriver for TestDriver {
    fn map(&self, fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Mapping, Failure> {
        self.around(DriverCall::Map { length }, || {
            let mapping = self.system.map(fd, offset, length)?;
            self.lock().live += 1;
            Ok(mapping)
        })
    }

    fn probe_process(&self, memory: &ProcessMemory, base: u64, length: u64) -> Result<(), Failure> {
        self.around(DriverCall::Probe { base }, || self.system.probe_process(memory, base, length))
    }

    fn unmap(&self, mapping: Mapping) {
        let length = mapping.len() as u64;
        let unmapped = self.around(DriverCall::Unmap { length }, || {
            self.system.unmap(mapping);
            self.lock().live -= 1;
            Ok(())
        });
        unmapped.expect("releasing is never made to fail");
    }
}

/// The memory of this very process, as if it were an engine's.
pub(crate) fn own_memory() -> Arc<ProcessMemory> {
    Arc::new(ProcessMemory::open(rustix::process::getpid()).expect("our own memory"))
}

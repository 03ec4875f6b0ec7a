//! Making one driver call: under the node's lock, and measured.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use super::{RegionDriver, RegistrarStats};
use crate::domain::{Failure, Reason};

/// The driver with what goes around each of its calls.
#[derive(Debug)]
pub(super) struct Caller {
    driver: Arc<dyn RegionDriver>,
    lock: Option<NodeLock>,
    meter: Meter,
}

impl Caller {
    pub(super) fn new(driver: Arc<dyn RegionDriver>, lock: Option<NodeLock>) -> Self {
        Self { driver, lock, meter: Meter::default() }
    }

    /// Makes one call for a request that waited this long for its turn. DRIVER where the lock cannot be had.
    pub(super) fn call<T>(
        &self,
        waited: Duration,
        call: impl FnOnce(&dyn RegionDriver) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let asked = Instant::now();
        let _held = self.lock.as_ref().map(NodeLock::hold).transpose()?;
        self.meter.wait.add(waited + asked.elapsed());
        self.meter.enter();
        let begun = Instant::now();
        let result = call(&*self.driver);
        self.meter.call.add(begun.elapsed());
        self.meter.leave(result.is_err());
        result
    }

    /// What was measured so far.
    pub(super) fn stats(&self, queue_length: usize) -> RegistrarStats {
        let meter = &self.meter;
        RegistrarStats {
            queue_length: queue_length as u64,
            waits: meter.wait.count.load(Relaxed),
            wait_sum: meter.wait.sum(),
            calls: meter.call.count.load(Relaxed),
            call_sum: meter.call.sum(),
            calls_in_progress: meter.in_progress.load(Relaxed),
            calls_high_water: meter.high_water.load(Relaxed),
            failures: meter.failures.load(Relaxed),
        }
    }
}

#[derive(Debug, Default)]
struct Meter {
    wait: Clocked,
    call: Clocked,
    in_progress: AtomicU64,
    high_water: AtomicU64,
    failures: AtomicU64,
}

impl Meter {
    fn enter(&self) {
        let now = self.in_progress.fetch_add(1, Relaxed) + 1;
        self.high_water.fetch_max(now, Relaxed);
    }

    fn leave(&self, failed: bool) {
        self.in_progress.fetch_sub(1, Relaxed);
        self.failures.fetch_add(u64::from(failed), Relaxed);
    }
}

#[derive(Debug, Default)]
struct Clocked {
    count: AtomicU64,
    sum_ns: AtomicU64,
}

impl Clocked {
    fn add(&self, time: Duration) {
        self.count.fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.load(Relaxed))
    }
}

/// An advisory lock on a file, for the daemons of one node.
#[derive(Debug)]
pub(super) struct NodeLock(File);

impl NodeLock {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        File::options().read(true).write(true).create(true).truncate(false).open(path).map(Self)
    }

    fn hold(&self) -> Result<Held<'_>, Failure> {
        rustix::io::retry_on_intr(|| flock(&self.0, FlockOperation::LockExclusive))
            .map(|()| Held(&self.0))
            .map_err(|errno| Failure::io(Reason::Driver, "locking the registrar's file", &errno.into()))
    }
}

struct Held<'a>(&'a File);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Err(errno) = flock(self.0, FlockOperation::Unlock) {
            tracing::error!(%errno, "the registrar's lock file stays locked");
        }
    }
}

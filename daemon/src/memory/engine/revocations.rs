//! The engine's revocations where those who touch its memory look at them.
//!
//! Beside the view, and published in the same order: stored, then the gate raised, then the news for those who
//! tell peers. So whoever enters the gate under the new version is judged by it, and once the gate was quiet
//! nobody touches what was revoked on behalf of an older transfer, whatever peers still send.
//!
//! As long as nothing speaks against a part it is judged by atomic loads alone; otherwise by one look under a
//! lock for the whole part.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Instant,
};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;

use super::{super::Version, EngineMemory};
use crate::{
    domain::{AddressRange, Epoch, Failure, Tag},
    policy::{Hit, RevocationLimits, RevocationList, Revocations},
};

/// A revocation that is stored and binding. Once the gate is quiet for its version it is proven.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raised {
    /// The endpoint's epoch since then.
    pub epoch: Epoch,
    /// For [`Gate::quiet`](super::super::Gate::quiet).
    pub version: Version,
}

/// What the endpoint of one engine has revoked.
#[derive(Debug)]
pub struct RevocationBook {
    /// These three repeat what `all` says. They are written under its lock, after it.
    epoch: AtomicU64,
    newest_range: AtomicU64,
    tombstones: AtomicUsize,
    /// Held for one judgement or one change.
    all: Mutex<Revocations>,
    news: watch::Sender<Epoch>,
    refused: Counter,
}

impl RevocationBook {
    /// Begins with these; parts that it refuses are counted.
    pub fn new(revocations: Revocations, refused: Counter) -> Self {
        let book = Self {
            epoch: AtomicU64::new(0),
            newest_range: AtomicU64::new(0),
            tombstones: AtomicUsize::new(0),
            news: watch::Sender::new(revocations.epoch()),
            all: Mutex::new(revocations),
            refused,
        };
        book.repeat(&book.all());
        book
    }

    /// The newest revocation.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(SeqCst))
    }

    /// Whether a part of a transfer admitted under this epoch may touch these runs (address, bytes). Asked inside
    /// the gate, or before entering it.
    ///
    /// # Errors
    /// What speaks against it. It is counted as a refused part.
    pub fn judge_part(
        &self,
        admitted: Epoch,
        tag: Option<Tag>,
        runs: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), Hit> {
        let judged = self.judge(admitted, tag, runs);
        if judged.is_err() {
            self.refused.inc();
        }
        judged
    }

    /// The same of a whole transfer.
    ///
    /// # Errors
    /// What speaks against it.
    pub fn judge(
        &self,
        admitted: Epoch,
        tag: Option<Tag>,
        runs: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), Hit> {
        if self.is_clear(admitted, tag) {
            return Ok(());
        }
        let now = Instant::now();
        let mut all = self.all();
        all.expire(now);
        self.tombstones.store(all.tombstones(), SeqCst);
        all.judge(admitted, tag, runs, now)
    }

    /// Whether transfers with this tag are refused.
    pub fn refuses(&self, tag: Tag) -> bool {
        self.tombstones.load(SeqCst) > 0 && self.all().refuses(tag, Instant::now())
    }

    /// What is newer than `told`, and the floor.
    pub fn since(&self, told: Epoch) -> RevocationList {
        self.all().since(told, Instant::now())
    }

    /// Tells the newest epoch, after it is binding.
    pub fn news(&self) -> watch::Receiver<Epoch> {
        self.news.subscribe()
    }

    fn is_clear(&self, admitted: Epoch, tag: Option<Tag>) -> bool {
        admitted.0 >= self.newest_range.load(SeqCst)
            && admitted.0 <= self.epoch.load(SeqCst)
            && (tag.is_none() || self.tombstones.load(SeqCst) == 0)
    }

    fn repeat(&self, all: &Revocations) {
        self.epoch.store(all.epoch().0, SeqCst);
        self.newest_range.store(all.newest_range().0, SeqCst);
        self.tombstones.store(all.tombstones(), SeqCst);
    }

    fn all(&self) -> MutexGuard<'_, Revocations> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RevocationBook {
    fn default() -> Self {
        Self::new(Revocations::new(RevocationLimits::ranges(4096)), Counter::default())
    }
}

impl EngineMemory {
    /// What was revoked.
    pub fn revocations(&self) -> &RevocationBook {
        &self.revocations
    }

    /// Refuses these ranges to every transfer admitted so far.
    pub fn revoke(&self, ranges: Vec<AddressRange>) -> Raised {
        let mut all = self.revocations.all();
        let epoch = all.revoke(ranges);
        self.bind(&all, epoch)
    }

    /// Refuses every transfer with this tag, those to come included.
    ///
    /// # Errors
    /// `Limit` when too many tags are revoked.
    pub fn revoke_tag(&self, tag: Tag) -> Result<Raised, Failure> {
        let mut all = self.revocations.all();
        let epoch = all.revoke_tag(tag, Instant::now())?;
        Ok(self.bind(&all, epoch))
    }

    /// Under the lock, so that the news never go back.
    fn bind(&self, all: &Revocations, epoch: Epoch) -> Raised {
        self.revocations.repeat(all);
        let version = self.gate.raise();
        self.revocations.news.send_replace(epoch);
        Raised { epoch, version }
    }
}

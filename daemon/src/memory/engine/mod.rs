//! All memory of one attached engine.
//!
//! Lanes and planners read the [`View`], an immutable snapshot behind an atomic pointer. A registration is a
//! transaction: ranges claimed, memory acquired through the registrar, view published, or nothing of it. An
//! unregistration (I6) takes the regions out of the view and retires them, raises the gate and answers; they
//! are released once the gate was quiet and the last lease is gone, however long that takes.
//!
//! Every change is published in the same order: view, then gate, then the news for those who push tables. So
//! whoever enters the gate under the new version finds the new view.
//!
//! Revocations are kept beside the view, and are published in the same order (`revocations.rs`).
//!
//! What it deliberately does not know: peers and transfers. Who must be told of a change, and how long an
//! answer may wait for it, is decided above.

mod ledger;
mod private;
mod register;
mod release;
mod revocations;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use self::ledger::Ledger;
use super::{Gate, Layout, ProcessMemory, Region, RegionTable, Registrar, Version};
use crate::domain::{LayoutId, RegionId};

pub use private::{Awaited, ProcessAccess};
pub use release::PendingRelease;
pub use revocations::{Raised, RevocationBook};

/// What one engine may register (`limits.*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// Regions, those not released yet included; never more than 65,535.
    pub regions: usize,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Layouts.
    pub layouts: usize,
}

/// Where the bytes of a region are.
#[derive(Clone, Debug)]
pub enum Source {
    /// In a memfd.
    SharedFd {
        /// The memfd.
        fd: Arc<OwnedFd>,
        /// Where the region begins in it.
        offset: u64,
    },
    /// In the engine's private memory.
    Process,
}

/// A range to be registered.
#[derive(Clone, Debug)]
pub struct RegionRequest {
    /// First address, in the engine's address space.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// Where they are.
    pub source: Source,
}

/// A layout to be registered; the fields are those of [`Layout`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayoutRequest {
    /// First address of each layer.
    pub layer_bases: Vec<u64>,
    /// Bytes from one page to the next.
    pub page_stride: u64,
    /// Payload bytes of a page.
    pub page_bytes: u64,
    /// Pages in each layer.
    pub pages: u64,
    /// Opaque; equal on both sides of a transfer.
    pub dtype_tag: String,
}

/// What is to be unregistered. A layout goes with the regions it lies in, too.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Unregister {
    /// Regions by number.
    pub ids: Vec<RegionId>,
    /// Regions by base address, as incumbents do.
    pub bases: Vec<u64>,
    /// Layouts by number.
    pub layouts: Vec<LayoutId>,
}

/// What can be reached at one moment. Holding it holds a lease on every region in it: let go of it before
/// waiting for anything.
#[derive(Debug, Default)]
pub struct View {
    /// The regions.
    pub table: RegionTable<Arc<Region>>,
    /// The layouts, each wholly inside the regions.
    pub layouts: BTreeMap<LayoutId, Arc<Layout>>,
    /// Rises with every change.
    pub version: u64,
    /// The engine is gone; nothing will be registered any more.
    pub closed: bool,
}

/// All memory of one attached engine. Close it before it is dropped: only then is everything released by the
/// registrar.
#[derive(Debug)]
pub struct EngineMemory {
    registrar: Arc<Registrar>,
    quota: Quota,
    process: ProcessAccess,
    gate: Arc<Gate>,
    view: ArcSwap<View>,
    changes: watch::Sender<u64>,
    revocations: RevocationBook,
    /// Also makes those who change the view take turns. Never held across an await.
    ledger: Mutex<Ledger>,
}

impl EngineMemory {
    /// Nothing registered yet, and nothing revoked. Without `process`, private memory is refused.
    pub fn new(registrar: Arc<Registrar>, quota: Quota, process: Option<Arc<ProcessMemory>>) -> Arc<Self> {
        let process = process.map_or(ProcessAccess::OutOfReach, ProcessAccess::Direct);
        Self::with_revocations(registrar, quota, process, RevocationBook::default())
    }

    /// The same, with any way into private memory, and with what was revoked before.
    pub fn with_revocations(
        registrar: Arc<Registrar>,
        quota: Quota,
        process: ProcessAccess,
        revocations: RevocationBook,
    ) -> Arc<Self> {
        Arc::new(Self {
            registrar,
            quota,
            process,
            gate: Gate::new(),
            view: ArcSwap::default(),
            changes: watch::Sender::new(0),
            revocations,
            ledger: Mutex::default(),
        })
    }

    /// The gate that everyone enters who touches this memory.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// What can be reached now.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Tells the version of the newest view, after it is visible.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change visible and binding, in this order. The ledger is locked.
    fn publish(
        &self,
        table: RegionTable<Arc<Region>>,
        layouts: BTreeMap<LayoutId, Arc<Layout>>,
        closed: bool,
    ) -> Version {
        let version = self.view.load().version + 1;
        self.view.store(Arc::new(View { table, layouts, version, closed }));
        let raised = self.gate.raise();
        self.changes.send_replace(version);
        raised
    }
}

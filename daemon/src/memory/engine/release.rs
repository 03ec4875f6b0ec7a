//! Unregistration and the end of an engine: memory on its way out (I6, I10).
//!
//! First nobody may begin to touch it (retired, out of the view, gate raised), then nobody does (gate quiet,
//! leases gone), then it is released, then its addresses are free. The steps run in a task of their own; the
//! callers only wait for it, as long as they like.

use std::{
    collections::{BTreeMap, BTreeSet},
    future,
    sync::Arc,
};

use tokio::sync::{oneshot, watch};

use super::{
    super::{Backing, Layout, RegionTable, Urgency, Version},
    EngineMemory, Unregister, View,
    ledger::{Ledger, Named},
};
use crate::domain::{Failure, LayoutId, Reason};

/// Regions that were unregistered. The work goes on whether anybody waits or not.
#[derive(Debug)]
pub struct PendingRelease {
    releases: Vec<watch::Receiver<bool>>,
}

impl PendingRelease {
    /// Waits until nobody can touch the memory any more and it is released. Bound it with a timeout and answer
    /// UNSETTLED then; it may be waited for again.
    pub async fn settled(&mut self) {
        for release in &mut self.releases {
            if release.wait_for(|done| *done).await.is_err() {
                // The runtime is shutting down and took the task with it: that is no proof (I1).
                future::pending::<()>().await;
            }
        }
    }
}

impl EngineMemory {
    /// Takes regions and layouts out of use, all or none, and begins to release them. Must run inside a
    /// runtime, which carries the rest of the work. A release that is already under way is joined.
    ///
    /// UNREGISTERED for what is not registered, or named twice.
    #[expect(clippy::unused_async, reason = "it needs the runtime that an async caller has")]
    pub async fn unregister(self: &Arc<Self>, unregister: Unregister) -> Result<PendingRelease, Failure> {
        let mut ledger = self.ledger();
        let view = self.view();
        if view.closed {
            return Err(Failure::plain(Reason::EngineGone));
        }
        let named = ledger.find(&unregister)?;
        let dropped = layouts_named(&view, &unregister.layouts)?;
        if named.live.is_empty() && dropped.is_empty() {
            return Ok(PendingRelease { releases: named.pending });
        }
        let (gone, kept): (Vec<_>, Vec<_>) =
            view.table.iter().cloned().partition(|region| named.live.contains(&region.info.base));
        gone.iter().for_each(|region| region.retire());
        let table = RegionTable::new(kept);
        let keeps = |layout: &Layout| !dropped.contains(&layout.id) && layout.check(&table).is_ok();
        let mut layouts = view.layouts.clone();
        layouts.retain(|_, layout| keeps(layout));
        for id in view.layouts.keys().filter(|id| !layouts.contains_key(id)) {
            ledger.layout_numbers.give_back(id.0);
        }
        let version = self.publish(table, layouts, false);
        Ok(self.depart(&mut ledger, named, version))
    }

    /// The engine is gone: from the returned version on nobody begins to touch its memory.
    pub fn begin_close(&self) -> Version {
        let _ledger = self.ledger();
        let view = self.view();
        if view.closed {
            return self.gate.raise();
        }
        view.table.iter().for_each(|region| region.retire());
        let version = self.publish(RegionTable::default(), BTreeMap::new(), true);
        self.close_assistant();
        version
    }

    /// Releases everything, ahead of all ordinary work of the registrar. Dropped while it waits, the work goes
    /// on; may be called again.
    pub async fn close(self: &Arc<Self>) {
        let version = self.begin_close();
        let mut pending = {
            let mut ledger = self.ledger();
            let named = ledger.all();
            self.depart(&mut ledger, named, version)
        };
        pending.settled().await;
        self.release_assistant().await;
    }

    /// Sends live regions on their way out, together.
    fn depart(self: &Arc<Self>, ledger: &mut Ledger, named: Named, version: Version) -> PendingRelease {
        let Named { live, pending: mut releases } = named;
        if !live.is_empty() {
            let (done, released) = watch::channel(false);
            let leases = live.iter().filter_map(|base| ledger.retire(*base, &released)).collect();
            let departure = Departure { bases: live.into_iter().collect(), leases, version, done };
            // Owned by the claims: each holds the other end of `done` until the task is through.
            tokio::spawn(departure.run(self.clone()));
            releases.push(released);
        }
        PendingRelease { releases }
    }
}

fn layouts_named(view: &View, ids: &[LayoutId]) -> Result<BTreeSet<LayoutId>, Failure> {
    let mut named = BTreeSet::new();
    for (at, id) in ids.iter().enumerate() {
        if !view.layouts.contains_key(id) || !named.insert(*id) {
            let message = format!("layout_ids[{at}] names no layout, or one for the second time");
            return Err(Failure::new(Reason::Unregistered, message).at(at as u64));
        }
    }
    Ok(named)
}

/// Regions that go together.
#[derive(Debug)]
struct Departure {
    /// Their claims.
    bases: Vec<u64>,
    /// Hear when the last lease of each is gone.
    leases: Vec<oneshot::Receiver<Backing>>,
    /// The change that put them out of reach.
    version: Version,
    done: watch::Sender<bool>,
}

impl Departure {
    async fn run(self, memory: Arc<EngineMemory>) {
        memory.gate.quiet(self.version).await;
        let mut backings = Vec::with_capacity(self.leases.len());
        for lease in self.leases {
            // A region gives its backing back whatever happens to it; without one nothing is left to release.
            backings.extend(lease.await);
        }
        let urgency = if memory.view().closed { Urgency::Dead } else { Urgency::Ordinary };
        memory.registrar.release(backings, urgency).await;
        memory.ledger().free(self.bases);
        self.done.send_replace(true);
    }
}

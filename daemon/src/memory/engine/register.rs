//! Registration: a transaction over all regions and layouts of a call.
//!
//! Ranges are claimed, memory is acquired, and then, with nothing left that can fail, the view is published.
//! Whatever was got on the way is an object that gives itself back when it is dropped, so a failure, a dropped
//! call and the death of the engine all undo the same things.

use std::{mem, sync::Arc};

use super::{
    super::{Acquire, Grant, Layout, MemoryKind, Region, RegionInfo, RegionTable, Urgency},
    EngineMemory, LayoutRequest, RegionRequest, Source, View,
    ledger::Ledger,
};
use crate::domain::{Failure, Generation, LayoutId, Reason, RegionId};

/// Layers of a layout.
const MAX_LAYERS: usize = 65_536;

/// Bytes of a layout's dtype tag.
const MAX_DTYPE_TAG_BYTES: usize = 256;

/// What a registration made, in the order asked for.
type Registered = (Vec<RegionInfo>, Vec<Layout>);

impl EngineMemory {
    /// Registers all of it or nothing, and answers in the order asked for. Dropped while it waits, it
    /// registers nothing.
    ///
    /// A failure names by its index the region at fault, or the layout where the message says so.
    pub async fn register(
        &self,
        regions: Vec<RegionRequest>,
        layouts: Vec<LayoutRequest>,
    ) -> Result<Registered, Failure> {
        layouts.iter().enumerate().try_for_each(|(at, layout)| check_shape(at, layout))?;
        let calls = self.calls(&regions)?;
        let reservation = Reservation::new(self, &regions)?;
        let acquired = async {
            self.probe_assisted(&regions).await?;
            self.registrar.acquire(calls).await
        };
        let grant = tokio::select! {
            // First, so that nothing is acquired for an engine that is gone already.
            biased;
            () = self.closed() => return Err(Failure::plain(Reason::EngineGone)),
            grant = acquired => grant?,
        };
        match self.commit(reservation, &regions, layouts, grant) {
            Ok(registered) => Ok(registered),
            Err((failure, grant)) => {
                self.registrar.release(grant.into_backings(), Urgency::Ordinary).await;
                Err(failure)
            }
        }
    }

    pub(super) async fn closed(&self) {
        let mut changes = self.changes();
        // The sender is ours, so waiting for news cannot fail.
        while !self.view.load().closed && changes.changed().await.is_ok() {}
    }

    /// The driver call that each region needs.
    fn calls(&self, regions: &[RegionRequest]) -> Result<Vec<Acquire>, Failure> {
        let call = |(at, request): (usize, &RegionRequest)| {
            let RegionRequest { base, length, ref source } = *request;
            match source {
                Source::SharedFd { fd, offset } => {
                    Ok(Acquire::Shared { fd: fd.clone(), offset: *offset, length })
                }
                Source::Process => self.acquire_process(base, length).map_err(|failure| {
                    let message = format!("regions[{at}]: {}", failure.message);
                    Failure { message, ..failure }.at(at as u64)
                }),
            }
        };
        regions.iter().enumerate().map(call).collect()
    }

    /// Makes acquired memory regions of the view, unless a layout does not fit or the engine is gone.
    fn commit(
        &self,
        mut reservation: Reservation<'_>,
        requests: &[RegionRequest],
        layouts: Vec<LayoutRequest>,
        grant: Grant,
    ) -> Result<Registered, (Failure, Grant)> {
        let mut ledger = self.ledger();
        let view = self.view();
        let (infos, layouts) = match self.plan(&mut ledger, &view, requests, layouts) {
            Ok(planned) => planned,
            Err(failure) => {
                // The reservation takes the lock itself when it goes.
                drop(ledger);
                return Err((failure, grant));
            }
        };
        let mut entries: Vec<_> = view.table.iter().cloned().collect();
        for (info, backing) in infos.iter().zip(grant.into_backings()) {
            let (region, returned) = Region::new(*info, backing);
            ledger.go_live(info, returned);
            entries.push(region);
        }
        reservation.bases.clear();
        let mut all = view.layouts.clone();
        all.extend(layouts.iter().map(|layout| (layout.id, Arc::new(layout.clone()))));
        self.publish(RegionTable::new(entries), all, false);
        Ok((infos, layouts))
    }

    /// Numbers everything, and checks what could not be checked before the other regions were known.
    fn plan(
        &self,
        ledger: &mut Ledger,
        view: &View,
        requests: &[RegionRequest],
        layouts: Vec<LayoutRequest>,
    ) -> Result<Registered, Failure> {
        if view.closed {
            return Err(Failure::plain(Reason::EngineGone));
        }
        if layouts.len() > self.quota.layouts.saturating_sub(view.layouts.len()) {
            let message = format!("layouts: more than the quota of {}", self.quota.layouts);
            return Err(Failure::new(Reason::Limit, message));
        }
        let mut generations = self.registrar.generations(requests.len() + layouts.len())?;
        let number = |(request, generation)| describe(ledger, request, generation);
        let infos: Vec<_> = requests.iter().zip(&mut generations).map(number).collect();
        let number = |(layout, generation)| name(ledger, layout, generation);
        let layouts: Vec<_> = layouts.into_iter().zip(generations).map(number).collect();
        if let Err(failure) = check_places(view, &infos, &layouts) {
            infos.iter().for_each(|info| ledger.region_numbers.give_back(info.id.0));
            layouts.iter().for_each(|layout| ledger.layout_numbers.give_back(layout.id.0));
            return Err(failure);
        }
        Ok((infos, layouts))
    }
}

fn describe(ledger: &mut Ledger, request: &RegionRequest, generation: Generation) -> RegionInfo {
    let RegionRequest { base, length, ref source } = *request;
    let kind = match source {
        Source::SharedFd { .. } => MemoryKind::SharedFd,
        Source::Process => MemoryKind::Process,
    };
    RegionInfo { id: RegionId(ledger.region_numbers.take()), generation, base, length, kind }
}

fn name(ledger: &mut Ledger, request: LayoutRequest, generation: Generation) -> Layout {
    let LayoutRequest { layer_bases, page_stride, page_bytes, pages, dtype_tag } = request;
    let id = LayoutId(ledger.layout_numbers.take());
    Layout { id, generation, layer_bases, page_stride, page_bytes, pages, dtype_tag }
}

/// What is wrong with a layout whatever the regions are.
fn check_shape(at: usize, layout: &LayoutRequest) -> Result<(), Failure> {
    let fault = if layout.layer_bases.is_empty() {
        "layer_bases is empty"
    } else if layout.layer_bases.len() > MAX_LAYERS {
        "layer_bases has more than 65,536 entries"
    } else if layout.pages == 0 {
        "pages is zero"
    } else if layout.page_bytes == 0 {
        "page_bytes is zero"
    } else if layout.page_stride < layout.page_bytes {
        "page_stride is less than page_bytes"
    } else if layout.dtype_tag.len() > MAX_DTYPE_TAG_BYTES {
        "dtype_tag has more than 256 bytes"
    } else {
        return Ok(());
    };
    Err(Failure::new(Reason::BadArgument, format!("layouts[{at}].{fault}")).at(at as u64))
}

/// Every page of the new layouts lies in a region, old or new.
fn check_places(view: &View, infos: &[RegionInfo], layouts: &[Layout]) -> Result<(), Failure> {
    if layouts.is_empty() {
        return Ok(());
    }
    let old = view.table.iter().map(|region| region.info);
    let table = RegionTable::new(old.chain(infos.iter().copied()).collect());
    for (at, layout) in layouts.iter().enumerate() {
        layout.check(&table).map_err(|(address, _)| {
            let message = format!("layouts[{at}]: the page at {address:#x} does not lie in a region");
            Failure::new(Reason::OutOfBounds, message).at(at as u64)
        })?;
    }
    Ok(())
}

/// Claimed ranges of a registration that may still fail; given up when dropped.
#[derive(Debug)]
struct Reservation<'a> {
    memory: &'a EngineMemory,
    bases: Vec<u64>,
}

impl<'a> Reservation<'a> {
    fn new(memory: &'a EngineMemory, regions: &[RegionRequest]) -> Result<Self, Failure> {
        memory.ledger().reserve(regions, &memory.quota)?;
        Ok(Self { memory, bases: regions.iter().map(|request| request.base).collect() })
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let bases = mem::take(&mut self.bases);
        if !bases.is_empty() {
            self.memory.ledger().free(bases);
        }
    }
}

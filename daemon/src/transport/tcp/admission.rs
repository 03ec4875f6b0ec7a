//! What a target makes sure of before a part touches memory (I4, I5): nobody has stopped its transfer, its regions
//! are the ones it names, its runs lie in them, and nothing of it was revoked.

use std::sync::Arc;

use super::{
    body::{Body, Place},
    fence::Fence,
    stops::LaneStops,
    wire::{Descriptor, PartHeader, Refusal, Table},
};
use crate::{
    domain::{Epoch, Failure, Reason, Tag, TransferId},
    memory::{EngineMemory, Region, View},
    policy::Hit,
};

/// The part that a target has under way, and the leases of what it touches. Reused from part to part.
#[derive(Debug)]
pub(super) struct Admission {
    engine: Arc<EngineMemory>,
    stops: LaneStops,
    transfer: TransferId,
    sequence: u64,
    admitted: Epoch,
    tag: Option<Tag>,
    regions: Vec<Arc<Region>>,
    /// Address and bytes of each run: what a revocation is held against.
    runs: Vec<(u64, u64)>,
}

impl Admission {
    pub(super) fn new(engine: Arc<EngineMemory>, stops: LaneStops) -> Self {
        Self {
            engine,
            stops,
            transfer: TransferId([0; 16]),
            sequence: 0,
            admitted: Epoch(0),
            tag: None,
            regions: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// The lane's marks.
    pub(super) fn stops(&self) -> &LaneStops {
        &self.stops
    }

    /// The fence of the same engine.
    pub(super) fn fence(&self) -> Fence {
        Fence::new(self.engine.clone())
    }

    /// Checks the whole part, and fills `body` with its pieces when nothing speaks against it.
    pub(super) fn admit(
        &mut self,
        header: &PartHeader,
        table: Table<'_>,
        body: &mut Body,
    ) -> Result<(), Refusal> {
        self.transfer = header.transfer;
        self.sequence = header.sequence;
        (self.admitted, self.tag) = (header.admit_epoch, header.tag);
        let admitted = self.check(header, table);
        if admitted.is_err() {
            self.end();
            return admitted;
        }
        let regions = &self.regions;
        body.fill(table.runs().map(|run| place(regions, run)));
        Ok(())
    }

    /// Whether the part under way may go on under new rules.
    pub(super) fn review(&self, view: &View) -> Result<(), Refusal> {
        if self.stops.is_stopped(self.transfer, self.sequence) {
            return Err(Refusal::whole(Reason::Cancelled));
        }
        let stands = |region: &Arc<Region>| {
            let now = view.table.get(region.info.id);
            now.is_some_and(|now| Arc::ptr_eq(now, region)) && !region.is_retired()
        };
        if !self.regions.iter().all(stands) {
            return Err(Refusal::whole(Reason::RegionChanged));
        }
        self.check_revocations()
    }

    /// The part is over or put aside: lets go of the leases.
    pub(super) fn end(&mut self) {
        self.regions.clear();
        self.runs.clear();
    }

    /// Whether leases are held.
    pub(super) fn is_under_way(&self) -> bool {
        !self.regions.is_empty()
    }

    fn check(&mut self, header: &PartHeader, table: Table<'_>) -> Result<(), Refusal> {
        if self.stops.is_stopped(header.transfer, header.sequence) {
            return Err(Refusal::whole(Reason::Cancelled));
        }
        let view = self.engine.view();
        self.end();
        for (entry, (id, generation)) in table.regions().enumerate() {
            let region = view.table.get(id).filter(|region| region.info.generation == generation);
            let Some(region) = region.filter(|region| !region.is_retired()) else {
                let run = table.runs().position(|run| usize::from(run.region) == entry).unwrap_or(0);
                return Err(Refusal::of_run(Reason::RegionChanged, run));
            };
            self.regions.push(region.clone());
        }
        let mut bytes = 0;
        for (at, run) in table.runs().enumerate() {
            self.check_run(run).map_err(|reason| Refusal::of_run(reason, at))?;
            bytes += u64::from(run.length);
            self.runs.push((run.address, run.length.into()));
        }
        if bytes != u64::from(header.bytes) {
            return Err(Refusal::whole(Reason::BadArgument));
        }
        self.check_revocations()
    }

    /// The part was checked outside the gate or under older rules: what was revoked since is seen here, at the
    /// latest in the review that follows the next entry.
    fn check_revocations(&self) -> Result<(), Refusal> {
        let judged = self.engine.revocations().judge_part(self.admitted, self.tag, self.runs.iter().copied());
        judged.map_err(|hit| match hit {
            Hit::Run(run) => Refusal::of_run(Reason::Revoked, run),
            Hit::Future | Hit::Floor | Hit::Tag => Refusal::whole(Reason::Revoked),
        })
    }

    fn check_run(&self, run: Descriptor) -> Result<(), Reason> {
        let region = self.regions.get(usize::from(run.region)).ok_or(Reason::BadArgument)?;
        if run.length == 0 {
            return Err(Reason::BadArgument);
        }
        match () {
            () if region.info.contains(run.address, run.length.into()) => Ok(()),
            () if region.info.contains(run.address, 1) => Err(Reason::OutOfBounds),
            () => Err(Reason::Unregistered),
        }
    }
}

fn place(regions: &[Arc<Region>], run: Descriptor) -> Place<'_> {
    (&regions[usize::from(run.region)], run.address, run.length.into())
}

/// A lost connection in words.
pub(super) fn lost(error: &std::io::Error) -> Failure {
    Failure::io(Reason::ConnectionLost, "the lane's connection", error)
}

/// The peer has hung up.
pub(super) fn hung_up() -> Failure {
    Failure::new(Reason::ConnectionLost, "the peer closed the lane's connection")
}

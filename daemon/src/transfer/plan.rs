//! Planning: slices, checked against both region tables, coalesced and cut into parts.
//!
//! Everything is checked before a byte moves (I5): the whole batch is resolved, or the first slice at fault is
//! named and nothing is sent. The plan is linear in the number of slices and allocates per batch, not per slice.

use std::sync::{Arc, atomic::AtomicBool};

use crate::{
    domain::{Epoch, Failure, Op, Reason, SliceBatch, Tag, TransferId},
    memory::{Described, Miss, Region, RegionInfo, RegionTable},
    transport::{PART_BYTES, PART_RUNS, PartBounds, Payload, RemoteRegion, Run},
};

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Whose.
    pub transfer: TransferId,
    /// Direction.
    pub op: Op,
    /// The request it serves.
    pub tag: Option<Tag>,
    /// Epoch it was admitted under.
    pub admit_epoch: Epoch,
}

/// Which side of a slice is at fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The initiator's memory.
    Local,
    /// The target's memory.
    Remote,
}

/// The first slice that could not be resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unresolved {
    /// Which side.
    pub side: Side,
    /// Index in the batch.
    pub slice: u64,
    /// Address on that side.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// What is wrong with it.
    pub miss: Miss,
}

impl From<Unresolved> for Failure {
    fn from(fault: Unresolved) -> Self {
        let side = match fault.side {
            Side::Local => "local",
            Side::Remote => "remote",
        };
        let wrong = match fault.miss {
            Miss::Unregistered => "lies in no registered region",
            Miss::OutOfBounds => "leaves its region",
            Miss::Wraps => "wraps around the address space",
        };
        Failure::new(
            fault.miss.reason(),
            format!("slice {}: {side} {:#x}+{} {wrong}", fault.slice, fault.address, fault.length),
        )
        .at(fault.slice)
    }
}

/// Checks the initiator's side alone, for when the target's table is not known yet. Gives the regions used.
pub fn check_local(
    batch: &SliceBatch,
    local: &RegionTable<Arc<Region>>,
) -> Result<Vec<Arc<Region>>, Failure> {
    let mut used = Used::new(local.len());
    let mut near = 0;
    for (slice, (address, _, length)) in batch.iter().enumerate() {
        let region = local.find_near(address, length, &mut near).map_err(|miss| {
            let slice = slice as u64;
            Unresolved { side: Side::Local, slice, address, length, miss }
        })?;
        used.index(near, region);
    }
    Ok(used.entries.into_iter().cloned().collect())
}

/// Resolves, coalesces and cuts.
pub fn plan(
    order: Order,
    batch: &SliceBatch,
    local: &RegionTable<Arc<Region>>,
    remote: &RegionTable<RegionInfo>,
) -> Result<Payload, Unresolved> {
    let mut locals = Used::new(local.len());
    let mut remotes = Used::new(remote.len());
    let mut cutter = Cutter::with_capacity(batch.len());
    let (mut near_local, mut near_remote) = (0, 0);
    for (index, (local_address, remote_address, length)) in batch.iter().enumerate() {
        let slice = index as u64;
        let fault = |side, address, miss| Unresolved { side, slice, address, length, miss };
        let source = local
            .find_near(local_address, length, &mut near_local)
            .map_err(|miss| fault(Side::Local, local_address, miss))?;
        let target = remote
            .find_near(remote_address, length, &mut near_remote)
            .map_err(|miss| fault(Side::Remote, remote_address, miss))?;
        cutter.slice(Run {
            local: local_address,
            remote: remote_address,
            length,
            local_region: locals.index(near_local, source),
            remote_region: remotes.index(near_remote, target),
        });
    }
    let (runs, parts, bytes) = cutter.finish();
    Ok(Payload {
        transfer: order.transfer,
        op: order.op,
        tag: order.tag,
        admit_epoch: order.admit_epoch,
        local_regions: locals.entries.into_iter().cloned().collect(),
        remote_regions: remotes
            .entries
            .into_iter()
            .map(|region| RemoteRegion { id: region.info().id, generation: region.info().generation })
            .collect(),
        runs,
        parts,
        slices: batch.len() as u64,
        bytes,
        stopped: AtomicBool::new(false),
    })
}

/// Most payload bytes of a transfer: as many parts as there may be slices.
pub const MAX_BYTES: u64 = PART_BYTES << 22;

/// Refuses a batch whose parts alone would fill this node's memory: the same region may be named again and again.
pub fn check_size(batch: &SliceBatch) -> Result<(), Failure> {
    let total = batch.iter().try_fold(0u64, |sum, (.., length)| sum.checked_add(length));
    match total {
        Some(bytes) if bytes <= MAX_BYTES => Ok(()),
        _ => Err(Failure::new(Reason::Limit, format!("more than {MAX_BYTES} bytes in one transfer"))),
    }
}

/// Every failure of [`plan`] that names the remote side may be cured by a newer table.
pub fn wants_newer_table(fault: &Unresolved) -> bool {
    fault.side == Side::Remote && fault.miss != Miss::Wraps
}

/// The regions of one table that the batch uses, numbered in order of first use.
struct Used<'a, R> {
    entries: Vec<&'a R>,
    /// By place in the table; `u16::MAX` where not used yet. Tables hold at most 65,535 regions.
    numbers: Vec<u16>,
}

impl<'a, R> Used<'a, R> {
    fn new(table: usize) -> Self {
        Self { entries: Vec::new(), numbers: vec![u16::MAX; table] }
    }

    fn index(&mut self, place: usize, entry: &'a R) -> u16 {
        if self.numbers[place] == u16::MAX {
            self.numbers[place] = self.entries.len() as u16;
            self.entries.push(entry);
        }
        self.numbers[place]
    }
}

/// Joins slices into runs and runs into parts as they come.
struct Cutter {
    runs: Vec<Run>,
    parts: Vec<PartBounds>,
    open: PartBounds,
    slices: u32,
    bytes: u64,
}

impl Cutter {
    fn with_capacity(slices: usize) -> Self {
        Self {
            runs: Vec::with_capacity(slices),
            parts: Vec::new(),
            open: PartBounds { first_run: 0, runs: 0, skip: 0, bytes: 0, first_slice: 0, slices: 0 },
            slices: 0,
            bytes: 0,
        }
    }

    fn slice(&mut self, run: Run) {
        self.bytes += run.length;
        let mut left = run.length;
        let joins = self.runs.last().is_some_and(|last| continues(last, &run));
        if left > 0 {
            match self.runs.last_mut() {
                Some(last) if joins => last.length += run.length,
                _ => self.runs.push(run),
            }
            let mut fresh = !joins;
            while left > 0 {
                if u64::from(self.open.bytes) == PART_BYTES || (fresh && self.open.runs as usize == PART_RUNS)
                {
                    self.cut(left);
                }
                // A part that was just cut begins inside this run; one that goes on counts a new run once.
                fresh |= self.open.runs == 0;
                self.open.runs += u32::from(fresh);
                fresh = false;
                let take = left.min(PART_BYTES - u64::from(self.open.bytes));
                self.open.bytes += take as u32;
                left -= take;
            }
        }
        self.slices += 1;
        self.open.slices += 1;
    }

    /// Ends the open part; the next one begins `left` bytes before the end of the last run.
    fn cut(&mut self, left: u64) {
        let last = self.runs.len() as u32 - 1;
        let skip = self.runs[last as usize].length - left;
        let next =
            PartBounds { first_run: last, runs: 0, skip, bytes: 0, first_slice: self.slices, slices: 0 };
        self.parts.push(std::mem::replace(&mut self.open, next));
    }

    fn finish(mut self) -> (Vec<Run>, Vec<PartBounds>, u64) {
        if self.open.bytes > 0 {
            self.parts.push(self.open);
        } else if let Some(last) = self.parts.last_mut() {
            // Empty slices at the end are done when everything before them is.
            last.slices += self.open.slices;
        }
        self.runs.shrink_to_fit();
        (self.runs, self.parts, self.bytes)
    }
}

fn continues(last: &Run, next: &Run) -> bool {
    last.local + last.length == next.local
        && last.remote + last.length == next.remote
        && last.local_region == next.local_region
        && last.remote_region == next.remote_region
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        domain::{Generation, RegionId},
        memory::MemoryKind,
        transport::Part,
    };

    const BASE: u64 = 0x10_0000;
    const SIZE: u64 = 1 << 32;

    fn info(base: u64, length: u64) -> RegionInfo {
        let kind = MemoryKind::SharedFd;
        RegionInfo { id: RegionId(1), generation: Generation(7), base, length, kind }
    }

    fn order() -> Order {
        let transfer = TransferId([1; 16]);
        Order { transfer, op: Op::Write, tag: None, admit_epoch: Epoch(0) }
    }

    /// The cutting alone, against one region that holds everything.
    fn cut(slices: &[(u64, u64, u64)]) -> Arc<Payload> {
        let mut cutter = Cutter::with_capacity(slices.len());
        for &(local, remote, length) in slices {
            cutter.slice(Run { local, remote, length, local_region: 0, remote_region: 0 });
        }
        let (runs, parts, bytes) = cutter.finish();
        Arc::new(Payload {
            transfer: order().transfer,
            op: Op::Write,
            tag: None,
            admit_epoch: Epoch(0),
            local_regions: vec![],
            remote_regions: vec![],
            runs,
            parts,
            slices: slices.len() as u64,
            bytes,
            stopped: AtomicBool::new(false),
        })
    }

    fn pieces(payload: &Arc<Payload>) -> Vec<Vec<(u64, u64, u64)>> {
        (0..payload.parts.len() as u32)
            .map(|index| {
                let part = Part { payload: payload.clone(), index };
                part.pieces().map(|piece| (piece.local, piece.remote, piece.length)).collect()
            })
            .collect()
    }

    #[test]
    fn neighbours_on_both_sides_become_one_run() {
        let payload = cut(&[(0, 100, 10), (10, 110, 10), (20, 200, 10)]);
        assert_eq!(pieces(&payload), [[(0, 100, 20), (20, 200, 10)]]);
        assert_eq!(payload.parts[0].slices, 3);
    }

    #[test]
    fn a_large_slice_is_cut_at_part_bytes() {
        let payload = cut(&[(0, 0, 2 * PART_BYTES + 5)]);
        assert_eq!(payload.runs.len(), 1);
        assert_eq!(
            pieces(&payload),
            [
                [(0, 0, PART_BYTES)],
                [(PART_BYTES, PART_BYTES, PART_BYTES)],
                [(2 * PART_BYTES, 2 * PART_BYTES, 5)]
            ]
        );
        let slices: Vec<u32> = payload.parts.iter().map(|part| part.slices).collect();
        assert_eq!(slices, [0, 0, 1]);
    }

    #[test]
    fn many_small_slices_are_cut_at_part_runs() {
        let slices: Vec<_> = (0..1025u64).map(|i| (i * 100, i * 200, 8)).collect();
        let payload = cut(&slices);
        let runs: Vec<u32> = payload.parts.iter().map(|part| part.runs).collect();
        assert_eq!(runs, [PART_RUNS as u32, 3]);
    }

    #[test]
    fn a_batch_of_absurd_size_is_refused_before_it_is_planned() {
        let batch = |length: u64| SliceBatch {
            local: vec![0; 65_536],
            remote: vec![0; 65_536],
            lengths: vec![],
            uniform: Some(length),
        };
        assert_eq!(check_size(&batch(MAX_BYTES / 65_536)), Ok(()));
        for length in [MAX_BYTES / 65_536 + 1, u64::MAX] {
            assert_eq!(check_size(&batch(length)).expect_err("too much").reason, Reason::Limit);
        }
    }

    #[test]
    fn the_slice_at_fault_is_named_with_its_side() {
        let remote = RegionTable::new(vec![info(BASE, 100)]);
        let local = RegionTable::default();
        let batch = SliceBatch { local: vec![BASE], remote: vec![BASE], lengths: vec![1], uniform: None };
        let fault = plan(order(), &batch, &local, &remote).expect_err("nothing is registered");
        assert_eq!((fault.side, fault.slice, fault.miss), (Side::Local, 0, Miss::Unregistered));
        assert!(!wants_newer_table(&fault));
        let failure = Failure::from(fault);
        assert_eq!((failure.reason, failure.index), (Reason::Unregistered, Some(0)));
    }

    proptest! {
        /// I3: the pieces of all parts are the slices, byte for byte and in order, within the limits.
        #[test]
        fn parts_hold_exactly_the_slices(
            shape in prop::collection::vec((0u64..3, 0u64..3, prop_oneof![0u64..4, 1000u64..3_000_000]), 0..40),
        ) {
            let (mut local, mut remote) = (BASE, BASE + SIZE);
            let mut slices = Vec::new();
            for (gap_local, gap_remote, length) in shape {
                local += gap_local;
                remote += gap_remote;
                slices.push((local, remote, length));
                local += length;
                remote += length;
            }
            let payload = cut(&slices);
            let total: u64 = slices.iter().map(|slice| slice.2).sum();
            prop_assert_eq!(payload.bytes, total);
            let mut want = slices.iter().filter(|slice| slice.2 > 0).copied();
            let mut slice = want.next();
            let mut whole = 0;
            for (part, pieces) in payload.parts.iter().zip(pieces(&payload)) {
                prop_assert!(u64::from(part.bytes) <= PART_BYTES && pieces.len() <= PART_RUNS);
                let bytes: u64 = pieces.iter().map(|piece| piece.2).sum();
                prop_assert_eq!(bytes, u64::from(part.bytes));
                prop_assert_eq!(part.first_slice, whole);
                whole += part.slices;
                for (mut local, mut remote, mut length) in pieces {
                    prop_assert!(length > 0);
                    while length > 0 {
                        let (l, r, n) = slice.expect("a slice for every byte");
                        prop_assert_eq!((l, r), (local, remote));
                        let step = n.min(length);
                        slice = if step == n { want.next() } else { Some((l + step, r + step, n - step)) };
                        local += step;
                        remote += step;
                        length -= step;
                    }
                }
            }
            prop_assert!(slice.is_none());
            if total > 0 {
                prop_assert_eq!(u64::from(whole), payload.slices);
            }
        }
    }
}

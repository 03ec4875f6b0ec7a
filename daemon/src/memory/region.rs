//! Regions and the table an engine's regions make.
//!
//! A [`Region`] owns the way to its bytes; as long as one `Arc<Region>` lives, the memory stays mapped (I6).
//! Each such `Arc` is a lease, a snapshot of the table that holds one is one too. The last of them gives the
//! memory back to where it came from, so that no lane ever makes the driver call that releases it (I7). A
//! [`RegionTable`] is an immutable snapshot, changed by making another.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use tokio::sync::oneshot;

use super::{Mapping, ProcessMemory};
use crate::domain::{Generation, LayoutId, Reason, RegionId};

/// How a region's bytes are reached.
#[derive(Debug)]
pub enum Backing {
    /// The engine's memfd, mapped here.
    Shared(Mapping),
    /// The engine's private memory.
    Process(Arc<ProcessMemory>),
}

/// Kind of memory, for tables and messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryKind {
    /// [`Backing::Shared`]
    SharedFd,
    /// [`Backing::Process`]
    Process,
}

/// What others need to know of a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionInfo {
    /// Its number.
    pub id: RegionId,
    /// Which registration of that number.
    pub generation: Generation,
    /// First address, in the owning engine's address space.
    pub base: u64,
    /// Bytes; `base + length` does not wrap.
    pub length: u64,
    /// What it is made of.
    pub kind: MemoryKind,
}

impl RegionInfo {
    /// Whether `[address, address + length)` lies inside. Safe against overflow.
    pub fn contains(&self, address: u64, length: u64) -> bool {
        address
            .checked_sub(self.base)
            .is_some_and(|offset| offset <= self.length && length <= self.length - offset)
    }
}

/// A registered range with the way to its bytes.
#[derive(Debug)]
pub struct Region {
    /// What others know of it.
    pub info: RegionInfo,
    /// Taken only when the region is dropped.
    backing: Option<Backing>,
    retired: AtomicBool,
    /// Where the backing goes with the last lease.
    give_back: Option<oneshot::Sender<Backing>>,
}

impl Region {
    /// A region, and what tells that its last lease is gone, by giving its backing back (I6). Where nobody
    /// waits for that any more the backing is released on the spot.
    ///
    /// A shared backing must hold `info.length` bytes.
    pub fn new(info: RegionInfo, backing: Backing) -> (Arc<Self>, oneshot::Receiver<Backing>) {
        if let Backing::Shared(mapping) = &backing {
            assert!(mapping.len() as u64 >= info.length, "the mapping is what was asked for");
        }
        let (give_back, returned) = oneshot::channel();
        let region = Self {
            info,
            backing: Some(backing),
            retired: AtomicBool::new(false),
            give_back: Some(give_back),
        };
        (Arc::new(region), returned)
    }

    /// Takes it out of use: lanes refuse pieces of it from now on (REGION_CHANGED). Those that looked before
    /// are waited for at the engine's gate.
    pub fn retire(&self) {
        self.retired.store(true, SeqCst);
    }

    /// Whether [`Region::retire`] was called. Asked inside the gate, before each touch of memory.
    pub fn is_retired(&self) -> bool {
        self.retired.load(SeqCst)
    }

    /// Where the byte at `address` of the engine lies in this process, for shared memory. The caller has
    /// checked [`RegionInfo::contains`] for all it will touch, and holds the region while it does.
    pub fn host_pointer(&self, address: u64) -> Option<*mut u8> {
        debug_assert!(self.info.contains(address, 0), "{address:#x} is outside of {:?}", self.info);
        match &self.backing {
            Some(Backing::Shared(mapping)) => {
                let offset = usize::try_from(address.checked_sub(self.info.base)?).ok()?;
                Some(mapping.as_ptr().wrapping_add(offset))
            }
            Some(Backing::Process(_)) | None => None,
        }
    }

    /// The way into the engine's private memory, where that is what the region is made of.
    pub fn process(&self) -> Option<&ProcessMemory> {
        match &self.backing {
            Some(Backing::Process(memory)) => Some(memory),
            Some(Backing::Shared(_)) | None => None,
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let (Some(backing), Some(give_back)) = (self.backing.take(), self.give_back.take()) {
            // Nobody waits only where the engine's memory itself is gone: then the backing ends here.
            let _ = give_back.send(backing);
        }
    }
}

/// A paged pool: layer `l`'s page `p` is `page_bytes` at `layer_bases[l] + p * page_stride`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Its number.
    pub id: LayoutId,
    /// Which registration of that number.
    pub generation: Generation,
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

impl Layout {
    /// Whether every page lies in one region of the table; the first address that does not.
    pub fn check<R: Described>(&self, table: &RegionTable<R>) -> Result<(), (u64, Miss)> {
        self.layer_bases.iter().try_for_each(|&base| self.visit_layer(base, table, &mut |_| {}))
    }

    /// The regions that its pages lie in, each once.
    pub fn regions(&self, table: &RegionTable<Arc<Region>>) -> Vec<Arc<Region>> {
        let mut used = BTreeMap::new();
        let mut note = |region: &Arc<Region>| {
            used.entry(region.info.id).or_insert_with(|| region.clone());
        };
        for &base in &self.layer_bases {
            // A page that is in no region ends its layer here, and the transfer when it is planned.
            let _ = self.visit_layer(base, table, &mut note);
        }
        used.into_values().collect()
    }

    /// Looks at one page per region touched: those behind it that the region has room for need no look.
    fn visit_layer<R: Described>(
        &self,
        base: u64,
        table: &RegionTable<R>,
        visit: &mut impl FnMut(&R),
    ) -> Result<(), (u64, Miss)> {
        let mut page = 0;
        while page < self.pages {
            let address = page
                .checked_mul(self.page_stride)
                .and_then(|offset| base.checked_add(offset))
                .ok_or((base, Miss::Wraps))?;
            let region = table.find(address, self.page_bytes).map_err(|miss| (address, miss))?;
            visit(region);
            let info = region.info();
            let room = info.length - (address - info.base) - self.page_bytes;
            page += 1 + room.checked_div(self.page_stride).unwrap_or(0);
        }
        Ok(())
    }
}

/// Why an address range is in no region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Miss {
    /// It begins in no region.
    Unregistered,
    /// It begins in a region and leaves it.
    OutOfBounds,
    /// Address plus length wraps around.
    Wraps,
}

impl Miss {
    /// The reason told to the caller.
    pub fn reason(self) -> Reason {
        match self {
            Self::Unregistered => Reason::Unregistered,
            Self::OutOfBounds | Self::Wraps => Reason::OutOfBounds,
        }
    }
}

/// An immutable table of regions `R` that know their [`RegionInfo`].
///
/// The owning daemon's table holds `Arc<Region>`; the copy an initiator's daemon keeps of a peer's table holds
/// bare [`RegionInfo`].
#[derive(Clone, Debug)]
pub struct RegionTable<R> {
    by_base: Vec<R>,
    by_id: BTreeMap<RegionId, usize>,
}

impl<R> Default for RegionTable<R> {
    fn default() -> Self {
        Self { by_base: Vec::new(), by_id: BTreeMap::new() }
    }
}

/// Gives a table entry's [`RegionInfo`], whether it is bare or behind an `Arc<Region>`.
pub trait Described {
    /// What others know of the region.
    fn info(&self) -> &RegionInfo;
}

impl Described for RegionInfo {
    fn info(&self) -> &RegionInfo {
        self
    }
}

impl Described for Arc<Region> {
    fn info(&self) -> &RegionInfo {
        &self.info
    }
}

impl<R: Described> RegionTable<R> {
    /// Sorts the entries. They must not overlap: [`RegionTable::overlapping`] tells beforehand.
    pub fn new(mut entries: Vec<R>) -> Self {
        entries.sort_unstable_by_key(|entry| entry.info().base);
        let by_id = entries.iter().enumerate().map(|(at, entry)| (entry.info().id, at)).collect();
        Self { by_base: entries, by_id }
    }

    /// The region that holds all of `[address, address + length)`. A zero length must still begin inside.
    pub fn find(&self, address: u64, length: u64) -> Result<&R, Miss> {
        self.find_near(address, length, &mut 0)
    }

    /// As [`RegionTable::find`], trying the place of the last hit first: batches stay in a region for long.
    pub fn find_near(&self, address: u64, length: u64, near: &mut usize) -> Result<&R, Miss> {
        if let Some(entry) = self.by_base.get(*near)
            && entry.info().contains(address, length)
        {
            return Ok(entry);
        }
        if address.checked_add(length).is_none() {
            return Err(Miss::Wraps);
        }
        let after = self.by_base.partition_point(|entry| entry.info().base <= address);
        let at = after.checked_sub(1).ok_or(Miss::Unregistered)?;
        let entry = &self.by_base[at];
        if entry.info().contains(address, length) {
            *near = at;
            return Ok(entry);
        }
        match entry.info().contains(address, 1) {
            true => Err(Miss::OutOfBounds),
            false => Err(Miss::Unregistered),
        }
    }

    /// The region with this number, whatever its generation.
    pub fn get(&self, id: RegionId) -> Option<&R> {
        self.by_id.get(&id).map(|&at| &self.by_base[at])
    }

    /// A region that shares a byte with the range.
    pub fn overlapping(&self, base: u64, length: u64) -> Option<&R> {
        let after = self.by_base.partition_point(|entry| entry.info().base < base.saturating_add(length));
        let entry = &self.by_base[after.checked_sub(1)?];
        (entry.info().base + entry.info().length > base).then_some(entry)
    }

    /// All entries, by base address.
    pub fn iter(&self) -> std::slice::Iter<'_, R> {
        self.by_base.iter()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.by_base.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.by_base.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(layer_bases: &[u64], page_stride: u64, page_bytes: u64, pages: u64) -> Layout {
        Layout {
            id: LayoutId(0),
            generation: Generation(1),
            layer_bases: layer_bases.to_vec(),
            page_stride,
            page_bytes,
            pages,
            dtype_tag: "bf16".into(),
        }
    }

    #[test]
    fn a_layout_lies_in_regions_page_by_page() {
        let table =
            RegionTable::new(vec![info(0, 0x1000, 0x1000), info(1, 0x2000, 0x800), info(2, 0x4000, 0x10)]);
        assert_eq!(layout(&[0x1000, 0x1800], 0x100, 0x100, 16).check(&table), Ok(()));
        assert_eq!(layout(&[0x1000], 0x100, 0x100, 24).check(&table), Ok(()));
        assert_eq!(layout(&[0x1000], 0x100, 0x100, 25).check(&table), Err((0x2800, Miss::Unregistered)));
        assert_eq!(layout(&[0x1080], 0x100, 0x100, 16).check(&table), Err((0x1f80, Miss::OutOfBounds)));
        assert_eq!(layout(&[0x4000], u64::MAX, 0x10, 1).check(&table), Ok(()));
        assert_eq!(layout(&[0x4000], u64::MAX, 0x10, 3).check(&table), Err((0x4000, Miss::Wraps)));
        assert!(layout(&[0x1000], 1 << 40, 0x10, u64::MAX).check(&table).is_err());
    }

    #[tokio::test]
    async fn the_last_lease_gives_the_memory_back() {
        let memory = ProcessMemory::open(rustix::process::getpid()).expect("our own memory");
        let (region, mut returned) = Region::new(info(0, 0x1000, 0x1000), Backing::Process(Arc::new(memory)));
        let lease = region.clone();
        drop(region);
        assert_eq!(returned.try_recv().expect_err("still leased"), oneshot::error::TryRecvError::Empty);
        drop(lease);
        assert!(matches!(returned.await, Ok(Backing::Process(_))));
    }

    fn info(id: u32, base: u64, length: u64) -> RegionInfo {
        RegionInfo { id: RegionId(id), generation: Generation(1), base, length, kind: MemoryKind::SharedFd }
    }

    #[test]
    fn misses_are_told_apart() {
        let table = RegionTable::new(vec![info(1, 0x2000, 0x1000), info(0, 0x1000, 0x1000)]);
        assert_eq!(table.find(0x1800, 0x800).map(|r| r.id), Ok(RegionId(0)));
        assert_eq!(table.find(0x1800, 0x801), Err(Miss::OutOfBounds));
        assert_eq!(table.find(0x500, 1), Err(Miss::Unregistered));
        assert_eq!(table.find(0x3000, 1), Err(Miss::Unregistered));
        assert_eq!(table.find(0x2fff, u64::MAX), Err(Miss::Wraps));
        assert_eq!(table.get(RegionId(1)).map(|r| r.base), Some(0x2000));
    }

    #[test]
    fn a_region_at_the_end_of_the_address_space_is_ordinary() {
        let table = RegionTable::new(vec![info(0, u64::MAX - 0x1000, 0x1000)]);
        assert!(table.find(u64::MAX - 0x10, 0x10).is_ok());
        assert_eq!(table.find(u64::MAX - 0x10, 0x11), Err(Miss::Wraps));
    }

    proptest! {
        /// I5: what is found is inside, and what is inside is found.
        #[test]
        fn find_agrees_with_contains(
            gaps in prop::collection::vec((0u64..50, 1u64..50), 0..20),
            address in 0u64..3000,
            length in 0u64..100,
        ) {
            let mut base = 10;
            let mut entries = Vec::new();
            for (id, (gap, size)) in gaps.into_iter().enumerate() {
                base += gap;
                entries.push(info(id as u32, base, size));
                base += size;
            }
            let inside = entries.iter().any(|r| r.contains(address, length) && r.contains(address, 1));
            let touching = entries.iter().any(|r| address < r.base + r.length && r.base < address + length);
            let table = RegionTable::new(entries);
            if length > 0 {
                prop_assert_eq!(table.find(address, length).is_ok(), inside);
                prop_assert_eq!(table.overlapping(address, length).is_some(), touching);
            }
        }
    }
}

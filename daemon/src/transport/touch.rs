//! Copies that touch engine memory from this process.
//!
//! Callers are inside the gate of each engine they touch and have looked at the rules. Bounds are checked here
//! once more, because a pointer is made of them. Engine memory is shared with processes that write it when
//! they please, so it is only ever reached through raw pointers: no reference to it exists, and what is read
//! may be a mixture of old and new, which is the engine's own affair.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::{
    domain::{Failure, Reason},
    memory::{Extent, ProcessMemory, Region},
};

/// Where `[address, address + length)` is mapped in this process; nothing for process memory.
pub(super) fn mapped(region: &Region, address: u64, length: u64) -> Option<*mut u8> {
    region.info.contains(address, length).then(|| region.host_pointer(address)).flatten()
}

/// A piece of a batch: region, first address, and its place in the bytes of this process.
pub(super) type Placed<'a> = (&'a Region, u64, Range<usize>);

/// Copies pieces out of regions. Those of private memory travel together: where the engine itself copies, a part is one
/// request and not one for each of its runs.
pub(super) fn copy_out<'a>(pieces: impl Iterator<Item = Placed<'a>>, into: &mut [u8]) -> Result<(), Failure> {
    let mut asked = Asked::default();
    for (region, address, range) in pieces {
        let Some(process) = region.process() else {
            copy_mapped_out(region, address, &mut into[range])?;
            continue;
        };
        if let Some((process, extents)) = asked.add(process, address, range) {
            process.read(&extents, into)?;
        }
    }
    asked.take().map_or(Ok(()), |(process, extents)| process.read(&extents, into))
}

/// Copies pieces into regions, as [`copy_out`] does out of them.
pub(super) fn copy_in<'a>(pieces: impl Iterator<Item = Placed<'a>>, from: &[u8]) -> Result<(), Failure> {
    let mut asked = Asked::default();
    for (region, address, range) in pieces {
        let Some(process) = region.process() else {
            copy_mapped_in(region, address, &from[range])?;
            continue;
        };
        if let Some((process, extents)) = asked.add(process, address, range) {
            process.write(&extents, from)?;
        }
    }
    asked.take().map_or(Ok(()), |(process, extents)| process.write(&extents, from))
}

/// Copies from region to region within this process; the ranges may overlap. False where one of them is not mapped
/// here, and nothing was done.
pub(super) fn copy_mapped(
    (source, from): (&Region, u64),
    (target, to): (&Region, u64),
    length: u64,
) -> Result<bool, Failure> {
    if source.process().or(target.process()).is_some() {
        return Ok(false);
    }
    let from = mapped(source, from, length).ok_or_else(outside)?;
    let to = mapped(target, to, length).ok_or_else(outside)?;
    // SAFETY: both are valid for the length while their regions are borrowed; `copy` allows overlap.
    unsafe { std::ptr::copy(from, to, length as usize) };
    Ok(true)
}

/// Pieces of one process's memory that are to be moved together.
#[derive(Default)]
struct Asked<'a> {
    process: Option<&'a ProcessMemory>,
    extents: Vec<Extent>,
}

impl<'a> Asked<'a> {
    /// One more; gives what was collected so far where that is of another process.
    fn add(
        &mut self,
        process: &'a ProcessMemory,
        address: u64,
        range: Range<usize>,
    ) -> Option<(&'a ProcessMemory, Vec<Extent>)> {
        let stranger = self.process.is_some_and(|before| !std::ptr::eq(before, process));
        let before = if stranger { self.take() } else { None };
        self.process = Some(process);
        self.extents.push(Extent { address, at: range.start, length: range.len() });
        before
    }

    fn take(&mut self) -> Option<(&'a ProcessMemory, Vec<Extent>)> {
        self.process.take().map(|process| (process, std::mem::take(&mut self.extents)))
    }
}

fn copy_mapped_out(region: &Region, address: u64, into: &mut [u8]) -> Result<(), Failure> {
    let from = mapped(region, address, into.len() as u64).ok_or_else(outside)?;
    // SAFETY: `from` is valid for the length (`mapped` checked it against the region, whose mapping lives as
    // long as the `Region` borrowed here); `into` is exclusively ours, so the two do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    Ok(())
}

fn copy_mapped_in(region: &Region, address: u64, from: &[u8]) -> Result<(), Failure> {
    let into = mapped(region, address, from.len() as u64).ok_or_else(outside)?;
    // SAFETY: as in `copy_mapped_out`: `into` is valid for the length while the region is borrowed, and nothing
    // that Rust lends out lies in engine memory, so `from` is elsewhere.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
    Ok(())
}

/// Planning and admission have checked the bounds, so this is an error of ours; it is told, not hidden.
fn outside() -> Failure {
    Failure::new(Reason::OutOfBounds, "a piece lies outside its region")
}

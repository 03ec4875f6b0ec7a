//! Copies that touch engine memory from this process.
//!
//! Callers are inside the gate of each engine they touch and have looked at the rules. Bounds are checked here
//! once more, because a pointer is made of them. Engine memory is shared with processes that write it when
//! they please, so it is only ever reached through raw pointers: no reference to it exists, and what is read
//! may be a mixture of old and new, which is the engine's own affair.
#![allow(unsafe_code)]

use crate::{
    domain::{Failure, Reason},
    memory::Region,
};

/// Where `[address, address + length)` is mapped in this process; nothing for process memory.
pub(super) fn mapped(region: &Region, address: u64, length: u64) -> Option<*mut u8> {
    region.info.contains(address, length).then(|| region.host_pointer(address)).flatten()
}

/// Copies out of a region.
pub(super) fn copy_out(region: &Region, address: u64, into: &mut [u8]) -> Result<(), Failure> {
    if let Some(process) = region.process() {
        return process.read_at(address, into);
    }
    let from = mapped(region, address, into.len() as u64).ok_or_else(outside)?;
    // SAFETY: `from` is valid for the length (`mapped` checked it against the region, whose mapping lives as
    // long as the `Region` borrowed here); `into` is exclusively ours, so the two do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    Ok(())
}

/// Copies into a region.
pub(super) fn copy_in(region: &Region, address: u64, from: &[u8]) -> Result<(), Failure> {
    if let Some(process) = region.process() {
        return process.write_at(address, from);
    }
    let into = mapped(region, address, from.len() as u64).ok_or_else(outside)?;
    // SAFETY: as in `copy_out`: `into` is valid for the length while the region is borrowed, and nothing that
    // Rust lends out lies in engine memory, so `from` is elsewhere.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
    Ok(())
}

/// Copies from region to region; the ranges may overlap. Process memory goes through `bounce`.
pub(super) fn copy_between(
    (source, from): (&Region, u64),
    (target, to): (&Region, u64),
    length: u64,
    bounce: &mut [u8],
) -> Result<(), Failure> {
    if let (None, None) = (source.process(), target.process()) {
        let from = mapped(source, from, length).ok_or_else(outside)?;
        let to = mapped(target, to, length).ok_or_else(outside)?;
        // SAFETY: both are valid for the length while their regions are borrowed; `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, length as usize) };
        return Ok(());
    }
    let mut done = 0;
    while done < length {
        let step = (length - done).min(bounce.len() as u64);
        let bytes = &mut bounce[..step as usize];
        copy_out(source, from + done, bytes)?;
        copy_in(target, to + done, bytes)?;
        done += step;
    }
    Ok(())
}

/// Planning and admission have checked the bounds, so this is an error of ours; it is told, not hidden.
fn outside() -> Failure {
    Failure::new(Reason::OutOfBounds, "a piece lies outside its region")
}

//! Memory that the daemon maps: a sealed memfd.
//!
//! The seals are what lets a daemon map memory of a process it does not trust: a file that can shrink would
//! kill whoever touches the lost part (SIGBUS). The pages are touched here first, because the first touch is
//! what a cgroup charges, and it should be the engine's.
#![allow(unsafe_code)]

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{Advice, MapFlags, ProtFlags},
};

use crate::Error;

/// A sealed memfd, mapped here and touched; register it and the daemon reaches it without a copy.
///
/// While it is registered the mapping stays, even when the buffer itself is dropped, so that its addresses
/// mean nothing else meanwhile.
#[derive(Debug)]
pub struct SharedBuffer {
    mapping: Arc<Mapping>,
}

/// Owner of the mapping. Registrations hold it too.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
    file: OwnedFd,
}

// SAFETY: the mapping is plain shared memory, valid in every thread until `drop`, which needs the last owner.
// Nothing in `Mapping` gives out references; what `SharedBuffer` gives out follows its own borrow rules.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` allows only reading the pointer, the length and the descriptor.
unsafe impl Sync for Mapping {}

impl SharedBuffer {
    /// Zeroed memory of `length` bytes.
    ///
    /// # Errors
    /// [`Error::System`] for a length of zero, or when the memory cannot be had.
    pub fn new(length: usize) -> Result<Self, Error> {
        Ok(Self { mapping: Arc::new(Mapping::new(length)?) })
    }

    /// Where it lies in this process: what slices name.
    pub fn address(&self) -> u64 {
        self.mapping.address()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.mapping.length
    }

    /// Never: a buffer has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.mapping.length == 0
    }

    /// The bytes. Others (the daemon, and through it peers) may write at any time: use it only while no
    /// transfer touches the buffer, else through [`as_ptr`](Self::as_ptr) with volatile reads.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` is valid for `length` initialised bytes while `self` lives. That nobody writes
        // meanwhile is the documented duty of the caller, who is the one to start and allow transfers.
        unsafe { std::slice::from_raw_parts(self.mapping.start.as_ptr(), self.mapping.length) }
    }

    /// The bytes, to be written. The same duty as for [`as_slice`](Self::as_slice).
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; `&mut self` excludes other references from this buffer, and registrations
        // that share the mapping never make one.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.as_ptr(), self.mapping.length) }
    }

    /// The first byte, for access while transfers are under way.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.start.as_ptr()
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

impl AsFd for SharedBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mapping.file.as_fd()
    }
}

impl Mapping {
    pub(crate) fn new(length: usize) -> Result<Self, Error> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("kvferry", flags).map_err(Error::system("creating a memfd"))?;
        rustix::fs::ftruncate(&file, length as u64).map_err(Error::system("sizing a memfd"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(Error::system("sealing a memfd"))?;
        // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .map_err(Error::system("mapping a memfd"))?;
        let start = NonNull::new(start.cast()).expect("the kernel places no mapping at address zero");
        let mapping = Self { start, length, file };
        mapping.populate()?;
        Ok(mapping)
    }

    /// Touches every page. `MADV_POPULATE_WRITE` turns a shortage into an error instead of a signal; kernels
    /// before 5.14 do not know it.
    fn populate(&self) -> Result<(), Error> {
        let start = self.start.as_ptr();
        // SAFETY: the range is this mapping's own, and populating does not change its contents.
        match unsafe { rustix::mm::madvise(start.cast(), self.length, Advice::LinuxPopulateWrite) } {
            Err(rustix::io::Errno::INVAL) => {}
            other => return other.map_err(Error::system("allocating the pages of a memfd")),
        }
        for offset in (0..self.length).step_by(rustix::param::page_size()) {
            // SAFETY: `offset` lies inside the mapping, and nobody else knows of it yet.
            unsafe { start.add(offset).write_volatile(0) };
        }
        Ok(())
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }
}

impl AsFd for Mapping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and the last owner lets go: no reference into it is left.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) } {
            tracing::error!(%error, "unmapping a shared buffer failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_can_neither_shrink_nor_grow_nor_lose_its_seals() {
        let buffer = SharedBuffer::new(10_000).unwrap();
        let seals = rustix::fs::fcntl_get_seals(&buffer).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
        assert_eq!(rustix::fs::ftruncate(&buffer, 4096), Err(rustix::io::Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&buffer, 20_000), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn what_is_written_here_is_in_the_file() {
        let mut buffer = SharedBuffer::new(3 * 4096 + 1).unwrap();
        assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
        buffer.as_mut_slice()[3 * 4096] = 7;
        let mut byte = [0];
        rustix::io::pread(&buffer, &mut byte, 3 * 4096).unwrap();
        assert_eq!(byte, [7]);
        assert_eq!(buffer.address(), buffer.as_ptr().addr() as u64);
    }

    #[test]
    fn every_page_is_allocated_before_anybody_else_touches_it() {
        let buffer = SharedBuffer::new(1 << 20).unwrap();
        let blocks = rustix::fs::fstat(&buffer).unwrap().st_blocks;
        assert!(blocks * 512 >= 1 << 20, "only {blocks} blocks");
    }

    #[test]
    fn nothing_is_not_a_buffer() {
        assert!(matches!(SharedBuffer::new(0), Err(Error::System { .. })));
    }

    #[test]
    fn an_impossible_length_is_an_error() {
        assert!(matches!(SharedBuffer::new(usize::MAX), Err(Error::System { .. })));
    }
}

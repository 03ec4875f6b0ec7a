#![allow(unsafe_code)]
//! An engine's sealed memfd, mapped here.
//!
//! What is accepted cannot turn into SIGBUS later: the memfd is sealed against shrinking (a shrunk one kills
//! whoever touches the mapping), it is not hugetlb unless allowed (a hole punched into it is SIGBUS once the
//! pool is empty, seals or not), and every page is populated here, where a failure is an errno and not a
//! signal. All checks come before the mapping is made.
//!
//! The engine writes the same bytes at any moment. So they are only ever touched through raw pointers, by
//! system calls and copies; no reference to them is made, here or elsewhere. Bounds are the caller's matter
//! ([`super::RegionTable`]), and so is when the mapping may end ([`super::Region`], I6).

use std::{
    ffi::c_void,
    io,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
};

use rustix::{
    fs::{OFlags, SealFlags},
    mm::{Advice, MapFlags, ProtFlags},
};

use crate::domain::{Failure, Reason};

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What may be mapped beyond the ordinary.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapOptions {
    /// Accept hugetlb memfds. Whoever turns this on trusts every engine not to punch holes.
    pub allow_hugetlb: bool,
}

/// A shared read-write mapping of a range of a memfd; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    /// Page aligned, at or below the first byte asked for.
    start: NonNull<c_void>,
    /// Whole pages from `start` on.
    mapped: usize,
    /// From `start` to the first byte asked for.
    delta: usize,
    length: usize,
}

// SAFETY: a `Mapping` is an address range that it alone unmaps, and munmap may be called on any thread. The
// bytes inside are reached through raw pointers only, so moving the owner moves no borrow.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out numbers and a raw pointer; whoever dereferences that pointer answers for it.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of the memfd from `offset` on, all pages present.
    ///
    /// UNSUPPORTED_MEMORY where the descriptor is not fit to be mapped, OUT_OF_BOUNDS where it is too small,
    /// BAD_ARGUMENT for no bytes at all, DRIVER with the errno where the kernel would not.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, length: u64, options: MapOptions) -> Result<Self, Failure> {
        if length == 0 {
            return Err(Failure::new(Reason::BadArgument, "a mapping of zero bytes"));
        }
        check_rights(fd)?;
        check_seals(fd)?;
        let page = check_pages(fd, options)?;
        let end = check_size(fd, offset, length)?;
        let from = offset - offset % page;
        let mapped = end.next_multiple_of(page) - from;
        Self::map(fd, from, mapped, offset - from, length)
    }

    /// Maps whole pages that were checked to lie in the file.
    fn map(fd: BorrowedFd<'_>, from: u64, mapped: u64, delta: u64, length: u64) -> Result<Self, Failure> {
        let size = |bytes: u64| {
            usize::try_from(bytes).map_err(|_| Failure::new(Reason::Limit, "larger than the address space"))
        };
        let (mapped, delta, length) = (size(mapped)?, size(delta)?, size(length)?);
        // SAFETY: with a null hint and without MAP_FIXED the kernel chooses unused addresses, so no memory
        // that anybody else knows of is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                from,
            )
        }
        .map_err(|errno| driver("mmap", errno))?;
        let start = NonNull::new(start).ok_or_else(|| Failure::new(Reason::Driver, "mmap gave address 0"))?;
        let mapping = Self { start, mapped, delta, length };
        mapping.populate()?;
        Ok(mapping)
    }

    /// Brings every page in, so that what cannot be had shows as an errno now and never as a signal.
    fn populate(&self) -> Result<(), Failure> {
        rustix::io::retry_on_intr(|| {
            // SAFETY: the range is exactly what this object mapped; populating changes no byte of it.
            unsafe { rustix::mm::madvise(self.start.as_ptr(), self.mapped, Advice::LinuxPopulateWrite) }
        })
        .map_err(|errno| driver("madvise(MADV_POPULATE_WRITE, Linux 5.14)", errno))
    }

    /// The first byte asked for. Valid for [`Mapping::len`] bytes as long as the mapping lives; the engine
    /// writes there too, so never make a reference of it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast::<u8>().wrapping_add(self.delta)
    }

    /// Bytes asked for.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `mapped` are what mmap returned for this object, which is not Clone, so the range
        // is unmapped once. Nobody uses the pointer any more: whoever did held the region that owns us (I6).
        if let Err(errno) = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.mapped) } {
            tracing::error!(address = ?self.start, bytes = self.mapped, %errno, "munmap failed; mapping leaked");
        }
    }
}

fn driver(call: &str, errno: rustix::io::Errno) -> Failure {
    Failure::io(Reason::Driver, call, &io::Error::from(errno))
}

fn unsupported(message: &str) -> Failure {
    Failure::new(Reason::UnsupportedMemory, message)
}

fn check_rights(fd: BorrowedFd<'_>) -> Result<(), Failure> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|errno| driver("fcntl(F_GETFL)", errno))?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE != OFlags::RDWR {
        return Err(unsupported("the descriptor is not open for reading and writing"));
    }
    Ok(())
}

/// Comes before any question that a file system of the engine's making could answer, or never answer: only
/// shmem and hugetlbfs know seals, all others are refused by the kernel itself.
fn check_seals(fd: BorrowedFd<'_>) -> Result<(), Failure> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|errno| {
        let error = io::Error::from(errno);
        Failure::io(Reason::UnsupportedMemory, "the descriptor is not a memfd", &error)
    })?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(unsupported("the memfd is not sealed against shrinking: add F_SEAL_SHRINK"));
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(unsupported("the memfd is sealed against writing"));
    }
    Ok(())
}

/// Bytes of a page of this file.
fn check_pages(fd: BorrowedFd<'_>, options: MapOptions) -> Result<u64, Failure> {
    let page = rustix::param::page_size() as u64;
    let stat = rustix::fs::fstatfs(fd).map_err(|errno| driver("fstatfs", errno))?;
    let block = u64::try_from(stat.f_bsize).unwrap_or(page);
    let hugetlb = u64::try_from(stat.f_type).is_ok_and(|kind| kind == HUGETLBFS_MAGIC) || block > page;
    if hugetlb && !options.allow_hugetlb {
        return Err(unsupported("a hugetlb memfd: a hole punched into it is SIGBUS (memory.allow_hugetlb)"));
    }
    Ok(if hugetlb { block } else { page })
}

/// Where the range ends, inside the file.
fn check_size(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<u64, Failure> {
    let stat = rustix::fs::fstat(fd).map_err(|errno| driver("fstat", errno))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    offset.checked_add(length).filter(|end| *end <= size).ok_or_else(|| {
        let message = format!("offset {offset} + length {length} leaves the memfd of {size} bytes");
        Failure::new(Reason::OutOfBounds, message)
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::fs::{MemfdFlags, Mode};

    use super::*;
    use crate::memory::testing::{memfd, sealed_memfd};

    fn refused(fd: impl AsFd, offset: u64, length: u64) -> Reason {
        Mapping::new(fd.as_fd(), offset, length, MapOptions::default()).expect_err("a refusal").reason
    }

    fn peek(mapping: &Mapping, at: usize) -> u8 {
        assert!(at < mapping.len());
        // SAFETY: inside the mapping, which lives; volatile, because the other side may write.
        unsafe { mapping.as_ptr().add(at).read_volatile() }
    }

    #[test]
    fn an_offset_inside_a_page_is_met_exactly() {
        let fd = sealed_memfd(3 * 4096);
        rustix::io::pwrite(&fd, b"kv", 4096 + 100).expect("a write");
        let mapping = Mapping::new(fd.as_fd(), 4096 + 100, 4096, MapOptions::default()).expect("a mapping");
        assert_eq!((mapping.len(), peek(&mapping, 0), peek(&mapping, 1)), (4096, b'k', b'v'));
        // SAFETY: the last byte of a live mapping.
        unsafe { mapping.as_ptr().add(4095).write_volatile(7) };
        let mut byte = [0];
        rustix::io::pread(&fd, &mut byte, 4096 + 100 + 4095).expect("a read");
        assert_eq!(byte, [7]);
    }

    #[test]
    fn a_file_that_ends_inside_a_page_is_mapped_to_its_end() {
        let fd = sealed_memfd(4096 + 10);
        let mapping = Mapping::new(fd.as_fd(), 0, 4096 + 10, MapOptions::default()).expect("a mapping");
        assert_eq!(peek(&mapping, 4096 + 9), 0);
    }

    #[test]
    fn what_could_turn_into_a_signal_is_refused() {
        assert_eq!(refused(memfd(4096, SealFlags::empty()), 0, 4096), Reason::UnsupportedMemory);
        assert_eq!(refused(memfd(4096, SealFlags::GROW), 0, 4096), Reason::UnsupportedMemory);
        let unwritable = memfd(4096, SealFlags::SHRINK | SealFlags::WRITE);
        assert_eq!(refused(unwritable, 0, 4096), Reason::UnsupportedMemory);
        let unwritable = memfd(4096, SealFlags::SHRINK | SealFlags::FUTURE_WRITE);
        assert_eq!(refused(unwritable, 0, 4096), Reason::UnsupportedMemory);
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("a size");
        assert_eq!(refused(file, 0, 4096), Reason::UnsupportedMemory);
    }

    #[test]
    fn a_descriptor_without_the_right_to_write_is_refused() {
        let fd = sealed_memfd(4096);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::PATH] {
            let reopened = rustix::fs::open(&path, flags, Mode::empty()).expect("reopening");
            assert_eq!(refused(reopened, 0, 4096), Reason::UnsupportedMemory, "{flags:?}");
        }
    }

    #[test]
    fn a_range_beyond_the_file_is_refused() {
        let fd = sealed_memfd(8192);
        assert_eq!(refused(&fd, 0, 8193), Reason::OutOfBounds);
        assert_eq!(refused(&fd, 4096, 4097), Reason::OutOfBounds);
        assert_eq!(refused(&fd, u64::MAX, 2), Reason::OutOfBounds);
        assert_eq!(refused(&fd, 0, 0), Reason::BadArgument);
    }

    #[test]
    fn hugetlb_is_refused_unless_allowed() {
        let flags = MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING;
        let made = rustix::fs::memfd_create("kvferry-huge", flags);
        let fd: OwnedFd = match made {
            Ok(fd) => fd,
            Err(errno) => {
                println!("skipped: no hugetlb memfd on this machine: {errno}");
                return;
            }
        };
        let block = u64::try_from(rustix::fs::fstatfs(&fd).expect("fstatfs").f_bsize).expect("a size");
        rustix::fs::ftruncate(&fd, block).expect("a size");
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).expect("a seal");
        assert_eq!(refused(&fd, 0, 4096), Reason::UnsupportedMemory);
        match Mapping::new(fd.as_fd(), 4096, 4096, MapOptions { allow_hugetlb: true }) {
            Ok(mapping) => assert_eq!(peek(&mapping, 0), 0),
            // An empty pool is an errno, never a signal.
            Err(failure) => assert_eq!((failure.reason, failure.code != 0), (Reason::Driver, true)),
        }
    }
}

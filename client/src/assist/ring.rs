#![allow(unsafe_code)]
//! The engine's hands on its ring: see `kvferry_proto::ring` for what is where.
//!
//! The daemon is trusted with this process's memory anyhow; but it may be another version, or stop at any moment, so what
//! it wrote is copied once and judged then.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use kvferry_proto::ring::{self, Word};
use rustix::{
    fs::{FlockOperation, fcntl_lock},
    thread::futex,
};

use crate::{Error, buffer::Mapping};

/// A ring of this process, in the hands of the one thread that serves it.
#[derive(Debug)]
pub(super) struct Ring(Arc<Mapping>);

/// The same ring, for those who only wake that thread or hand the file over.
#[derive(Debug)]
pub(super) struct Bell(Arc<Mapping>);

impl Bell {
    /// As the daemon does: wakes whoever serves.
    pub(super) fn ring(&self) {
        let bell = atomic(&self.0, ring::BELL_AT);
        bell.fetch_add(1, SeqCst);
        let _ = futex::wake(bell, futex::Flags::empty(), 1);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Ring {
    /// A fresh one, locked: as long as this process lives the daemon can tell so.
    pub(super) fn new() -> Result<Self, Error> {
        let mapping = Mapping::new(ring::BYTES)?;
        fcntl_lock(&mapping, FlockOperation::NonBlockingLockExclusive)
            .map_err(Error::system("locking the ring of the assistant"))?;
        atomic(&mapping, ring::MAGIC_AT).store(ring::MAGIC, SeqCst);
        atomic(&mapping, ring::VERSION_AT).store(ring::VERSION, SeqCst);
        Ok(Self(Arc::new(mapping)))
    }

    /// For others than the thread that serves.
    pub(super) fn bell(&self) -> Bell {
        Bell(self.0.clone())
    }

    /// The daemon's mapping, as it were.
    #[cfg(test)]
    pub(super) fn twin(&self) -> Self {
        Self(self.0.clone())
    }

    /// A word of a slot.
    pub(super) fn word(&self, slot: usize, word: Word) -> &AtomicU32 {
        atomic(&self.0, ring::word_at(slot, word))
    }

    /// Shows life, and tells the bell as it is now.
    pub(super) fn beat(&self) -> u32 {
        atomic(&self.0, ring::BEAT_AT).fetch_add(1, SeqCst);
        atomic(&self.0, ring::BELL_AT).load(SeqCst)
    }

    /// Until the bell is another one than `heard`.
    pub(super) fn wait(&self, heard: u32) {
        // Whatever it returns with, the caller looks.
        let _ = futex::wait(atomic(&self.0, ring::BELL_AT), futex::Flags::empty(), heard, None);
    }

    /// Says how a claimed slot ended, and wakes the daemon.
    pub(super) fn tell(&self, slot: usize, status: u32) {
        let word = self.word(slot, Word::Status);
        // A daemon that has put something else there meanwhile does not wait for this.
        if word.compare_exchange(ring::status::CLAIMED, status, SeqCst, SeqCst).is_ok() {
            let _ = futex::wake(word, futex::Flags::empty(), 1);
        }
    }

    /// Entry `at` of a slot's table: address and length.
    pub(super) fn entry(&self, slot: usize, at: usize) -> (u64, u64) {
        assert!(at < ring::PIECES, "the table has an end");
        let mut bytes = [[0; 8]; 2];
        let from = place(&self.0, ring::table_at(slot) + at * ring::ENTRY_BYTES, ring::ENTRY_BYTES);
        // SAFETY: `place` has checked that the range lies in the mapping, which lives; `bytes` is ours and as long.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().cast(), ring::ENTRY_BYTES) };
        let [address, length] = bytes.map(u64::from_ne_bytes);
        (address, length)
    }

    /// The data of a slot that was claimed.
    pub(super) fn data(&mut self, slot: usize) -> &mut [u8] {
        let start = place(&self.0, ring::data_at(slot), ring::DATA_BYTES);
        // SAFETY: `place` has checked the range; it is initialised (a memfd is zeros) and lives as long as `self`. In this
        // process nobody else reaches it: a ring is not Clone, and borrowed mutably here; a `Bell` knows no data. The
        // daemon keeps its hands off the data of a claimed slot until it reads DONE or FAILED there, which is told when
        // this slice is gone; one that did not could change what is copied, and nothing else.
        unsafe { std::slice::from_raw_parts_mut(start, ring::DATA_BYTES) }
    }
}

fn atomic(mapping: &Mapping, at: usize) -> &AtomicU32 {
    assert!(at.is_multiple_of(align_of::<AtomicU32>()), "words are aligned");
    let word = place(mapping, at, size_of::<AtomicU32>()).cast();
    // SAFETY: `place` has checked the range; a mapping is aligned to pages and `at` to words; it lives as long as the
    // borrow. Both processes reach these four bytes by atomics only.
    unsafe { AtomicU32::from_ptr(word) }
}

fn place(mapping: &Mapping, at: usize, length: usize) -> *mut u8 {
    let inside = at.checked_add(length).is_some_and(|end| end <= ring::BYTES);
    assert!(inside, "{length} bytes at {at} of a ring");
    mapping.as_ptr().wrapping_add(at)
}

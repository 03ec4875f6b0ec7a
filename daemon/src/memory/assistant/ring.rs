#![allow(unsafe_code)]
//! The daemon's hands on a ring: words, tables and data, at places that are checked here.
//!
//! The engine writes to the same bytes whenever it pleases, and is not trusted. So the words are atomics, read once
//! and judged by whoever reads them; tables and data are copied through raw pointers, never looked at in place. What
//! is mapped cannot shrink ([`Mapping`]), so no byte of it can turn into a signal.

use std::{
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use kvferry_proto::ring::{self, Word};
use rustix::{event::Timespec, thread::futex};

use super::super::Mapping;
use crate::domain::{Failure, Reason};

/// A mapped ring.
#[derive(Debug)]
pub(super) struct Ring(Mapping);

impl Ring {
    /// UNSUPPORTED_MEMORY where the memfd is not a ring of the one layout there is.
    pub(super) fn new(mapping: Mapping) -> Result<Self, Failure> {
        let refused = |what: &str| Err(Failure::new(Reason::UnsupportedMemory, format!("the ring {what}")));
        if mapping.len() != ring::BYTES || mapping.as_ptr().align_offset(align_of::<u64>()) != 0 {
            return refused("is not mapped as a whole");
        }
        let ring = Self(mapping);
        let (magic, version) = (ring.load(ring::MAGIC_AT), ring.load(ring::VERSION_AT));
        if magic != ring::MAGIC {
            return refused("has another magic");
        }
        if version != ring::VERSION {
            return refused(&format!("is of version {version}; this daemon knows {}", ring::VERSION));
        }
        Ok(ring)
    }

    /// A word of a slot.
    pub(super) fn word(&self, slot: usize, word: Word) -> &AtomicU32 {
        self.atomic(ring::word_at(slot, word))
    }

    /// How often the engine's thread has woken.
    pub(super) fn beat(&self) -> u32 {
        self.load(ring::BEAT_AT)
    }

    /// Wakes the engine's thread.
    pub(super) fn ring(&self) {
        let bell = self.atomic(ring::BELL_AT);
        bell.fetch_add(1, SeqCst);
        if let Err(errno) = futex::wake(bell, futex::Flags::empty(), 1) {
            tracing::error!(%errno, "an assistant's bell cannot be rung");
        }
    }

    /// Until a slot's status is another one than `seen`, or for `limit`, which is less than a second. May return early.
    pub(super) fn wait(&self, slot: usize, seen: u32, limit: Duration) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        // Whatever it returns with, the caller looks again.
        let _ = futex::wait(self.word(slot, Word::Status), futex::Flags::empty(), seen, Some(&timeout));
    }

    /// Wakes those who wait for a slot's status.
    pub(super) fn wake(&self, slot: usize) {
        let _ = futex::wake(self.word(slot, Word::Status), futex::Flags::empty(), u32::MAX >> 1);
    }

    /// Writes a slot's table.
    pub(super) fn put_table(&self, slot: usize, entries: impl Iterator<Item = (u64, u64)>) {
        for (at, (address, length)) in entries.take(ring::PIECES).enumerate() {
            let mut entry = [0; ring::ENTRY_BYTES];
            entry[..8].copy_from_slice(&address.to_ne_bytes());
            entry[8..].copy_from_slice(&length.to_ne_bytes());
            self.put(ring::table_at(slot) + at * ring::ENTRY_BYTES, &entry);
        }
    }

    /// Writes a slot's data from its byte `at` on.
    pub(super) fn put_data(&self, slot: usize, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= ring::DATA_BYTES, "a batch fits its slot");
        self.put(ring::data_at(slot) + at, bytes);
    }

    /// Reads a slot's data from its byte `at` on.
    pub(super) fn get_data(&self, slot: usize, at: usize, into: &mut [u8]) {
        assert!(at + into.len() <= ring::DATA_BYTES, "a batch fits its slot");
        let from = self.place(ring::data_at(slot) + at, into.len());
        // SAFETY: `place` has checked that the range lies in the mapping, which lives; `into` is exclusively ours and
        // no engine's memory, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        let into = self.place(at, bytes.len());
        // SAFETY: as in `get_data`; nothing that Rust lends out lies in the mapping, so `bytes` are elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into, bytes.len()) };
    }

    fn load(&self, at: usize) -> u32 {
        self.atomic(at).load(SeqCst)
    }

    fn atomic(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(align_of::<AtomicU32>()), "words are aligned");
        let word = self.place(at, size_of::<AtomicU32>()).cast();
        // SAFETY: `place` has checked the range; the mapping is aligned to pages and `at` to words; it lives as long as
        // the borrow of `self`. All access from here to these four bytes is atomic, and so is the engine's, or else it
        // deceives itself.
        unsafe { AtomicU32::from_ptr(word) }
    }

    fn place(&self, at: usize, length: usize) -> *mut u8 {
        let inside = at.checked_add(length).is_some_and(|end| end <= self.0.len());
        assert!(inside, "{length} bytes at {at} of a ring");
        self.0.as_ptr().wrapping_add(at)
    }
}

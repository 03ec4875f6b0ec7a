//! Assisted memory: the engine's own client library copies, on request, through a ring that both have mapped.
//!
//! A request is synchronous and made inside the engine's gate, like every other touch of engine memory: it is over when
//! the engine has said so, when it was taken back before the engine had claimed it, or when the engine's process has
//! ended. So a quiet gate is proof here too (I1). A request that nobody claims is taken back after `process.answer_ms`
//! and refused ENGINE_SILENT, and those after it at once, until the engine's thread has shown life. One that is claimed
//! is waited for: the engine may touch its memory for it at any moment, and any other answer would be a guess. That is
//! why lanes of such an engine have threads of their own (`transport/own.rs`).
//!
//! The engine is not trusted. Whatever it writes into the ring, when it likes: it can have its own requests fail, its own
//! lanes wait, and its own bytes be wrong.

mod life;
mod ring;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use kvferry_proto::ring::{DATA_BYTES, PIECES, SLOTS, Word, operation, status};

use self::{life::Life, ring::Ring};
use super::{Extent, Mapping};
use crate::domain::{Failure, Reason};

/// How often whoever waits for a claimed slot looks whether the engine still lives.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The way to an engine's private memory by way of its own client library.
#[derive(Debug)]
pub(super) struct Assistant {
    ring: Ring,
    life: Life,
    /// How long a request may wait to be claimed (`process.answer_ms`).
    answer: Duration,
    /// Slots that nobody uses. Held to take one out or to put one back.
    free: Mutex<Vec<usize>>,
    freed: Condvar,
    /// The beat at which the engine's thread was found silent.
    silent: Mutex<Option<u32>>,
    /// The engine's lease is over: nothing is posted any more.
    closed: AtomicBool,
    /// The engine has written into the ring what it may not.
    broken: AtomicBool,
}

/// The bytes of a request, on this side.
enum Bytes<'a> {
    Into(&'a mut [u8]),
    From(&'a [u8]),
}

impl Assistant {
    /// Of an engine whose ring is mapped. `process` is its pidfd, where it can be had.
    pub(super) fn new(
        mapping: Mapping,
        memfd: Arc<OwnedFd>,
        process: Option<Arc<OwnedFd>>,
        answer: Duration,
    ) -> Result<Self, Failure> {
        Ok(Self {
            ring: Ring::new(mapping)?,
            life: Life::of(process, memfd)?,
            answer,
            free: Mutex::new((0..SLOTS).collect()),
            freed: Condvar::new(),
            silent: Mutex::default(),
            closed: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        })
    }

    /// Fills `bytes` from the engine's memory, as the extents say. ENGINE_SILENT, ENGINE_GONE, or DRIVER with the errno
    /// where a page is not there.
    pub(super) fn read(&self, extents: &[Extent], bytes: &mut [u8]) -> Result<(), Failure> {
        self.in_batches(extents, &mut Bytes::Into(bytes))
    }

    /// Puts `bytes` into the engine's memory. Errors as with [`Assistant::read`].
    pub(super) fn write(&self, extents: &[Extent], bytes: &[u8]) -> Result<(), Failure> {
        self.in_batches(extents, &mut Bytes::From(bytes))
    }

    /// From now on nothing is posted, and what is not claimed is taken back at once.
    pub(super) fn close(&self) {
        self.closed.store(true, SeqCst);
        (0..SLOTS).for_each(|slot| self.ring.wake(slot));
        // Between those who look and then wait there is nobody who looked before.
        drop(self.lock());
        self.freed.notify_all();
    }

    /// As few requests as possible: a part is one.
    fn in_batches(&self, extents: &[Extent], bytes: &mut Bytes<'_>) -> Result<(), Failure> {
        let mut batch = Vec::with_capacity(extents.len().min(PIECES));
        let mut room = DATA_BYTES;
        for extent in extents {
            let Extent { mut address, mut at, mut length } = *extent;
            while length > 0 {
                if batch.len() == PIECES || room == 0 {
                    self.exchange(&batch, bytes)?;
                    batch.clear();
                    room = DATA_BYTES;
                }
                let step = length.min(room);
                batch.push(Extent { address, at, length: step });
                (address, at, length, room) = (address + step as u64, at + step, length - step, room - step);
            }
        }
        if batch.is_empty() { Ok(()) } else { self.exchange(&batch, bytes) }
    }

    /// One request, from the first word to the last.
    fn exchange(&self, batch: &[Extent], bytes: &mut Bytes<'_>) -> Result<(), Failure> {
        self.check()?;
        let slot = self.take_slot()?;
        self.post(slot.number, batch, bytes);
        let word = self.outcome(slot.number)?;
        let result = match word {
            status::DONE => {
                if let Bytes::Into(into) = bytes {
                    self.collect(slot.number, batch, into);
                }
                Ok(())
            }
            _ => Err(self.failure(slot.number, batch, bytes)),
        };
        self.ring.word(slot.number, Word::Status).store(status::IDLE, SeqCst);
        result
    }

    /// Whether asking makes sense.
    fn check(&self) -> Result<(), Failure> {
        if self.closed.load(SeqCst) {
            return Err(gone());
        }
        if self.broken.load(SeqCst) {
            return Err(broken());
        }
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match *silent {
            Some(beat) if beat == self.ring.beat() => {
                // Should it run again, this is what it wakes from.
                self.ring.ring();
                Err(self.silence())
            }
            _ => {
                *silent = None;
                Ok(())
            }
        }
    }

    fn post(&self, slot: usize, batch: &[Extent], bytes: &Bytes<'_>) {
        let (operation, from) = match bytes {
            Bytes::Into(_) => (operation::READ, None),
            Bytes::From(from) => (operation::WRITE, Some(from)),
        };
        if let Some(from) = from {
            let mut at = 0;
            for extent in batch {
                self.ring.put_data(slot, at, &from[extent.at..extent.at + extent.length]);
                at += extent.length;
            }
        }
        self.ring.put_table(slot, batch.iter().map(|extent| (extent.address, extent.length as u64)));
        self.ring.word(slot, Word::Operation).store(operation, SeqCst);
        self.ring.word(slot, Word::Count).store(batch.len() as u32, SeqCst);
        self.ring.word(slot, Word::Status).store(status::POSTED, SeqCst);
        self.ring.ring();
    }

    /// Waits for the last word on a slot: DONE or FAILED. An error where there is none, and the engine touches no memory
    /// for the slot any more.
    fn outcome(&self, slot: usize) -> Result<u32, Failure> {
        let word = self.ring.word(slot, Word::Status);
        let posted = Instant::now();
        let mut looked = posted;
        loop {
            let seen = word.load(SeqCst);
            let limit = match seen {
                status::DONE | status::FAILED => return Ok(seen),
                status::POSTED => {
                    let left = self.answer.saturating_sub(posted.elapsed());
                    if left.is_zero() || self.closed.load(SeqCst) {
                        match word.compare_exchange(status::POSTED, status::IDLE, SeqCst, SeqCst) {
                            Ok(_) => return Err(self.unanswered()),
                            Err(_) => continue,
                        }
                    }
                    left.min(LOOK_EVERY)
                }
                status::CLAIMED => LOOK_EVERY,
                _ => {
                    self.broken.store(true, SeqCst);
                    tracing::error!(status = seen, "an engine writes into its ring what it may not");
                    return Err(broken());
                }
            };
            self.ring.wait(slot, seen, limit);
            // By the clock: whoever has the ring mapped may wake us as often as they like.
            if looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                if self.life.has_ended() {
                    self.closed.store(true, SeqCst);
                    return Err(gone());
                }
            }
        }
    }

    /// A request was taken back.
    fn unanswered(&self) -> Failure {
        if self.closed.load(SeqCst) {
            return gone();
        }
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        if silent.replace(self.ring.beat()).is_none() {
            tracing::warn!(answer_ms = self.answer.as_millis(), "an engine does not answer its ring");
        }
        self.silence()
    }

    fn silence(&self) -> Failure {
        let message = format!("the engine did not answer within {} ms", self.answer.as_millis());
        Failure::new(Reason::EngineSilent, message)
    }

    fn collect(&self, slot: usize, batch: &[Extent], into: &mut [u8]) {
        let mut at = 0;
        for extent in batch {
            self.ring.get_data(slot, at, &mut into[extent.at..extent.at + extent.length]);
            at += extent.length;
        }
    }

    /// What the engine says went wrong, which may be anything: only the numbers are its own.
    fn failure(&self, slot: usize, batch: &[Extent], bytes: &Bytes<'_>) -> Failure {
        let errno = self.ring.word(slot, Word::Errno).load(SeqCst).cast_signed();
        let piece = self.ring.word(slot, Word::Piece).load(SeqCst) as usize;
        let address = batch.get(piece).or(batch.first()).map_or(0, |extent| extent.address);
        let doing = match bytes {
            Bytes::Into(_) => "reading",
            Bytes::From(_) => "writing",
        };
        let error = io::Error::from_raw_os_error(if errno > 0 { errno } else { libc::EIO });
        Failure::io(Reason::Driver, format_args!("{doing} assisted memory at {address:#x}"), &error)
    }

    /// A slot of one's own. Where all of them are with the engine, it is waited for as an answer is.
    fn take_slot(&self) -> Result<Slot<'_>, Failure> {
        let taken = |free: &mut Vec<usize>| free.is_empty() && !self.closed.load(SeqCst);
        let (mut free, _) = self
            .freed
            .wait_timeout_while(self.lock(), self.answer, taken)
            .unwrap_or_else(PoisonError::into_inner);
        match free.pop() {
            _ if self.closed.load(SeqCst) => Err(gone()),
            Some(number) => Ok(Slot { assistant: self, number }),
            None => Err(self.silence()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot in use; free again when dropped.
struct Slot<'a> {
    assistant: &'a Assistant,
    number: usize,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.assistant.lock().push(self.number);
        self.assistant.freed.notify_one();
    }
}

fn gone() -> Failure {
    Failure::new(Reason::EngineGone, "the engine's assistant is gone")
}

fn broken() -> Failure {
    Failure::new(Reason::Driver, "the engine has broken its ring")
}

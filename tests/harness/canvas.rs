//! Memory of which every byte says when it was written, and a judge that reads it from outside.
//!
//! The question of the late-write probes is not whether the right bytes arrived but *when* bytes were read and
//! written. So a canvas has one shade at a time, and it changes at the moment that counts: what carries the shade
//! of after the reply, or changes a range that was repainted, is late.
//!
//! All access is by `pread` and `pwrite` on the memfd: unlike a reference it may race with a daemon's writes.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
};

use kvferry_client::{Memory, SharedBuffer};
use serde::{Deserialize, Serialize};

use crate::{oracle::Kind, process::Process};

/// The value of all bytes of a canvas at a time.
pub type Shade = u8;

/// A destination before the transfer.
pub const BLANK: Shade = 0x11;
/// A source before the reply: what a transfer may bring.
pub const BEFORE: Shade = 0x22;
/// A source after the reply: wherever it turns up, it is late.
pub const AFTER: Shade = 0x33;
/// A destination in the hands of its next owner: whatever else turns up there is late.
pub const OWNED: Shade = 0x44;

const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;

/// An engine's memory for a probe.
#[derive(Debug)]
pub struct Canvas {
    buffer: SharedBuffer,
    file: File,
    kind: Kind,
    /// What is painted and judged; behind it lies a margin for other transfers.
    length: u64,
}

impl Canvas {
    /// Memory of `length` bytes that are painted and `margin` bytes that are not. A judge sees it, so it is a memfd in
    /// any case; but it can be registered as if it were the process's alone.
    pub fn new(kind: Kind, length: u64, margin: u64) -> anyhow::Result<Self> {
        let buffer = SharedBuffer::new(usize::try_from(length + margin)?)?;
        let file = buffer.as_fd().try_clone_to_owned()?.into();
        Ok(Self { buffer, file, kind, length })
    }

    /// For registration.
    pub fn memory(&self) -> Memory<'_> {
        match self.kind {
            Kind::Shared => Memory::Shared(&self.buffer),
            Kind::Process => {
                Memory::Process { address: self.buffer.address(), length: self.buffer.len() as u64 }
            }
        }
    }

    /// Where it begins in this process.
    pub fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// What a [`Judge`] needs besides the process.
    pub fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Gives all bytes this shade, and says what was there until then.
    pub fn paint(&self, shade: Shade) -> anyhow::Result<Census> {
        let paint = vec![shade; CHUNK];
        let mut found = vec![0; CHUNK];
        let mut census = Census::default();
        for at in (0..self.length).step_by(CHUNK) {
            let size = (self.length - at).min(CHUNK as u64) as usize;
            // The look and the paint are so close together that nothing worth finding falls between them.
            self.file.read_exact_at(&mut found[..size], at)?;
            self.file.write_all_at(&paint[..size], at)?;
            census.add(&found[..size]);
        }
        Ok(census)
    }
}

/// Bytes of a canvas by shade.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Census {
    /// [`BLANK`]
    pub blank: u64,
    /// [`BEFORE`]
    pub before: u64,
    /// [`AFTER`]
    pub after: u64,
    /// [`OWNED`]
    pub owned: u64,
    /// None of them: nobody painted it.
    pub other: u64,
}

impl Census {
    fn add(&mut self, bytes: &[u8]) {
        for page in bytes.chunks(PAGE) {
            // Nearly every page is of one shade; comparing is many times faster than counting.
            match page {
                [first, rest @ ..] if page[..rest.len()] == *rest => *self.of(*first) += page.len() as u64,
                _ => page.iter().for_each(|shade| *self.of(*shade) += 1),
            }
        }
    }

    fn of(&mut self, shade: Shade) -> &mut u64 {
        match shade {
            BLANK => &mut self.blank,
            BEFORE => &mut self.before,
            AFTER => &mut self.after,
            OWNED => &mut self.owned,
            _ => &mut self.other,
        }
    }

    /// All but the bytes of the next owner.
    pub fn not_owned(&self) -> u64 {
        self.blank + self.before + self.after + self.other
    }
}

/// Reads the canvas of another process, also while that process is stopped.
#[derive(Debug)]
pub struct Judge {
    file: File,
    length: u64,
}

impl Judge {
    /// By the descriptor that the process has of it; its owner may be our child or ourselves.
    pub fn open(process: Process, descriptor: i32, length: u64) -> anyhow::Result<Self> {
        let file = File::open(format!("/proc/{}/fd/{descriptor}", process.0))?;
        Ok(Self { file, length })
    }

    /// Reads all of it.
    pub fn census(&self) -> anyhow::Result<Census> {
        let mut found = vec![0; CHUNK];
        let mut census = Census::default();
        for at in (0..self.length).step_by(CHUNK) {
            let size = (self.length - at).min(CHUNK as u64) as usize;
            self.file.read_exact_at(&mut found[..size], at)?;
            census.add(&found[..size]);
        }
        Ok(census)
    }

    /// One byte.
    pub fn shade(&self, at: u64) -> anyhow::Result<Shade> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at)?;
        Ok(byte[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 3 * CHUNK as u64 + 5;

    /// What everything rests on: a byte that comes late is seen, from outside, wherever it lands.
    #[test]
    fn one_late_byte_is_found() {
        let canvas = Canvas::new(Kind::Shared, LENGTH, 7).unwrap();
        let judge = Judge::open(Process(std::process::id()), canvas.descriptor(), LENGTH).unwrap();
        assert_eq!(canvas.paint(OWNED).unwrap(), Census { other: LENGTH, ..Census::default() });
        assert_eq!(judge.census().unwrap().not_owned(), 0);
        for at in [0, 4095, 4096, LENGTH - 1] {
            canvas.file.write_all_at(&[AFTER], at).unwrap();
            let census = judge.census().unwrap();
            assert_eq!((census.after, census.not_owned()), (1, 1), "at {at}");
            assert_eq!(judge.shade(at).unwrap(), AFTER);
            assert_eq!(canvas.paint(OWNED).unwrap().after, 1, "who paints over it sees it too");
        }
        // The margin is nobody's business.
        canvas.file.write_all_at(&[AFTER], LENGTH).unwrap();
        assert_eq!(judge.census().unwrap().not_owned(), 0);
    }
}

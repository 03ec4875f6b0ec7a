//! Where a part's payload lies in engine memory, and how much of it is still to move.
//!
//! Mapped memory goes straight between socket and region. A part with a piece of process memory goes through
//! the thread's bounce buffer, filled or emptied within the same visit to the gate. A part that may not touch
//! memory any more is *put aside*: what is left of it comes from zeros or goes to scrap, so the lane lives on.
//!
//! Where the daemons have agreed on checksums, the payload is summed as it passes: before its first byte goes,
//! and as it lands. Both happen inside the gate, as every touch of engine memory does.

use std::{io, os::fd::BorrowedFd, sync::Arc};

pub(super) use super::io::Page;
use super::{
    io::{self as calls, Received, Scatter},
    wire::{Trailer, Violation},
};
use crate::{
    domain::{Failure, Reason},
    memory::Region,
    transport::touch,
};

/// A piece of engine memory: region, first address, bytes.
pub(super) type Place<'a> = (&'a Arc<Region>, u64, u64);

/// The payload of the part under way. Reused from part to part.
#[derive(Debug, Default)]
pub(super) struct Body {
    direct: Scatter,
    bounced: Vec<(Arc<Region>, u64, u64)>,
    /// First piece of `bounced` that is not done, and how much of it is.
    at: usize,
    offset: u64,
    left: u64,
    /// Checksums were agreed on.
    sums: bool,
    /// Nothing for what was put aside: padding is not summed.
    sum: Option<Sum>,
}

/// The CRC32C of payload from its first byte on.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    crc: u32,
    /// Bytes that are in it and still to move.
    ahead: u64,
}

/// What went wrong in a call: the connection, or the engine's memory.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Ends the lane.
    Socket(io::Error),
    /// Ends the part.
    Memory(Failure),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            // The socket stays intact: the kernel found that it cannot reach the memory.
            Some(libc::EFAULT) => {
                Self::Memory(Failure::io(Reason::Driver, "the kernel cannot reach the memory", &error))
            }
            _ => Self::Socket(error),
        }
    }
}

/// What a receiving call brought, and whether it could be kept.
#[derive(Debug)]
pub(super) struct Receipt {
    /// Bytes taken from the socket, over payload and what follows.
    pub(super) received: Received,
    /// Not everything could be asked for: the bounce buffer was too small.
    pub(super) cut: bool,
    /// Payload that process memory did not take.
    pub(super) spoilt: Option<Failure>,
}

impl Body {
    /// Empty; `sums` where payload is to be summed.
    pub(super) fn new(sums: bool) -> Self {
        Self { sums, ..Self::default() }
    }

    /// Takes up a part's pieces. They have been checked: inside their regions, not retired.
    pub(super) fn fill<'a>(&mut self, places: impl Iterator<Item = Place<'a>> + Clone) {
        self.clear();
        self.sum = self.sums.then(Sum::default);
        let mapped =
            places.clone().all(|(region, address, length)| self.direct.push(region, address, length));
        if mapped {
            self.left = self.direct.left();
            return;
        }
        self.direct.clear();
        self.bounced.extend(places.map(|(region, address, length)| (region.clone(), address, length)));
        self.left = self.bounced.iter().map(|(.., length)| length).sum();
    }

    /// Lets go of the memory. What is left comes from or goes to `page`.
    pub(super) fn put_aside(&mut self, page: Page) {
        self.set_scrap(page, self.left);
    }

    /// Takes up bytes that never had a place in memory.
    pub(super) fn set_scrap(&mut self, page: Page, bytes: u64) {
        self.clear();
        self.direct.push_page(page, bytes);
        self.left = bytes;
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        self.direct.clear();
        self.bounced.clear();
        (self.at, self.offset, self.left) = (0, 0, 0);
        self.sum = None;
    }

    /// Payload bytes still to move.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The payload's checksum, once all of it is in it.
    pub(super) fn sum(&self) -> Option<u32> {
        self.sum.filter(|sum| sum.ahead == self.left).map(|sum| sum.crc)
    }

    /// Whether the payload, which has all come, is what its sender had.
    pub(super) fn judge(&self, trailer: &Trailer) -> Result<(), Violation> {
        let sequence = trailer.sequence;
        match (self.sums, self.sum()) {
            _ if trailer.aborted.is_some() => Ok(()),
            (true, Some(sum)) if sum != trailer.checksum => Err(Violation::Payload { sequence }),
            (true, _) => Ok(()),
            (false, _) if trailer.checksum == 0 => Ok(()),
            (false, _) => Err(Violation::Limit { field: "trailer checksum", value: trailer.checksum.into() }),
        }
    }

    /// Makes the next bytes ready for [`Body::send`]: those of process memory are in `bounce` then, and the sum
    /// has all that the call will offer.
    pub(super) fn prepare(&mut self, bounce: &mut [u8]) -> Result<(), Failure> {
        if self.bounced.is_empty() {
            if let Some(sum) = self.sum.as_mut().filter(|sum| sum.ahead == 0) {
                *sum = Sum { crc: self.direct.sum(sum.crc, self.left, bounce), ahead: self.left };
            }
            return Ok(());
        }
        let step = self.step(bounce.len());
        let bytes = &mut bounce[..step];
        self.walk(bytes.len() as u64, |region, address, range| {
            touch::copy_out(region, address, &mut bytes[range])
        })?;
        if let Some(sum) = &mut self.sum {
            // What was offered before and not taken is in it already.
            sum.crc = crc32c::crc32c_append(sum.crc, &bytes[sum.ahead as usize..]);
            sum.ahead = bytes.len() as u64;
        }
        Ok(())
    }

    /// Sends `before`, what is left of the payload and, right behind its last byte, `after`: as much as the
    /// socket takes and the bounce buffer holds. Answers with the bytes taken and whether the socket took all
    /// that it was offered. [`Body::prepare`] was called with the same buffer.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        before: &[u8],
        after: &[u8],
        bounce: &[u8],
    ) -> Result<(usize, bool), Trouble> {
        let (sent, moved, all);
        if self.bounced.is_empty() {
            let offered = before.len() + self.left as usize + after.len();
            sent = calls::send(socket, before, &mut self.direct, after)?;
            moved = (sent.saturating_sub(before.len()) as u64).min(self.left);
            all = sent == offered;
            self.direct.advance(moved);
            self.left = self.direct.left();
        } else {
            let step = self.step(bounce.len());
            let after = if step as u64 == self.left { after } else { &[] };
            sent = send_slices(socket, [before, &bounce[..step], after])?;
            moved = sent.saturating_sub(before.len()).min(step) as u64;
            all = sent == before.len() + step + after.len();
            self.advance(moved);
        }
        if let Some(sum) = &mut self.sum {
            sum.ahead -= moved;
        }
        Ok((sent, all))
    }

    /// Bytes of process memory that move at once.
    fn step(&self, room: usize) -> usize {
        self.left.min(room as u64) as usize
    }

    /// Receives what is left of the payload and, right behind its last byte, into `after`.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        after: [&mut [u8]; 2],
        bounce: &mut [u8],
    ) -> Result<Receipt, Trouble> {
        if self.bounced.is_empty() {
            let received = calls::receive(socket, &mut self.direct, after)?;
            if let Received::Bytes(bytes) = received {
                if let Some(sum) = &mut self.sum {
                    sum.crc = self.direct.sum(sum.crc, (bytes as u64).min(self.left), bounce);
                }
                self.direct.advance(bytes as u64);
                self.left = self.direct.left();
            }
            return Ok(Receipt { received, cut: false, spoilt: None });
        }
        let step = self.step(bounce.len());
        let [trailer, next] = after;
        let after = if step as u64 == self.left { [trailer, next] } else { [&mut [][..], &mut [][..]] };
        let received = receive_slices(socket, &mut bounce[..step], after)?;
        let moved = match received {
            Received::Bytes(bytes) => bytes.min(step),
            Received::Nothing | Received::End => 0,
        };
        let bytes = &bounce[..moved];
        if let Some(sum) = &mut self.sum {
            sum.crc = crc32c::crc32c_append(sum.crc, bytes);
        }
        let kept =
            self.walk(moved as u64, |region, address, range| touch::copy_in(region, address, &bytes[range]));
        self.advance(moved as u64);
        Ok(Receipt { received, cut: moved == step && self.left > 0, spoilt: kept.err() })
    }

    /// Visits the next bytes of the bounced pieces in order: region, address, range within those bytes.
    fn walk(
        &self,
        bytes: u64,
        mut visit: impl FnMut(&Region, u64, std::ops::Range<usize>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut done = 0;
        let mut offset = self.offset;
        for (region, address, length) in &self.bounced[self.at..] {
            if done == bytes {
                break;
            }
            let step = (length - offset).min(bytes - done);
            visit(region, address + offset, done as usize..(done + step) as usize)?;
            done += step;
            offset = 0;
        }
        Ok(())
    }

    fn advance(&mut self, mut bytes: u64) {
        self.left -= bytes;
        while bytes > 0 {
            let (.., length) = &self.bounced[self.at];
            let step = (length - self.offset).min(bytes);
            bytes -= step;
            self.offset += step;
            if self.offset == *length {
                (self.at, self.offset) = (self.at + 1, 0);
            }
        }
    }
}

/// The same by way of ordinary memory.
fn send_slices(socket: BorrowedFd<'_>, slices: [&[u8]; 3]) -> io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
    let slices = slices.map(io::IoSlice::new);
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), flags));
    match sent {
        Err(rustix::io::Errno::AGAIN) => Ok(0),
        other => Ok(other?),
    }
}

fn receive_slices(socket: BorrowedFd<'_>, first: &mut [u8], after: [&mut [u8]; 2]) -> io::Result<Received> {
    use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
    let [trailer, next] = after;
    let mut slices = [first, trailer, next].map(io::IoSliceMut::new);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(socket, &mut slices, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT)
    });
    match received {
        Ok(message) if message.bytes == 0 => Ok(Received::End),
        Ok(message) => Ok(Received::Bytes(message.bytes)),
        Err(rustix::io::Errno::AGAIN) => Ok(Received::Nothing),
        Err(error) => Err(error.into()),
    }
}

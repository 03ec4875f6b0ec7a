//! Where a part's payload lies in engine memory, and how much of it is still to move.
//!
//! Mapped memory goes straight between socket and region. A part with a piece of process memory is *staged*: read as a
//! whole before its first byte goes, written as a whole when its last one has come, each within one visit to the gate.
//! So memory that its engine itself copies costs one request a part, however the socket takes or gives the bytes. The
//! stage is the lane's own, as large as its largest such part (1 MiB). A part that may not touch memory any more is
//! *put aside*: what is left of it comes from zeros or goes to scrap, so the lane lives on.
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
    /// Pieces of a part that is staged.
    pieces: Vec<(Arc<Region>, u64, u64)>,
    /// Its first `whole` bytes are the part's. Not given back, because the next part needs it too.
    stage: Vec<u8>,
    whole: usize,
    /// For sending: the part has been read.
    read: bool,
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
        self.pieces.extend(places.map(|(region, address, length)| (region.clone(), address, length)));
        self.left = self.pieces.iter().map(|(.., length)| length).sum();
        self.whole = self.left as usize;
        if self.stage.len() < self.whole {
            self.stage.resize(self.whole, 0);
        }
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
        self.pieces.clear();
        (self.whole, self.read, self.left) = (0, false, 0);
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

    /// Makes the next bytes ready for [`Body::send`]: those of process memory are staged then, and the sum has all that
    /// the call will offer. `room` is for summing.
    pub(super) fn prepare(&mut self, room: &mut [u8]) -> Result<(), Failure> {
        let crc = |sum: &Sum| sum.crc;
        let wanted = self.sum.as_ref().filter(|sum| sum.ahead == 0 && self.left > 0).map(crc);
        if self.pieces.is_empty() {
            if let Some(crc) = wanted {
                self.sum = Some(Sum { crc: self.direct.sum(crc, self.left, room), ahead: self.left });
            }
            return Ok(());
        }
        if !self.read {
            touch::copy_out(placed(&self.pieces), &mut self.stage[..self.whole])?;
            self.read = true;
            if let Some(crc) = wanted {
                let crc = crc32c::crc32c_append(crc, &self.stage[..self.whole]);
                self.sum = Some(Sum { crc, ahead: self.left });
            }
        }
        Ok(())
    }

    /// Sends `before`, what is left of the payload and, right behind its last byte, `after`: as much as the
    /// socket takes. Answers with the bytes taken and whether the socket took all that it was offered.
    /// [`Body::prepare`] was called before.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        before: &[u8],
        after: &[u8],
    ) -> Result<(usize, bool), Trouble> {
        let offered = before.len() + self.left as usize + after.len();
        let sent = match self.pieces.is_empty() {
            true => calls::send(socket, before, &mut self.direct, after)?,
            false => send_slices(socket, [before, &self.stage[self.staged()..self.whole], after])?,
        };
        let moved = (sent.saturating_sub(before.len()) as u64).min(self.left);
        self.direct.advance(moved);
        self.left -= moved;
        if let Some(sum) = &mut self.sum {
            sum.ahead -= moved;
        }
        Ok((sent, sent == offered))
    }

    /// Where in the stage the bytes begin that are still to move.
    fn staged(&self) -> usize {
        self.whole - self.left as usize
    }

    /// Receives what is left of the payload and, right behind its last byte, into `after`. `room` is for summing.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        after: [&mut [u8]; 2],
        room: &mut [u8],
    ) -> Result<Receipt, Trouble> {
        if self.pieces.is_empty() {
            let received = calls::receive(socket, &mut self.direct, after)?;
            if let Received::Bytes(bytes) = received {
                if let Some(sum) = &mut self.sum {
                    sum.crc = self.direct.sum(sum.crc, (bytes as u64).min(self.left), room);
                }
                self.direct.advance(bytes as u64);
                self.left = self.direct.left();
            }
            return Ok(Receipt { received, spoilt: None });
        }
        let at = self.staged();
        let received = receive_slices(socket, &mut self.stage[at..self.whole], after)?;
        let moved = match received {
            Received::Bytes(bytes) => bytes.min(self.left as usize),
            Received::Nothing | Received::End => 0,
        };
        if let Some(sum) = &mut self.sum {
            sum.crc = crc32c::crc32c_append(sum.crc, &self.stage[at..at + moved]);
        }
        self.left -= moved as u64;
        let kept = match moved > 0 && self.left == 0 {
            true => touch::copy_in(placed(&self.pieces), &self.stage[..self.whole]),
            false => Ok(()),
        };
        Ok(Receipt { received, spoilt: kept.err() })
    }
}

/// The pieces of a staged part, with their places on the stage.
fn placed(pieces: &[(Arc<Region>, u64, u64)]) -> impl Iterator<Item = touch::Placed<'_>> {
    let mut at = 0;
    pieces.iter().map(move |(region, address, length)| {
        let range = at..at + *length as usize;
        at = range.end;
        (&**region, *address, range)
    })
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

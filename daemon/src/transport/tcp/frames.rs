//! The halves that lanes are made of: frames with payload going out and coming in, and small frames both ways.

use std::{io, os::fd::BorrowedFd};

use rustix::net::{RecvFlags, SendFlags};

use super::{
    admission::{hung_up, lost},
    body::{Body, Page, Place, Trouble},
    io::Received,
    wire::{TRAILER_BYTES, Trailer, Violation},
};
use crate::domain::{Failure, Reason};

/// What a sending call achieved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sent {
    /// The frame is out.
    Finished,
    /// The socket took everything it was offered; there is more.
    More,
    /// The socket is full.
    Blocked,
}

/// A frame on its way out: header, table, payload, trailer.
#[derive(Debug)]
pub(super) struct Outgoing {
    head: Vec<u8>,
    head_at: usize,
    body: Body,
    trailer: [u8; TRAILER_BYTES],
    /// Where the frame has no trailer, at its end.
    trailer_at: usize,
    sequence: u64,
}

impl Outgoing {
    /// None under way; `sums` where payload is to be summed.
    pub(super) fn new(sums: bool) -> Self {
        let trailer = [0; TRAILER_BYTES];
        Self { head: vec![], head_at: 0, body: Body::new(sums), trailer, trailer_at: 0, sequence: 0 }
    }

    /// Takes up a frame with payload. Only when [`Outgoing::is_idle`].
    pub(super) fn begin<'a>(
        &mut self,
        sequence: u64,
        places: impl Iterator<Item = Place<'a>> + Clone,
    ) -> &mut Vec<u8> {
        self.body.fill(places);
        self.begin_filled(sequence)
    }

    /// The same where [`Outgoing::body`] was filled beforehand. The header goes into what is returned.
    pub(super) fn begin_filled(&mut self, sequence: u64) -> &mut Vec<u8> {
        self.head.clear();
        (self.head_at, self.trailer_at) = (0, 0);
        self.sequence = sequence;
        self.trailer = Trailer { aborted: None, sequence, checksum: 0 }.encode();
        &mut self.head
    }

    /// Takes up a frame that is a header only.
    pub(super) fn begin_bare(&mut self, head: &[u8]) {
        self.body.clear();
        self.head.clear();
        self.head.extend_from_slice(head);
        (self.head_at, self.trailer_at) = (0, TRAILER_BYTES);
    }

    /// What the next frame's payload is to be filled into.
    pub(super) fn body(&mut self) -> &mut Body {
        &mut self.body
    }

    /// No frame under way.
    pub(super) fn is_idle(&self) -> bool {
        self.head_at == self.head.len() && self.body.left() == 0 && self.trailer_at == self.trailer_end()
    }

    /// Not a byte of the frame has gone out.
    pub(super) fn is_untouched(&self) -> bool {
        self.head_at == 0
    }

    /// Lets go of the memory; padding takes its place and the trailer says so. A frame whose payload is all
    /// out stays as it is: it is whole.
    pub(super) fn abort(&mut self, reason: Reason) {
        if self.body.left() > 0 {
            self.body.put_aside(Page::Zeros);
            let trailer = Trailer { aborted: Some(reason), sequence: self.sequence, checksum: 0 };
            self.trailer = trailer.encode();
        } else {
            // Only the trailer waits for room: the memory is not needed for that.
            self.body.clear();
        }
    }

    /// Sends what the socket takes, and tells how many payload bytes went.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> Result<(Sent, u64), Trouble> {
        self.body.prepare(room).map_err(Trouble::Memory)?;
        if let Some(checksum) = self.body.sum() {
            self.trailer = Trailer { aborted: None, sequence: self.sequence, checksum }.encode();
        }
        let left = self.body.left();
        let before = &self.head[self.head_at..];
        let head = before.len();
        let (sent, all) = self.body.send(socket, before, &self.trailer[self.trailer_at..])?;
        let moved = left - self.body.left();
        let head = sent.min(head);
        self.head_at += head;
        self.trailer_at += sent - head - moved as usize;
        let outcome = match (self.is_idle(), all) {
            (true, _) => Sent::Finished,
            (false, true) => Sent::More,
            (false, false) => Sent::Blocked,
        };
        if outcome == Sent::Finished {
            self.body.clear();
        }
        Ok((outcome, moved))
    }

    fn trailer_end(&self) -> usize {
        match self.head.is_empty() {
            true => 0,
            false => TRAILER_BYTES,
        }
    }
}

/// What a receiving call brought.
#[derive(Debug)]
pub(super) struct Arrival {
    /// Bytes over all.
    pub(super) bytes: usize,
    /// Payload bytes among them.
    pub(super) moved: u64,
    /// There is nothing more to read now.
    pub(super) drained: bool,
    /// Process memory did not take the payload.
    pub(super) spoilt: Option<Failure>,
}

/// Frames coming in. Each begins with `HEAD` bytes, read together with the end of the frame before it.
#[derive(Debug)]
pub(super) struct Incoming<const HEAD: usize> {
    head: [u8; HEAD],
    head_have: usize,
    body: Body,
    trailer: [u8; TRAILER_BYTES],
    trailer_have: usize,
}

impl<const HEAD: usize> Incoming<HEAD> {
    /// None under way; `sums` where payload is to be summed.
    pub(super) fn new(sums: bool) -> Self {
        let trailer = [0; TRAILER_BYTES];
        Self { head: [0; HEAD], head_have: 0, body: Body::new(sums), trailer, trailer_have: TRAILER_BYTES }
    }

    /// The next frame's beginning, once it is complete and the frame before it is over.
    pub(super) fn head(&mut self) -> Option<[u8; HEAD]> {
        let complete = self.head_have == HEAD && self.trailer_have == TRAILER_BYTES;
        complete.then(|| {
            self.head_have = 0;
            self.head
        })
    }

    /// What the frame's payload is to be filled into; [`Incoming::begin`] follows.
    pub(super) fn body(&mut self) -> &mut Body {
        &mut self.body
    }

    /// From now on payload and trailer come in.
    pub(super) fn begin(&mut self) {
        self.trailer_have = 0;
    }

    /// Lets go of the memory; the rest of the payload goes to scrap.
    pub(super) fn put_aside(&mut self) {
        self.body.put_aside(Page::Scrap);
    }

    /// The trailer of the part with this sequence, once it is complete. An error where the payload before it is
    /// not what was sent.
    pub(super) fn trailer(&self, sequence: u64) -> Result<Option<Trailer>, Violation> {
        if self.body.left() > 0 || self.trailer_have < TRAILER_BYTES {
            return Ok(None);
        }
        let trailer = Trailer::parse(&self.trailer, sequence)?;
        self.body.judge(&trailer)?;
        Ok(Some(trailer))
    }

    /// Lets go of the memory at a part's end.
    pub(super) fn end(&mut self) {
        self.body.clear();
    }

    /// Receives what is there of payload, trailer and the next frame's beginning.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> Result<Arrival, Failure> {
        let left = self.body.left();
        let after = [&mut self.trailer[self.trailer_have..], &mut self.head[self.head_have..]];
        let asked = after.iter().map(|slice| slice.len()).sum::<usize>() + left as usize;
        let receipt = match self.body.receive(socket, after, room) {
            Ok(receipt) => receipt,
            Err(Trouble::Socket(error)) => return Err(lost(&error)),
            Err(Trouble::Memory(failure)) => {
                return Ok(Arrival { bytes: 0, moved: 0, drained: false, spoilt: Some(failure) });
            }
        };
        let bytes = match receipt.received {
            Received::Bytes(bytes) => bytes,
            Received::Nothing => 0,
            Received::End => return Err(hung_up()),
        };
        let moved = left - self.body.left();
        let trailer = (bytes - moved as usize).min(TRAILER_BYTES - self.trailer_have);
        self.trailer_have += trailer;
        self.head_have += bytes - moved as usize - trailer;
        Ok(Arrival { bytes, moved, drained: bytes != asked, spoilt: receipt.spoilt })
    }
}

/// Small frames on their way out, sent when the lane finds the time.
#[derive(Debug, Default)]
pub(super) struct SmallOut {
    bytes: Vec<u8>,
    at: usize,
}

impl SmallOut {
    /// Bytes waiting.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where frames are appended.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<(), Failure> {
        if self.is_empty() {
            return Ok(());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(socket, &self.bytes[self.at..], flags));
        match sent {
            Ok(sent) => self.at += sent,
            Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(lost(&error.into())),
        }
        if self.is_empty() {
            self.bytes.clear();
            self.at = 0;
        }
        Ok(())
    }
}

/// Small frames coming in, as many at once as there are. They carry no payload, so reading ahead is free.
#[derive(Debug)]
pub(super) struct SmallIn {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl SmallIn {
    /// `capacity` must hold the largest frame.
    pub(super) fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What has come and was not consumed.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Done with so many of them.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
    }

    /// Receives what is there, and tells how much and whether there may be more.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<(usize, bool), Failure> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let room = &mut self.bytes[self.end..];
        let asked = room.len();
        match receive_plain(socket, room).map_err(|error| lost(&error))? {
            Received::Bytes(bytes) => {
                self.end += bytes;
                Ok((bytes, bytes == asked))
            }
            Received::Nothing => Ok((0, false)),
            Received::End => Err(hung_up()),
        }
    }
}

/// Receives into ordinary memory.
pub(super) fn receive_plain(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
    let received = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *into, RecvFlags::DONTWAIT));
    match received {
        Ok((0, _)) => Ok(Received::End),
        Ok((bytes, _)) => Ok(Received::Bytes(bytes)),
        Err(rustix::io::Errno::AGAIN) => Ok(Received::Nothing),
        Err(error) => Err(error.into()),
    }
}

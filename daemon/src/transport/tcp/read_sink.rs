//! The initiator's end of a read lane: requests out, parts of the target's memory in.

use std::{collections::VecDeque, os::fd::BorrowedFd};

use super::{
    InitiatorSetup,
    body::Page,
    fence::Fence,
    frames::{Arrival, Incoming, SmallOut},
    initiator::{Encoder, Queue, Queued, Standing, Teller},
    role::{Budget, Ended, Interest, Meter, Ready, Role},
    wire::{FrameKind, PartHeader, REPLY_BYTES, Reply, Violation},
};
use crate::{
    domain::{Failure, TransferId},
    transport::{Part, SequencedPart},
};

/// Requests that may wait for a full socket; more are put into bytes when these are out.
const REQUEST_BACKLOG_BYTES: usize = 32 << 10;

#[derive(Debug)]
pub(super) struct ReadSink {
    fence: Fence,
    work: Work,
}

/// A part that was asked for, or whose place was passed over.
#[derive(Debug)]
struct Awaited {
    sequence: u64,
    transfer: TransferId,
    /// Payload asked for; 0 where an ABORT was sent.
    bytes: u32,
    /// Where it goes; nothing once it may not touch memory any more.
    part: Option<Part>,
}

#[derive(Debug)]
struct Work {
    teller: Teller,
    meter: Meter,
    queue: Queue,
    encoder: Encoder,
    requests: SmallOut,
    /// In order of sequence, at most a window long; data of the first may be coming in.
    awaited: VecDeque<Awaited>,
    incoming: Incoming<REPLY_BYTES>,
    /// Data of the first awaited part is coming in.
    under_way: bool,
    processed: u64,
}

impl ReadSink {
    pub(super) fn new(setup: InitiatorSetup, meter: Meter) -> Self {
        let work = Work {
            teller: Teller::new(setup.lane, setup.sink),
            meter,
            queue: Queue::default(),
            encoder: Encoder::new(setup.checksums),
            requests: SmallOut::default(),
            awaited: VecDeque::new(),
            incoming: Incoming::new(setup.checksums),
            under_way: false,
            processed: 0,
        };
        Self { fence: Fence::new(setup.memory), work }
    }

    fn hear(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> Result<(), Ended> {
        let Self { fence, work } = self;
        let mut budget = Budget::new();
        while budget.is_left() {
            let (inside, news) = fence.enter()?;
            if news.is_some() {
                work.review();
            }
            let arrival = work.incoming.receive(socket, room)?;
            drop(inside);
            budget.spend(arrival.moved);
            let drained = arrival.drained;
            work.arrived(arrival)?;
            if drained {
                break;
            }
        }
        work.teller.processed(work.processed);
        Ok(())
    }
}

impl Role for ReadSink {
    fn turn(&mut self, socket: BorrowedFd<'_>, ready: Ready, room: &mut [u8]) -> Result<Interest, Ended> {
        if ready.readable {
            self.hear(socket, room)?;
        }
        self.work.ask(socket)?;
        Ok(Interest { read: true, write: self.work.has_output() })
    }

    fn submit(&mut self, parts: Vec<SequencedPart>) -> Result<(), Ended> {
        Ok(self.work.queue.submit(parts)?)
    }

    fn review(&mut self) -> Result<(), Ended> {
        Ok(self.fence.review(|_| self.work.review())?)
    }

    fn holds_leases(&self) -> bool {
        !self.work.queue.is_empty() || !self.work.awaited.is_empty()
    }
}

impl Work {
    fn has_output(&self) -> bool {
        !self.requests.is_empty() || self.queue.is_due(self.processed)
    }

    /// Sends requests as far as the socket takes them.
    fn ask(&mut self, socket: BorrowedFd<'_>) -> Result<(), Ended> {
        loop {
            while self.requests.len() < REQUEST_BACKLOG_BYTES && self.ask_next() {}
            let before = self.requests.len();
            self.requests.flush(socket)?;
            if self.requests.len() == before || !self.requests.is_empty() {
                return Ok(());
            }
        }
    }

    fn ask_next(&mut self) -> bool {
        let Some(queued) = self.queue.next(self.processed, &self.teller) else { return false };
        let buffer = self.requests.buffer();
        self.awaited.push_back(match queued {
            Queued::Part(SequencedPart { sequence, part }) => {
                self.encoder.encode(FrameKind::ReadRequest, sequence, &part, buffer);
                let (transfer, bytes) = (part.payload.transfer, part.bounds().bytes);
                Awaited { sequence, transfer, bytes, part: Some(part) }
            }
            Queued::Passed { sequence, transfer } => {
                buffer.extend_from_slice(&PartHeader::abort(sequence, transfer).encode());
                Awaited { sequence, transfer, bytes: 0, part: None }
            }
        });
        true
    }

    /// The rules have changed: lets go of what may not touch memory any more.
    fn review(&mut self) {
        self.queue.review(&self.teller);
        for awaited in &mut self.awaited {
            awaited.review(&self.teller);
        }
        if self.under_way && self.awaited.front().is_some_and(|first| first.part.is_none()) {
            self.incoming.put_aside();
        }
    }

    fn arrived(&mut self, arrival: Arrival) -> Result<(), Ended> {
        self.meter.moved(arrival.moved);
        self.meter.heard(arrival.bytes);
        if let Some(failure) = arrival.spoilt {
            self.refuse_first(failure);
            self.incoming.put_aside();
        }
        if self.under_way
            && let Some(trailer) = self.incoming.trailer(self.processed + 1)?
        {
            self.incoming.end();
            self.under_way = false;
            if let Some(reason) = trailer.aborted {
                self.refuse_first(Failure::plain(reason));
            }
            self.pass();
        }
        match self.incoming.head().filter(|_| !self.under_way) {
            Some(head) => Ok(self.begin(&head)?),
            None => Ok(()),
        }
    }

    fn begin(&mut self, head: &[u8; REPLY_BYTES]) -> Result<(), Violation> {
        let reply = Reply::parse(head)?;
        let (Reply::Part(PartHeader { sequence, .. }) | Reply::Refused { sequence, .. }) = reply;
        let first = self.awaited.front_mut().filter(|first| first.sequence == sequence);
        let Some(first) = first else {
            return Err(Violation::Sequence { expected: self.processed + 1, got: sequence });
        };
        first.review(&self.teller);
        match reply {
            Reply::Refused { refusal, .. } if first.bytes > 0 => {
                self.refuse_first(refusal.into());
                self.pass();
            }
            Reply::Part(header) if header.kind == FrameKind::Abort && first.bytes == 0 => self.pass(),
            Reply::Part(header) if header.kind == FrameKind::ReadData && first.bytes > 0 => {
                if header.bytes != first.bytes || header.transfer != first.transfer {
                    return Err(Violation::Limit { field: "bytes of a reply", value: header.bytes.into() });
                }
                match &first.part {
                    Some(part) => self.incoming.body().fill(
                        part.pieces().map(|piece| (part.local_region(&piece), piece.local, piece.length)),
                    ),
                    None => self.incoming.body().set_scrap(Page::Scrap, first.bytes.into()),
                }
                self.incoming.begin();
                self.under_way = true;
            }
            Reply::Part(_) | Reply::Refused { .. } => return Err(Violation::Kind(head[0])),
        }
        Ok(())
    }

    /// Tells of a refusal, unless the part was given up on this side already.
    fn refuse_first(&mut self, failure: Failure) {
        if let Some(first) = self.awaited.front_mut()
            && first.part.take().is_some()
        {
            self.teller.refused(first.sequence, failure);
        }
    }

    fn pass(&mut self) {
        if let Some(first) = self.awaited.pop_front() {
            self.processed = first.sequence;
        }
    }
}

impl Awaited {
    fn review(&mut self, teller: &Teller) {
        let Some(part) = &self.part else { return };
        match Standing::of(&part.payload) {
            Standing::Live => return,
            Standing::Stopped => {}
            Standing::Lost => teller.lost(self.sequence),
        }
        self.part = None;
    }
}

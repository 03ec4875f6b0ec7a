//! The initiator's end of a write lane: parts out of local memory, acknowledgements in.

use std::{os::fd::BorrowedFd, sync::Arc};

use super::{
    InitiatorSetup,
    admission::lost,
    body::Trouble,
    fence::Fence,
    frames::{Outgoing, Sent, SmallIn},
    initiator::{Encoder, Queue, Queued, Standing, Teller},
    role::{Budget, Ended, Interest, Meter, Ready, Role},
    wire::{ACK_BYTES, Ack, FrameKind, HEADER_AND_TABLE_START, HEADER_BYTES, PartHeader, Violation},
};
use crate::{
    domain::{Failure, Reason, TransferId},
    transport::{Payload, SequencedPart},
};

const ACKS_READ_AT_ONCE: usize = 128;

#[derive(Debug)]
pub(super) struct WriteSource {
    fence: Fence,
    work: Work,
}

#[derive(Debug)]
struct Work {
    teller: Teller,
    meter: Meter,
    queue: Queue,
    encoder: Encoder,
    out: Outgoing,
    /// Sequence of the frame under way, and whose bytes it carries, unless they were put aside.
    current: Option<(u64, Option<Arc<Payload>>)>,
    /// The socket is full.
    blocked: bool,
    finished: u64,
    acks: SmallIn,
    acked: u64,
    /// The last part that the target refused.
    refused: u64,
}

impl WriteSource {
    pub(super) fn new(setup: InitiatorSetup, meter: Meter) -> Self {
        let work = Work {
            teller: Teller::new(setup.lane, setup.sink),
            meter,
            queue: Queue::default(),
            encoder: Encoder::new(setup.checksums),
            out: Outgoing::new(setup.checksums),
            current: None,
            blocked: false,
            finished: 0,
            acks: SmallIn::new(ACKS_READ_AT_ONCE * ACK_BYTES),
            acked: 0,
            refused: 0,
        };
        Self { fence: Fence::new(setup.memory), work }
    }

    fn speak(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> Result<(), Ended> {
        let Self { fence, work } = self;
        let mut budget = Budget::new();
        while budget.is_left() && !work.blocked {
            let (_inside, news) = fence.enter()?;
            if news.is_some() {
                work.review();
            }
            if work.current.is_none() && !work.start_next() {
                break;
            }
            budget.spend(work.send(socket, room)?);
        }
        Ok(())
    }
}

impl Role for WriteSource {
    fn turn(&mut self, socket: BorrowedFd<'_>, ready: Ready, room: &mut [u8]) -> Result<Interest, Ended> {
        if ready.readable {
            self.work.hear(socket)?;
        }
        self.work.blocked &= !ready.writable;
        self.speak(socket, room)?;
        Ok(Interest { read: true, write: self.work.has_output() })
    }

    fn submit(&mut self, parts: Vec<SequencedPart>) -> Result<(), Ended> {
        Ok(self.work.queue.submit(parts)?)
    }

    fn review(&mut self) -> Result<(), Ended> {
        Ok(self.fence.review(|_| self.work.review())?)
    }

    fn holds_leases(&self) -> bool {
        !self.work.queue.is_empty() || self.work.current.is_some()
    }
}

impl Work {
    fn has_output(&self) -> bool {
        self.current.is_some() || self.queue.is_due(self.acked)
    }

    /// The rules have changed: lets go of what may not touch memory any more.
    fn review(&mut self) {
        self.queue.review(&self.teller);
        let Some((sequence, Some(payload))) = &self.current else { return };
        match Standing::of(payload) {
            Standing::Live => {}
            Standing::Stopped => self.put_aside(Reason::Cancelled),
            Standing::Lost => {
                self.teller.lost(*sequence);
                self.put_aside(Reason::RegionChanged);
            }
        }
    }

    /// The part under way touches memory no more: padding takes the place of its bytes, or, where it has not
    /// begun, an ABORT its own.
    fn put_aside(&mut self, reason: Reason) {
        let Some((sequence, payload)) = &mut self.current else { return };
        match payload.take() {
            Some(payload) if self.out.is_untouched() => {
                self.out.begin_bare(&abort(*sequence, payload.transfer))
            }
            _ => self.out.abort(reason),
        }
    }

    /// Takes up the next part, if one is due.
    fn start_next(&mut self) -> bool {
        let Some(queued) = self.queue.next(self.acked, &self.teller) else { return false };
        match queued {
            Queued::Part(SequencedPart { sequence, part }) => {
                let places =
                    part.pieces().map(|piece| (part.local_region(&piece), piece.local, piece.length));
                let head = self.out.begin(sequence, places);
                self.encoder.encode(FrameKind::Write, sequence, &part, head);
                self.current = Some((sequence, Some(part.payload)));
            }
            Queued::Passed { sequence, transfer } => {
                self.out.begin_bare(&abort(sequence, transfer));
                self.current = Some((sequence, None));
            }
        }
        true
    }

    /// One call of the frame under way; tells the payload bytes that went. Inside the gate.
    fn send(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> Result<u64, Ended> {
        let (sent, moved) = match self.out.send(socket, room) {
            Ok(progress) => progress,
            Err(Trouble::Socket(error)) => return Err(lost(&error).into()),
            Err(Trouble::Memory(failure)) => {
                self.spoil(failure);
                return Ok(0);
            }
        };
        self.meter.moved(moved);
        self.blocked = sent == Sent::Blocked;
        if sent == Sent::Finished
            && let Some((sequence, _)) = self.current.take()
        {
            self.finished = sequence;
        }
        Ok(moved)
    }

    /// Local memory does not give its bytes: the part is refused, the lane lives.
    fn spoil(&mut self, failure: Failure) {
        if let Some((sequence, _)) = self.current {
            self.put_aside(failure.reason);
            self.teller.refused(sequence, failure);
        }
    }

    fn hear(&mut self, socket: BorrowedFd<'_>) -> Result<(), Ended> {
        let mut more = true;
        let mut budget = Budget::new();
        while more && budget.is_left() {
            let bytes;
            (bytes, more) = self.acks.receive(socket)?;
            self.meter.heard(bytes);
            budget.spend(0);
            while let Some(ack) = self.acks.bytes().first_chunk() {
                let ack = Ack::parse(ack)?;
                self.acks.consume(ACK_BYTES);
                self.acknowledged(ack)?;
            }
            self.teller.processed(self.acked);
        }
        Ok(())
    }

    fn acknowledged(&mut self, ack: Ack) -> Result<(), Ended> {
        let (Ack::Processed { through: sequence } | Ack::Refused { sequence, .. }) = ack;
        // Refusals come in order and before the acknowledgement that covers them, each once.
        let heard = match ack {
            Ack::Processed { .. } => self.acked,
            Ack::Refused { .. } => self.acked.max(self.refused),
        };
        let sent = match (ack, &self.current) {
            // A table is judged before the payload behind it has come, or gone.
            (Ack::Refused { refusal, .. }, Some((begun, _))) if refusal.reason == Reason::Checksum => *begun,
            _ => self.finished,
        };
        if sequence <= heard || sequence > sent {
            return Err(Violation::Sequence { expected: heard + 1, got: sequence }.into());
        }
        match ack {
            Ack::Processed { through } => self.acked = through,
            // The target's last word: what arrived is not what was sent. No refusal of the part, which will be
            // sent again, but the lane's end.
            Ack::Refused { refusal, .. } if refusal.reason == Reason::Checksum => {
                return Err(Failure::new(Reason::Checksum, "the target received something else").into());
            }
            Ack::Refused { refusal, .. } => {
                self.refused = sequence;
                self.teller.refused(sequence, refusal.into());
            }
        }
        Ok(())
    }
}

/// What stands for a part on a write lane: as long as what its target reads first of each frame.
fn abort(sequence: u64, transfer: TransferId) -> [u8; HEADER_AND_TABLE_START] {
    let mut frame = [0; HEADER_AND_TABLE_START];
    frame[..HEADER_BYTES].copy_from_slice(&PartHeader::abort(sequence, transfer).encode());
    frame
}

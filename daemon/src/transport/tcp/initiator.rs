//! What both kinds of initiator's lanes share: the queue of parts, and how a part is put into bytes.

use std::{collections::VecDeque, sync::Arc};

use super::wire::{Descriptor, FrameKind, PartHeader, WINDOW_PARTS, table_sum};
use crate::{
    domain::{Failure, LaneId, Reason, TransferId},
    transport::{LaneEvent, LaneSink, Part, Payload, SequencedPart},
};

/// Whether a transfer's parts may touch local memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// They may.
    Live,
    /// The transfer was stopped: its owner knows.
    Stopped,
    /// A local region was unregistered: its owner is told.
    Lost,
}

impl Standing {
    pub(super) fn of(payload: &Payload) -> Self {
        if payload.is_stopped() {
            return Self::Stopped;
        }
        match payload.local_regions.iter().any(|region| region.is_retired()) {
            true => Self::Lost,
            false => Self::Live,
        }
    }
}

/// Where an initiator's lane tells its events.
#[derive(Debug)]
pub(super) struct Teller {
    pub(super) lane: LaneId,
    pub(super) sink: Arc<dyn LaneSink>,
    told: u64,
}

impl Teller {
    pub(super) fn new(lane: LaneId, sink: Arc<dyn LaneSink>) -> Self {
        Self { lane, sink, told: 0 }
    }

    /// A part is refused; told before it counts as processed.
    pub(super) fn refused(&self, sequence: u64, failure: Failure) {
        self.sink.lane_event(self.lane, LaneEvent::Refused { sequence, failure });
    }

    /// A local region of the part is gone.
    pub(super) fn lost(&self, sequence: u64) {
        self.refused(sequence, Failure::plain(Reason::RegionChanged));
    }

    /// Tells of what was processed since the last time, in one event.
    pub(super) fn processed(&mut self, through: u64) {
        if through > self.told {
            let from = self.told + 1;
            self.told = through;
            self.sink.lane_event(self.lane, LaneEvent::Processed { from, through });
        }
    }
}

/// A part that waits for its turn.
#[derive(Debug)]
pub(super) enum Queued {
    /// To be sent or asked for.
    Part(SequencedPart),
    /// Only its place is left: an ABORT.
    Passed { sequence: u64, transfer: TransferId },
}

impl Queued {
    fn sequence(&self) -> u64 {
        match self {
            Self::Part(part) => part.sequence,
            Self::Passed { sequence, .. } => *sequence,
        }
    }
}

/// Parts not started. As long as the session's window allows, which is what bounds it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    parts: VecDeque<Queued>,
    submitted: u64,
}

impl Queue {
    /// Takes parts whose sequences follow on.
    pub(super) fn submit(&mut self, parts: Vec<SequencedPart>) -> Result<(), Failure> {
        for part in parts {
            if part.sequence != self.submitted + 1 {
                let message = format!("part {} was submitted after {}", part.sequence, self.submitted);
                return Err(Failure::new(Reason::BadArgument, message));
            }
            self.submitted = part.sequence;
            self.parts.push_back(Queued::Part(part));
        }
        Ok(())
    }

    /// Whether a part may be started, when everything up to `processed` is over.
    pub(super) fn is_due(&self, processed: u64) -> bool {
        self.parts.front().is_some_and(|next| next.sequence() <= processed + WINDOW_PARTS)
    }

    /// The next part to start. One that may not touch memory any more comes out as its place alone.
    pub(super) fn next(&mut self, processed: u64, teller: &Teller) -> Option<Queued> {
        if !self.is_due(processed) {
            return None;
        }
        self.parts.pop_front().map(|queued| pass_over(queued, teller))
    }

    /// Lets go of what may not touch memory any more.
    pub(super) fn review(&mut self, teller: &Teller) {
        // Neighbours mostly belong to the same transfer, and a long queue is looked through inside the gate.
        let mut last = None;
        for queued in &mut self.parts {
            let Queued::Part(part) = queued else { continue };
            let payload = Arc::as_ptr(&part.part.payload);
            let standing = match last {
                Some((seen, standing)) if seen == payload => standing,
                _ => Standing::of(&part.part.payload),
            };
            last = Some((payload, standing));
            if standing != Standing::Live {
                *queued = pass_over(Queued::Part(part.clone()), teller);
            }
        }
    }

    /// No part waits.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

fn pass_over(queued: Queued, teller: &Teller) -> Queued {
    let Queued::Part(SequencedPart { sequence, part }) = queued else { return queued };
    let passed = Queued::Passed { sequence, transfer: part.payload.transfer };
    match Standing::of(&part.payload) {
        Standing::Live => Queued::Part(SequencedPart { sequence, part }),
        Standing::Stopped => passed,
        Standing::Lost => {
            teller.lost(sequence);
            passed
        }
    }
}

/// Puts parts into bytes. Reused from part to part.
#[derive(Debug)]
pub(super) struct Encoder {
    /// Checksums were agreed on.
    sums: bool,
    /// Target regions of the part, as indices into the payload's, in order of first use.
    used: Vec<u16>,
}

impl Encoder {
    /// `sums` where tables are to be summed.
    pub(super) fn new(sums: bool) -> Self {
        Self { sums, used: Vec::new() }
    }

    /// Appends header and table.
    pub(super) fn encode(&mut self, kind: FrameKind, sequence: u64, part: &Part, into: &mut Vec<u8>) {
        self.used.clear();
        let mut last = 0;
        for piece in part.pieces() {
            last = self.entry(piece.remote_region, last);
        }
        let (payload, bounds) = (&part.payload, part.bounds());
        let header = PartHeader {
            kind,
            runs: bounds.runs as u16,
            regions: self.used.len() as u16,
            sequence,
            transfer: payload.transfer,
            tag: payload.tag,
            admit_epoch: payload.admit_epoch,
            bytes: bounds.bytes,
        };
        into.extend_from_slice(&header.encode());
        let table = into.len();
        for &region in &self.used {
            let region = &payload.remote_regions[usize::from(region)];
            into.extend_from_slice(&region.id.0.to_le_bytes());
            into.extend_from_slice(&region.generation.0.to_le_bytes());
        }
        let mut last = 0;
        for piece in part.pieces() {
            last = self.entry(piece.remote_region, last);
            let length = piece.length as u32;
            let run = Descriptor { address: piece.remote, length, region: last as u16 };
            into.extend_from_slice(&run.encode());
        }
        if self.sums {
            let sum = table_sum(&into[table..]);
            into.extend_from_slice(&sum);
        }
    }

    /// The entry of a region, made where there is none. Neighbours mostly lie in the same one.
    fn entry(&mut self, region: u16, last: usize) -> usize {
        if self.used.get(last) == Some(&region) {
            return last;
        }
        self.used.iter().position(|&used| used == region).unwrap_or_else(|| {
            self.used.push(region);
            self.used.len() - 1
        })
    }
}

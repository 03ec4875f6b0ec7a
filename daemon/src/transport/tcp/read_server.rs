//! The target's end of a read lane: requests in, parts of the engine's memory out.
//!
//! One request is served at a time; the next ones wait in a small buffer and then in the socket, so a peer
//! that asks without reading costs nothing here.

use std::os::fd::BorrowedFd;

use super::{
    TargetSetup,
    admission::{Admission, lost},
    body::Trouble,
    fence::Fence,
    frames::{Outgoing, Sent, SmallIn},
    role::{Budget, Ended, Interest, Meter, Ready, Refusals, Role},
    stops::LaneStops,
    wire::{
        FrameKind, HEADER_BYTES, PartHeader, REGION_ENTRY_BYTES, RUN_BYTES, Refusal, TABLE_SUM_BYTES, Table,
        Violation, refusal_reply,
    },
};
use crate::{
    memory::View,
    transport::{LaneRecord, PART_RUNS},
};

/// Holds the largest request.
const REQUEST_BYTES: usize = HEADER_BYTES + PART_RUNS * (REGION_ENTRY_BYTES + RUN_BYTES) + TABLE_SUM_BYTES;

#[derive(Debug)]
pub(super) struct ReadServer {
    fence: Fence,
    work: Work,
}

#[derive(Debug)]
struct Work {
    meter: Meter,
    /// Checksums were agreed on.
    sums: bool,
    admission: Admission,
    requests: SmallIn,
    out: Outgoing,
    /// Sequence of the part being answered.
    current: Option<u64>,
    refusals: Refusals,
    processed: u64,
}

impl ReadServer {
    pub(super) fn new(setup: TargetSetup, stops: LaneStops, meter: Meter) -> Self {
        let work = Work {
            meter,
            sums: setup.checksums,
            admission: Admission::new(setup.memory, stops),
            requests: SmallIn::new(REQUEST_BYTES),
            out: Outgoing::new(setup.checksums),
            current: None,
            refusals: Refusals::default(),
            processed: 0,
        };
        Self { fence: work.admission.fence(), work }
    }
}

impl Role for ReadServer {
    fn turn(&mut self, socket: BorrowedFd<'_>, _: Ready, room: &mut [u8]) -> Result<Interest, Ended> {
        let Self { fence, work } = self;
        let mut budget = Budget::new();
        let mut more = true;
        while budget.is_left() {
            if work.current.is_none() && !work.take_request()? {
                if !more {
                    break;
                }
                let bytes;
                (bytes, more) = work.requests.receive(socket)?;
                work.meter.heard(bytes);
                budget.spend(0);
                continue;
            }
            let (_inside, news) = fence.enter()?;
            if let Some(view) = news {
                work.review(&view);
            }
            let (blocked, moved) = work.send(socket, room)?;
            budget.spend(moved);
            if blocked {
                break;
            }
        }
        let busy = work.current.is_some();
        Ok(Interest { read: !busy, write: busy || work.request().is_ok_and(|request| request.is_some()) })
    }

    fn review(&mut self) -> Result<(), Ended> {
        Ok(self.fence.review(|view| self.work.review(view))?)
    }

    fn holds_leases(&self) -> bool {
        self.work.admission.is_under_way()
    }

    fn record(&self) -> LaneRecord {
        self.work.refusals.record(self.work.processed)
    }
}

impl Work {
    /// The next request, once it is complete.
    fn request(&self) -> Result<Option<(PartHeader, usize)>, Violation> {
        let bytes = self.requests.bytes();
        let Some(header) = bytes.first_chunk() else { return Ok(None) };
        let header = PartHeader::parse(header)?;
        let length = HEADER_BYTES + header.table_bytes(self.sums);
        Ok((bytes.len() >= length).then_some((header, length)))
    }

    /// Takes up the next request, if it is complete.
    fn take_request(&mut self) -> Result<bool, Violation> {
        let Some((header, length)) = self.request()? else { return Ok(false) };
        let (sequence, expected) = (header.sequence, self.processed + 1);
        if sequence != expected {
            return Err(Violation::Sequence { expected, got: sequence });
        }
        match header.kind {
            FrameKind::ReadRequest => {
                let table = Table::parse(&header, &self.requests.bytes()[HEADER_BYTES..length], self.sums)?;
                match self.admission.admit(&header, table, self.out.body()) {
                    Ok(()) => {
                        let data = PartHeader { kind: FrameKind::ReadData, runs: 0, regions: 0, ..header };
                        self.out.begin_filled(sequence).extend_from_slice(&data.encode());
                    }
                    Err(refusal) => self.refuse(sequence, refusal),
                }
            }
            FrameKind::Abort => self.out.begin_bare(&header.encode()),
            other => return Err(Violation::Kind(other as u8)),
        }
        self.requests.consume(length);
        self.current = Some(sequence);
        Ok(true)
    }

    /// The rules have changed: puts the part under way aside where they speak against it.
    fn review(&mut self, view: &View) {
        if self.admission.is_under_way()
            && let Err(refusal) = self.admission.review(view)
        {
            self.put_aside(refusal);
        }
    }

    /// The part under way gives no more bytes: it is refused, or where its data is on the way, aborted.
    fn put_aside(&mut self, refusal: Refusal) {
        self.admission.end();
        let Some(sequence) = self.current else { return };
        match self.out.is_untouched() {
            true => self.refuse(sequence, refusal),
            false => {
                self.out.abort(refusal.reason);
                self.refusals.push(sequence, refusal);
            }
        }
    }

    fn refuse(&mut self, sequence: u64, refusal: Refusal) {
        self.out.begin_bare(&refusal_reply(sequence, refusal));
        self.refusals.push(sequence, refusal);
    }

    /// One call of the answer under way: whether the socket is full, and the payload bytes that went. Inside
    /// the gate.
    fn send(&mut self, socket: BorrowedFd<'_>, room: &mut [u8]) -> Result<(bool, u64), Ended> {
        let (sent, moved) = match self.out.send(socket, room) {
            Ok(progress) => progress,
            Err(Trouble::Socket(error)) => return Err(lost(&error).into()),
            Err(Trouble::Memory(failure)) => {
                self.put_aside((&failure).into());
                return Ok((false, 0));
            }
        };
        self.meter.moved(moved);
        if sent == Sent::Finished
            && let Some(sequence) = self.current.take()
        {
            self.admission.end();
            self.processed = sequence;
            self.admission.stops().processed(sequence);
        }
        Ok((sent == Sent::Blocked, moved))
    }
}

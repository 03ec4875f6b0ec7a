//! The target's end of a write lane: checked parts into the engine's memory, acknowledgements out.

use std::os::fd::BorrowedFd;

use super::{
    TargetSetup,
    admission::{Admission, hung_up, lost},
    body::Page,
    fence::Fence,
    frames::{Arrival, Incoming, SmallOut, receive_plain},
    io::Received,
    role::{Budget, Ended, Interest, Meter, Ready, Refusals, Role},
    stops::LaneStops,
    wire::{
        Ack, FrameKind, HEADER_AND_TABLE_START, HEADER_BYTES, PartHeader, REGION_ENTRY_BYTES, RUN_BYTES,
        Refusal, TABLE_START, TABLE_SUM_BYTES, Table, Trailer, Violation,
    },
};
use crate::{
    domain::Reason,
    memory::View,
    transport::{LaneRecord, PART_RUNS},
};

/// Parts after which progress is told although more bytes wait to be read.
const PARTS_PER_ACK: u64 = 4;

/// Acknowledgements that may wait for a peer that does not read them, before its parts wait too.
const ACK_BACKLOG_BYTES: usize = 4096;

const TABLE_BYTES: usize = PART_RUNS * (REGION_ENTRY_BYTES + RUN_BYTES) + TABLE_SUM_BYTES;

#[derive(Debug)]
pub(super) struct WriteTarget {
    fence: Fence,
    work: Work,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// A frame's beginning.
    Head,
    /// The rest of a table, so much of which is here.
    Table(PartHeader, usize),
    /// Payload, trailer, and the beginning of the next frame.
    Payload(PartHeader),
}

#[derive(Debug)]
struct Work {
    meter: Meter,
    /// Checksums were agreed on.
    sums: bool,
    admission: Admission,
    incoming: Incoming<HEADER_AND_TABLE_START>,
    stage: Stage,
    table: Box<[u8]>,
    /// Why the part under way is not applied.
    refusal: Option<Refusal>,
    refusals: Refusals,
    processed: u64,
    told: u64,
    acks: SmallOut,
}

impl WriteTarget {
    pub(super) fn new(setup: TargetSetup, stops: LaneStops, meter: Meter) -> Self {
        let admission = Admission::new(setup.memory, stops);
        let work = Work {
            meter,
            sums: setup.checksums,
            incoming: Incoming::new(setup.checksums),
            stage: Stage::Head,
            table: vec![0; TABLE_BYTES].into_boxed_slice(),
            refusal: None,
            refusals: Refusals::default(),
            processed: 0,
            told: 0,
            acks: SmallOut::default(),
            admission,
        };
        Self { fence: work.admission.fence(), work }
    }
}

impl Role for WriteTarget {
    fn turn(&mut self, socket: BorrowedFd<'_>, _: Ready, room: &mut [u8]) -> Result<Interest, Ended> {
        let Self { fence, work } = self;
        let mut budget = Budget::new();
        work.acks.flush(socket)?;
        while budget.is_left() && work.acks.len() < ACK_BACKLOG_BYTES {
            let (moved, drained) = match work.stage {
                Stage::Table(header, have) => {
                    let taken = work.receive_table(socket, header, have);
                    (0, taken.map_err(|ended| work.part_with(socket, ended))?)
                }
                Stage::Head | Stage::Payload(_) => {
                    let (inside, news) = fence.enter()?;
                    if let Some(view) = news {
                        work.review(&view);
                    }
                    let arrival = work.incoming.receive(socket, room)?;
                    drop(inside);
                    let moved = arrival.moved;
                    (moved, work.arrived(arrival).map_err(|ended| work.part_with(socket, ended))?)
                }
            };
            budget.spend(moved);
            // A lone part costs one acknowledgement, a stream of parts one for several of them.
            let untold = work.processed - work.told;
            if untold >= PARTS_PER_ACK || (drained && untold > 0) {
                work.acknowledge();
                work.acks.flush(socket)?;
            }
            if drained {
                break;
            }
        }
        Ok(Interest { read: work.acks.len() < ACK_BACKLOG_BYTES, write: !work.acks.is_empty() })
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
    /// The rules have changed: puts the part under way aside where they speak against it.
    fn review(&mut self, view: &View) {
        if let Stage::Payload(_) = self.stage
            && self.refusal.is_none()
            && let Err(refusal) = self.admission.review(view)
        {
            self.refuse(refusal);
        }
    }

    /// The part under way will not be applied; the rest of it goes to scrap.
    fn refuse(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
        self.admission.end();
        self.incoming.put_aside();
    }

    fn receive_table(
        &mut self,
        socket: BorrowedFd<'_>,
        header: PartHeader,
        have: usize,
    ) -> Result<bool, Ended> {
        let need = header.table_bytes(self.sums);
        let bytes = match receive_plain(socket, &mut self.table[have..need]).map_err(|error| lost(&error))? {
            Received::Bytes(bytes) => bytes,
            Received::Nothing => 0,
            Received::End => return Err(hung_up().into()),
        };
        self.meter.heard(bytes);
        if have + bytes < need {
            self.stage = Stage::Table(header, have + bytes);
            return Ok(true);
        }
        self.admit(header)?;
        Ok(false)
    }

    /// Takes in what a call brought, and tells whether there is nothing more to read.
    fn arrived(&mut self, arrival: Arrival) -> Result<bool, Ended> {
        self.meter.moved(arrival.moved);
        self.meter.heard(arrival.bytes);
        if let Stage::Payload(header) = self.stage {
            if let Some(failure) = arrival.spoilt {
                self.refuse((&failure).into());
            }
            if let Some(trailer) = self.incoming.trailer(header.sequence)? {
                self.finish(header, trailer);
            }
        }
        if let Stage::Head = self.stage
            && let Some(head) = self.incoming.head()
        {
            self.begin(&head)?;
        }
        Ok(arrival.drained)
    }

    /// A part that was changed ends the lane, and is not acknowledged. The initiator is told why while the
    /// connection still carries it; otherwise it learns what every cut means, and does the same.
    fn part_with(&mut self, socket: BorrowedFd<'_>, ended: Ended) -> Ended {
        if let Ended::Broken(Violation::Payload { sequence } | Violation::Table { sequence }) = ended {
            let refusal = Refusal::whole(Reason::Checksum);
            self.acks.buffer().extend_from_slice(&Ack::Refused { sequence, refusal }.encode());
            let _ = self.acks.flush(socket);
        }
        ended
    }

    fn begin(&mut self, head: &[u8; HEADER_AND_TABLE_START]) -> Result<(), Violation> {
        let (header, table) = head.split_first_chunk::<HEADER_BYTES>().unwrap_or((&[0; HEADER_BYTES], &[]));
        let header = PartHeader::parse(header)?;
        let expected = self.processed + 1;
        if header.sequence != expected {
            return Err(Violation::Sequence { expected, got: header.sequence });
        }
        match header.kind {
            FrameKind::Write => {
                self.table[..TABLE_START].copy_from_slice(table);
                match header.table_bytes(self.sums) {
                    TABLE_START => self.admit(header)?,
                    _ => self.stage = Stage::Table(header, TABLE_START),
                }
            }
            FrameKind::Abort if table.iter().all(|&byte| byte == 0) => self.pass(header.sequence),
            FrameKind::Abort => return Err(Violation::Limit { field: "abort padding", value: 1 }),
            other => return Err(Violation::Kind(other as u8)),
        }
        Ok(())
    }

    /// The table is here: from now on payload comes, into memory or into scrap.
    fn admit(&mut self, header: PartHeader) -> Result<(), Violation> {
        let table = Table::parse(&header, &self.table[..header.table_bytes(self.sums)], self.sums)?;
        let body = self.incoming.body();
        self.refusal = self.admission.admit(&header, table, body).err();
        if self.refusal.is_some() {
            body.set_scrap(Page::Scrap, header.bytes.into());
        }
        self.incoming.begin();
        self.stage = Stage::Payload(header);
        Ok(())
    }

    fn finish(&mut self, header: PartHeader, trailer: Trailer) {
        self.incoming.end();
        self.admission.end();
        let refusal = self.refusal.take();
        // The initiator knows of what it has aborted itself.
        if let Some(refusal) = refusal.filter(|_| trailer.aborted.is_none()) {
            let sequence = header.sequence;
            self.refusals.push(sequence, refusal);
            self.acks.buffer().extend_from_slice(&Ack::Refused { sequence, refusal }.encode());
        }
        self.pass(header.sequence);
        self.stage = Stage::Head;
    }

    fn pass(&mut self, sequence: u64) {
        self.processed = sequence;
        self.admission.stops().processed(sequence);
    }

    fn acknowledge(&mut self) {
        self.told = self.processed;
        self.acks.buffer().extend_from_slice(&Ack::Processed { through: self.told }.encode());
    }
}

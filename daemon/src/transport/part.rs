//! What travels: the payload of one transfer, cut into parts.
//!
//! A [`Payload`] is made once, by planning, and shared by everyone who works on the transfer; a [`Part`] is an
//! index into it, so queueing, sending again and acknowledging copy nothing. The payload holds the leases of
//! the local regions (I6) and the transfer's own stop mark: once [`Payload::stop`] was called and the local
//! engine's gate was quiet, no part of it can touch local memory any more (I1).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use crate::{
    domain::{Epoch, Generation, Op, RegionId, Tag, TransferId},
    memory::Region,
};

/// Most payload bytes in a part.
pub const PART_BYTES: u64 = 1 << 20;

/// Most runs in a part: with a header before and a trailer behind it, one iovec array of 1024 entries.
pub const PART_RUNS: usize = 1022;

/// A region of the target, as the initiator's plan saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RemoteRegion {
    /// Its number.
    pub id: RegionId,
    /// The registration that was planned against; another one refuses the part (I4).
    pub generation: Generation,
}

/// Bytes contiguous on both sides: one slice, or several that follow each other on both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Address in the initiator engine's address space.
    pub local: u64,
    /// Address in the target engine's address space.
    pub remote: u64,
    /// Bytes.
    pub length: u64,
    /// Index into [`Payload::local_regions`].
    pub local_region: u16,
    /// Index into [`Payload::remote_regions`].
    pub remote_region: u16,
}

/// Where a part begins and ends in the runs, and what it stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartBounds {
    /// First run.
    pub first_run: u32,
    /// Runs touched.
    pub runs: u32,
    /// Bytes of the first run that belong to earlier parts.
    pub skip: u64,
    /// Payload bytes, at most [`PART_BYTES`]; the last run is cut where they end.
    pub bytes: u32,
    /// First slice that has a byte in the part.
    pub first_slice: u32,
    /// Slices whose last byte is in the part.
    pub slices: u32,
}

/// The resolved bytes of one transfer.
#[derive(Debug)]
pub struct Payload {
    /// Whose.
    pub transfer: TransferId,
    /// Direction.
    pub op: Op,
    /// The request it serves.
    pub tag: Option<Tag>,
    /// Newest revocation epoch of the endpoint that was known when the transfer was admitted.
    pub admit_epoch: Epoch,
    /// Leases of every local region used.
    pub local_regions: Vec<Arc<Region>>,
    /// Every target region used.
    pub remote_regions: Vec<RemoteRegion>,
    /// The bytes, in slice order.
    pub runs: Vec<Run>,
    /// The cuts.
    pub parts: Vec<PartBounds>,
    /// Slices asked for.
    pub slices: u64,
    /// Sum of all parts' bytes.
    pub bytes: u64,
    /// Set once, never cleared.
    pub stopped: AtomicBool,
}

impl Payload {
    /// From now on no part may be started, and the one under way ends before its next call.
    pub fn stop(&self) {
        self.stopped.store(true, SeqCst);
    }

    /// Whether [`Payload::stop`] was called. Asked inside the gate, before each touch of memory.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }
}

/// A piece of a part, contiguous on both sides.
pub type Piece = Run;

/// One part of a payload.
#[derive(Clone, Debug)]
pub struct Part {
    /// The whole it is a part of.
    pub payload: Arc<Payload>,
    /// Which.
    pub index: u32,
}

impl Part {
    /// Its bounds.
    pub fn bounds(&self) -> &PartBounds {
        &self.payload.parts[self.index as usize]
    }

    /// Its pieces in order: at most [`PART_RUNS`], together [`PartBounds::bytes`] long, none empty.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + Clone + '_ {
        let bounds = *self.bounds();
        let first = bounds.first_run as usize;
        let mut skip = bounds.skip;
        let mut left = u64::from(bounds.bytes);
        self.payload.runs[first..first + bounds.runs as usize].iter().map(move |run| {
            let length = (run.length - skip).min(left);
            let piece = Run { local: run.local + skip, remote: run.remote + skip, length, ..*run };
            skip = 0;
            left -= length;
            piece
        })
    }

    /// The lease of a piece's local region.
    pub fn local_region(&self, piece: &Piece) -> &Arc<Region> {
        &self.payload.local_regions[usize::from(piece.local_region)]
    }

    /// The target region of a piece.
    pub fn remote_region(&self, piece: &Piece) -> RemoteRegion {
        self.payload.remote_regions[usize::from(piece.remote_region)]
    }
}

//! One part copied: look at the rules on both sides, then copy.
//!
//! A part with a piece of private memory goes through the worker's own memory as a whole, so that an engine that copies
//! for itself is asked once on either side.

use std::{ops::Range, sync::Arc};

use crate::{
    domain::{Failure, Reason},
    memory::{Region, RevocationBook, View},
    transport::{LaneKind, Part, Piece, touch},
};

/// How a part ended.
#[derive(Debug)]
pub(super) enum Copied {
    /// Every byte is at its destination.
    Whole,
    /// The transfer was stopped: not a byte was touched.
    Stopped,
}

/// Copies a part. The caller is inside both gates, and took both views after it entered. `revoked` is the target's.
pub(super) fn copy(
    part: &Part,
    kind: LaneKind,
    source: &View,
    (target, revoked): (&View, &RevocationBook),
    bounce: &mut [u8],
) -> Result<Copied, Failure> {
    if part.payload.is_stopped() {
        return Ok(Copied::Stopped);
    }
    if source.closed || part.payload.local_regions.iter().any(|region| region.is_retired()) {
        return Err(Failure::plain(Reason::RegionChanged));
    }
    let runs = part.pieces().map(|piece| (piece.remote, piece.length));
    revoked.judge_part(part.payload.admit_epoch, part.payload.tag, runs)?;
    // All of the part is checked before any of it is copied.
    for resolved in resolve(part, target) {
        resolved?;
    }
    let private = |region: &Region| region.process().is_some();
    let through = part.payload.local_regions.iter().any(|region| private(region))
        || resolve(part, target).flatten().any(|(_, region)| private(region));
    if through {
        let bytes = &mut bounce[..part.bounds().bytes as usize];
        touch::copy_out(places(part, kind, target).map(|(from, _, range)| (from.0, from.1, range)), bytes)?;
        touch::copy_in(places(part, kind, target).map(|(_, to, range)| (to.0, to.1, range)), bytes)?;
        return Ok(Copied::Whole);
    }
    for (from, to, range) in places(part, kind, target) {
        touch::copy_mapped(from, to, range.len() as u64)?;
    }
    Ok(Copied::Whole)
}

/// A region, and an address in it.
type Place<'a> = (&'a Region, u64);

/// Where the pieces of a checked part come from, where they go, and their place in the part's bytes.
fn places<'a>(
    part: &'a Part,
    kind: LaneKind,
    target: &'a View,
) -> impl Iterator<Item = (Place<'a>, Place<'a>, Range<usize>)> {
    let mut at = 0;
    resolve(part, target).flatten().map(move |(piece, region)| {
        let here = (&**part.local_region(&piece), piece.local);
        let there = (&**region, piece.remote);
        let (from, to) = match kind {
            LaneKind::Write => (here, there),
            LaneKind::Read => (there, here),
        };
        let range = at..at + piece.length as usize;
        at = range.end;
        (from, to, range)
    })
}

/// The part's pieces, each with its region at the target, or why it has none.
fn resolve<'a>(
    part: &'a Part,
    target: &'a View,
) -> impl Iterator<Item = Result<(Piece, &'a Arc<Region>), Failure>> + 'a {
    let mut last: Option<(u16, &Arc<Region>)> = None;
    part.pieces().enumerate().map(move |(at, piece)| {
        let region = match last {
            Some((index, region)) if index == piece.remote_region => region,
            _ => find(part, &piece, target).map_err(|failure| failure.at(at as u64))?,
        };
        last = Some((piece.remote_region, region));
        match () {
            () if region.info.contains(piece.remote, piece.length) => Ok((piece, region)),
            () if region.info.contains(piece.remote, 1) => {
                Err(Failure::plain(Reason::OutOfBounds).at(at as u64))
            }
            () => Err(Failure::plain(Reason::Unregistered).at(at as u64)),
        }
    })
}

fn find<'a>(part: &Part, piece: &Piece, target: &'a View) -> Result<&'a Arc<Region>, Failure> {
    let named = part.remote_region(piece);
    let region = target.table.get(named.id).filter(|region| region.info.generation == named.generation);
    region.filter(|region| !region.is_retired()).ok_or_else(|| Failure::plain(Reason::RegionChanged))
}

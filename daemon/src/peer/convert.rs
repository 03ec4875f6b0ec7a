//! `kvferry.peer.v1` to domain types and back. A message that cannot be converted ends the session.

use std::time::{Duration, Instant};

use kvferry_proto::{peer::v1 as wire, types::v1 as types};

use crate::{
    convert::{self, BadField, bytes},
    domain::{AddressRange, BootId, Epoch, Failure, Incarnation, LaneId, Reason, Tag},
    memory::{RegionTable, View},
    policy::{RevocationLimits, RevocationList, Revocations, TagRevoked},
    session::{
        PeerTable,
        identity::{Challenge, Open, ProtocolRange},
    },
    transport::{LaneKind, LaneRecord},
};

/// Most capability strings a message may hold.
const MAX_CAPABILITIES: usize = 64;

impl From<BadField> for wire::Refused {
    fn from(bad: BadField) -> Self {
        refused(&bad.into())
    }
}

/// A refusal as a message.
pub(super) fn refused(failure: &Failure) -> wire::Refused {
    wire::Refused { failure: Some(failure.into()), protocol: None }
}

/// The failure in a message that must hold one.
pub(super) fn told(failure: Option<types::Failure>) -> Failure {
    failure.map_or_else(|| Failure::plain(Reason::Unspecified), convert::failure)
}

fn capabilities(names: Vec<String>) -> Result<Vec<String>, BadField> {
    match names.len() {
        0..=MAX_CAPABILITIES => Ok(names),
        more => {
            Err(BadField::new("capabilities", format!("{more} where at most {MAX_CAPABILITIES} are taken")))
        }
    }
}

pub(super) fn open_out(open: &Open) -> wire::Open {
    wire::Open {
        protocol: Some(wire::Protocol { min: open.protocol.min, max: open.protocol.max }),
        nonce: open.nonce.to_vec(),
        boot_id: open.boot.0.to_vec(),
        incarnation: open.incarnation.0.to_vec(),
        session_id: open.session_id.clone(),
        expected_incarnation: open.expected.map_or_else(Vec::new, |key| key.0.to_vec()),
        capabilities: open.capabilities.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

pub(super) fn open_in(open: wire::Open) -> Result<Open, BadField> {
    let protocol = open.protocol.ok_or_else(|| BadField::new("open.protocol", "missing"))?;
    let expected = match open.expected_incarnation.as_slice() {
        [] => None,
        key => Some(Incarnation(bytes("open.expected_incarnation", key)?)),
    };
    if open.session_id.len() > 300 {
        return Err(BadField::new("open.session_id", "longer than 300 bytes"));
    }
    Ok(Open {
        protocol: ProtocolRange { min: protocol.min, max: protocol.max },
        nonce: bytes("open.nonce", &open.nonce)?,
        boot: BootId(bytes("open.boot_id", &open.boot_id)?),
        incarnation: Incarnation(bytes("open.incarnation", &open.incarnation)?),
        session_id: open.session_id,
        expected,
        capabilities: capabilities(open.capabilities)?,
    })
}

pub(super) fn challenge_out(challenge: &Challenge, signature: &[u8; 64], proof: Vec<u8>) -> wire::Challenge {
    wire::Challenge {
        protocol: challenge.protocol,
        nonce: challenge.nonce.to_vec(),
        boot_id: challenge.boot.0.to_vec(),
        incarnation: challenge.incarnation.0.to_vec(),
        capabilities: challenge.capabilities.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        signature: signature.to_vec(),
        proof,
    }
}

/// The challenge, its signature and its proof.
pub(super) fn challenge_in(challenge: wire::Challenge) -> Result<(Challenge, Vec<u8>, Vec<u8>), BadField> {
    let domain = Challenge {
        protocol: challenge.protocol,
        nonce: bytes("challenge.nonce", &challenge.nonce)?,
        boot: BootId(bytes("challenge.boot_id", &challenge.boot_id)?),
        incarnation: Incarnation(bytes("challenge.incarnation", &challenge.incarnation)?),
        capabilities: capabilities(challenge.capabilities)?,
    };
    Ok((domain, challenge.signature, challenge.proof))
}

pub(super) fn table_out(view: &View, nonce: u64) -> wire::Table {
    wire::Table {
        version: view.version,
        regions: view.table.iter().map(|region| types::Region::from(&region.info)).collect(),
        layouts: view.layouts.values().map(|layout| types::Layout::from(&**layout)).collect(),
        nonce,
    }
}

pub(super) fn table_in(table: wire::Table) -> Result<PeerTable, BadField> {
    if table.regions.len() > usize::from(u16::MAX) {
        return Err(BadField::new("table.regions", "more than 65,535"));
    }
    let regions: Result<Vec<_>, _> = table.regions.into_iter().map(convert::region).collect();
    let layouts: Result<Vec<_>, _> = table.layouts.into_iter().map(convert::layout).collect();
    Ok(PeerTable {
        version: table.version,
        regions: RegionTable::new(regions?),
        layouts: layouts?.into_iter().map(|layout| (layout.id, layout)).collect(),
    })
}

/// One message for each epoch of ranges, one for each tag. The last one is of the newest epoch, also where what was
/// revoked then is remembered by the floor alone, and brings the floor.
pub(super) fn revoked_out(list: RevocationList) -> Vec<wire::Revoked> {
    let floor = list.floor.0;
    let mut all = Vec::new();
    for RevocationList { epoch, ranges, tags, .. } in list.by_epoch() {
        let named = !ranges.is_empty();
        let ranges =
            ranges.iter().map(|(_, range)| types::Range { base: range.base(), length: range.length() });
        let ranges = wire::Revoked { epoch: epoch.0, ranges: ranges.collect(), ..Default::default() };
        let tag = |revoked: &TagRevoked| wire::Revoked {
            epoch: epoch.0,
            tag: revoked.tag.0.to_vec(),
            ..Default::default()
        };
        all.extend(Some(ranges).filter(|_| named || tags.is_empty()));
        all.extend(tags.iter().map(tag));
    }
    if let Some(last) = all.last_mut() {
        last.floor = floor;
    }
    all
}

pub(super) fn revocations_out(list: RevocationList) -> wire::Revocations {
    wire::Revocations { epoch: list.epoch.0, floor: list.floor.0, recent: revoked_out(list) }
}

/// A target's list, to be held against what goes there. How old its tombstones are does not matter for that.
pub(super) fn revocations_in(told: wire::Revocations) -> Result<Revocations, Failure> {
    let mut list =
        RevocationList { epoch: Epoch(told.epoch), floor: Epoch(told.floor), ..Default::default() };
    for revoked in told.recent {
        let epoch = Epoch(revoked.epoch);
        for range in revoked.ranges {
            list.ranges.push((epoch, AddressRange::new(range.base, range.length)?));
        }
        if !revoked.tag.is_empty() {
            let tag = Tag(bytes("revoked.tag", &revoked.tag)?);
            list.tags.push(TagRevoked { tag, epoch, age: Duration::ZERO });
        }
    }
    // As long as the message: what it names is acted on and not kept.
    let limits = RevocationLimits::ranges(list.ranges.len());
    Revocations::restore(limits, list, Instant::now())
}

pub(super) fn fenced_out(lane: LaneId, record: &LaneRecord) -> wire::LaneFenced {
    let refused = record
        .refused
        .iter()
        .map(|(sequence, failure)| wire::PartRefused { sequence: *sequence, failure: Some(failure.into()) });
    wire::LaneFenced { lane_id: lane.0, processed: record.processed, refused: refused.collect() }
}

pub(super) fn fenced_in(fenced: wire::LaneFenced) -> (LaneId, LaneRecord) {
    let refused = fenced.refused.into_iter().map(|part| (part.sequence, told(part.failure))).collect();
    (LaneId(fenced.lane_id), LaneRecord { processed: fenced.processed, refused })
}

pub(super) fn kind_out(kind: LaneKind) -> wire::LaneKind {
    match kind {
        LaneKind::Write => wire::LaneKind::Write,
        LaneKind::Read => wire::LaneKind::Read,
    }
}

pub(super) fn kind_in(kind: i32) -> Result<LaneKind, BadField> {
    match wire::LaneKind::try_from(kind) {
        Ok(wire::LaneKind::Write) => Ok(LaneKind::Write),
        Ok(wire::LaneKind::Read) => Ok(LaneKind::Read),
        _ => Err(BadField::new("lane_request.kind", format!("unknown: {kind}"))),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::session::identity::PROTOCOL;

    fn open() -> Open {
        Open {
            protocol: PROTOCOL,
            nonce: [1; 32],
            boot: BootId([2; 16]),
            incarnation: Incarnation([3; 32]),
            session_id: "a:1".into(),
            expected: Some(Incarnation([4; 32])),
            capabilities: vec!["tcp".into(), "teleport".into()],
        }
    }

    #[test]
    fn an_open_survives_the_wire() {
        assert_eq!(open_in(open_out(&open())), Ok(open()));
    }

    /// A newer peer may say more: a field not known here is passed over, and what is signed stays the same.
    #[test]
    fn an_unknown_newer_field_changes_nothing() {
        let mut bytes = open_out(&open()).encode_to_vec();
        prost::encoding::string::encode(900, &"from the future".to_owned(), &mut bytes);
        let newer = wire::Open::decode(&bytes[..]).expect("decodes");
        assert_eq!(open_in(newer), Ok(open()));
    }

    #[test]
    fn revocations_survive_the_wire() {
        let now = Instant::now();
        let range = |base| AddressRange::new(base, 10).expect("a range");
        let mut own = Revocations::new(RevocationLimits::ranges(3));
        own.revoke(vec![range(0)]);
        own.revoke(vec![range(100), range(200)]);
        own.revoke_tag(Tag([5; 16]), now).expect("room");
        own.revoke(vec![range(300)]);
        let heard = revocations_in(revocations_out(own.since(Epoch(0), now))).expect("a good list");
        assert_eq!((heard.epoch(), heard.floor()), (Epoch(4), Epoch(1)));
        for admitted in 0..5 {
            for tag in [None, Some(Tag([5; 16])), Some(Tag([6; 16]))] {
                for run in [(0, 1), (105, 1), (205, 9), (305, 1), (400, 1)] {
                    let judge = |by: &Revocations| by.judge(Epoch(admitted), tag, [run], now);
                    assert_eq!(judge(&heard), judge(&own), "{admitted} {tag:?} {run:?}");
                }
            }
        }
        let epochs: Vec<u64> =
            revoked_out(own.since(Epoch(1), now)).iter().map(|revoked| revoked.epoch).collect();
        assert_eq!(epochs, [2, 3, 4], "told one by one, and in order");
    }

    /// More ranges than are remembered leave nothing but a floor; peers must hear of it all the same.
    #[test]
    fn a_floor_is_told_where_nothing_else_is_left() {
        let mut own = Revocations::new(RevocationLimits::ranges(1));
        let range = |base| AddressRange::new(base, 1).expect("a range");
        own.revoke(vec![range(1), range(10)]);
        let told = revoked_out(own.since(Epoch(0), Instant::now()));
        let [told] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!((told.epoch, told.floor, told.ranges.len()), (1, 1, 0));
    }

    #[test]
    fn a_malformed_revocation_is_refused() {
        let revoked = |base, length, tag: &[u8]| {
            let ranges = vec![types::Range { base, length }];
            let recent = vec![wire::Revoked { epoch: 1, ranges, tag: tag.to_vec(), floor: 0 }];
            revocations_in(wire::Revocations { epoch: 1, floor: 0, recent }).map_err(|failure| failure.reason)
        };
        assert!(revoked(0, 1, &[]).is_ok());
        assert_eq!(revoked(0, 0, &[]).err(), Some(Reason::BadArgument));
        assert_eq!(revoked(u64::MAX, 2, &[]).err(), Some(Reason::OutOfBounds));
        assert_eq!(revoked(0, 1, &[1; 15]).err(), Some(Reason::BadArgument));
    }

    #[test]
    fn a_malformed_field_is_named() {
        let field = |change: fn(&mut wire::Open)| {
            let mut message = open_out(&open());
            change(&mut message);
            open_in(message).expect_err("malformed").field
        };
        assert_eq!(field(|open| open.protocol = None), "open.protocol");
        assert_eq!(field(|open| open.nonce.truncate(31)), "open.nonce");
        assert_eq!(field(|open| open.incarnation.push(0)), "open.incarnation");
        assert_eq!(field(|open| open.session_id = "x".repeat(301)), "open.session_id");
    }
}

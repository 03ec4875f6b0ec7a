//! A part's header, the table that follows it, and what a target answers on a read lane.

use super::{
    ACK_BYTES, Ack, Refusal, Violation, ack::REFUSED, array_at, check_seal, seal, u16_at, u32_at, u64_at,
    zero,
};
use crate::{
    domain::{Epoch, Generation, RegionId, Tag, TransferId},
    transport::{PART_BYTES, PART_RUNS},
};

/// Bytes of a [`PartHeader`].
pub(crate) const HEADER_BYTES: usize = 64;
/// Bytes of a region entry: `u32 id | u32 generation`.
pub(crate) const REGION_ENTRY_BYTES: usize = 8;
/// Bytes of a run's descriptor: `u64 address | u32 length | u16 region entry | u16 0`.
pub(crate) const RUN_BYTES: usize = 16;
/// Bytes of the CRC32C behind a table where checksums were agreed on, of region entries and descriptors.
pub(crate) const TABLE_SUM_BYTES: usize = 4;
/// Every table is at least so long, so a receiver reads so much of it together with the header: a part of a
/// single run costs no read of its own for its table, unless a checksum follows. An ABORT on a write lane pads to it.
pub(crate) const TABLE_START: usize = REGION_ENTRY_BYTES + RUN_BYTES;
/// What a receiver reads first of each frame on a write lane.
pub(crate) const HEADER_AND_TABLE_START: usize = HEADER_BYTES + TABLE_START;
/// What an initiator reads first of each frame on a read lane.
pub(crate) const REPLY_BYTES: usize = HEADER_BYTES;

/// What a frame with a [`PartHeader`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum FrameKind {
    /// A part of a WRITE: table, payload, trailer.
    Write = 1,
    /// Asks for a part of a READ: table.
    ReadRequest = 2,
    /// A part of a READ: payload, trailer.
    ReadData = 3,
    /// Stands for a part whose transfer was stopped: nothing follows.
    Abort = 4,
}

/// `u8 kind | u8 flags 0 | u16 runs | u16 region entries | u16 0 | u64 sequence | 16 B transfer | 16 B tag (zeros:
/// none) | u64 admit epoch | u32 payload bytes | u32 crc`
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PartHeader {
    /// What it is.
    pub kind: FrameKind,
    /// Descriptors in the table.
    pub runs: u16,
    /// Region entries in the table.
    pub regions: u16,
    /// The part's place on its lane.
    pub sequence: u64,
    /// Whose part it is.
    pub transfer: TransferId,
    /// The request it serves.
    pub tag: Option<Tag>,
    /// The newest revocation its transfer was admitted under.
    pub admit_epoch: Epoch,
    /// Payload of the part; of a request, what is asked for.
    pub bytes: u32,
}

impl PartHeader {
    /// Stands for the part with this sequence.
    pub(crate) fn abort(sequence: u64, transfer: TransferId) -> Self {
        let (runs, regions, bytes) = (0, 0, 0);
        Self {
            kind: FrameKind::Abort,
            runs,
            regions,
            sequence,
            transfer,
            tag: None,
            admit_epoch: Epoch(0),
            bytes,
        }
    }

    /// Its bytes.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.runs.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.regions.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.transfer.0);
        bytes[32..48].copy_from_slice(&self.tag.map_or([0; 16], |tag| tag.0));
        bytes[48..56].copy_from_slice(&self.admit_epoch.0.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.bytes.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// Reads one and checks every limit that concerns it alone.
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Violation> {
        check_seal(bytes, "part header")?;
        let kind = match bytes[0] {
            1 => FrameKind::Write,
            2 => FrameKind::ReadRequest,
            3 => FrameKind::ReadData,
            4 => FrameKind::Abort,
            other => return Err(Violation::Kind(other)),
        };
        zero("part flags", bytes[1].into())?;
        zero("part padding", u16_at(bytes, 6).into())?;
        let header = Self {
            kind,
            runs: u16_at(bytes, 2),
            regions: u16_at(bytes, 4),
            sequence: u64_at(bytes, 8),
            transfer: TransferId(array_at(bytes, 16)),
            tag: Some(Tag(array_at(bytes, 32))).filter(|tag| tag.0 != [0; 16]),
            admit_epoch: Epoch(u64_at(bytes, 48)),
            bytes: u32_at(bytes, 56),
        };
        header.check_limits()?;
        Ok(header)
    }

    fn check_limits(&self) -> Result<(), Violation> {
        let limit = |field, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(Violation::Limit { field, value }),
        };
        let with_table = matches!(self.kind, FrameKind::Write | FrameKind::ReadRequest);
        let with_payload = self.kind != FrameKind::Abort;
        let most_runs = if with_table { PART_RUNS as u64 } else { 0 };
        limit("runs", self.runs.into(), u64::from(with_table), most_runs)?;
        limit("region entries", self.regions.into(), u64::from(with_table), self.runs.into())?;
        let most_bytes = if with_payload { PART_BYTES } else { 0 };
        limit("payload bytes", self.bytes.into(), u64::from(with_payload), most_bytes)
    }

    /// Bytes of the table that follows it: with the checksum behind it, where `sums` were agreed on.
    pub(crate) fn table_bytes(&self, sums: bool) -> usize {
        let sum = if sums && self.runs > 0 { TABLE_SUM_BYTES } else { 0 };
        usize::from(self.regions) * REGION_ENTRY_BYTES + usize::from(self.runs) * RUN_BYTES + sum
    }
}

/// Where a run lies in the target's address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Descriptor {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Index of its region entry.
    pub region: u16,
}

impl Descriptor {
    /// Its bytes.
    pub(crate) fn encode(&self) -> [u8; RUN_BYTES] {
        let mut bytes = [0; RUN_BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.region.to_le_bytes());
        bytes
    }
}

/// The table behind a header: region entries, then descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a> {
    regions: &'a [u8],
    runs: &'a [u8],
}

impl<'a> Table<'a> {
    /// `bytes` are the [`PartHeader::table_bytes`] that followed `header`. A table that is not what its sender wrote
    /// names places that nobody meant, all of them valid, so this comes before anybody looks at one.
    pub(crate) fn parse(header: &PartHeader, bytes: &'a [u8], sums: bool) -> Result<Self, Violation> {
        let (table, sum) = bytes.split_at(header.table_bytes(false));
        if sums && crc32c::crc32c(table) != u32_at(sum, 0) {
            return Err(Violation::Table { sequence: header.sequence });
        }
        let (regions, runs) = table.split_at(usize::from(header.regions) * REGION_ENTRY_BYTES);
        Ok(Self { regions, runs })
    }

    /// The regions that the part uses.
    pub(crate) fn regions(self) -> impl Iterator<Item = (RegionId, Generation)> + 'a {
        let entries = self.regions.chunks_exact(REGION_ENTRY_BYTES);
        entries.map(|entry| (RegionId(u32_at(entry, 0)), Generation(u32_at(entry, 4))))
    }

    /// The runs, in order of the payload.
    pub(crate) fn runs(self) -> impl Iterator<Item = Descriptor> + Clone + 'a {
        self.runs.chunks_exact(RUN_BYTES).map(|run| Descriptor {
            address: u64_at(run, 0),
            length: u32_at(run, 8),
            region: u16_at(run, 12),
        })
    }
}

/// What follows a table where checksums were agreed on.
pub(crate) fn table_sum(table: &[u8]) -> [u8; TABLE_SUM_BYTES] {
    crc32c::crc32c(table).to_le_bytes()
}

/// What a target sends in the place of a part's data on a read lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reply {
    /// Data follows, or the request was an ABORT.
    Part(PartHeader),
    /// The part is refused.
    Refused {
        /// Which.
        sequence: u64,
        /// Why.
        refusal: Refusal,
    },
}

impl Reply {
    /// Reads one.
    pub(crate) fn parse(bytes: &[u8; REPLY_BYTES]) -> Result<Self, Violation> {
        if bytes[0] != REFUSED {
            return PartHeader::parse(bytes).map(Self::Part);
        }
        if bytes[ACK_BYTES..].iter().any(|&byte| byte != 0) {
            return Err(Violation::Limit { field: "refusal padding", value: 1 });
        }
        match Ack::parse(&array_at(bytes, 0))? {
            Ack::Refused { sequence, refusal } => Ok(Self::Refused { sequence, refusal }),
            Ack::Processed { .. } => Err(Violation::Kind(bytes[0])),
        }
    }
}

/// The bytes of [`Reply::Refused`].
pub(crate) fn refusal_reply(sequence: u64, refusal: Refusal) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..ACK_BYTES].copy_from_slice(&Ack::Refused { sequence, refusal }.encode());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::Reason;

    fn header() -> PartHeader {
        PartHeader {
            kind: FrameKind::Write,
            runs: 2,
            regions: 1,
            sequence: 0x0102_0304,
            transfer: TransferId([5; 16]),
            tag: Some(Tag([6; 16])),
            admit_epoch: Epoch(9),
            bytes: 4096,
        }
    }

    fn limit_of(header: PartHeader) -> Option<&'static str> {
        match PartHeader::parse(&header.encode()) {
            Ok(_) => None,
            Err(Violation::Limit { field, .. }) => Some(field),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn the_layout_is_as_documented() {
        let bytes = header().encode();
        assert_eq!(bytes[..16], [1, 0, 2, 0, 1, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(bytes[16..32], [5; 16]);
        assert_eq!(bytes[32..48], [6; 16]);
        assert_eq!(bytes[48..60], [9, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0]);
        assert_eq!(bytes[60..], crc32c::crc32c(&bytes[..60]).to_le_bytes());
    }

    #[test]
    fn limits_are_judged_by_the_header_alone() {
        assert_eq!(limit_of(header()), None);
        let most = PART_RUNS as u16;
        assert_eq!(limit_of(PartHeader { runs: most, regions: most, ..header() }), None);
        assert_eq!(limit_of(PartHeader { runs: most + 1, ..header() }), Some("runs"));
        assert_eq!(limit_of(PartHeader { runs: 0, regions: 0, ..header() }), Some("runs"));
        assert_eq!(limit_of(PartHeader { regions: 3, ..header() }), Some("region entries"));
        assert_eq!(limit_of(PartHeader { regions: 0, ..header() }), Some("region entries"));
        assert_eq!(limit_of(PartHeader { bytes: PART_BYTES as u32 + 1, ..header() }), Some("payload bytes"));
        assert_eq!(limit_of(PartHeader { bytes: 0, ..header() }), Some("payload bytes"));
        let abort = PartHeader::abort(1, TransferId([1; 16]));
        assert_eq!(limit_of(abort), None);
        assert_eq!(limit_of(PartHeader { bytes: 1, ..abort }), Some("payload bytes"));
        let data = PartHeader { kind: FrameKind::ReadData, runs: 0, regions: 0, ..header() };
        assert_eq!(limit_of(data), None);
        assert_eq!(limit_of(PartHeader { runs: 1, ..data }), Some("runs"));
    }

    #[test]
    fn a_table_gives_back_what_was_put_in() {
        let runs = [
            Descriptor { address: u64::MAX - 3, length: 4, region: 0 },
            Descriptor { address: 17, length: u32::MAX, region: 65535 },
        ];
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&3u32.to_le_bytes());
        bytes.extend_from_slice(&8u32.to_le_bytes());
        runs.iter().for_each(|run| bytes.extend_from_slice(&run.encode()));
        for sums in [false, true] {
            if sums {
                bytes.extend_from_slice(&table_sum(&bytes));
            }
            assert_eq!(bytes.len(), header().table_bytes(sums));
            let table = Table::parse(&header(), &bytes, sums).expect("a table");
            assert_eq!(table.regions().collect::<Vec<_>>(), [(RegionId(3), Generation(8))]);
            assert_eq!(table.runs().collect::<Vec<_>>(), runs);
        }
        assert_eq!(PartHeader::abort(1, TransferId([1; 16])).table_bytes(true), 0);
    }

    #[test]
    fn a_changed_bit_of_a_table_is_noticed() {
        let length = header().table_bytes(false);
        let mut bytes: Vec<u8> = (0..length as u8).collect();
        bytes.extend_from_slice(&table_sum(&bytes));
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let damaged = Table::parse(&header(), &bytes, true).err();
            assert_eq!(damaged, Some(Violation::Table { sequence: header().sequence }), "bit {bit}");
            assert!(Table::parse(&header(), &bytes[..length], false).is_ok());
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_refusal_takes_the_place_of_data() {
        let refusal = Refusal::of_run(Reason::OutOfBounds, 3);
        let bytes = refusal_reply(5, refusal);
        assert_eq!(Reply::parse(&bytes), Ok(Reply::Refused { sequence: 5, refusal }));
        let mut dirty = bytes;
        dirty[40] = 1;
        assert!(Reply::parse(&dirty).is_err());
    }

    proptest! {
        #[test]
        fn a_header_comes_back(
            runs in 1u16..=PART_RUNS as u16, sequence: u64, transfer: [u8; 16], epoch: u64,
            bytes in 1u32..=PART_BYTES as u32, tag in prop::option::of(1u8..),
        ) {
            let tag = tag.map(|byte| Tag([byte; 16]));
            let header = PartHeader {
                runs, sequence, transfer: TransferId(transfer), admit_epoch: Epoch(epoch), bytes, tag, ..header()
            };
            prop_assert_eq!(PartHeader::parse(&header.encode()), Ok(header));
        }

        #[test]
        fn a_changed_bit_is_noticed(bit in 0..HEADER_BYTES * 8) {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(PartHeader::parse(&bytes), Err(Violation::Crc("part header")));
        }
    }
}

//! What travels on a data connection, byte by byte. Pure: no socket, no memory, no clock.
//!
//! The initiator opens with a [`Preface`]; from then on each direction is a sequence of frames, all integers
//! little endian:
//!
//! ```text
//! write lane, initiator to target   part header | table | payload | trailer      (or ABORT | 24 zero bytes)
//! write lane, target to initiator   ack
//! read lane,  initiator to target   part header | table                          (or ABORT)
//! read lane,  target to initiator   part header | payload | trailer              (or ABORT, or refusal + 32 zero bytes)
//! ```
//!
//! Where the two daemons have agreed on checksums, four bytes follow each table: its CRC32C. It travels by itself and
//! not in the trailer because the table is judged before the first byte of payload lands.
//!
//! Part sequences are contiguous from 1 on each lane, so a frame that was lost, repeated or injected shows.
//! Every header carries a CRC of itself. With checksums a part's trailer carries one of its payload; without, TCP's
//! is all there is for payload and table. Whatever does not parse is a [`Violation`], which ends the
//! lane: nothing is ever skipped to resynchronise.

mod ack;
mod part;
mod preface;

pub(crate) use ack::{ACK_BYTES, Ack, Refusal};
pub(crate) use part::{
    Descriptor, FrameKind, HEADER_AND_TABLE_START, HEADER_BYTES, PartHeader, REGION_ENTRY_BYTES, REPLY_BYTES,
    RUN_BYTES, Reply, TABLE_START, TABLE_SUM_BYTES, Table, refusal_reply, table_sum,
};
pub use preface::{PREFACE_BYTES, Preface};

use crate::domain::{Failure, Reason};

/// Parts that an initiator may have started on a lane without hearing that they were processed. The target
/// remembers refusals as far back, so [`LaneRecord`](crate::transport::LaneRecord) misses none of them.
pub const WINDOW_PARTS: u64 = 1024;

/// Bytes of a [`Trailer`].
pub(crate) const TRAILER_BYTES: usize = 16;

const TRAILER_MAGIC: u32 = u32::from_le_bytes(*b"KVFT");

/// A frame that breaks the protocol. The lane that receives one closes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// the bytes are not what they claim to be
    #[error("{0} does not begin with its magic number")]
    Magic(&'static str),
    /// a version this daemon does not speak
    #[error("protocol version {0} on a data connection")]
    Version(u16),
    /// a kind of frame that may not come here
    #[error("frame kind {0} where it cannot be")]
    Kind(u8),
    /// the header's CRC does not fit
    #[error("{0} with a wrong CRC")]
    Crc(&'static str),
    /// the payload of a part is not what its sender had
    #[error("the payload of part {sequence} does not fit its checksum")]
    Payload {
        /// The part's.
        sequence: u64,
    },
    /// the table of a part is not what its sender wrote
    #[error("the table of part {sequence} does not fit its checksum")]
    Table {
        /// The part's.
        sequence: u64,
    },
    /// a field outside its limits
    #[error("{field} is {value}")]
    Limit {
        /// Which.
        field: &'static str,
        /// What it was.
        value: u64,
    },
    /// a gap or a repetition
    #[error("sequence {got} where {expected} was due")]
    Sequence {
        /// What was due.
        expected: u64,
        /// What came.
        got: u64,
    },
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Self {
        let reason = match violation {
            Violation::Crc(_) | Violation::Payload { .. } | Violation::Table { .. } => Reason::Checksum,
            Violation::Magic("preface") | Violation::Version(_) => Reason::HandshakeFailed,
            _ => Reason::ConnectionLost,
        };
        Failure::new(reason, format!("protocol violation: {violation}"))
    }
}

/// What follows a part's payload.
///
/// `u32 magic "KVFT" | u32 status | u32 CRC32C of the payload (0 where none was agreed on) | u32 low half of the
/// sequence`
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Trailer {
    /// Why the bytes before it are worthless padding; nothing where they are the part's.
    pub aborted: Option<Reason>,
    /// The part's.
    pub sequence: u64,
    /// Of the payload that the sender had; 0 where it says none, as always for padding.
    pub checksum: u32,
}

impl Trailer {
    /// Its bytes. A status of 0 means that the payload counts, so `Unspecified` travels as a number of no reason.
    pub(crate) fn encode(&self) -> [u8; TRAILER_BYTES] {
        let status = match self.aborted {
            None => 0,
            Some(Reason::Unspecified) => u16::MAX,
            Some(reason) => reason as u16,
        };
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..4].copy_from_slice(&TRAILER_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(status).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[12..].copy_from_slice(&(self.sequence as u32).to_le_bytes());
        bytes
    }

    /// Reads the trailer of the part with this sequence. Whether the payload fits is for its receiver to say.
    pub(crate) fn parse(bytes: &[u8; TRAILER_BYTES], sequence: u64) -> Result<Self, Violation> {
        if u32_at(bytes, 0) != TRAILER_MAGIC {
            return Err(Violation::Magic("trailer"));
        }
        let low = u32_at(bytes, 12);
        if low != sequence as u32 {
            return Err(Violation::Sequence { expected: sequence, got: low.into() });
        }
        let (aborted, checksum) = (reason_of(u32_at(bytes, 4)), u32_at(bytes, 8));
        if aborted.is_some() {
            zero("checksum of padding", checksum.into())?;
        }
        Ok(Self { aborted, sequence, checksum })
    }
}

/// A reason number from the wire: 0 is none, and one that this version does not know is still a reason.
fn reason_of(number: u32) -> Option<Reason> {
    let known = u16::try_from(number).ok().and_then(Reason::from_number);
    (number != 0).then(|| known.unwrap_or(Reason::Unspecified))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn zero(field: &'static str, value: u64) -> Result<(), Violation> {
    if value == 0 { Ok(()) } else { Err(Violation::Limit { field, value }) }
}

/// Puts the CRC of everything before the last four bytes into them.
fn seal(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

fn check_seal(bytes: &[u8], what: &'static str) -> Result<(), Violation> {
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    if crc32c::crc32c(body) == u32_at(crc, 0) { Ok(()) } else { Err(Violation::Crc(what)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_trailer_belongs_to_its_part() {
        let sequence = (7 << 32) + 3;
        let good = Trailer { aborted: None, sequence, checksum: 0x0102_0304 };
        assert_eq!(Trailer::parse(&good.encode(), sequence), Ok(good));
        assert_eq!(
            Trailer::parse(&good.encode(), sequence + 1),
            Err(Violation::Sequence { expected: sequence + 1, got: 3 })
        );
        let mut bytes = good.encode();
        bytes[0] ^= 1;
        assert_eq!(Trailer::parse(&bytes, sequence), Err(Violation::Magic("trailer")));
    }

    #[test]
    fn an_aborted_part_never_looks_whole() {
        for &reason in Reason::ALL {
            let trailer = Trailer { aborted: Some(reason), sequence: 1, checksum: 0 };
            let parsed = Trailer::parse(&trailer.encode(), 1).expect("a trailer");
            assert_eq!(parsed.aborted, Some(reason));
        }
    }

    #[test]
    fn a_reason_of_a_later_version_is_a_reason() {
        let mut bytes = Trailer { aborted: None, sequence: 1, checksum: 0 }.encode();
        bytes[4..8].copy_from_slice(&70_000u32.to_le_bytes());
        assert_eq!(Trailer::parse(&bytes, 1).map(|t| t.aborted), Ok(Some(Reason::Unspecified)));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 88)) {
            prop_assert!(Preface::parse(&array_at(&bytes, 0)).is_err());
            prop_assert!(PartHeader::parse(&array_at(&bytes, 0)).is_err());
            prop_assert!(Ack::parse(&array_at(&bytes, 0)).is_err());
            prop_assert!(Reply::parse(&array_at(&bytes, 0)).is_err());
            prop_assert!(Trailer::parse(&array_at(&bytes, 0), 1).is_err());
        }
    }
}

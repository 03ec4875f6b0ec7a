//! The first bytes of a data connection: which lane it is, proven by a single-use token.

use super::{Violation, array_at, check_seal, seal, u16_at, u64_at, zero};
use crate::{domain::LaneId, transport::LaneKind};

/// Bytes of a [`Preface`].
pub const PREFACE_BYTES: usize = 52;

const MAGIC: [u8; 4] = *b"KVFL";
const VERSION: u16 = 1;

/// Sent once by the initiator.
///
/// `"KVFL" | u16 version | u8 kind (1 write, 2 read) | u8 0 | u64 lane | 32 B token | u32 crc`
///
/// Its first byte, `K`, is how the endpoint's listener knows a data connection from a control one.
#[derive(Clone, PartialEq, Eq)]
pub struct Preface {
    /// Which way payload will flow.
    pub kind: LaneKind,
    /// The lane's number.
    pub lane: LaneId,
    /// Binds the lane to one confirmed session (I4).
    pub token: [u8; 32],
}

impl Preface {
    /// Its bytes.
    pub fn encode(&self) -> [u8; PREFACE_BYTES] {
        let mut bytes = [0; PREFACE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = match self.kind {
            LaneKind::Write => 1,
            LaneKind::Read => 2,
        };
        bytes[8..16].copy_from_slice(&self.lane.0.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.token);
        seal(&mut bytes);
        bytes
    }

    /// Reads one. The token is not judged here.
    pub fn parse(bytes: &[u8; PREFACE_BYTES]) -> Result<Self, Violation> {
        if bytes[..4] != MAGIC {
            return Err(Violation::Magic("preface"));
        }
        check_seal(bytes, "preface")?;
        // Checked before the rest, so that a later version may give the rest another meaning.
        match u16_at(bytes, 4) {
            VERSION => {}
            other => return Err(Violation::Version(other)),
        }
        let kind = match bytes[6] {
            1 => LaneKind::Write,
            2 => LaneKind::Read,
            other => return Err(Violation::Kind(other)),
        };
        zero("preface flags", bytes[7].into())?;
        Ok(Self { kind, lane: LaneId(u64_at(bytes, 8)), token: array_at(bytes, 16) })
    }
}

impl std::fmt::Debug for Preface {
    /// Without the token: it opens a lane, so it is no matter for logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Preface").field("kind", &self.kind).field("lane", &self.lane).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preface() -> Preface {
        Preface { kind: LaneKind::Read, lane: LaneId(77), token: [9; 32] }
    }

    #[test]
    fn a_preface_comes_back_and_begins_with_k() {
        let bytes = preface().encode();
        assert_eq!(bytes[0], b'K');
        assert_eq!(Preface::parse(&bytes), Ok(preface()));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        for bit in 0..PREFACE_BYTES * 8 {
            let mut bytes = preface().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Preface::parse(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = preface().encode();
        bytes[4] = 2;
        seal(&mut bytes);
        assert_eq!(Preface::parse(&bytes), Err(Violation::Version(2)));
    }

    #[test]
    fn a_token_is_not_shown() {
        let shown = format!("{:?}", Preface { token: [0xab; 32], ..preface() });
        assert!(!shown.contains("171") && !shown.contains("ab"), "{shown}");
    }
}

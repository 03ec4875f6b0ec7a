//! What a target says back about parts.

use super::{Violation, array_at, check_seal, reason_of, seal, u16_at, u32_at, u64_at, zero};
use crate::domain::{Failure, Reason};

/// Bytes of an [`Ack`].
pub(crate) const ACK_BYTES: usize = 32;

const PROCESSED: u8 = 16;
pub(super) const REFUSED: u8 = 17;

/// No run in particular is at fault.
const NO_RUN: u32 = u32::MAX;

/// `u8 kind | u8 0 | u16 reason | u32 run | u64 sequence | i32 code | 8 B 0 | u32 crc`
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ack {
    /// Every part up to this sequence was applied, refused or aborted.
    Processed {
        /// The last of them.
        through: u64,
    },
    /// A part was not applied; told before the `Processed` that covers it.
    Refused {
        /// Which.
        sequence: u64,
        /// Why.
        refusal: Refusal,
    },
}

/// Why a part was not applied: what fits into a frame of fixed size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refusal {
    /// Why.
    pub reason: Reason,
    /// The run of the part that is at fault.
    pub run: Option<u32>,
    /// Raw errno, or 0.
    pub code: i32,
}

impl Refusal {
    /// No run in particular.
    pub(crate) fn whole(reason: Reason) -> Self {
        Self { reason, run: None, code: 0 }
    }

    /// A run of the part.
    pub(crate) fn of_run(reason: Reason, run: usize) -> Self {
        Self { reason, run: Some(run as u32), code: 0 }
    }
}

impl From<&Failure> for Refusal {
    fn from(failure: &Failure) -> Self {
        let run = failure.index.and_then(|index| u32::try_from(index).ok());
        Self { reason: failure.reason, run, code: failure.code }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self { code: refusal.code, index: refusal.run.map(u64::from), ..Failure::plain(refusal.reason) }
    }
}

impl Ack {
    /// Its bytes.
    pub(crate) fn encode(&self) -> [u8; ACK_BYTES] {
        let mut bytes = [0; ACK_BYTES];
        match *self {
            Self::Processed { through } => {
                bytes[0] = PROCESSED;
                bytes[8..16].copy_from_slice(&through.to_le_bytes());
            }
            Self::Refused { sequence, refusal } => {
                bytes[0] = REFUSED;
                bytes[2..4].copy_from_slice(&(refusal.reason as u16).to_le_bytes());
                bytes[4..8].copy_from_slice(&refusal.run.unwrap_or(NO_RUN).to_le_bytes());
                bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
                bytes[16..20].copy_from_slice(&refusal.code.to_le_bytes());
            }
        }
        seal(&mut bytes);
        bytes
    }

    /// Reads one. Whether the sequence is due is for the lane to judge.
    pub(crate) fn parse(bytes: &[u8; ACK_BYTES]) -> Result<Self, Violation> {
        check_seal(bytes, "ack")?;
        zero("ack flags", bytes[1].into())?;
        zero("ack padding", u64_at(bytes, 20))?;
        let sequence = u64_at(bytes, 8);
        match bytes[0] {
            PROCESSED => {
                zero("processed details", u64_at(bytes, 0) >> 8)?;
                zero("processed code", u32_at(bytes, 16).into())?;
                Ok(Self::Processed { through: sequence })
            }
            REFUSED => {
                let reason = reason_of(u16_at(bytes, 2).into()).unwrap_or(Reason::Unspecified);
                let run = Some(u32_at(bytes, 4)).filter(|&run| run != NO_RUN);
                let code = i32::from_le_bytes(array_at(bytes, 16));
                Ok(Self::Refused { sequence, refusal: Refusal { reason, run, code } })
            }
            other => Err(Violation::Kind(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_ack() -> impl Strategy<Value = Ack> {
        let refusal = (prop::sample::select(Reason::ALL), prop::option::of(0u32..2000), any::<i32>())
            .prop_map(|(reason, run, code)| Refusal { reason, run, code });
        prop_oneof![
            any::<u64>().prop_map(|through| Ack::Processed { through }),
            (any::<u64>(), refusal).prop_map(|(sequence, refusal)| Ack::Refused { sequence, refusal }),
        ]
    }

    proptest! {
        #[test]
        fn an_ack_comes_back(ack in any_ack()) {
            prop_assert_eq!(Ack::parse(&ack.encode()), Ok(ack));
        }

        #[test]
        fn a_changed_bit_is_noticed(ack in any_ack(), bit in 0..ACK_BYTES * 8) {
            let mut bytes = ack.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Ack::parse(&bytes), Err(Violation::Crc("ack")));
        }
    }

    #[test]
    fn the_layout_is_as_documented() {
        let refusal = Refusal { reason: Reason::OutOfBounds, run: Some(3), code: -5 };
        let bytes = Ack::Refused { sequence: 0x0102, refusal }.encode();
        assert_eq!(bytes[..8], [17, 0, 42, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[8..20], [2, 1, 0, 0, 0, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff]);
    }
}

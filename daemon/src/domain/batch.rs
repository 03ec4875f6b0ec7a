//! What an engine asks to be moved, and how it ended.

use std::time::Duration;

use super::{Failure, Reason, TransferId};

/// Direction, seen from the initiator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// Local memory to the target's.
    Write,
    /// The target's memory to local.
    Read,
}

/// The way bytes take.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum PathKind {
    /// Both engines on this node.
    Local,
    /// TCP lanes.
    Tcp,
    /// RDMA lanes.
    Rdma,
}

impl PathKind {
    /// The name in configuration, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }
}

/// Slices as packed columns: one length for all or one each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SliceBatch {
    /// Addresses in the initiator engine's address space.
    pub local: Vec<u64>,
    /// Addresses in the target engine's address space.
    pub remote: Vec<u64>,
    /// One per slice; empty when `uniform` holds.
    pub lengths: Vec<u64>,
    /// Bytes of every slice.
    pub uniform: Option<u64>,
}

/// Columns that do not fit together.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BatchError {
    /// local and remote differ in length
    #[error("slices.remote has {remote} entries where slices.local has {local}")]
    Columns {
        /// Entries of `local`.
        local: usize,
        /// Entries of `remote`.
        remote: usize,
    },
    /// lengths fits neither the other columns nor `length`
    #[error("slices.lengths has {lengths} entries where slices.local has {local}")]
    Lengths {
        /// Entries of `local`.
        local: usize,
        /// Entries of `lengths`.
        lengths: usize,
    },
    /// both forms of length were given
    #[error("slices.length and slices.lengths exclude each other")]
    BothLengths,
}

impl From<BatchError> for Failure {
    fn from(error: BatchError) -> Self {
        Failure::new(Reason::BadArgument, error.to_string())
    }
}

impl SliceBatch {
    /// Checks that the columns fit together.
    pub fn validate(&self) -> Result<(), BatchError> {
        let local = self.local.len();
        if self.remote.len() != local {
            return Err(BatchError::Columns { local, remote: self.remote.len() });
        }
        match (self.uniform, self.lengths.len()) {
            (Some(_), 0) => Ok(()),
            (Some(_), _) => Err(BatchError::BothLengths),
            (None, lengths) if lengths == local => Ok(()),
            (None, lengths) => Err(BatchError::Lengths { local, lengths }),
        }
    }

    /// How many slices.
    pub fn len(&self) -> usize {
        self.local.len()
    }

    /// No slice at all.
    pub fn is_empty(&self) -> bool {
        self.local.is_empty()
    }

    /// Local address, remote address and length of each slice, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        (0..self.len()).map(|i| {
            let length = self.uniform.unwrap_or_else(|| self.lengths[i]);
            (self.local[i], self.remote[i], length)
        })
    }

    /// Takes the slices of a later chunk; each chunk brings its own form of length.
    pub fn append(&mut self, chunk: SliceBatch) {
        if self.is_empty() {
            *self = chunk;
            return;
        }
        if self.uniform != chunk.uniform || self.uniform.is_none() {
            self.spell_out();
            let count = chunk.len();
            match chunk.uniform {
                Some(length) => self.lengths.resize(self.lengths.len() + count, length),
                None => self.lengths.extend_from_slice(&chunk.lengths),
            }
        }
        self.local.extend_from_slice(&chunk.local);
        self.remote.extend_from_slice(&chunk.remote);
    }

    fn spell_out(&mut self) {
        if let Some(length) = self.uniform.take() {
            self.lengths = vec![length; self.local.len()];
        }
    }
}

/// How a transfer ended, or that its end is not proven yet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Every byte applied and acknowledged (I3).
    Done,
    /// Over, not done; the destination is undefined.
    Failed,
    /// Over, because the caller said so.
    Cancelled,
    /// Not an end: settlement is not proven (I1).
    Unsettled,
}

/// What is proven of the peer's memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PeerHalf {
    /// Out of the transfer's reach.
    Confirmed,
    /// Not proven; never upgraded by time.
    Unconfirmed,
}

/// Where the time went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timings {
    /// From receipt to the first part started.
    pub queued: Duration,
    /// From the first part to the last acknowledgement, or to the decision to end.
    pub moving: Duration,
    /// From that decision to the reply.
    pub settling: Duration,
}

/// The answer to a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Which.
    pub transfer: TransferId,
    /// How it ended.
    pub outcome: Outcome,
    /// What is known of the peer's memory.
    pub peer_half: PeerHalf,
    /// Why, unless DONE.
    pub failure: Option<Failure>,
    /// Slices asked for.
    pub slices: u64,
    /// Slices wholly applied and acknowledged.
    pub slices_done: u64,
    /// Payload bytes asked for.
    pub bytes: u64,
    /// Payload bytes applied and acknowledged.
    pub bytes_done: u64,
    /// Payload bytes sent again after a loss.
    pub bytes_resent: u64,
    /// Losses counted, plus one.
    pub attempts: u32,
    /// The way taken; nothing where none was chosen yet.
    pub path: Option<PathKind>,
    /// Where the time went.
    pub timings: Timings,
}

impl Report {
    /// Refused before any part of it was started, so both halves are settled as they are.
    pub fn refused(transfer: TransferId, failure: Failure) -> Self {
        let outcome = match failure.reason {
            Reason::Cancelled => Outcome::Cancelled,
            _ => Outcome::Failed,
        };
        Self {
            transfer,
            outcome,
            peer_half: PeerHalf::Confirmed,
            failure: Some(failure),
            slices: 0,
            slices_done: 0,
            bytes: 0,
            bytes_done: 0,
            bytes_resent: 0,
            attempts: 1,
            path: None,
            timings: Timings::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uniform(local: &[u64], length: u64) -> SliceBatch {
        SliceBatch { local: local.to_vec(), remote: local.to_vec(), lengths: vec![], uniform: Some(length) }
    }

    #[test]
    fn chunks_of_different_form_join() {
        let mut batch = uniform(&[1, 2], 10);
        batch.append(uniform(&[3], 10));
        assert_eq!(batch.uniform, Some(10));
        batch.append(uniform(&[4], 20));
        batch.append(SliceBatch { local: vec![5], remote: vec![5], lengths: vec![30], uniform: None });
        assert_eq!(batch.validate(), Ok(()));
        let lengths: Vec<u64> = batch.iter().map(|(.., length)| length).collect();
        assert_eq!(lengths, [10, 10, 10, 20, 30]);
    }

    #[test]
    fn columns_that_do_not_fit_are_named() {
        let mut batch = uniform(&[1, 2], 10);
        batch.remote.pop();
        assert_eq!(batch.validate(), Err(BatchError::Columns { local: 2, remote: 1 }));
        let batch = SliceBatch { lengths: vec![1], uniform: None, ..uniform(&[1, 2], 10) };
        assert_eq!(batch.validate(), Err(BatchError::Lengths { local: 2, lengths: 1 }));
        let batch = SliceBatch { lengths: vec![1, 1], ..uniform(&[1, 2], 10) };
        assert_eq!(batch.validate(), Err(BatchError::BothLengths));
    }
}

//! Large batches: chunks of one transfer on the wire, and several transfers where one may not be that large.
//!
//! All of it is pure. Chunks are made as they are sent, so a large batch is in memory once, not twice.

use std::{ops::Range, sync::Arc};

use kvferry_proto::engine::v1 as wire;
use sha2::{Digest, Sha256};

use crate::{Error, Lengths, Outcome, Report, Slices, TransferId};

impl Slices {
    /// Slices in the batch, if its columns agree on it.
    pub(crate) fn count(&self) -> Result<usize, Error> {
        let count = self.local.len();
        let each = match &self.lengths {
            Lengths::Each(lengths) => lengths.len(),
            Lengths::Uniform(_) => count,
        };
        if self.remote.len() == count && each == count {
            return Ok(count);
        }
        let text = format!(
            "the columns of a batch differ in length: {count} local, {} remote, {each} lengths",
            self.remote.len()
        );
        Err(Error::argument(text, Some(count.min(self.remote.len()).min(each) as u64)))
    }

    /// Bytes in the batch. Only for reports: a sum that overflows is refused by the daemon.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.lengths {
            Lengths::Each(lengths) => lengths.iter().fold(0, |sum: u64, length| sum.saturating_add(*length)),
            Lengths::Uniform(length) => length.saturating_mul(self.local.len() as u64),
        }
    }

    /// A copy of some of it. The caller has checked the columns.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        Self {
            local: self.local[range.clone()].to_vec(),
            remote: self.remote[range.clone()].to_vec(),
            lengths: match &self.lengths {
                Lengths::Each(lengths) => Lengths::Each(lengths[range].to_vec()),
                Lengths::Uniform(length) => Lengths::Uniform(*length),
            },
        }
    }

    pub(crate) fn into_wire(self) -> wire::Slices {
        let (lengths, length) = match self.lengths {
            Lengths::Each(lengths) => (lengths, None),
            Lengths::Uniform(length) => (Vec::new(), Some(length)),
        };
        wire::Slices { local: self.local, remote: self.remote, lengths, length }
    }
}

/// `0..count` in steps; one empty range for an empty batch, because that is a transfer too.
pub(crate) fn ranges(count: usize, step: u64) -> impl Iterator<Item = Range<usize>> {
    let step = usize::try_from(step).unwrap_or(usize::MAX).max(1);
    let steps = count.div_ceil(step).max(1);
    (0..steps).map(move |index| index * step..count.min((index + 1).saturating_mul(step)))
}

/// The messages of one transfer: the first says everything, the others carry slices alone.
pub(crate) struct Chunks {
    header: Option<wire::TransferRequest>,
    id: TransferId,
    slices: Arc<Slices>,
    step: u64,
    at: usize,
}

impl Chunks {
    pub(crate) fn new(id: TransferId, header: wire::TransferRequest, slices: Arc<Slices>, step: u64) -> Self {
        Self { header: Some(header), id, slices, step: step.max(1), at: 0 }
    }
}

impl Iterator for Chunks {
    type Item = wire::TransferRequest;

    fn next(&mut self) -> Option<Self::Item> {
        let count = self.slices.local.len();
        if self.at >= count && self.header.is_none() {
            return None;
        }
        let step = usize::try_from(self.step).unwrap_or(usize::MAX);
        let end = self.at.saturating_add(step).min(count);
        let slices = self.slices.part(self.at..end).into_wire();
        self.at = end;
        let header = self.header.take().unwrap_or_else(|| wire::TransferRequest {
            transfer_id: self.id.0.to_vec(),
            ..Default::default()
        });
        Some(wire::TransferRequest { slices: Some(slices), more: end < count, ..header })
    }
}

/// Id of the `index`th transfer that a batch is cut into. Derived, so that submitting the batch again joins
/// the same transfers.
pub(crate) fn piece_id(batch: TransferId, index: usize) -> TransferId {
    if index == 0 {
        return batch;
    }
    let digest = Sha256::new().chain_update(batch.0).chain_update((index as u64).to_be_bytes()).finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    TransferId(id)
}

/// Adds the report of the next piece to what the pieces before it came to. `first` is the piece's place in
/// the batch: a failed slice is named by its place in what the caller submitted.
pub(crate) fn merge(whole: Option<Report>, piece: Report, first: usize) -> Report {
    let mut merged = piece;
    if let Some(index) = merged.failure.as_mut().and_then(|failure| failure.index.as_mut()) {
        *index = index.saturating_add(first as u64);
    }
    let Some(whole) = whole else { return merged };
    merged.id = whole.id;
    merged.peer_confirmed &= whole.peer_confirmed;
    merged.slices_done += whole.slices_done;
    merged.bytes_done += whole.bytes_done;
    merged.bytes_resent += whole.bytes_resent;
    merged.attempts = merged.attempts.max(whole.attempts);
    merged.path = merged.path.or(whole.path);
    merged.queued += whole.queued;
    merged.moving += whole.moving;
    merged.settling += whole.settling;
    merged.total += whole.total;
    merged
}

/// Whether the next piece may start after this report.
pub(crate) fn goes_on(report: &Report) -> bool {
    report.outcome == Outcome::Done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Failure, Reason};

    fn batch(count: u64, lengths: Lengths) -> Slices {
        Slices { local: (0..count).collect(), remote: (1000..1000 + count).collect(), lengths }
    }

    fn chunks(count: u64, step: u64, lengths: Lengths) -> Vec<wire::TransferRequest> {
        let id = TransferId([7; 16]);
        let header = wire::TransferRequest {
            transfer_id: id.0.to_vec(),
            session_id: "peer:1".into(),
            ..Default::default()
        };
        Chunks::new(id, header, batch(count, lengths).into(), step).collect()
    }

    #[test]
    fn chunks_carry_every_slice_once_and_only_the_last_says_so() {
        for (count, step, expected) in [(0, 4, 1), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 3)] {
            let sent = chunks(count, step, Lengths::Each((0..count).map(|i| i + 50).collect()));
            assert_eq!(sent.len(), expected, "{count} by {step}");
            let column = |pick: fn(&wire::Slices) -> &Vec<u64>| -> Vec<u64> {
                sent.iter().flat_map(|chunk| pick(chunk.slices.as_ref().unwrap()).clone()).collect()
            };
            assert_eq!(column(|slices| &slices.local), (0..count).collect::<Vec<_>>());
            assert_eq!(column(|slices| &slices.remote), (1000..1000 + count).collect::<Vec<_>>());
            assert_eq!(column(|slices| &slices.lengths), (50..50 + count).collect::<Vec<_>>());
            let more: Vec<_> = sent.iter().map(|chunk| chunk.more).collect();
            assert!(more[..expected - 1].iter().all(|more| *more) && !more[expected - 1], "{more:?}");
            assert!(sent.iter().all(|chunk| chunk.transfer_id == [7; 16]));
            assert_eq!(sent.iter().filter(|chunk| !chunk.session_id.is_empty()).count(), 1);
        }
    }

    #[test]
    fn every_chunk_of_a_uniform_batch_says_its_length() {
        let sent = chunks(5, 2, Lengths::Uniform(4096));
        assert_eq!(sent.len(), 3);
        assert!(sent.iter().all(|chunk| {
            let slices = chunk.slices.as_ref().unwrap();
            slices.length == Some(4096) && slices.lengths.is_empty()
        }));
    }

    #[test]
    fn a_limit_of_zero_does_not_loop() {
        assert_eq!(chunks(2, 0, Lengths::Uniform(1)).len(), 2);
        assert_eq!(ranges(2, 0).collect::<Vec<_>>(), [0..1, 1..2]);
    }

    #[test]
    fn ranges_cover_a_batch_without_gap_or_overlap() {
        let bounds =
            |count, step| -> Vec<_> { ranges(count, step).map(|range| (range.start, range.end)).collect() };
        assert_eq!(bounds(0, 4), [(0, 0)]);
        assert_eq!(bounds(4, 4), [(0, 4)]);
        assert_eq!(bounds(9, 4), [(0, 4), (4, 8), (8, 9)]);
        assert_eq!(bounds(9, u64::MAX), [(0, 9)]);
    }

    #[test]
    fn columns_that_disagree_are_refused_with_the_first_slice_that_is_not_whole() {
        let mut slices = batch(3, Lengths::Each(vec![1, 2]));
        match slices.count() {
            Err(Error::Refused(Failure { reason: Reason::BadArgument, index: Some(2), .. })) => {}
            other => panic!("{other:?}"),
        }
        slices.lengths = Lengths::Uniform(1);
        assert_eq!(slices.count().unwrap(), 3);
        slices.remote.pop();
        assert!(slices.count().is_err());
    }

    #[test]
    fn the_same_batch_gives_the_same_piece_ids() {
        let id = TransferId([9; 16]);
        assert_eq!(piece_id(id, 0), id);
        assert_eq!(piece_id(id, 1), piece_id(id, 1));
        assert_ne!(piece_id(id, 1), piece_id(id, 2));
        assert_ne!(piece_id(id, 1), piece_id(TransferId([8; 16]), 1));
    }

    #[test]
    fn a_merged_report_names_the_failed_slice_by_its_place_in_the_batch() {
        let done = Report {
            peer_confirmed: true,
            slices_done: 4,
            bytes_done: 40,
            failure: None,
            ..Report::untold(TransferId([1; 16]), Outcome::Done, Failure::new(Reason::Unspecified, ""))
        };
        let failure = Failure { index: Some(1), ..Failure::new(Reason::OutOfBounds, "") };
        let failed = Report::untold(TransferId([2; 16]), Outcome::Failed, failure);
        let first = merge(None, done, 0);
        assert!(goes_on(&first));
        let whole = merge(Some(first), failed, 4);
        assert!(!goes_on(&whole));
        assert_eq!(whole.id, TransferId([1; 16]));
        assert_eq!(whole.outcome, Outcome::Failed);
        assert_eq!((whole.slices_done, whole.bytes_done), (4, 40));
        assert_eq!(whole.failure.unwrap().index, Some(5));
        assert!(!whole.peer_confirmed);
    }
}

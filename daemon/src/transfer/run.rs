//! The state of one transfer on its session: which parts wait, fly and are done, and how it ends.
//!
//! Synchronous, no I/O, no clock: the session's core calls it with the time. It keeps I3 (DONE only when every
//! part was acknowledged) by counting parts, never bytes or messages, and I1 by ending in steps: first nothing
//! new is started, then the own half is proven, then the peer's half is proven or given up on, then the report.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{log::Teller, pages::PageBatch};
use crate::{
    domain::{
        Epoch, Failure, Incarnation, LaneId, Op, Outcome, PathKind, PeerHalf, Reason, Report, SliceBatch,
        Tag, Timings, TransferId,
    },
    memory::Region,
    policy::{Attempts, RetryPolicy, Verdict},
    transport::Payload,
};

/// The bytes as the engine named them.
#[derive(Clone, Debug)]
pub enum Request {
    /// Slices.
    Slices(SliceBatch),
    /// Pages of two layouts.
    Pages(PageBatch),
}

/// An admitted transfer, before it is planned.
#[derive(Debug)]
pub struct Admitted {
    /// Whose end is told to.
    pub teller: Option<Teller>,
    /// Its name.
    pub id: TransferId,
    /// Direction.
    pub op: Op,
    /// The bytes.
    pub request: Arc<Request>,
    /// Leases of the local regions it names: a region that is retired before there is a plan ends it all the
    /// same, whatever is registered at that address by then (I4).
    pub local: Vec<Arc<Region>>,
    /// The request it serves.
    pub tag: Option<Tag>,
    /// How often and how long.
    pub policy: RetryPolicy,
    /// Outages in a row that fail the session when this transfer is given up; nothing: the session's own.
    pub failure_threshold: Option<u32>,
    /// When it was received.
    pub received: Instant,
    /// Who was known at the target's endpoint when it was received, and the newest revocation of theirs.
    pub known: Option<(Incarnation, Epoch)>,
    /// The newest revocation of the own engine when it was received.
    pub own_epoch: Epoch,
}

/// One transfer.
#[derive(Debug)]
pub struct Run {
    /// As admitted.
    pub admitted: Admitted,
    /// The newest revocation epoch known when it was admitted; nothing where none was ever known.
    pub admit_epoch: Option<Epoch>,
    /// Whose addresses it names, as far as that was known when it was admitted, or is since it was planned (I4).
    pub expects: Option<Incarnation>,
    /// The plan, once there is one.
    pub payload: Option<Arc<Payload>>,
    /// Where it stands.
    pub phase: Phase,
    /// No part before this time: back-off after a loss.
    pub not_before: Option<Instant>,
    /// Whether any part was ever handed to a lane.
    pub sent: bool,
    /// Whether it stands in its session's rotation.
    pub queued: bool,
    asked_table: bool,
    todo: VecDeque<u32>,
    flying: u32,
    done: Vec<bool>,
    parts_done: u32,
    bytes_done: u64,
    bytes_resent: u64,
    attempts: Attempts,
    first_part: Option<Instant>,
}

/// Where a transfer stands.
#[derive(Debug)]
pub enum Phase {
    /// For the session to open, or for a newer region table.
    Waiting {
        /// The nonce of the table asked for because a look-up missed.
        table: Option<u64>,
    },
    /// Parts go out.
    Moving,
    /// No part is started any more.
    Ending(Ending),
}

/// How a transfer ends, and what is proven so far.
#[derive(Debug)]
pub struct Ending {
    /// FAILED or CANCELLED.
    pub outcome: Outcome,
    /// Why.
    pub failure: Failure,
    /// When it was decided.
    pub since: Instant,
    /// The own half is proven (I1).
    pub own_settled: bool,
    /// Lanes on which the target may still touch its memory for this transfer.
    pub peer_pending: BTreeSet<LaneId>,
    /// The peer that could prove its half is not there any more.
    pub peer_lost: bool,
    /// UNSETTLED was told.
    pub told_unsettled: bool,
}

impl Run {
    /// Newly admitted; waits to be planned.
    pub fn new(admitted: Admitted, expects: Option<Incarnation>, admit_epoch: Option<Epoch>) -> Self {
        Self {
            admitted,
            admit_epoch,
            expects,
            payload: None,
            phase: Phase::Waiting { table: None },
            not_before: None,
            sent: false,
            queued: false,
            asked_table: false,
            todo: VecDeque::new(),
            flying: 0,
            done: Vec::new(),
            parts_done: 0,
            bytes_done: 0,
            bytes_resent: 0,
            attempts: Attempts::default(),
            first_part: None,
        }
    }

    /// When it must be over.
    pub fn deadline(&self) -> Instant {
        self.admitted.received + self.admitted.policy.deadline
    }

    /// Whether a local region that it names was unregistered since it was admitted.
    pub fn has_lost_regions(&self) -> bool {
        let planned = self.payload.iter().flat_map(|payload| &payload.local_regions);
        self.admitted.local.iter().chain(planned).any(|region| region.is_retired())
    }

    /// Takes its plan.
    pub fn planned(&mut self, payload: Arc<Payload>) {
        let parts = payload.parts.len();
        self.todo = (0..parts as u32).collect();
        self.done = vec![false; parts];
        self.payload = Some(payload);
        self.phase = Phase::Moving;
    }

    /// Forgets a plan of which nothing was sent: the target's table is another one now.
    pub fn unplan(&mut self) {
        debug_assert!(!self.sent);
        self.payload = None;
        self.phase = Phase::Waiting { table: None };
    }

    /// A look-up missed: waits for the answer to a request for the newest table. Asked only once.
    pub fn ask_table(&mut self, nonce: u64) {
        self.asked_table = true;
        self.phase = Phase::Waiting { table: Some(nonce) };
    }

    /// Whether its last look-up was made in a table newer than itself.
    pub fn asked_table(&self) -> bool {
        self.asked_table
    }

    /// Whether it waits for the table asked for with this nonce.
    pub fn waits_for_table(&self, nonce: u64) -> bool {
        matches!(self.phase, Phase::Waiting { table: Some(asked) } if asked == nonce)
    }

    /// Whether it waits to be planned at all.
    pub fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. })
    }

    /// Whether its end was decided.
    pub fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Ending(_))
    }

    /// Whether a part could go out now.
    pub fn is_ready(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Moving)
            && !self.todo.is_empty()
            && self.not_before.is_none_or(|at| at <= now)
    }

    /// Whether parts wait to go out, now or after a back-off.
    pub fn has_todo(&self) -> bool {
        matches!(self.phase, Phase::Moving) && !self.todo.is_empty()
    }

    /// Hands out the next part.
    pub fn take(&mut self, now: Instant) -> Option<u32> {
        let part = self.todo.pop_front()?;
        self.first_part.get_or_insert(now);
        self.not_before = None;
        self.sent = true;
        self.flying += 1;
        Some(part)
    }

    /// A part was applied and acknowledged. Returns its bytes.
    pub fn acknowledged(&mut self, part: u32) -> u64 {
        self.flying -= 1;
        let index = part as usize;
        if matches!(self.phase, Phase::Ending(_)) || std::mem::replace(&mut self.done[index], true) {
            return 0;
        }
        let bytes = self.part_bytes(part);
        self.parts_done += 1;
        self.bytes_done += bytes;
        self.attempts.on_progress();
        bytes
    }

    /// A part will not be acknowledged: its lane is fenced on both sides (I2), or it was refused.
    pub fn lost(&mut self, part: u32) {
        self.flying -= 1;
        if matches!(self.phase, Phase::Moving) {
            self.todo.push_front(part);
            self.bytes_resent += self.part_bytes(part);
        }
    }

    /// A loss counts against this transfer.
    pub fn count_loss(&mut self, now: Instant) -> Verdict {
        let verdict = self.attempts.on_loss(&self.admitted.policy);
        if let Verdict::Retry { after } = verdict {
            self.not_before = Some(now + after);
        }
        verdict
    }

    /// Whether every part was acknowledged.
    pub fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Moving) && self.parts_done as usize == self.done.len()
    }

    /// Parts on lanes, or lost on lanes whose fence is not confirmed.
    pub fn flying(&self) -> u32 {
        self.flying
    }

    /// No part is started from now on.
    pub fn end(&mut self, ending: Ending) {
        self.todo.clear();
        self.phase = Phase::Ending(ending);
    }

    /// The answer if it ended now.
    pub fn report(&self, ended: End<'_>, path: Option<PathKind>, now: Instant) -> Report {
        let (slices, bytes) = self.asked();
        let decided = match &self.phase {
            Phase::Ending(ending) => ending.since,
            _ => now,
        };
        let begun = self.first_part.unwrap_or(decided);
        Report {
            transfer: self.admitted.id,
            outcome: ended.outcome,
            peer_half: ended.peer_half,
            failure: ended.failure.cloned(),
            slices,
            slices_done: self.slices_done(ended.outcome, slices),
            bytes,
            bytes_done: self.bytes_done,
            bytes_resent: self.bytes_resent,
            attempts: self.attempts.count(),
            path: path.filter(|_| self.sent || ended.outcome == Outcome::Done),
            timings: Timings {
                queued: begun.saturating_duration_since(self.admitted.received),
                moving: decided.saturating_duration_since(begun),
                settling: now.saturating_duration_since(decided),
            },
        }
    }

    fn asked(&self) -> (u64, u64) {
        match (&self.payload, &*self.admitted.request) {
            (Some(payload), _) => (payload.slices, payload.bytes),
            (None, Request::Slices(batch)) => {
                (batch.len() as u64, batch.iter().fold(0, |sum: u64, slice| sum.saturating_add(slice.2)))
            }
            (None, Request::Pages(_)) => (0, 0),
        }
    }

    /// A slice is done when each part that holds a byte of it is. Where a slice may have begun in an
    /// unfinished part, it is left out: the figure is never too high.
    fn slices_done(&self, outcome: Outcome, slices: u64) -> u64 {
        if outcome == Outcome::Done {
            return slices;
        }
        let Some(payload) = &self.payload else { return 0 };
        let mut done = 0;
        let mut begun_well = true;
        for (bounds, &part_done) in payload.parts.iter().zip(&self.done) {
            if bounds.slices > 0 {
                if part_done {
                    done += u64::from(bounds.slices) - u64::from(!begun_well);
                }
                begun_well = part_done;
            } else {
                begun_well &= part_done;
            }
        }
        done
    }

    fn part_bytes(&self, part: u32) -> u64 {
        self.payload.as_ref().map_or(0, |payload| u64::from(payload.parts[part as usize].bytes))
    }
}

/// What a report says about the end.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// How.
    pub outcome: Outcome,
    /// What is proven of the peer's memory.
    pub peer_half: PeerHalf,
    /// Why.
    pub failure: Option<&'a Failure>,
}

impl End<'static> {
    /// Everything went well, which implies that the peer's half is proven.
    pub const DONE: Self = End { outcome: Outcome::Done, peer_half: PeerHalf::Confirmed, failure: None };
}

impl Ending {
    /// Decided now; nothing is proven yet.
    pub fn decided(failure: Failure, since: Instant) -> Self {
        Self {
            outcome: Self::outcome_of(&failure),
            failure,
            since,
            own_settled: false,
            peer_pending: BTreeSet::new(),
            peer_lost: false,
            told_unsettled: false,
        }
    }

    /// CANCELLED is what the caller wanted, everything else FAILED.
    pub fn outcome_of(failure: &Failure) -> Outcome {
        match failure.reason {
            Reason::Cancelled => Outcome::Cancelled,
            _ => Outcome::Failed,
        }
    }

    /// When waiting for the peer's word is over.
    pub fn peer_deadline(&self, peer_wait: Duration) -> Instant {
        self.since + peer_wait
    }
}

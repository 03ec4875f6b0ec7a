//! Which part goes where next, and what becomes of it while its lane lives.
//!
//! Transfers take turns, part by part, so that a large one does not hold up small ones. A lane never has more
//! than `window_parts` in doubt (I8): what is not handed out costs nothing to cancel.

use super::{Action, MAX_DYING_LANES, Outbound, lanes::LaneState};
use crate::{
    domain::{Failure, LaneId, PathKind, TransferId},
    transport::{LaneKind, Part, SequencedPart},
};

/// Ended transfers that may stand in a rotation, besides as many as there are live ones.
const ROTATION_SLACK: usize = 64;

impl Outbound {
    /// Puts a transfer with parts to send into the rotation of its direction.
    pub(super) fn queue(&mut self, transfer: TransferId) {
        let Some(run) = self.runs.get_mut(&transfer).filter(|run| run.has_todo() && !run.queued) else {
            return;
        };
        run.queued = true;
        let rotation = &mut self.rotation[LaneKind::of(run.admitted.op) as usize];
        rotation.push_back(transfer);
        // Who ended leaves when its turn comes, which may be never while no lane takes parts.
        if rotation.len() > 2 * self.runs.len() + ROTATION_SLACK {
            rotation.retain(|waiting| self.runs.contains_key(waiting));
        }
    }

    pub(super) fn dispatch(&mut self) {
        self.lane_retry_at = self.lane_retry_at.filter(|at| *at > self.now);
        if !self.link.is_up() || self.shutdown.is_some() {
            return;
        }
        for kind in [LaneKind::Write, LaneKind::Read] {
            if !self.rotation[kind as usize].is_empty() {
                self.ensure_lanes(kind);
                self.fill_lanes(kind);
            }
        }
    }

    fn ensure_lanes(&mut self, kind: LaneKind) {
        let Some(path) = self.path else { return };
        if self.lane_retry_at.is_some() {
            return;
        }
        let wanted = match path {
            PathKind::Local => 1,
            PathKind::Tcp | PathKind::Rdma => self.policy.tcp_lanes,
        };
        let live = self.lanes.values().filter(|lane| lane.kind == kind && lane.is_live()).count();
        let dying = self.lanes.values().filter(|lane| !lane.is_live()).count();
        if dying >= MAX_DYING_LANES {
            return;
        }
        for _ in live..wanted {
            let lane = LaneId(self.next_lane);
            self.next_lane += 1;
            self.lanes.insert(lane, LaneState::opening(kind, self.now));
            self.actions.push(Action::OpenLane(lane, kind, path));
        }
    }

    /// One part of each transfer in turn, each to the lane with the fewest in doubt, until the windows are full.
    fn fill_lanes(&mut self, kind: LaneKind) {
        let mut open: Vec<(LaneId, Vec<SequencedPart>)> = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.kind == kind && lane.is_open())
            .map(|(id, _)| (*id, Vec::new()))
            .collect();
        while let Some(at) = self.roomiest(&open) {
            let Some(transfer) = self.rotation[kind as usize].pop_front() else { break };
            // One that ended while it waited leaves the rotation here.
            let Some(run) = self.runs.get_mut(&transfer) else { continue };
            if let Some(part) = run.is_ready(self.now).then(|| run.take(self.now)).flatten()
                && let Some(payload) = run.payload.clone()
                && let Some(lane) = self.lanes.get_mut(&open[at].0)
            {
                let sequence = lane.assign(transfer, part, self.now);
                open[at].1.push(SequencedPart { sequence, part: Part { payload, index: part } });
            }
            // Who backs off leaves too, and is queued again when its time comes (see `expire`).
            run.queued = run.is_ready(self.now);
            if run.queued {
                self.rotation[kind as usize].push_back(transfer);
            }
        }
        let batches = open.into_iter().filter(|(_, parts)| !parts.is_empty());
        self.actions.extend(batches.map(|(lane, parts)| Action::Submit(lane, parts)));
    }

    fn roomiest(&self, open: &[(LaneId, Vec<SequencedPart>)]) -> Option<usize> {
        let outstanding =
            |at: &usize| self.lanes.get(&open[*at].0).map_or(usize::MAX, LaneState::outstanding);
        (0..open.len()).min_by_key(outstanding).filter(|at| outstanding(at) < self.policy.window_parts)
    }

    pub(super) fn processed(&mut self, lane: LaneId, from: u64, through: u64) {
        let Some(state) = self.lanes.get_mut(&lane) else { return };
        for assigned in state.processed(from, through, self.now) {
            self.acknowledged(lane, assigned.transfer, assigned.part);
        }
    }

    pub(super) fn acknowledged(&mut self, lane: LaneId, transfer: TransferId, part: u32) {
        let Some(run) = self.runs.get_mut(&transfer) else { return };
        self.counts.bytes += run.acknowledged(part);
        self.finish_if_done(transfer);
        self.out_of_doubt(lane, transfer);
    }

    pub(super) fn refused(&mut self, lane: LaneId, sequence: u64, failure: Failure) {
        let Some(assigned) = self.lanes.get(&lane).and_then(|state| state.get(sequence)) else { return };
        let (transfer, part) = (assigned.transfer, assigned.part);
        self.part_refused(transfer, part, failure);
    }

    pub(super) fn part_refused(&mut self, transfer: TransferId, part: u32, mut failure: Failure) {
        let Some(payload) = self.runs.get(&transfer).and_then(|run| run.payload.clone()) else { return };
        let bounds = &payload.parts[part as usize];
        let slice = u64::from(bounds.first_slice).saturating_add(failure.index.unwrap_or(0));
        failure.index = Some(slice.min(payload.slices.saturating_sub(1)));
        self.end(transfer, failure);
    }

    pub(super) fn moved(&mut self, lane: LaneId, bytes: u64) {
        if let Some(state) = self.lanes.get_mut(&lane)
            && state.moved.0 != bytes
        {
            state.moved = (bytes, self.now);
        }
    }
}

//! What the life of a lane means for the parts on it: opened, lost, closed here, fenced there (I2).

use std::{collections::BTreeSet, time::Instant};

use super::{
    Action, Event, MAX_DYING_LANES, Outbound,
    lanes::{Fate, LanePhase, LaneState, resolve},
};
use crate::{
    domain::{Class, Failure, LaneId, Reason, TransferId},
    policy::{MAX_SPACING, ReconnectStep, Verdict},
    transfer::run::Run,
    transport::{LaneKind, LaneRecord},
};

impl Outbound {
    pub(super) fn lane_opened(&mut self, lane: LaneId) {
        if let Some(state) = self.lanes.get_mut(&lane)
            && state.phase == LanePhase::Opening
        {
            state.phase = LanePhase::Open;
            return;
        }
        // It came too late: the session was closed or fenced meanwhile.
        self.actions.push(Action::CloseLane(lane, Failure::plain(Reason::ConnectionLost)));
    }

    pub(super) fn lane_open_failed(&mut self, lane: LaneId, failure: Failure) {
        let opening = |state: &LaneState| state.phase == LanePhase::Opening;
        let Some(kind) = self.lanes.get(&lane).filter(|state| opening(state)).map(|state| state.kind) else {
            return;
        };
        self.lanes.remove(&lane);
        self.last_failure = Some(failure.clone());
        if !self.link.is_up() || self.shutdown.is_some() {
            return;
        }
        // The target may have granted it; what will not come must not count against its limit of lanes.
        self.actions.push(Action::FenceLane(lane));
        // Where another lane of the kind works nobody has to wait: there is less of the path, not none.
        let carried = self.lanes.values().any(|lane| lane.kind == kind && lane.is_open());
        let waits = |run: &Run| !carried && LaneKind::of(run.admitted.op) == kind && run.has_todo();
        if failure.class() == Class::Fabric {
            self.health.outage_began();
            self.fail_waiting(&failure, |run| waits(run) && !run.admitted.policy.outlives_failed_open());
            match self.cycle().failed_now() {
                ReconnectStep::TryAt(at) => return self.lane_retry_at = Some(at),
                ReconnectStep::GiveUp => self.give_up_waiting(waits),
            }
        } else {
            self.fail_waiting(&failure, waits);
        }
        self.lane_retry_at = carried.then(|| self.now + MAX_SPACING);
    }

    /// Has a lane closed; what it carries stays in doubt until both sides said so.
    pub(super) fn close_lane(&mut self, lane: LaneId, cause: Failure) {
        let Some(state) = self.lanes.get_mut(&lane) else { return };
        match state.phase {
            // Nothing was put on it: when it does open, it is closed at once (see `lane_opened`).
            LanePhase::Opening => {
                self.lanes.remove(&lane);
            }
            LanePhase::Open => {
                state.phase = LanePhase::Closing;
                self.actions.push(Action::CloseLane(lane, cause));
            }
            LanePhase::Closing | LanePhase::Closed => {}
        }
    }

    /// The owner has said closed. If the path is to blame, somebody pays, but not before the target has said what
    /// it applied: what was only not acknowledged yet is progress.
    pub(super) fn lane_closed(&mut self, lane: LaneId, cause: Failure) {
        let Some(state) = self.lanes.get_mut(&lane).filter(|state| state.phase != LanePhase::Closed) else {
            return;
        };
        state.phase = LanePhase::Closed;
        if cause.class() == Class::Fabric {
            state.lost_to = Some((cause.clone(), self.now));
            self.last_failure = Some(cause.clone());
            self.health.outage_began();
            self.end_unretried(lane, &cause);
            if self.wants_link() {
                self.begin_cycle();
            }
        }
        let Some(state) = self.lanes.get_mut(&lane) else { return };
        match state.fenced.take() {
            Some(record) => self.settle_lane(lane, &record),
            None if self.link.is_up() => self.actions.push(Action::FenceLane(lane)),
            None => {}
        }
    }

    /// Where no retry was allowed at all, any lost part is the end, at once.
    fn end_unretried(&mut self, lane: LaneId, cause: &Failure) {
        let Some(state) = self.lanes.get(&lane) else { return };
        let hit: BTreeSet<TransferId> = state.in_doubt().map(|assigned| assigned.transfer).collect();
        for transfer in hit {
            let Some(run) = self.runs.get_mut(&transfer).filter(|run| !run.is_ending()) else { continue };
            if !run.admitted.policy.outlives_failed_open() {
                run.count_loss(self.now);
                self.end(transfer, cause.clone());
            }
        }
    }

    /// The transfer whose part was the first that the path lost pays for the lane's death, as of then.
    fn charge(&mut self, payer: TransferId, cause: Failure, when: Instant) {
        let Some(run) = self.runs.get_mut(&payer).filter(|run| !run.is_ending()) else { return };
        match run.count_loss(when) {
            Verdict::Retry { .. } => self.counts.retries += 1,
            Verdict::GiveUp => self.end(payer, cause),
        }
    }

    /// The target's confirmation (I2). Acted on only when this side's owner has said closed too.
    pub(super) fn lane_fenced(&mut self, lane: LaneId, record: LaneRecord) {
        let Some(state) = self.lanes.get_mut(&lane) else { return };
        if state.phase == LanePhase::Closed {
            self.settle_lane(lane, &record);
            return;
        }
        state.fenced = Some(record);
        self.close_lane(lane, Failure::new(Reason::ConnectionLost, "the target fenced the lane"));
    }

    fn settle_lane(&mut self, lane: LaneId, record: &LaneRecord) {
        let Some(mut state) = self.lanes.remove(&lane) else { return };
        let (lost_to, mut payer) = (state.lost_to.take(), None);
        // For READ the target's record says what it sent; what was applied here, this side has said itself.
        let nothing = LaneRecord::default();
        let record = if state.kind == LaneKind::Read { &nothing } else { record };
        for fate in resolve(state, record) {
            match fate {
                Fate::Applied(assigned) => self.acknowledged(lane, assigned.transfer, assigned.part),
                Fate::Refused(assigned, failure) => {
                    self.part_refused(assigned.transfer, assigned.part, failure);
                    self.lost(lane, assigned.transfer, assigned.part);
                }
                Fate::Lost(assigned) => {
                    self.lost(lane, assigned.transfer, assigned.part);
                    // Newest first: the last one named was the first on the lane.
                    payer = Some(assigned.transfer);
                }
            }
        }
        if let (Some((cause, when)), Some(payer)) = (lost_to, payer) {
            self.charge(payer, cause, when);
        }
    }

    /// A target that confirms no fence is given up as a whole: the next Accept confirms them all (I2, I8).
    pub(super) fn shed_unfenced_lanes(&mut self) {
        let unfenced = self.lanes.values().filter(|lane| lane.phase == LanePhase::Closed).count();
        if self.link.is_up() && self.shutdown.is_none() && unfenced >= MAX_DYING_LANES {
            let message = format!("the target has not confirmed the fence of {unfenced} lanes");
            let failure = Failure::new(Reason::ConnectionLost, message);
            self.actions.push(Action::Disconnect(failure.clone()));
            self.apply(Event::ControlEnded(failure));
        }
    }

    fn lost(&mut self, lane: LaneId, transfer: TransferId, part: u32) {
        let Some(run) = self.runs.get_mut(&transfer) else { return };
        run.lost(part);
        self.queue(transfer);
        self.out_of_doubt(lane, transfer);
    }

    pub(super) fn lane_wake(&self, lane: &LaneState) -> Option<Instant> {
        (lane.is_open() && lane.outstanding() > 0).then(|| lane.moved.1 + self.policy.retry.progress_timeout)
    }

    /// A lane on which nothing moves although parts are in doubt is given up (fabric).
    pub(super) fn retire_stuck_lanes(&mut self) {
        let stuck: Vec<LaneId> = self
            .lanes
            .iter()
            .filter(|(_, lane)| self.lane_wake(lane).is_some_and(|at| at <= self.now))
            .map(|(id, _)| *id)
            .collect();
        for lane in stuck {
            let timeout = self.policy.retry.progress_timeout.as_millis();
            let message = format!("no byte moved on lane {lane} for {timeout} ms");
            self.close_lane(lane, Failure::new(Reason::ProgressTimeout, message));
        }
    }
}

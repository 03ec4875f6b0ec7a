//! How transfers end: DONE when every part was acknowledged, otherwise by proof, half by half (I1).
//!
//! The first step of the settle ladder, *stop*: nothing new starts, the own gate proves this side, the target's
//! gate proves the other. It disturbs no other transfer and closes no lane. Where the peer cannot answer, the
//! report says UNCONFIRMED; where this side cannot be proven in time, the answer is UNSETTLED until it is.

use super::{Action, Outbound};
use crate::{
    domain::{Failure, LaneId, Op, Outcome, PeerHalf, Reason, Report, TransferId},
    policy::{Origin, disposition},
    transfer::run::{End, Ending, Phase, Run},
};

/// The end of a transfer of which no part was started: both halves are settled as they are.
pub(super) fn untouched(failure: &Failure) -> End<'_> {
    End { outcome: Ending::outcome_of(failure), peer_half: PeerHalf::Confirmed, failure: Some(failure) }
}

impl Outbound {
    pub(super) fn finish_if_done(&mut self, transfer: TransferId) {
        if !self.runs.get(&transfer).is_some_and(Run::is_done) {
            return;
        }
        if let Some(run) = self.runs.remove(&transfer) {
            self.health.success(run.admitted.op);
            let report = run.report(End::DONE, self.path, self.now);
            self.finish(run, report);
        }
    }

    /// Decides that the transfer is to be over. Nothing happens where that was decided before.
    pub(super) fn end(&mut self, transfer: TransferId, failure: Failure) {
        let Some(run) = self.runs.get_mut(&transfer).filter(|run| !run.is_ending()) else { return };
        let (op, threshold) = (run.admitted.op, run.admitted.failure_threshold);
        let mut ending = Ending::decided(failure.clone(), self.now);
        let lanes = self.lanes.iter().filter(|(_, lane)| lane.last_of(transfer).is_some());
        ending.peer_pending = lanes.map(|(id, _)| *id).collect();
        let in_doubt = run.flying() > 0;
        if let Some(payload) = run.payload.clone().filter(|_| in_doubt) {
            self.actions.push(Action::StopLocal(payload));
        }
        ending.own_settled = !in_doubt;
        run.end(ending);
        if disposition(failure.reason, Origin::Peer).counts && !self.probing.is(transfer) {
            self.given_up(op, threshold);
        }
        self.finish_if_settled(transfer);
    }

    /// This side is proven. Now the target is asked for its side, naming the last sequence of each lane.
    pub(super) fn local_quiet(&mut self, transfer: TransferId) {
        let Some(ending) = self.ending(transfer) else { return };
        ending.own_settled = true;
        let marks: Vec<(LaneId, u64)> =
            self.lanes.iter().filter_map(|(id, lane)| Some((*id, lane.last_of(transfer)?))).collect();
        if self.link.is_up() && !marks.is_empty() {
            self.actions.push(Action::StopPeer(transfer, marks));
        }
        self.finish_if_settled(transfer);
    }

    pub(super) fn peer_stopped(&mut self, transfer: TransferId) {
        if let Some(ending) = self.ending(transfer).filter(|ending| !ending.peer_lost) {
            ending.peer_pending.clear();
            self.finish_if_settled(transfer);
        }
    }

    /// Nobody is left who could say anything of the peer's half: what is not proven now never will be.
    pub(super) fn peer_is_lost(&mut self) {
        for run in self.runs.values_mut() {
            if let Phase::Ending(ending) = &mut run.phase {
                ending.peer_lost = true;
            }
        }
        self.finish_settled();
    }

    /// A part of the transfer is no longer in doubt on the lane.
    pub(super) fn out_of_doubt(&mut self, lane: LaneId, transfer: TransferId) {
        let still = self.lanes.get(&lane).is_some_and(|state| state.last_of(transfer).is_some());
        if !still && let Some(ending) = self.ending(transfer).filter(|ending| !ending.peer_lost) {
            ending.peer_pending.remove(&lane);
            self.finish_if_settled(transfer);
        }
    }

    pub(super) fn local_regions_retired(&mut self) {
        self.fail_waiting(&Failure::plain(Reason::RegionChanged), Run::has_lost_regions);
    }

    /// Ends what is past its deadline, and waits for nobody's word longer than is allowed.
    pub(super) fn expire(&mut self) {
        for transfer in self.runs.due(self.now) {
            let Some(run) = self.runs.get_mut(&transfer) else { continue };
            let late = run.deadline() <= self.now;
            match &mut run.phase {
                Phase::Ending(ending) if ending.own_settled => self.finish_if_settled(transfer),
                Phase::Ending(ending) => {
                    ending.told_unsettled = true;
                    let failure = ending.failure.clone();
                    let end = End {
                        outcome: Outcome::Unsettled,
                        peer_half: PeerHalf::Unconfirmed,
                        failure: Some(&failure),
                    };
                    let report = run.report(end, self.path, self.now);
                    self.actions.push(Action::Unsettled(transfer, report));
                }
                _ if late => {
                    let deadline = run.admitted.policy.deadline.as_millis();
                    let message = format!("not done within {deadline} ms");
                    self.end(transfer, Failure::new(Reason::Deadline, message));
                }
                _ => {
                    run.not_before = None;
                    self.queue(transfer);
                }
            }
        }
    }

    pub(super) fn finish_settled(&mut self) {
        let ending: Vec<TransferId> =
            self.runs.iter().filter(|(_, run)| run.is_ending()).map(|(id, _)| *id).collect();
        for transfer in ending {
            self.finish_if_settled(transfer);
        }
    }

    /// Reports once the own half is proven and the peer's half is proven too, or will not be.
    fn finish_if_settled(&mut self, transfer: TransferId) {
        let (up, peer_wait, now) = (self.link.is_up(), self.policy.peer_wait, self.now);
        let Some(ending) = self.ending(transfer).filter(|ending| ending.own_settled) else { return };
        let peer_half = match ending.peer_pending.is_empty() {
            true => PeerHalf::Confirmed,
            false if up && !ending.peer_lost && now < ending.peer_deadline(peer_wait) => return,
            false => PeerHalf::Unconfirmed,
        };
        let Some(run) = self.runs.remove(&transfer) else { return };
        let Phase::Ending(ending) = &run.phase else { return };
        let end = End { outcome: ending.outcome, peer_half, failure: Some(&ending.failure) };
        let report = run.report(end, self.path, self.now);
        self.finish(run, report);
    }

    fn finish(&mut self, run: Run, report: Report) {
        if self.probing.is(run.admitted.id) {
            self.probe_step(&report);
            return;
        }
        match report.outcome {
            Outcome::Done => self.counts.done += 1,
            _ => self.counts.failed += 1,
        }
        self.actions.push(Action::Finish(Box::new(run), report));
    }

    fn given_up(&mut self, op: Op, own_threshold: Option<u32>) {
        let change = self.health.given_up(op, own_threshold, self.now, self.draw);
        self.health_changed(change);
    }

    fn ending(&mut self, transfer: TransferId) -> Option<&mut Ending> {
        match &mut self.runs.get_mut(&transfer)?.phase {
            Phase::Ending(ending) => Some(ending),
            _ => None,
        }
    }
}

//! Revocations, from both ends: what the target has revoked ends transfers to it, what the own engine has revoked
//! ends its own. Wholly, and queued, backing off and flying ones alike.
//!
//! The list of a target is acted on and not kept: whoever is admitted later was admitted under what it says. A
//! transfer of pages that is not planned yet names no addresses; what is revoked under it the target refuses
//! part by part.

use super::{Action, Outbound};
use crate::{
    domain::{Epoch, Failure, Incarnation, TransferId},
    policy::{Hit, Revocations},
    transfer::run::{Phase, Request, Run},
};

/// Whose addresses a revocation names.
#[derive(Clone, Copy)]
enum Side {
    /// The own engine's.
    Here,
    /// The target's.
    There,
}

impl Outbound {
    /// The target has revoked, or told at the opening what it had revoked before.
    pub(super) fn revoked(&mut self, revoked: &Revocations) {
        let Some(peer) = &mut self.peer else { return };
        peer.epoch = peer.epoch.max(revoked.epoch());
        self.end_hit(revoked, Side::There);
        // Nothing of what was hit is started after this message.
        self.actions.push(Action::RevocationsSeen(revoked.epoch()));
    }

    pub(super) fn end_hit_there(&mut self, revoked: &Revocations) {
        self.end_hit(revoked, Side::There);
    }

    /// The own engine has revoked. Answered with everyone it hits whose own half is not settled, those that end
    /// for another reason included.
    pub(super) fn revoked_here(&mut self, ticket: u64, revoked: &Revocations) {
        let hit = self.end_hit(revoked, Side::Here);
        self.actions.push(Action::HitHere(ticket, hit));
    }

    fn end_hit(&mut self, revoked: &Revocations, side: Side) -> Vec<TransferId> {
        let hit = |(id, run): (&TransferId, &Run)| Some((*id, self.hit(run, revoked, side)?));
        let hit: Vec<(TransferId, Failure)> = self.runs.iter().filter_map(hit).collect();
        let ids = hit.iter().map(|(id, _)| *id).collect();
        for (transfer, failure) in hit {
            self.end(transfer, failure);
        }
        ids
    }

    fn hit(&self, run: &Run, revoked: &Revocations, side: Side) -> Option<Failure> {
        let admitted = match side {
            Side::Here => run.admitted.own_epoch,
            // Not admitted yet: its tag alone may speak against it.
            Side::There => run.admit_epoch.unwrap_or(Epoch(u64::MAX)),
        };
        let tag = run.admitted.tag;
        let pick = |local: u64, remote: u64, length: u64| match side {
            Side::Here => (local, length),
            Side::There => (remote, length),
        };
        let judged = match (&*run.admitted.request, &run.payload) {
            (Request::Slices(batch), _) => {
                let slices = batch.iter().map(|(local, remote, length)| pick(local, remote, length));
                revoked.judge_known(admitted, tag, slices, self.now)
            }
            (Request::Pages(_), Some(payload)) => {
                let runs = payload.runs.iter().map(|run| pick(run.local, run.remote, run.length));
                revoked.judge_known(admitted, tag, runs, self.now)
            }
            (Request::Pages(_), None) => revoked.judge_known(admitted, tag, [], self.now),
        };
        let hit = judged.err()?;
        let mut failure = Failure::from(hit);
        // A run of pages is no slice that the caller could name.
        if matches!((hit, &*run.admitted.request), (Hit::Run(_), Request::Pages(_))) {
            failure.index = None;
        }
        Some(failure)
    }

    /// Whether nobody on this node touches memory for the transfer any more.
    pub fn is_settled_here(&self, transfer: TransferId) -> bool {
        match self.runs.get(&transfer).map(|run| &run.phase) {
            None => true,
            Some(Phase::Ending(ending)) => ending.own_settled,
            Some(Phase::Waiting { .. } | Phase::Moving) => false,
        }
    }

    /// Whether it is here, ending or not.
    pub fn carries(&self, transfer: TransferId) -> bool {
        self.runs.contains_key(&transfer)
    }

    /// The own engine's epoch under which the transfer was admitted; none for a probe's.
    pub fn own_epoch(&self, transfer: TransferId) -> Option<Epoch> {
        let run = self.runs.get(&transfer).filter(|_| !self.probing.is(transfer));
        run.map(|run| run.admitted.own_epoch)
    }

    /// The newest epoch known of the endpoint, and of which incarnation. After a reset nobody is known there.
    pub fn known(&self) -> Option<(Incarnation, Epoch)> {
        self.peer.as_ref().filter(|_| !self.accepts_anyone).map(|peer| (peer.incarnation, peer.epoch))
    }
}

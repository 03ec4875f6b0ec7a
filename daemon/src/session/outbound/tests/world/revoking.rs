//! Memory that is taken back, at either end.

use std::sync::Arc;

use super::{super::rig::*, World};
use crate::{
    domain::{AddressRange, Epoch, Incarnation, TransferId},
    policy::{RevocationLimits, Revocations},
    session::outbound::{Event, PlanFailure, PlanOrder},
    transport::PART_BYTES,
};

/// The memory of a transfer, on both sides.
fn piece(transfer: TransferId, parts: u64) -> AddressRange {
    AddressRange::new(slot(transfer.0[0]), (parts * PART_BYTES).max(1)).expect("a piece")
}

impl World {
    /// The target gives the memory of one transfer to another request.
    pub(in super::super) fn revoke(&mut self, transfer: TransferId, parts: u64) {
        self.revoked.revoke(vec![piece(transfer, parts)]);
        // Whoever was never met, or is somebody else by now, has admitted nothing.
        let here =
            |known: Option<(Incarnation, Epoch)>| known.is_some_and(|(who, _)| who == self.incarnation);
        let admitted = match self.inbox.iter().find(|call| call.id == transfer) {
            Some(call) => here(call.known),
            None => {
                let run = self.rig.core.runs.get(&transfer);
                run.is_some_and(|run| run.admit_epoch.is_some()) && here(self.rig.core.known())
            }
        };
        if admitted {
            self.doomed.insert(transfer);
        }
    }

    /// The own engine gives the memory of one transfer to another request.
    pub(in super::super) fn revoke_here(&mut self, transfer: TransferId, parts: u64) {
        let told = self.own.epoch();
        self.own.revoke(vec![piece(transfer, parts)]);
        self.own_doomed.insert(transfer);
        let now = self.rig.now;
        let alone = Revocations::restore(RevocationLimits::ranges(1), self.own.since(told, now), now);
        self.feed(Event::RevokedHere(self.own.epoch().0, Arc::new(alone.expect("a good list"))));
        let (_, hit) = self.rig.hit_here.pop().expect("an answer");
        assert!(hit.iter().all(|hit| *hit == transfer), "only whoever is hit");
    }

    pub(super) fn tell_revocations(&mut self) {
        let news = self.revoked.since(self.told, self.rig.now);
        self.told = news.epoch;
        let limits = RevocationLimits::ranges(news.ranges.len());
        let news = Revocations::restore(limits, news, self.rig.now).expect("a good list");
        self.feed(Event::Revoked(Box::new(news)));
    }

    /// As the driver does it: held against what the own engine has revoked when it is taken.
    pub(super) fn plan(&self, order: &PlanOrder) -> Event {
        let planned = self.rig.planned(order);
        let transfer = order.order.transfer;
        let Event::Planned(_, boot, Ok(payload)) = &planned else { return planned };
        let Some(admitted) = self.rig.core.own_epoch(transfer) else { return planned };
        let runs = payload.runs.iter().map(|run| (run.local, run.length));
        match self.own.judge(admitted, None, runs, self.rig.now) {
            Ok(()) => planned,
            Err(hit) => {
                let fault = PlanFailure { failure: hit.into(), wants_newer_table: false };
                Event::Planned(transfer, *boot, Err(fault))
            }
        }
    }
}

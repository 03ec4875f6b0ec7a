//! From what an engine asked for to parts: which table a plan is made from, and when it is made anew.
//!
//! A plan is only as good as the table and the daemon it was made from. A look-up that misses asks once for the
//! newest table, because engines talk faster than tables do; a plan from the tables of another boot is thrown
//! away. Being planned binds a transfer to the incarnation whose addresses it uses (I4).

use std::sync::Arc;

use super::{Action, Outbound, PlanFailure, PlanOrder};
use crate::{
    domain::{BootId, Failure, Reason, TransferId},
    session::PeerTable,
    transfer::{plan::Order, run::Run},
    transport::Payload,
};

impl Outbound {
    /// Asks for a plan if the target's table is known; otherwise the opening of the session will.
    pub(super) fn plan(&mut self, run: &mut Run) {
        let Some(peer) = self.peer.as_ref().filter(|_| self.link.is_up()) else { return };
        // Nobody knows more than the peer has said, whatever an engine brings along.
        let admit_epoch = run.admit_epoch.map_or(peer.epoch, |epoch| epoch.min(peer.epoch));
        run.admit_epoch = Some(admit_epoch);
        run.expects = Some(peer.incarnation);
        let table = peer.table.clone();
        let (transfer, request, op) = (run.admitted.id, run.admitted.request.clone(), run.admitted.op);
        let (tag, boot) = (run.admitted.tag, peer.boot);
        let order = Order { transfer, op, tag, admit_epoch };
        self.actions.push(Action::Plan(PlanOrder { order, boot, request, table }));
    }

    pub(super) fn planned(
        &mut self,
        transfer: TransferId,
        boot: BootId,
        result: Result<Payload, PlanFailure>,
    ) {
        let waits = |run: &&mut Run| run.is_waiting();
        let Some(run) = self.runs.get_mut(&transfer).filter(waits) else { return };
        if self.peer.as_ref().is_none_or(|peer| peer.boot != boot) {
            // Made from the tables of a daemon that is gone: its numbers mean nothing now.
            return self.plan_again(transfer);
        }
        match result {
            Ok(payload) => {
                run.planned(Arc::new(payload));
                if run.has_lost_regions() {
                    // Unregistered since it was admitted: nothing is sent, and the leases end with it.
                    return self.end(transfer, Failure::plain(Reason::RegionChanged));
                }
                self.queue(transfer);
                self.finish_if_done(transfer);
            }
            // The opening of the session brings the newest table and plans again.
            Err(fault) if fault.wants_newer_table && !self.link.is_up() => {}
            Err(fault) if fault.wants_newer_table && !run.asked_table() => {
                let nonce = self.next_nonce;
                self.next_nonce += 1;
                run.ask_table(nonce);
                self.actions.push(Action::RequestTable(nonce));
            }
            Err(fault) => self.end(transfer, fault.failure),
        }
    }

    pub(super) fn table(&mut self, table: PeerTable, nonce: u64) {
        let Some(peer) = &mut self.peer else { return };
        if table.version >= peer.table.version {
            peer.table = Arc::new(table);
        }
        if nonce != 0 {
            self.plan_where(|run| run.waits_for_table(nonce));
        }
    }

    pub(super) fn plan_where(&mut self, choose: impl Fn(&Run) -> bool) {
        let chosen: Vec<TransferId> =
            self.runs.iter().filter(|(_, run)| choose(run)).map(|(id, _)| *id).collect();
        for transfer in chosen {
            self.plan_again(transfer);
        }
    }

    fn plan_again(&mut self, transfer: TransferId) {
        if let Some(mut run) = self.runs.remove(&transfer) {
            self.plan(&mut run);
            self.runs.insert(transfer, run);
        }
    }
}

//! What the own engine revokes or cancels, at one of its sessions: whose answers wait for what, and plans made too
//! late.

use std::collections::HashMap;

use tokio::sync::oneshot;

use crate::{
    domain::{Failure, TransferId},
    memory::EngineMemory,
    session::outbound::{Event, Outbound, PlanFailure},
};

/// Calls that wait for the proof that nobody on this node touches what they hit. As many as there are callers:
/// whoever gives up waiting is forgotten.
#[derive(Debug, Default)]
pub(super) struct Revokes {
    waiting: HashMap<u64, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    answer: oneshot::Sender<()>,
    /// Nothing before the core has said whom it hit.
    hit: Option<Vec<TransferId>>,
}

impl Revokes {
    pub(super) fn begin(&mut self, ticket: u64, answer: oneshot::Sender<()>) {
        self.waiting.insert(ticket, Waiting { answer, hit: None });
    }

    pub(super) fn hit(&mut self, ticket: u64, transfers: Vec<TransferId>) {
        if let Some(waiting) = self.waiting.get_mut(&ticket) {
            waiting.hit = Some(transfers);
        }
    }

    /// Answers whoever can be answered.
    pub(super) fn answer(&mut self, core: &Outbound) {
        if self.waiting.is_empty() {
            return;
        }
        self.waiting.retain(|_, waiting| !waiting.answer.is_closed());
        let settled = |_: &u64, waiting: &mut Waiting| {
            waiting.hit.as_ref().is_some_and(|hit| hit.iter().all(|id| core.is_settled_here(*id)))
        };
        for (_, waiting) in self.waiting.extract_if(settled) {
            let _ = waiting.answer.send(());
        }
    }
}

/// A plan is held against what the own engine has revoked when it is *taken*, in turn with its revocations: of a
/// transfer and a revocation that cross on their way to the session, one always meets the other.
pub(super) fn judge_plan(core: &Outbound, memory: &EngineMemory, event: Event) -> Event {
    let Event::Planned(transfer, boot, Ok(payload)) = event else { return event };
    let Some(admitted) = core.own_epoch(transfer) else { return Event::Planned(transfer, boot, Ok(payload)) };
    let runs = payload.runs.iter().map(|run| (run.local, run.length));
    let result = match memory.revocations().judge(admitted, payload.tag, runs) {
        Ok(()) => Ok(payload),
        Err(hit) => {
            let failure = Failure { index: None, ..Failure::from(hit) };
            Err(PlanFailure { failure, wants_newer_table: false })
        }
    };
    Event::Planned(transfer, boot, result)
}

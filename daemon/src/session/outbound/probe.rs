//! Probing: 4 KiB both ways through the very path that transfers take, and the healing that follows.

use std::{sync::Arc, time::Duration};

use super::{Action, Link, Outbound};
use crate::{
    domain::{Epoch, Failure, Op, Outcome, Reason, Report, SliceBatch, TransferId},
    memory::{PROBE_BASE, PROBE_BYTES},
    policy::{HealthChange, RetryPolicy},
    transfer::run::{Admitted, Request},
};

/// A probe that is not through by then has failed.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Callers that may wait for one probe.
const MAX_TICKETS: usize = 1024;

/// The probe under way and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Probing {
    leg: Option<(TransferId, Op)>,
    /// At most [`MAX_TICKETS`].
    tickets: Vec<u64>,
}

impl Probing {
    pub(super) fn is(&self, transfer: TransferId) -> bool {
        self.leg.is_some_and(|(leg, _)| leg == transfer)
    }
}

impl Outbound {
    /// Somebody asks. Joins a probe that is under way; a failed session is probed at once.
    pub(super) fn probe(&mut self, ticket: u64) {
        if let Some(failure) = &self.shutdown {
            self.actions.push(Action::Probed(ticket, Err(failure.clone())));
            return;
        }
        if self.probing.tickets.len() >= MAX_TICKETS {
            let failure = Failure::new(Reason::Limit, format!("{MAX_TICKETS} callers wait for the probe"));
            self.actions.push(Action::Probed(ticket, Err(failure)));
            return;
        }
        self.probing.tickets.push(ticket);
        if self.probing.leg.is_none() {
            self.health.probe_asked();
            self.begin_probe();
        }
    }

    /// Starts the probe of a failed session when its time has come.
    pub(super) fn run_probe(&mut self) {
        let due = self.probe_at.is_some_and(|at| at <= self.now);
        if due && self.shutdown.is_none() {
            self.probe_at = None;
            if self.health.probe_due(self.now) == Some(HealthChange::StartProbe) && self.probing.leg.is_none()
            {
                self.begin_probe();
            }
        }
    }

    /// A probe is an attempt in its own right: it does not wait for the pace of the others.
    fn begin_probe(&mut self) {
        if matches!(self.link, Link::Backoff(_)) {
            self.link = Link::Idle;
        }
        self.probe_leg(Op::Write);
    }

    /// An ordinary transfer without retries, past the refusal that meets others on a failed session.
    fn probe_leg(&mut self, op: Op) {
        let mut id = [0xff; 16];
        id[..8].copy_from_slice(&self.next_lane.to_le_bytes());
        id[8..].copy_from_slice(&self.next_nonce.to_le_bytes());
        self.next_nonce += 1;
        let id = TransferId(id);
        let ends = vec![PROBE_BASE];
        let batch =
            SliceBatch { local: ends.clone(), remote: ends, lengths: vec![], uniform: Some(PROBE_BYTES) };
        let admitted = Admitted {
            teller: None,
            id,
            op,
            request: Arc::new(Request::Slices(batch)),
            local: vec![],
            tag: None,
            failure_threshold: None,
            policy: RetryPolicy { attempts: 1, deadline: PROBE_TIMEOUT, ..self.policy.retry },
            received: self.now,
            known: None,
            // Its memory is the daemons' own: no engine revokes it.
            own_epoch: Epoch(u64::MAX),
        };
        self.probing.leg = Some((id, op));
        let mut run = self.admit(admitted);
        self.plan(&mut run);
        self.runs.insert(id, run);
    }

    /// A leg ended: WRITE is followed by READ, READ ends the probe.
    pub(super) fn probe_step(&mut self, report: &Report) {
        let leg = self.probing.leg.take();
        if report.outcome == Outcome::Done && leg.is_some_and(|(_, op)| op == Op::Write) {
            self.probe_leg(Op::Read);
            return;
        }
        let result = match report.outcome {
            Outcome::Done => Ok(()),
            _ => Err(report.failure.clone().unwrap_or_else(|| Failure::plain(Reason::Unspecified))),
        };
        let change = match &result {
            Ok(()) => self.health.probe_ok(),
            Err(failure) => {
                self.last_failure = Some(failure.clone());
                self.health.probe_failed(self.now, self.draw)
            }
        };
        self.health_changed(change);
        for ticket in std::mem::take(&mut self.probing.tickets) {
            self.actions.push(Action::Probed(ticket, result.clone()));
        }
    }

    pub(super) fn health_changed(&mut self, change: Option<HealthChange>) {
        if self.shutdown.is_some() {
            return;
        }
        match change {
            Some(HealthChange::Failed { next_probe } | HealthChange::ProbeAgain { next_probe }) => {
                self.probe_at = Some(next_probe);
            }
            Some(HealthChange::Recovered) => self.probe_at = None,
            Some(HealthChange::StartProbe) | None => {}
        }
    }
}

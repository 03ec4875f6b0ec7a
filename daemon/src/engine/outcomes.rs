//! Where an engine's sessions tell what concerns the engine: its log, its event queue, the node's metrics.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{EngineEvent, EventQueue};
use crate::{
    domain::{Failure, Incarnation, Report, SessionId, TransferId},
    peer::Outcomes,
    session::outbound::State,
    telemetry::{Metrics, SessionState},
    transfer::log::TransferLog,
};

#[derive(Debug)]
pub(super) struct Teller {
    log: Arc<TransferLog>,
    events: Arc<EventQueue>,
    metrics: Arc<Metrics>,
    /// As last counted, so that what is counted in is counted out.
    states: Mutex<HashMap<SessionId, SessionState>>,
}

impl Teller {
    pub(super) fn new(log: Arc<TransferLog>, events: Arc<EventQueue>, metrics: Arc<Metrics>) -> Self {
        Self { log, events, metrics, states: Mutex::default() }
    }
}

impl Outcomes for Teller {
    fn unsettled(&self, transfer: TransferId, report: Report) {
        tracing::warn!(%transfer, failure = ?report.failure, "settlement is not proven yet");
        self.log.unsettled(transfer, report);
    }

    fn settled(&self, report: Report) {
        self.events.push(EngineEvent::TransferSettled(report));
    }

    fn session_changed(
        &self,
        session: &SessionId,
        state: State,
        pin: Option<Incarnation>,
        cause: Option<Failure>,
    ) {
        let counted = match state {
            State::Idle => SessionState::Idle,
            State::Opening => SessionState::Opening,
            State::Healthy => SessionState::Healthy,
            State::Recovering => SessionState::Recovering,
            State::Failed => SessionState::Failed,
        };
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let before = states.insert(session.clone(), counted);
        drop(states);
        self.metrics.session_changed(before, Some(counted));
        match (state, &cause) {
            (State::Failed, Some(cause)) => tracing::error!(%session, %cause, "session failed"),
            (State::Recovering, Some(cause)) => {
                tracing::info!(%session, %cause, "session is being re-opened")
            }
            _ => tracing::info!(%session, ?state, "session"),
        }
        self.events.push(EngineEvent::SessionChanged(session.clone(), state, pin, cause));
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        let states = self.states.get_mut().unwrap_or_else(PoisonError::into_inner);
        states.drain().for_each(|(_, state)| self.metrics.session_changed(Some(state), None));
    }
}

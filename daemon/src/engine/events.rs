//! What an engine is told over its lease: a bounded queue that never blocks the daemon.
//!
//! Of each session only the last word waits: how it stands, and whom it is pinned to. An engine that reads late
//! misses steps on the way, and never where they led: it brings the pins along after a restart (I4).

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use crate::{
    domain::{Failure, Incarnation, Report, SessionId},
    session::outbound::State,
};

/// Events that may wait for an engine that does not read. As many as there are peers that a client remembers, so
/// that no pin is dropped here that would not be dropped there.
const LIMIT: usize = 1024;

/// One thing an engine is told.
#[derive(Clone, Debug)]
pub enum EngineEvent {
    /// A session changed its state, or whom it is pinned to.
    SessionChanged(SessionId, State, Option<Incarnation>, Option<Failure>),
    /// A transfer that was answered UNSETTLED is over.
    TransferSettled(Report),
    /// The daemon goes away within this time.
    Draining(Duration),
}

impl EngineEvent {
    /// Whose last word it is.
    fn session(&self) -> Option<&SessionId> {
        match self {
            Self::SessionChanged(session, ..) => Some(session),
            Self::TransferSettled(_) | Self::Draining(_) => None,
        }
    }
}

/// The queue. When it is full the oldest event that can be asked for is dropped, the newcomer included; only for
/// the word of a session, where all that waits is such words, the one of the session that changed longest ago.
#[derive(Debug, Default)]
pub struct EventQueue {
    waiting: Mutex<VecDeque<EngineEvent>>,
    more: Notify,
}

impl EventQueue {
    /// Adds an event.
    pub fn push(&self, event: EngineEvent) {
        let mut waiting = self.waiting();
        if let Some(session) = event.session() {
            waiting.retain(|earlier| earlier.session() != Some(session));
        }
        if waiting.len() == LIMIT {
            let expendable = waiting.iter().position(|earlier| earlier.session().is_none());
            match (expendable, event.session()) {
                (Some(index), _) => waiting.remove(index),
                (None, Some(_)) => waiting.pop_front(),
                (None, None) => return,
            };
        }
        waiting.push_back(event);
        drop(waiting);
        self.more.notify_one();
    }

    /// The next event, when there is one. One reader: the lease.
    pub async fn next(&self) -> EngineEvent {
        loop {
            if let Some(event) = self.waiting().pop_front() {
                return event;
            }
            self.more.notified().await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<EngineEvent>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_events_are_kept_for_an_engine_that_does_not_read() {
        let queue = EventQueue::default();
        for second in 0..LIMIT as u64 + 5 {
            queue.push(EngineEvent::Draining(Duration::from_secs(second)));
        }
        let EngineEvent::Draining(first) = queue.next().await else { panic!("another event") };
        assert_eq!(first, Duration::from_secs(5));
        assert_eq!(queue.waiting().len(), LIMIT - 1);
    }

    fn changed(port: usize, pin: Option<u8>) -> EngineEvent {
        let session = SessionId::new(format!("peer:{port}"));
        EngineEvent::SessionChanged(session, State::Healthy, pin.map(|byte| Incarnation([byte; 32])), None)
    }

    /// The port of each session that waits, and whom it is pinned to.
    fn pins(queue: &EventQueue) -> Vec<(String, Option<u8>)> {
        let pin = |event: &EngineEvent| match event {
            EngineEvent::SessionChanged(session, _, pin, _) => {
                Some((session.to_string(), pin.map(|incarnation| incarnation.0[0])))
            }
            _ => None,
        };
        queue.waiting().iter().filter_map(pin).collect()
    }

    /// I4: whatever else there is to tell, and however often sessions change meanwhile.
    #[test]
    fn an_engine_that_does_not_read_misses_no_pin() {
        let queue = EventQueue::default();
        queue.push(changed(1, Some(1)));
        queue.push(changed(2, Some(2)));
        queue.push(changed(2, None));
        for round in 0..2 * LIMIT {
            queue.push(EngineEvent::Draining(Duration::ZERO));
            queue.push(changed(3, Some(round as u8)));
        }
        let last = Some((2 * LIMIT - 1) as u8);
        let expected = [("peer:1", Some(1)), ("peer:2", None), ("peer:3", last)];
        assert_eq!(pins(&queue), expected.map(|(session, pin)| (session.to_owned(), pin)));
        assert_eq!(queue.waiting().len(), LIMIT);
    }

    #[test]
    fn what_can_be_asked_for_takes_the_place_of_no_pin() {
        let queue = EventQueue::default();
        (0..LIMIT).for_each(|port| queue.push(changed(port, Some(1))));
        let full = pins(&queue);
        queue.push(EngineEvent::Draining(Duration::ZERO));
        assert_eq!((full.len(), pins(&queue)), (LIMIT, full));
    }

    #[test]
    fn of_more_sessions_than_a_client_remembers_the_last_to_change_are_told() {
        let queue = EventQueue::default();
        (0..LIMIT + 2).for_each(|port| queue.push(changed(port, Some(1))));
        queue.push(changed(2, Some(2)));
        let told = pins(&queue);
        assert_eq!(
            (told.len(), &told[0].0[..], told[LIMIT - 1].clone()),
            (LIMIT, "peer:3", ("peer:2".into(), Some(2)))
        );
    }
}

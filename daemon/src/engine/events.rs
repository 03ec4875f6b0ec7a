//! What an engine is told over its lease: a bounded queue that never blocks the daemon.

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

/// Events that may wait for an engine that does not read.
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

/// The queue. When an engine does not read, the oldest events are dropped: every one of them can be asked for.
#[derive(Debug, Default)]
pub struct EventQueue {
    waiting: Mutex<VecDeque<EngineEvent>>,
    more: Notify,
}

impl EventQueue {
    /// Adds an event.
    pub fn push(&self, event: EngineEvent) {
        let mut waiting = self.waiting();
        if waiting.len() == LIMIT {
            waiting.pop_front();
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
}

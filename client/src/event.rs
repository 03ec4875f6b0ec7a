//! What the daemon tells without being asked, and who listens.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use crate::{Failure, Report, SessionState};

/// What a receiver holds before events are lost to it.
pub(crate) const QUEUE: usize = 1024;
/// Receivers per engine; a further one disconnects the oldest.
const MOST_RECEIVERS: usize = 16;

/// Something happened that nobody asked for.
#[derive(Clone, Debug)]
pub enum Event {
    /// The health of a session to a peer changed.
    SessionChanged {
        /// `host:port` of the peer.
        session: String,
        /// What it is now.
        state: SessionState,
        /// Why, where it is for the worse.
        cause: Option<Failure>,
    },
    /// A transfer reported as UNSETTLED has ended.
    TransferSettled(Report),
    /// A region can no longer be used; unregister it.
    RegionInvalidated {
        /// Its id.
        region: u32,
        /// Why.
        cause: Option<Failure>,
    },
    /// The daemon is about to leave and takes no new transfers.
    Draining {
        /// What transfers under way have left.
        grace: Duration,
    },
    /// The daemon was gone, and the engine is attached again, with all registered that the daemon takes
    /// ([`RegionInvalidated`](Self::RegionInvalidated) told the rest).
    Reattached {
        /// `host:port`: where peers reach this engine now.
        session_id: String,
        /// Where they reached it before, if that was somewhere else: they must be told.
        moved_from: Option<String>,
        /// Of the daemon; the same as before where it had only lost touch with the engine.
        boot_id: [u8; 16],
    },
    /// The lease ended for good: the daemon refuses to attach this engine, or it is not to attach again. The last
    /// event; the receiver disconnects after it.
    Detached {
        /// For people.
        cause: String,
    },
}

/// Hands events to every receiver. The lock is held for a push to each, none of which waits.
#[derive(Debug, Default)]
pub(crate) struct Fanout {
    state: Mutex<State>,
    lost: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    receivers: VecDeque<Receiver>,
    /// Set by the last event.
    detached: Option<Event>,
}

#[derive(Debug)]
enum Receiver {
    Blocking(mpsc::SyncSender<Event>),
    Async(tokio::sync::mpsc::Sender<Event>),
}

impl Receiver {
    /// Whether there is still somebody, and whether the event reached them.
    fn push(&self, event: Event) -> Pushed {
        use tokio::sync::mpsc::error::TrySendError as AsyncError;
        match self {
            Self::Blocking(queue) => match queue.try_send(event) {
                Ok(()) => Pushed::Queued,
                Err(mpsc::TrySendError::Full(_)) => Pushed::Lost,
                Err(mpsc::TrySendError::Disconnected(_)) => Pushed::Gone,
            },
            Self::Async(queue) => match queue.try_send(event) {
                Ok(()) => Pushed::Queued,
                Err(AsyncError::Full(_)) => Pushed::Lost,
                Err(AsyncError::Closed(_)) => Pushed::Gone,
            },
        }
    }
}

#[derive(PartialEq, Eq)]
enum Pushed {
    Queued,
    Lost,
    Gone,
}

impl Fanout {
    pub(crate) fn blocking(&self) -> mpsc::Receiver<Event> {
        let (queue, events) = mpsc::sync_channel(QUEUE);
        self.add(Receiver::Blocking(queue));
        events
    }

    pub(crate) fn asynchronous(&self) -> tokio::sync::mpsc::Receiver<Event> {
        let (queue, events) = tokio::sync::mpsc::channel(QUEUE);
        self.add(Receiver::Async(queue));
        events
    }

    /// Somebody who comes after the end learns of it and is disconnected.
    fn add(&self, receiver: Receiver) {
        let mut state = self.lock();
        if let Some(last) = &state.detached {
            receiver.push(last.clone());
            return;
        }
        if state.receivers.len() == MOST_RECEIVERS {
            state.receivers.pop_front();
        }
        state.receivers.push_back(receiver);
    }

    pub(crate) fn send(&self, event: &Event) {
        self.lock().receivers.retain(|receiver| {
            let pushed = receiver.push(event.clone());
            if pushed == Pushed::Lost {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            pushed != Pushed::Gone
        });
    }

    /// The last event. A receiver whose queue is full sees the disconnection only.
    pub(crate) fn detach(&self, cause: String) {
        let last = Event::Detached { cause };
        self.send(&last);
        let mut state = self.lock();
        state.receivers.clear();
        state.detached = Some(last);
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draining(seconds: u64) -> Event {
        Event::Draining { grace: Duration::from_secs(seconds) }
    }

    #[test]
    fn a_full_receiver_loses_and_counts_and_the_others_do_not() {
        let events = Fanout::default();
        let (idle, mut busy) = (events.blocking(), events.asynchronous());
        for _ in 0..QUEUE + 3 {
            events.send(&draining(1));
            assert!(busy.try_recv().is_ok());
        }
        assert_eq!(events.lost(), 3);
        assert_eq!(idle.try_iter().count(), QUEUE);
    }

    #[test]
    fn the_last_event_is_followed_by_disconnection_also_for_latecomers() {
        let events = Fanout::default();
        let early = events.blocking();
        events.send(&draining(2));
        events.detach("gone".into());
        let late = events.blocking();
        let seen: Vec<_> = early.iter().collect();
        assert!(matches!(seen[..], [Event::Draining { .. }, Event::Detached { .. }]), "{seen:?}");
        let seen: Vec<_> = late.iter().collect();
        assert!(matches!(seen[..], [Event::Detached { .. }]), "{seen:?}");
    }

    #[test]
    fn receivers_are_bounded_and_dropped_ones_forgotten() {
        let events = Fanout::default();
        let receivers: Vec<_> = (0..=MOST_RECEIVERS).map(|_| events.blocking()).collect();
        assert!(matches!(receivers[0].try_recv(), Err(mpsc::TryRecvError::Disconnected)));
        drop(receivers);
        events.send(&draining(1));
        assert!(events.lock().receivers.is_empty());
        assert_eq!(events.lost(), 0);
    }
}

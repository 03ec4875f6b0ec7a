//! Transfers that calls of this engine have in hand, from the moment their ids are known until the calls return.
//!
//! Until a daemon has taken such a transfer up it is nobody's business but this library's: queued, on its way, or held
//! back from a daemon that leaves. So the daemon's word that it does not know an id, or the end of a daemon, says
//! nothing of a transfer that is in here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use crate::{Report, TransferId};

/// Bounded by the calls under way and the queue of submissions. The lock is held for single map operations.
#[derive(Clone, Debug, Default)]
pub(crate) struct Orders(Arc<Mutex<HashMap<TransferId, Entry>>>);

#[derive(Debug)]
struct Entry {
    /// Calls that carry this id at the same time.
    calls: usize,
    /// Goes with the last of them.
    news: watch::Sender<News>,
}

#[derive(Debug, Default)]
struct News {
    cancelled: bool,
    /// Of the call that returned last.
    report: Option<Report>,
}

impl Orders {
    /// A call has the transfer in hand, until what this gives is dropped.
    pub(crate) fn take(&self, id: TransferId) -> InHand {
        let mut orders = self.lock();
        let entry = orders.entry(id).or_insert_with(|| Entry { calls: 0, news: watch::Sender::default() });
        entry.calls += 1;
        InHand { orders: self.clone(), id, news: entry.news.subscribe() }
    }

    /// Joins whoever has the transfer in hand.
    pub(crate) fn find(&self, id: TransferId) -> Option<Joined> {
        self.lock().get(&id).map(|entry| Joined(entry.news.subscribe()))
    }

    /// Has it not be sent if it was not yet, and joins.
    pub(crate) fn cancel(&self, id: TransferId) -> Option<Joined> {
        let orders = self.lock();
        let entry = orders.get(&id)?;
        entry.news.send_modify(|news| news.cancelled = true);
        Some(Joined(entry.news.subscribe()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TransferId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One call's hold on a transfer.
#[derive(Debug)]
pub(crate) struct InHand {
    orders: Orders,
    id: TransferId,
    news: watch::Receiver<News>,
}

impl InHand {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.news.borrow().cancelled
    }

    /// Returns when the caller cancels it.
    pub(crate) async fn cancelled(&self) {
        let mut news = self.news.clone();
        if news.wait_for(|news| news.cancelled).await.is_err() {
            std::future::pending().await
        }
    }

    /// The call returns with this report.
    pub(crate) fn ends_with(&self, report: &Report) {
        if let Some(entry) = self.orders.lock().get(&self.id) {
            entry.news.send_modify(|news| news.report = Some(report.clone()));
        }
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut orders = self.orders.lock();
        let Some(entry) = orders.get_mut(&self.id) else { return };
        entry.calls -= 1;
        if entry.calls == 0 {
            orders.remove(&self.id);
        }
    }
}

/// Somebody who waits for the calls that have a transfer in hand.
#[derive(Debug)]
pub(crate) struct Joined(watch::Receiver<News>);

impl Joined {
    /// Returns when no call has it in hand any more. Nothing where the last one did not say how it ended.
    pub(crate) async fn over(&mut self) -> Option<Report> {
        while self.0.changed().await.is_ok() {}
        self.0.borrow().report.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Failure, Outcome, Reason};

    const ID: TransferId = TransferId([1; 16]);

    #[tokio::test]
    async fn who_joins_waits_for_the_last_call() {
        let orders = Orders::default();
        assert!(orders.find(ID).is_none());
        let (first, second) = (orders.take(ID), orders.take(ID));
        let mut joined = orders.find(ID).unwrap();
        first.ends_with(&Report::untold(ID, Outcome::Failed, Failure::new(Reason::Draining, "")));
        drop(first);
        let patience = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(patience, joined.over()).await.is_err(), "one call goes on");
        second.ends_with(&Report::untold(ID, Outcome::Cancelled, Failure::new(Reason::Cancelled, "")));
        drop(second);
        assert_eq!(joined.over().await.unwrap().outcome, Outcome::Cancelled);
        assert!(orders.find(ID).is_none());
    }

    #[tokio::test]
    async fn all_calls_hear_of_a_cancellation_and_the_next_ones_do_not() {
        let orders = Orders::default();
        assert!(orders.cancel(ID).is_none());
        let calls = [orders.take(ID), orders.take(ID)];
        let mut joined = orders.cancel(ID).unwrap();
        for call in &calls {
            call.cancelled().await;
            assert!(call.is_cancelled());
        }
        drop(calls);
        assert!(joined.over().await.is_none());
        assert!(!orders.take(ID).is_cancelled());
    }
}

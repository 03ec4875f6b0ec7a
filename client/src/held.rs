//! Transfers held back until the engine is attached again: a daemon that leaves did not take them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::TransferId;

/// Bounded by the calls under way: each waits in one. The lock is held for single map operations.
#[derive(Debug, Default)]
pub(crate) struct Held(Mutex<HashMap<TransferId, Arc<Notify>>>);

/// A transfer held back, until dropped.
pub(crate) struct Holding<'a> {
    held: &'a Held,
    id: TransferId,
    cancelled: Arc<Notify>,
}

impl Held {
    /// Nothing where it is held already: the same id again, at the same time.
    pub(crate) fn hold(&self, id: TransferId) -> Option<Holding<'_>> {
        let mut held = self.lock();
        if held.contains_key(&id) {
            return None;
        }
        let cancelled = Arc::new(Notify::new());
        held.insert(id, cancelled.clone());
        Some(Holding { held: self, id, cancelled })
    }

    /// Ends a transfer that is held back. False: it is not.
    pub(crate) fn cancel(&self, id: TransferId) -> bool {
        let cancelled = self.lock().get(&id).cloned();
        cancelled.inspect(|cancelled| cancelled.notify_one()).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TransferId, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holding<'_> {
    /// Returns when the caller cancels it.
    pub(crate) async fn cancelled(&self) {
        self.cancelled.notified().await;
    }
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.held.lock().remove(&self.id);
    }
}

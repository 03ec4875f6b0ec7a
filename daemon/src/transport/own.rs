//! Threads of their own for engines that can make them wait.
//!
//! A copy of assisted memory is over when its engine says so, and a stopped engine says nothing. So no thread serves
//! both such an engine and another: whatever an engine does or does not do, only lanes that touch its memory wait for
//! it. Such a thread begins with the first of these lanes and ends with the last, so there are no more of them than
//! attached engines (`limits.engines`), on the local path than pairs of them.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use crate::memory::EngineMemory;

/// What serves engines of their own, by engines. Each `T` ends its thread when it is dropped.
#[derive(Debug)]
pub(super) struct Own<T>(Mutex<HashMap<Vec<usize>, Weak<Owned<T>>>>);

/// A `T`, as long as a lane needs it.
#[derive(Debug)]
pub(super) struct Owned<T> {
    pub(super) thread: T,
    /// Kept, so that no other engine is mistaken for one of them: they are known by where they are.
    _engines: Vec<Arc<EngineMemory>>,
}

impl<T> Default for Own<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Own<T> {
    /// What serves lanes that touch these engines' memory; nothing where none of it can make anybody wait.
    pub(super) fn of(
        &self,
        touched: &[&Arc<EngineMemory>],
        start: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<Option<Arc<Owned<T>>>> {
        let mut engines: Vec<_> = touched.iter().filter(|memory| memory.is_assisted()).collect();
        if engines.is_empty() {
            return Ok(None);
        }
        engines.sort_unstable_by_key(|memory| Arc::as_ptr(memory));
        engines.dedup_by_key(|memory| Arc::as_ptr(memory));
        let key: Vec<usize> = engines.iter().map(|memory| Arc::as_ptr(memory).addr()).collect();
        let mut by_engines = self.lock();
        if let Some(living) = by_engines.get(&key).and_then(Weak::upgrade) {
            return Ok(Some(living));
        }
        let engines = engines.into_iter().map(|memory| Arc::clone(memory)).collect();
        let owned = Arc::new(Owned { thread: start()?, _engines: engines });
        by_engines.retain(|_, owned| owned.strong_count() > 0);
        by_engines.insert(key, Arc::downgrade(&owned));
        Ok(Some(owned))
    }

    /// Those that serve now.
    pub(super) fn living(&self) -> Vec<Arc<Owned<T>>> {
        self.lock().values().filter_map(Weak::upgrade).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<usize>, Weak<Owned<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

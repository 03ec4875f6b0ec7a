//! Descriptors that an engine handed over and has not registered yet.
//!
//! The fd socket puts them here under a handle that the engine chose; the registration that names the handle
//! takes them away. One shelf per engine: nobody can name another engine's descriptor.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::domain::{Failure, Reason};

/// The descriptors of one engine.
#[derive(Debug)]
pub struct FdShelf {
    /// Held for a look-up or an insertion.
    fds: Mutex<HashMap<u64, Arc<OwnedFd>>>,
    limit: usize,
}

impl FdShelf {
    /// A shelf for at most `limit` descriptors (`limits.fds`).
    pub fn new(limit: usize) -> Self {
        Self { fds: Mutex::default(), limit }
    }

    /// Keeps a descriptor. LIMIT when the shelf is full, BAD_ARGUMENT when the handle is taken; either way the
    /// descriptor is closed.
    pub fn put(&self, handle: u64, fd: OwnedFd) -> Result<(), Failure> {
        let mut fds = self.lock();
        if fds.len() >= self.limit {
            let message = format!("{} descriptors wait to be registered", self.limit);
            return Err(Failure::new(Reason::Limit, message));
        }
        match fds.entry(handle) {
            Entry::Vacant(place) => {
                place.insert(Arc::new(fd));
                Ok(())
            }
            Entry::Occupied(_) => {
                Err(Failure::new(Reason::BadArgument, format!("handle {handle} names a descriptor already")))
            }
        }
    }

    /// The descriptor, which stays: several regions of one call may lie in it.
    pub fn get(&self, handle: u64) -> Option<Arc<OwnedFd>> {
        self.lock().get(&handle).cloned()
    }

    /// The descriptor, and an empty place.
    pub fn take(&self, handle: u64) -> Option<Arc<OwnedFd>> {
        self.lock().remove(&handle)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<OwnedFd>>> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::testing::sealed_memfd;

    #[test]
    fn a_shelf_is_bounded_and_its_handles_are_unique() {
        let shelf = FdShelf::new(2);
        shelf.put(7, sealed_memfd(1)).expect("room");
        assert_eq!(shelf.put(7, sealed_memfd(2)).expect_err("taken").reason, Reason::BadArgument);
        shelf.put(8, sealed_memfd(3)).expect("room");
        assert_eq!(shelf.put(9, sealed_memfd(4)).expect_err("full").reason, Reason::Limit);
        let size = |fd: &OwnedFd| rustix::fs::fstat(fd).expect("fstat").st_size;
        assert_eq!(shelf.get(7).map(|fd| size(&fd)), Some(1));
        assert_eq!(shelf.take(7).map(|fd| size(&fd)), Some(1));
        assert!(shelf.get(7).is_none() && shelf.take(7).is_none());
        shelf.put(9, sealed_memfd(4)).expect("room again");
    }
}

//! What a forked child does with handles it did not ask for.
//!
//! A child shares the parent's sockets and epoll instances. Dropping a connection there would say goodbye to
//! the daemon in the parent's name, and dropping a runtime would unregister the parent's descriptors. So in a
//! child nothing is used and nothing is dropped: the memory is leaked, once.

use crate::Error;

/// A value that only the process that made it may use or drop.
pub(crate) struct Owned<T> {
    /// Taken in `drop` alone.
    value: Option<T>,
    owner: u32,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), owner: std::process::id() }
    }

    /// For talking to the daemon.
    pub(crate) fn get(&self) -> Result<&T, Error> {
        match &self.value {
            Some(value) if self.owner == std::process::id() => Ok(value),
            _ => Err(Error::Forked { owner: self.owner }),
        }
    }

    /// For plain facts, which a child may read as well.
    pub(crate) fn facts(&self) -> &T {
        self.value.as_ref().expect("the value is taken only when the handle is dropped")
    }
}

impl<T: Clone> Clone for Owned<T> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), owner: self.owner }
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            std::mem::forget(self.value.take());
        }
    }
}

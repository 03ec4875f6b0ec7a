//! The engine for callers with a tokio runtime of their own.

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    EngineOptions, Error, Event, Limits, Memory, Probe, ProcessAccess, Range, Region, Report, Settlement,
    Transfer, TransferId,
    attachment::{Attaching, Attachment},
    caller::Caller,
    fork::Owned,
    memory::Backing,
    submit::Order,
};

/// An attached engine whose calls are futures: see [`crate::Engine`] for what each of them does.
///
/// Its connection lives on the runtime that [`attach`](Self::attach) ran on, which must outlive the calls.
/// There is no `submit`: spawn [`transfer`](Self::transfer).
///
/// **Dropping** the future of a transfer cancels it, but does not tell when its memory is the caller's again:
/// give the transfer an id and ask [`cancel`](Self::cancel) or [`wait`](Self::wait).
#[derive(Clone)]
pub struct Engine(Owned<Inner>);

#[derive(Clone)]
struct Inner {
    attachment: Arc<Attachment>,
    /// Locked for a look, or to replace it.
    caller: Arc<Mutex<Caller>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("aio::Engine").field("session_id", &self.session_id()).finish_non_exhaustive()
    }
}

impl Engine {
    /// As [`crate::Engine::attach`].
    ///
    /// # Errors
    /// See there.
    pub async fn attach(options: EngineOptions) -> Result<Self, Error> {
        let attachment = Attaching::start(options)?.finish().await?;
        let caller = Arc::new(Mutex::new(Caller::connect(&attachment.core)));
        Ok(Self(Owned::new(Inner { attachment, caller })))
    }

    /// As [`crate::Engine::session_id`].
    pub fn session_id(&self) -> &str {
        &self.facts().core.facts().session_id
    }

    /// As [`crate::Engine::engine_id`].
    pub fn engine_id(&self) -> u64 {
        self.facts().core.facts().engine_id
    }

    /// As [`crate::Engine::boot_id`].
    pub fn boot_id(&self) -> [u8; 16] {
        self.facts().core.facts().boot_id
    }

    /// As [`crate::Engine::daemon_version`].
    pub fn daemon_version(&self) -> &str {
        &self.facts().core.facts().daemon_version
    }

    /// As [`crate::Engine::daemon_pid`].
    pub fn daemon_pid(&self) -> u32 {
        self.facts().core.facts().daemon_pid
    }

    /// As [`crate::Engine::process_access`].
    pub fn process_access(&self) -> ProcessAccess {
        self.facts().core.lease().process_access
    }

    /// As [`crate::Engine::limits`].
    pub fn limits(&self) -> &Limits {
        &self.facts().core.facts().limits
    }

    /// As [`crate::Engine::register`].
    ///
    /// # Errors
    /// See there.
    pub async fn register(&self, memory: &[Memory<'_>]) -> Result<Vec<Region>, Error> {
        self.caller()?.register(Backing::all(memory)?).await
    }

    /// As [`crate::Engine::unregister`].
    ///
    /// # Errors
    /// See there.
    pub async fn unregister(&self, regions: &[u32]) -> Result<Settlement, Error> {
        self.caller()?.unregister(regions).await
    }

    /// As [`crate::Engine::transfer`].
    ///
    /// # Errors
    /// See there.
    pub fn transfer(&self, transfer: Transfer) -> impl Future<Output = Result<Report, Error>> + Send {
        // Now, not when the future is first polled: what is revoked from here on revokes it.
        let order = self.0.get().map(|inner| Order::new(&inner.attachment.core, transfer));
        async move { self.caller()?.transfer(order?).await }
    }

    /// As [`crate::Engine::wait`].
    ///
    /// # Errors
    /// See there.
    pub async fn wait(&self, id: TransferId, timeout: Duration) -> Result<Report, Error> {
        self.caller()?.wait(id, timeout).await
    }

    /// As [`crate::Engine::cancel`].
    ///
    /// # Errors
    /// See there.
    pub async fn cancel(&self, id: TransferId) -> Result<Settlement, Error> {
        self.caller()?.cancel(id).await
    }

    /// As [`crate::Engine::revoke`].
    ///
    /// # Errors
    /// See there.
    pub async fn revoke(&self, ranges: &[Range]) -> Result<Settlement, Error> {
        self.caller()?.revoke(ranges).await
    }

    /// As [`crate::Engine::revoke_tag`].
    ///
    /// # Errors
    /// See there.
    pub async fn revoke_tag(&self, tag: [u8; 16]) -> Result<Settlement, Error> {
        self.caller()?.revoke_tag(tag).await
    }

    /// As [`crate::Engine::probe`].
    ///
    /// # Errors
    /// See there.
    pub async fn probe(&self, session: &str, timeout: Duration) -> Result<Probe, Error> {
        self.caller()?.probe(session, timeout).await
    }

    /// As [`crate::Engine::reset_session`].
    ///
    /// # Errors
    /// See there.
    pub async fn reset_session(&self, session: &str) -> Result<(), Error> {
        self.caller()?.reset_session(session).await
    }

    /// As [`crate::Engine::events`].
    pub fn events(&self) -> mpsc::Receiver<Event> {
        match self.0.get() {
            Ok(inner) => inner.attachment.events.asynchronous(),
            Err(_) => mpsc::channel(1).1,
        }
    }

    /// As [`crate::Engine::events_lost`].
    pub fn events_lost(&self) -> u64 {
        self.facts().events.lost()
    }

    fn facts(&self) -> &Attachment {
        &self.0.facts().attachment
    }

    fn caller(&self) -> Result<Caller, Error> {
        let inner = self.0.get()?;
        Ok(inner.caller.lock().unwrap_or_else(PoisonError::into_inner).renewed().clone())
    }
}

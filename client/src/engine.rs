//! The blocking engine.

use std::{
    fmt,
    sync::{Arc, mpsc},
    time::Duration,
};

use crate::{
    EngineOptions, Error, Event, Limits, Memory, Probe, ProcessAccess, Range, Region, Report, Settlement,
    Transfer, TransferId,
    attachment::{Attaching, Attachment, ReportReceiver},
    caller::Caller,
    fork::Owned,
    memory::Backing,
    submit::Order,
};

/// An attached engine. Clones share the attachment; it ends when the last one is dropped.
///
/// All methods block the calling thread and may be called from any thread, any number at a time; each thread
/// has its own connection. In async code use [`aio::Engine`](crate::aio::Engine).
///
/// When the daemon restarts, the engine attaches again by itself and registers everything again (see
/// [`Event::Reattached`] and [`EngineOptions::reattach`]); region ids stay as they are. Until then what would begin
/// something returns with [`Error::NoDaemon`] within seconds. What ends something answers UNSETTLED, or that error,
/// until it is proven: [`unregister`](Self::unregister), [`cancel`](Self::cancel), and the revocations, which are kept
/// for the next daemon. [`wait`](Self::wait) waits on, and transfers that the leaving daemon did not take are held back
/// until their deadline. After [`Event::Detached`] only a new attachment helps. In a
/// forked child every call returns [`Error::Forked`], and dropping the handle does nothing.
///
/// # Panics
/// The calls panic inside an async context, as every blocking call of tokio does.
#[derive(Clone)]
pub struct Engine(Owned<Arc<Attachment>>);

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("session_id", &self.session_id()).finish_non_exhaustive()
    }
}

impl Engine {
    /// Mints a key for this engine, attaches, and keeps the lease on a thread of its own.
    ///
    /// Where the kernel restricts who may reach into a process (Yama), this names the daemon as the one that
    /// may. There is one such name per process: the latest attachment's.
    ///
    /// # Errors
    /// [`Error::NoDaemon`] when nobody answers at the socket, [`Error::Timeout`] after
    /// [`attach_timeout`](EngineOptions::attach_timeout), [`Error::Refused`] with the daemon's reason, or for a
    /// [`rail_map`](EngineOptions::rail_map) whose file cannot be read.
    pub fn attach(options: EngineOptions) -> Result<Self, Error> {
        Attaching::start(options)?.finish_blocking().map(|attachment| Self(Owned::new(attachment)))
    }

    /// `host:port`: what peers put into [`Transfer::session`]. It stays over a daemon restart, unless
    /// [`Event::Reattached`] says otherwise.
    pub fn session_id(&self) -> &str {
        &self.0.facts().core.facts().session_id
    }

    /// The daemon's number for this engine.
    pub fn engine_id(&self) -> u64 {
        self.0.facts().core.facts().engine_id
    }

    /// Random per start of the daemon.
    pub fn boot_id(&self) -> [u8; 16] {
        self.0.facts().core.facts().boot_id
    }

    /// As the daemon tells it.
    pub fn daemon_version(&self) -> &str {
        &self.0.facts().core.facts().daemon_version
    }

    /// As the daemon sees itself.
    pub fn daemon_pid(&self) -> u32 {
        self.0.facts().core.facts().daemon_pid
    }

    /// How the daemon reaches plain private memory of this process ([`Memory::Process`]); `Unspecified`: not at all.
    pub fn process_access(&self) -> ProcessAccess {
        self.0.facts().core.lease().process_access
    }

    /// What the daemon takes at most.
    pub fn limits(&self) -> &Limits {
        &self.0.facts().core.facts().limits
    }

    /// Registers memory: all of it or nothing. Regions come in the order given.
    ///
    /// # Errors
    /// [`Error::Refused`] names the entry at fault by its index.
    pub fn register(&self, memory: &[Memory<'_>]) -> Result<Vec<Region>, Error> {
        let backings = Backing::all(memory)?;
        self.call(async |caller| caller.register(backings).await)
    }

    /// Takes regions back. Transfers that use them end with `RegionChanged`.
    ///
    /// Their memory is the caller's again only once this says [`Settlement::Settled`]; call again to wait on. While
    /// the engine is being attached again it says UNSETTLED, and the regions go as soon as the daemon has answered.
    ///
    /// # Errors
    /// [`Error::NoDaemon`] when nobody was asked and nothing is proven: the regions stay registered.
    /// [`Error::Refused`] for an id that is not a region of this engine.
    pub fn unregister(&self, regions: &[u32]) -> Result<Settlement, Error> {
        self.call(async |caller| caller.unregister(regions).await)
    }

    /// Moves slices, and blocks until the transfer is over, or UNSETTLED.
    ///
    /// The destination of a transfer that is not [`Done`](crate::Outcome::Done) is undefined. A retry may mix
    /// source contents of different moments: leave the source alone until the report is here.
    ///
    /// Any number of slices may be given. More than [`Limits::slices`] are cut into several transfers, one
    /// after the other; the report covers all of them (timings are sums), and `deadline` all of them too.
    ///
    /// When this node's daemon is lost on the way the report is
    /// [`Unsettled`](crate::Outcome::Unsettled) with reason `OwnDaemonGone`, and `Failed` only where its
    /// process is proven to have exited.
    ///
    /// # Errors
    /// Nothing was started: [`Error::Refused`] names the slice at fault, [`Error::NoDaemon`] after the lease.
    pub fn transfer(&self, transfer: Transfer) -> Result<Report, Error> {
        self.call(async |caller| {
            let order = Order::new(&caller.core, transfer);
            caller.transfer(order).await
        })
    }

    /// Starts a transfer on the engine's background thread. As [`transfer`](Self::transfer) in all else.
    ///
    /// # Errors
    /// [`Error::Refused`] with `Limit` when too many wait to be taken up.
    pub fn submit(&self, transfer: Transfer) -> Result<Pending, Error> {
        let attachment = self.0.get()?;
        let (id, report) = attachment.submit(transfer)?;
        Ok(Pending { id, rest: Owned::new((attachment.clone(), report)) })
    }

    /// Waits for the end of a transfer that was submitted, or reported as UNSETTLED. While a call has the transfer in
    /// hand, it is that call's report. `Duration::MAX` waits
    /// until it is over. Of a batch that was cut, the counts are those of the transfer that stands for it.
    ///
    /// A transfer lost with this node's daemon ends as `Failed` with reason `OwnDaemonGone` once that daemon is
    /// proven to have exited; until then this waits on.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Refused`] for an id that the daemon does not know (any more).
    pub fn wait(&self, id: TransferId, timeout: Duration) -> Result<Report, Error> {
        self.call(async |caller| caller.wait(id, timeout).await)
    }

    /// Ends a transfer. The memory is the caller's again only once this says [`Settlement::Settled`]; call
    /// again to wait on. The call that carries the transfer returns its report in any case, with what the peer
    /// said of its half; this answer does not wait for it.
    ///
    /// # Errors
    /// [`Error::Refused`] for an id that the daemon does not know (any more).
    pub fn cancel(&self, id: TransferId) -> Result<Settlement, Error> {
        self.call(async |caller| caller.cancel(id).await)
    }

    /// Takes memory back from every transfer admitted so far, in both directions, a peer's and this engine's own.
    /// Once this says [`Settlement::Settled`], nothing in flight or queued touches these ranges any more. Transfers
    /// that are submitted from then on may; this engine's own that were submitted before may not, whichever comes
    /// to the daemon first. Those that were hit end as FAILED with `Revoked`. The ranges need not be registered.
    ///
    /// A peer whose daemon has never met this engine admits at the meeting: against a transfer that it had queued
    /// before, only [`revoke_tag`](Self::revoke_tag) helps.
    ///
    /// # Errors
    /// [`Error::Refused`] names the range at fault by its index.
    pub fn revoke(&self, ranges: &[Range]) -> Result<Settlement, Error> {
        self.call(async |caller| caller.revoke(ranges).await)
    }

    /// Stops every transfer that carries the tag, and refuses it whenever it is submitted in the next 15 minutes.
    /// Longer names than tags: [`tag`](crate::tag).
    ///
    /// # Errors
    /// [`Error::Refused`] with `Limit` when 65,536 tags are revoked already.
    pub fn revoke_tag(&self, tag: [u8; 16]) -> Result<Settlement, Error> {
        self.call(async |caller| caller.revoke_tag(tag).await)
    }

    /// Asks whether the engine at `session` can be reached, at once if its session has failed.
    ///
    /// # Errors
    /// [`Error::Timeout`] if not even the own daemon answers in time. An unreachable peer is no error: see
    /// [`Probe::alive`].
    pub fn probe(&self, session: &str, timeout: Duration) -> Result<Probe, Error> {
        self.call(async |caller| caller.probe(session, timeout).await)
    }

    /// Forgets what was known of the engine at `session`: accepts that another one lives there now.
    ///
    /// # Errors
    /// [`Error::Refused`] with the daemon's reason.
    pub fn reset_session(&self, session: &str) -> Result<(), Error> {
        self.call(async |caller| caller.reset_session(session).await)
    }

    /// What happens from now on, for as long as the receiver is kept.
    ///
    /// A receiver holds 1024 events; those that do not fit are lost to it and counted in
    /// [`events_lost`](Self::events_lost). [`Event::Detached`] is the last, then it disconnects. An engine has
    /// at most 16 receivers; a further one disconnects the oldest. In a forked child it is disconnected.
    pub fn events(&self) -> mpsc::Receiver<Event> {
        match self.0.get() {
            Ok(attachment) => attachment.events.blocking(),
            Err(_) => mpsc::sync_channel(1).1,
        }
    }

    /// Events that some receiver had no room for.
    pub fn events_lost(&self) -> u64 {
        self.0.facts().events.lost()
    }

    fn call<T>(&self, ask: impl AsyncFnOnce(&Caller) -> Result<T, Error>) -> Result<T, Error> {
        let (link, caller) = self.0.get()?.caller()?;
        link.block_on(ask(&caller))
    }
}

/// A transfer under way. Dropping it does not cancel; it keeps the attachment until the report is here or it
/// is dropped.
pub struct Pending {
    id: TransferId,
    rest: Owned<(Arc<Attachment>, ReportReceiver)>,
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pending {
    /// For [`Engine::wait`] and [`Engine::cancel`].
    pub fn id(&self) -> TransferId {
        self.id
    }

    /// Blocks until the transfer is over, or UNSETTLED.
    ///
    /// # Errors
    /// As [`Engine::transfer`].
    pub fn wait(self) -> Result<Report, Error> {
        let (attachment, report) = self.rest.get()?;
        let core = &attachment.core;
        let ended = |_| core.no_daemon(&core.lease(), "the lease's thread ended".into());
        report.recv().map_err(ended)?
    }
}

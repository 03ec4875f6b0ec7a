//! The engine's calls, each made without the interpreter's lock.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use kvferry_client::{self as client, EngineOptions, Error, Policy, Settlement, Slices, Transfer};
use pyo3::prelude::*;

use crate::{
    arguments::{self, Column, Direction, Id, Name, Registrable, Seconds, SliceLengths, Transport},
    errors::{closed, raise},
    events::{Events, LOOK_FOR_SIGNALS},
    values::{Probe, Region, Report},
};

/// This process, attached to its node's daemon.
///
/// All methods may be called from any thread, any number at a time, and let other threads run while they block.
/// `with Engine.attach() as engine:` ends the attachment at the end of the block. In a forked child every call
/// raises ForkedError; attach there anew.
#[pyclass(frozen, module = "kvferry")]
pub(crate) struct Engine(Mutex<Option<client::Engine>>);

impl Engine {
    fn inner(&self, py: Python<'_>) -> PyResult<client::Engine> {
        let engine = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        engine.ok_or_else(|| closed(py))
    }

    fn call<T: Send>(
        &self,
        py: Python<'_>,
        ask: impl FnOnce(&client::Engine) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        let engine = self.inner(py)?;
        // Dropped without the lock as well: the last handle waits for the background thread.
        py.detach(move || ask(&engine)).map_err(|error| raise(py, error))
    }
}

#[pymethods]
impl Engine {
    /// Attaches. The socket is KVFERRY_SOCKET, else /run/kvferry/engine.sock, unless given. Raises NoDaemonError with
    /// the path tried and what helps, RefusedError with the daemon's reason, NoAnswerError after `timeout` seconds.
    ///
    /// `rail_map` names the RDMA devices that may be used, as sglang's --disaggregation-ib-device does: a comma list, a
    /// JSON object from GPU to comma list, in which `gpu_id` is looked up, or the path of a .json file with such an
    /// object, which this process reads. Without one the daemon's configuration holds. A wrong one is refused with
    /// BAD_ARGUMENT; a device that is not there only where `transports` has "rdma".
    #[staticmethod]
    #[pyo3(signature = (
        socket = None, *, name = None, attempts = None, backoff = None, failure_threshold = None, deadline = None,
        transports = None, advertise_host = None, gpu_id = None, rail_map = None, port = None, reattach = true,
        timeout = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of the Python call")]
    fn attach(
        py: Python<'_>,
        socket: Option<std::path::PathBuf>,
        name: Option<String>,
        attempts: Option<u32>,
        backoff: Option<Seconds>,
        failure_threshold: Option<u32>,
        deadline: Option<Seconds>,
        transports: Option<Vec<Transport>>,
        advertise_host: Option<String>,
        gpu_id: Option<u32>,
        rail_map: Option<String>,
        port: Option<u16>,
        reattach: bool,
        timeout: Option<Seconds>,
    ) -> PyResult<Self> {
        let usual = EngineOptions::default();
        let given = arguments::policy(attempts, backoff, failure_threshold, deadline);
        let options = EngineOptions {
            socket: socket.unwrap_or(usual.socket),
            name: name.unwrap_or(usual.name),
            policy: Policy {
                attempts: given.attempts.or(usual.policy.attempts),
                backoff: given.backoff.or(usual.policy.backoff),
                failure_threshold: given.failure_threshold.or(usual.policy.failure_threshold),
                deadline: given.deadline.or(usual.policy.deadline),
            },
            transports: transports.unwrap_or_default().into_iter().map(|path| path.0).collect(),
            advertise_host,
            gpu_id,
            rail_map,
            preferred_port: port,
            reattach,
            attach_timeout: timeout.map_or(usual.attach_timeout, |limit| limit.0),
        };
        let engine = py.detach(|| client::Engine::attach(options)).map_err(|error| raise(py, error))?;
        Ok(Self(Mutex::new(Some(engine))))
    }

    /// Ends the attachment once no call uses it any more. Registered memory is given back by the daemon.
    fn close(&self, py: Python<'_>) {
        let engine = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(move || drop(engine));
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _class: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) {
        self.close(py);
    }

    /// "host:port": what peers name as the session of a transfer to this engine.
    #[getter]
    fn session_id(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.inner(py)?.session_id().to_owned())
    }

    /// The daemon's number for this engine.
    #[getter]
    fn engine_id(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.inner(py)?.engine_id())
    }

    /// Which kvferryd this engine is attached to.
    #[getter]
    fn daemon_version(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.inner(py)?.daemon_version().to_owned())
    }

    /// The daemon's process id, as the daemon sees itself.
    #[getter]
    fn daemon_pid(&self, py: Python<'_>) -> PyResult<u32> {
        Ok(self.inner(py)?.daemon_pid())
    }

    /// 16 bytes, random per start of the daemon.
    #[getter]
    fn boot_id(&self, py: Python<'_>) -> PyResult<[u8; 16]> {
        Ok(self.inner(py)?.boot_id())
    }

    /// Events that some receiver had no room for.
    #[getter]
    fn events_lost(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.inner(py)?.events_lost())
    }

    /// Registers memory, all of it or nothing: SharedBuffers, and (address, length) pairs of plain memory of this
    /// process, which stays the caller's to keep alive. Raises RefusedError with the index of the entry at fault.
    fn register(&self, py: Python<'_>, memory: Vec<Registrable<'_>>) -> PyResult<Vec<Region>> {
        let memory: Vec<_> = memory.iter().map(Registrable::memory).collect();
        let regions = self.call(py, |engine| engine.register(&memory))?;
        Ok(regions.into_iter().map(Region::from).collect())
    }

    /// Takes regions back, by their ids. True once nobody touches their memory any more; call again to wait on.
    fn unregister(&self, py: Python<'_>, regions: Vec<u32>) -> PyResult<bool> {
        self.call(py, |engine| engine.unregister(&regions)).map(settled)
    }

    /// Moves slices and blocks until it is over, or "UNSETTLED". `op` "write" moves from here to there, "read" from
    /// there to here. `local` and `remote` are addresses, `lengths` bytes of each slice, or one number for all;
    /// lists, tuples and numpy arrays of integers are taken, of any length. Times are seconds. Raises an Error only
    /// where nothing was started.
    #[pyo3(signature = (
        session, op, local, remote, lengths, *, tag = None, deadline = None, attempts = None, backoff = None,
        id = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of the Python call")]
    fn transfer(
        &self,
        py: Python<'_>,
        session: String,
        op: Direction,
        local: Column,
        remote: Column,
        lengths: SliceLengths,
        tag: Option<Name>,
        deadline: Option<Seconds>,
        attempts: Option<u32>,
        backoff: Option<Seconds>,
        id: Option<Id>,
    ) -> PyResult<Report> {
        let slices = Slices { local: local.0, remote: remote.0, lengths: lengths.0 };
        let policy = arguments::policy(attempts, backoff, None, None);
        let transfer = transfer(session, op, slices, tag, deadline, policy, id);
        self.call(py, |engine| engine.transfer(transfer)).map(Report::from)
    }

    /// Starts a transfer on the engine's background thread. As `transfer` in all else.
    #[pyo3(signature = (
        session, op, local, remote, lengths, *, tag = None, deadline = None, attempts = None, backoff = None,
        id = None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of the Python call")]
    fn transfer_async(
        &self,
        py: Python<'_>,
        session: String,
        op: Direction,
        local: Column,
        remote: Column,
        lengths: SliceLengths,
        tag: Option<Name>,
        deadline: Option<Seconds>,
        attempts: Option<u32>,
        backoff: Option<Seconds>,
        id: Option<Id>,
    ) -> PyResult<Pending> {
        let slices = Slices { local: local.0, remote: remote.0, lengths: lengths.0 };
        let policy = arguments::policy(attempts, backoff, None, None);
        let transfer = transfer(session, op, slices, tag, deadline, policy, id);
        let pending = self.call(py, |engine| engine.submit(transfer))?;
        Ok(Pending { id: pending.id().0, rest: Mutex::new(Some(pending)) })
    }

    /// Waits for the end of a transfer that was "UNSETTLED" or started with `transfer_async`, for `timeout` seconds
    /// at most (default: until it is over). Raises NoAnswerError after that.
    #[pyo3(signature = (id, timeout = None))]
    fn wait(&self, py: Python<'_>, id: Id, timeout: Option<Seconds>) -> PyResult<Report> {
        let limit = timeout.map_or(Duration::MAX, |limit| limit.0);
        let begun = Instant::now();
        loop {
            let left = limit.saturating_sub(begun.elapsed());
            let turn = left.min(LOOK_FOR_SIGNALS);
            let engine = self.inner(py)?;
            match py.detach(move || engine.wait(id.0, turn)) {
                Ok(report) => return Ok(report.into()),
                Err(Error::Timeout(_)) if turn < left => py.check_signals()?,
                Err(Error::Timeout(_)) => return Err(raise(py, Error::Timeout(limit))),
                Err(error) => return Err(raise(py, error)),
            }
        }
    }

    /// Ends a transfer. True once the memory is the caller's again; call again to wait on.
    fn cancel(&self, py: Python<'_>, id: Id) -> PyResult<bool> {
        self.call(py, |engine| engine.cancel(id.0)).map(settled)
    }

    /// Takes ranges, as (address, length) pairs, back from every transfer admitted so far. True once nothing in
    /// flight or queued touches them any more; call again to wait on.
    fn revoke(&self, py: Python<'_>, ranges: Vec<(u64, u64)>) -> PyResult<bool> {
        let ranges = arguments::ranges(ranges);
        self.call(py, |engine| engine.revoke(&ranges)).map(settled)
    }

    /// Stops every transfer that carries the tag, and refuses it for 15 minutes. True as for `revoke`.
    fn revoke_tag(&self, py: Python<'_>, tag: Name) -> PyResult<bool> {
        self.call(py, |engine| engine.revoke_tag(client::tag(tag))).map(settled)
    }

    /// Asks whether the engine at `session` can be reached, for at most `timeout` seconds (default 5). A peer that
    /// cannot is no exception: see `Probe.alive`.
    #[pyo3(signature = (session, timeout = None))]
    fn probe(&self, py: Python<'_>, session: &str, timeout: Option<Seconds>) -> PyResult<Probe> {
        let limit = timeout.map_or(Duration::from_secs(5), |limit| limit.0);
        self.call(py, |engine| engine.probe(session, limit)).map(Probe::from)
    }

    /// Forgets what was known of the engine at `session`: accepts that another one lives there now.
    fn reset_session(&self, py: Python<'_>, session: &str) -> PyResult<()> {
        self.call(py, |engine| engine.reset_session(session))
    }

    /// What happens from now on. At most 16 receivers per engine; a further one ends the oldest.
    fn events(&self, py: Python<'_>) -> PyResult<Events> {
        Ok(Events::new(self.inner(py)?.events()))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.inner(py) {
            Ok(engine) => format!("Engine({})", engine.session_id()),
            Err(_) => "Engine(closed)".to_owned(),
        }
    }
}

/// A transfer under way. Dropping it does not cancel.
#[pyclass(frozen, module = "kvferry")]
pub(crate) struct Pending {
    /// For `Engine.wait` and `Engine.cancel`.
    #[pyo3(get)]
    id: [u8; 16],
    /// Taken by the first to wait.
    rest: Mutex<Option<client::Pending>>,
}

#[pymethods]
impl Pending {
    /// Blocks until the transfer is over, or "UNSETTLED". Once: after that, `Engine.wait` tells it again.
    fn wait(&self, py: Python<'_>) -> PyResult<Report> {
        let pending = self.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        let pending = pending.ok_or_else(|| {
            pyo3::exceptions::PyValueError::new_err("somebody waited for this transfer already")
        })?;
        py.detach(|| pending.wait()).map(Report::from).map_err(|error| raise(py, error))
    }
}

fn transfer(
    session: String,
    op: Direction,
    slices: Slices,
    tag: Option<Name>,
    deadline: Option<Seconds>,
    policy: Policy,
    id: Option<Id>,
) -> Transfer {
    Transfer {
        session,
        op: op.0,
        slices,
        tag: tag.map(client::tag),
        deadline: deadline.map(|time| time.0),
        policy,
        id: id.map(|id| id.0),
    }
}

fn settled(settlement: Settlement) -> bool {
    settlement == Settlement::Settled
}

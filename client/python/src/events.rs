//! What happens without being asked for.

use std::{
    sync::{Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use kvferry_client::Event;
use pyo3::{prelude::*, types::PyDict};

use crate::{
    arguments::Seconds,
    values::{Failure, Report, bare, seconds},
};

/// How often a waiting thread looks for signals, so that Ctrl-C works.
pub(crate) const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(200);

/// The events of an engine from `Engine.events()` on. Iterating blocks until the next one and ends with the
/// attachment. Holds 1024; what does not fit is lost and counted in `Engine.events_lost`.
#[pyclass(frozen, module = "kvferry")]
pub(crate) struct Events(Mutex<mpsc::Receiver<Event>>);

impl Events {
    pub(crate) fn new(receiver: mpsc::Receiver<Event>) -> Self {
        Self(Mutex::new(receiver))
    }

    /// `None` when nothing came in time, or nothing will any more, which the second tells.
    fn next(&self, py: Python<'_>, limit: Duration) -> PyResult<(Option<Event>, bool)> {
        let until = Instant::now().checked_add(limit);
        loop {
            let left =
                until.map_or(LOOK_FOR_SIGNALS, |until| until.saturating_duration_since(Instant::now()));
            let turn = left.min(LOOK_FOR_SIGNALS);
            let got = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(turn));
            match got {
                Ok(event) => return Ok((Some(event), false)),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok((None, true)),
                Err(mpsc::RecvTimeoutError::Timeout) if left <= turn => return Ok((None, false)),
                Err(mpsc::RecvTimeoutError::Timeout) => py.check_signals()?,
            }
        }
    }
}

#[pymethods]
impl Events {
    /// The next event as a dict with the key "event", or None after `timeout` seconds (default: no limit) and
    /// after the last one.
    #[pyo3(signature = (timeout = None))]
    fn get<'py>(&self, py: Python<'py>, timeout: Option<Seconds>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let limit = timeout.map_or(Duration::MAX, |limit| limit.0);
        self.next(py, limit)?.0.map(|event| dict(py, event)).transpose()
    }

    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.next(py, Duration::MAX)?.0.map(|event| dict(py, event)).transpose()
    }
}

fn dict(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    let kind = match event {
        Event::SessionChanged { session, state, cause } => {
            dict.set_item("session", session)?;
            dict.set_item("state", bare(state.as_str_name(), "SESSION_STATE_"))?;
            dict.set_item("cause", cause.map(Failure::from))?;
            "session_changed"
        }
        Event::TransferSettled(report) => {
            dict.set_item("report", Report::from(report))?;
            "transfer_settled"
        }
        Event::RegionInvalidated { region, cause } => {
            dict.set_item("region", region)?;
            dict.set_item("cause", cause.map(Failure::from))?;
            "region_invalidated"
        }
        Event::Draining { grace } => {
            dict.set_item("grace", seconds(grace))?;
            "draining"
        }
        Event::Reattached { session_id, moved_from, boot_id } => {
            dict.set_item("session_id", session_id)?;
            dict.set_item("moved_from", moved_from)?;
            dict.set_item("boot_id", boot_id)?;
            "reattached"
        }
        Event::Detached { cause } => {
            dict.set_item("cause", cause)?;
            "detached"
        }
    };
    dict.set_item("event", kind)?;
    Ok(dict)
}

//! Errors as exceptions. Their classes are written in Python, in `kvferry.errors`, where they can be
//! `ConnectionError` and `TimeoutError` as well.

use kvferry_client::Error;
use pyo3::{IntoPyObjectExt, prelude::*, sync::PyOnceLock, types::PyDict};

use crate::values::Failure;

/// Makes what a call of the library ended with an exception.
pub(crate) fn raise(py: Python<'_>, error: Error) -> PyErr {
    exception(py, error).unwrap_or_else(|error| error)
}

fn exception(py: Python<'_>, error: Error) -> PyResult<PyErr> {
    let message = error.to_string();
    let fields = PyDict::new(py);
    let class = match error {
        Error::NoDaemon { path, .. } => {
            fields.set_item("path", path)?;
            "NoDaemonError"
        }
        Error::Refused(failure) => {
            fields.set_item("failure", Failure::from(failure).into_py_any(py)?)?;
            "RefusedError"
        }
        Error::System { source, .. } => {
            fields.set_item("errno", source.raw_os_error())?;
            "SystemCallError"
        }
        Error::Forked { owner } => {
            fields.set_item("owner", owner)?;
            "ForkedError"
        }
        Error::Timeout(_) => "NoAnswerError",
        Error::Call { .. } => "CallError",
    };
    let made = classes(py)?.getattr(class)?.call((message,), Some(&fields))?;
    Ok(PyErr::from_value(made))
}

/// A closed engine is asked for something.
pub(crate) fn closed(py: Python<'_>) -> PyErr {
    let make = || classes(py)?.getattr("ClosedError")?.call1(("this engine is closed: attach another one",));
    make().map_or_else(|error| error, PyErr::from_value)
}

fn classes(py: Python<'_>) -> PyResult<&Bound<'_, PyModule>> {
    static CLASSES: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let import = || py.import("kvferry.errors").map(Bound::unbind);
    CLASSES.get_or_try_init(py, import).map(|classes| classes.bind(py))
}

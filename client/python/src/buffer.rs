//! Memory that the daemon reaches without a copy.

use kvferry_client as client;
use pyo3::{prelude::*, types::PyDict};

use crate::errors::raise;

/// Memory that the daemon maps: register it, and slices move without a copy on this node.
///
/// `numpy.asarray(buffer)` is its bytes (uint8), and keeps it alive; `buffer.view()` is a memoryview without numpy.
/// The mapping stays for as long as it is registered, also when the last reference here is gone.
#[pyclass(frozen, module = "kvferry")]
pub(crate) struct SharedBuffer(client::SharedBuffer);

impl SharedBuffer {
    pub(crate) fn inner(&self) -> &client::SharedBuffer {
        &self.0
    }
}

#[pymethods]
impl SharedBuffer {
    /// Zeroed memory of `length` bytes, touched. Raises SystemCallError for none, or when it cannot be had.
    #[new]
    fn new(py: Python<'_>, length: usize) -> PyResult<Self> {
        py.detach(|| client::SharedBuffer::new(length)).map(Self).map_err(|error| raise(py, error))
    }

    /// Its first byte, in this process: what slices name.
    #[getter]
    fn address(&self) -> u64 {
        self.0.address()
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// For numpy, which keeps a reference to this object.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("shape", (self.0.len(),))?;
        interface.set_item("data", (self.0.address(), false))?;
        Ok(interface)
    }

    /// A writable memoryview of the bytes, which keeps this object alive.
    fn view<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("kvferry._view")?.call_method1("view", (slf,))
    }

    fn __repr__(&self) -> String {
        format!("SharedBuffer({:#x} + {})", self.0.address(), self.0.len())
    }
}

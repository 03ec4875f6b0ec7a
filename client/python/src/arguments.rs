//! What Python passes in, taken apart while the interpreter's lock is held.

use std::time::Duration;

use kvferry_client::{Lengths, Memory, Op, Path, Policy, Range, TransferId};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::{PyBytes, PyInt, PyString},
};

use crate::buffer::SharedBuffer;

/// Seconds, not negative. Infinity is as long as it takes.
pub(crate) struct Seconds(pub(crate) Duration);

impl<'py> FromPyObject<'_, 'py> for Seconds {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let seconds: f64 = object.extract()?;
        if seconds.is_nan() || seconds < 0.0 {
            return Err(PyValueError::new_err(format!("{seconds} is not a time in seconds")));
        }
        // What a Duration cannot hold is longer than anything waits.
        Ok(Self(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)))
    }
}

/// A name of a request: text or bytes.
pub(crate) struct Name(Vec<u8>);

impl<'py> FromPyObject<'_, 'py> for Name {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(text) = object.cast::<PyString>() {
            return Ok(Self(text.to_str()?.as_bytes().to_vec()));
        }
        Ok(Self(object.cast::<PyBytes>()?.as_bytes().to_vec()))
    }
}

impl AsRef<[u8]> for Name {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// 16 bytes of a transfer.
pub(crate) struct Id(pub(crate) TransferId);

impl<'py> FromPyObject<'_, 'py> for Id {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let bytes: [u8; 16] = object
            .extract()
            .map_err(|_| PyValueError::new_err("a transfer id is 16 bytes: Report.id or Pending.id"))?;
        Ok(Self(TransferId(bytes)))
    }
}

/// Which way: "write" or "read".
pub(crate) struct Direction(pub(crate) Op);

impl<'py> FromPyObject<'_, 'py> for Direction {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<&str>()? {
            "write" => Ok(Self(Op::Write)),
            "read" => Ok(Self(Op::Read)),
            other => Err(PyValueError::new_err(format!("op is \"write\" or \"read\", not {other:?}"))),
        }
    }
}

/// A way for payload: "local", "tcp" or "rdma".
pub(crate) struct Transport(pub(crate) Path);

impl<'py> FromPyObject<'_, 'py> for Transport {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let name = object.extract::<&str>()?;
        Path::from_str_name(&format!("PATH_{}", name.to_uppercase()))
            .filter(|path| *path != Path::Unspecified)
            .map(Self)
            .ok_or_else(|| PyValueError::new_err(format!("no transport is called {name:?}")))
    }
}

/// One column of a batch: a list, a tuple, or a numpy array of integers.
pub(crate) struct Column(pub(crate) Vec<u64>);

impl<'py> FromPyObject<'_, 'py> for Column {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.getattr_opt("dtype")? {
            Some(dtype) => from_array(&object, &dtype),
            None => object.extract().map(Self),
        }
    }
}

/// Element by element would cost more than a transfer of many slices: the array is asked for its bytes instead.
fn from_array(array: &Bound<'_, PyAny>, dtype: &Bound<'_, PyAny>) -> PyResult<Column> {
    let kind: String = dtype.getattr("kind")?.extract()?;
    if !matches!(kind.as_str(), "i" | "u") || array.getattr("ndim")?.extract::<usize>()? != 1 {
        return Err(PyTypeError::new_err(format!("not a one-dimensional array of integers: {dtype}")));
    }
    if kind == "i" && array.len()? > 0 && array.call_method0("min")?.extract::<i128>()? < 0 {
        return Err(PyValueError::new_err("an address or length is negative"));
    }
    let bytes = array.call_method1("astype", ("<u8",))?.call_method0("tobytes")?;
    let (words, _) = bytes.cast::<PyBytes>()?.as_bytes().as_chunks();
    Ok(Column(words.iter().map(|word| u64::from_le_bytes(*word)).collect()))
}

/// Bytes of each slice: one number for all, or a column.
pub(crate) struct SliceLengths(pub(crate) Lengths);

impl<'py> FromPyObject<'_, 'py> for SliceLengths {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.cast::<PyInt>() {
            Ok(number) => number.extract().map(|length| Self(Lengths::Uniform(length))),
            Err(_) => object.extract::<Column>().map(|column| Self(Lengths::Each(column.0))),
        }
    }
}

/// `(address, length)` pairs.
pub(crate) fn ranges(pairs: Vec<(u64, u64)>) -> Vec<Range> {
    pairs.into_iter().map(|(address, length)| Range { address, length }).collect()
}

/// A shared buffer, or `(address, length)` of this process.
#[derive(FromPyObject)]
pub(crate) enum Registrable<'py> {
    Buffer(PyRef<'py, SharedBuffer>),
    Range((u64, u64)),
}

impl Registrable<'_> {
    pub(crate) fn memory(&self) -> Memory<'_> {
        match self {
            Self::Buffer(buffer) => Memory::Shared(buffer.inner()),
            Self::Range((address, length)) => Memory::Process { address: *address, length: *length },
        }
    }
}

/// Retry and health, from keyword arguments.
pub(crate) fn policy(
    attempts: Option<u32>,
    backoff: Option<Seconds>,
    failure_threshold: Option<u32>,
    deadline: Option<Seconds>,
) -> Policy {
    Policy {
        attempts,
        backoff: backoff.map(|time| time.0),
        failure_threshold,
        deadline: deadline.map(|time| time.0),
    }
}

//! What comes back: plain values that nothing changes any more.

use std::time::Duration;

use kvferry_client as client;
use pyo3::prelude::*;

/// Why something was refused or failed.
#[pyclass(frozen, get_all, module = "kvferry")]
#[derive(Clone)]
pub(crate) struct Failure {
    /// Name of the reason, e.g. "BAD_RANGE". The only field to decide by, besides `retryable`.
    reason: String,
    /// Raw errno or work-completion status; 0 when there is none.
    code: i32,
    /// For people.
    message: String,
    /// Index of the slice, region or range at fault, where there is one.
    index: Option<u64>,
    /// The same call may succeed with nothing changed by the caller.
    retryable: bool,
}

#[pymethods]
impl Failure {
    fn __repr__(&self) -> String {
        format!("Failure({}: {})", self.reason, self.message)
    }
}

impl From<client::Failure> for Failure {
    fn from(failure: client::Failure) -> Self {
        let client::Failure { reason, code, message, index, retryable } = failure;
        Self { reason: bare(reason.as_str_name(), "REASON_"), code, message, index, retryable }
    }
}

/// What became of a transfer.
#[pyclass(frozen, get_all, module = "kvferry")]
pub(crate) struct Report {
    /// 16 bytes that name the transfer.
    id: [u8; 16],
    /// "DONE", "FAILED", "CANCELLED", or "UNSETTLED", which is not an end: leave the memory alone and `Engine.wait`.
    outcome: &'static str,
    /// It is proven that nobody can touch the peer's memory for it any more either.
    peer_confirmed: bool,
    /// None when done.
    failure: Option<Failure>,
    /// Slices of the batch.
    slices: u64,
    /// Of these, moved and acknowledged.
    slices_done: u64,
    /// Bytes of the batch.
    bytes: u64,
    /// Of these, moved and acknowledged.
    bytes_done: u64,
    /// Bytes handed to the path more than once.
    bytes_resent: u64,
    /// Losses counted against the transfer.
    attempts: u32,
    /// "LOCAL", "TCP" or "RDMA"; None if it never got that far.
    path: Option<String>,
    /// Seconds from receipt to the first byte.
    queued: f64,
    /// Seconds from the first byte to the last.
    moving: f64,
    /// Seconds from having to end to proof that it has.
    settling: f64,
    /// Seconds in all, as the daemon measured it.
    total: f64,
}

#[pymethods]
impl Report {
    /// Every byte was applied at the destination and acknowledged.
    #[getter]
    fn done(&self) -> bool {
        self.outcome == "DONE"
    }

    /// It is over: nobody touches this engine's memory for it any more.
    #[getter]
    fn settled(&self) -> bool {
        self.outcome != "UNSETTLED"
    }

    fn __repr__(&self) -> String {
        let why = self.failure.as_ref().map(|why| format!(", {}: {}", why.reason, why.message));
        format!(
            "Report({}, {} of {} bytes{})",
            self.outcome,
            self.bytes_done,
            self.bytes,
            why.unwrap_or_default()
        )
    }
}

impl From<client::Report> for Report {
    fn from(report: client::Report) -> Self {
        Self {
            id: report.id.0,
            outcome: match report.outcome {
                client::Outcome::Done => "DONE",
                client::Outcome::Failed => "FAILED",
                client::Outcome::Cancelled => "CANCELLED",
                client::Outcome::Unsettled => "UNSETTLED",
            },
            peer_confirmed: report.peer_confirmed,
            failure: report.failure.map(Into::into),
            slices: report.slices,
            slices_done: report.slices_done,
            bytes: report.bytes,
            bytes_done: report.bytes_done,
            bytes_resent: report.bytes_resent,
            attempts: report.attempts,
            path: report.path.map(path),
            queued: seconds(report.queued),
            moving: seconds(report.moving),
            settling: seconds(report.settling),
            total: seconds(report.total),
        }
    }
}

/// A registered range.
#[pyclass(frozen, get_all, module = "kvferry")]
pub(crate) struct Region {
    /// For `Engine.unregister`.
    id: u32,
    /// Tells this registration from an earlier one with the same id.
    generation: u32,
    /// First address, in this process.
    base: u64,
    /// Bytes.
    length: u64,
    /// How the daemon reaches it: "SHARED_FD", "PROCESS", ...
    kind: String,
}

#[pymethods]
impl Region {
    fn __repr__(&self) -> String {
        format!("Region({}, {:#x} + {}, {})", self.id, self.base, self.length, self.kind)
    }
}

impl From<client::Region> for Region {
    fn from(region: client::Region) -> Self {
        let client::Region { id, generation, base, length, kind } = region;
        Self { id, generation, base, length, kind: bare(kind.as_str_name(), "MEMORY_KIND_") }
    }
}

/// Whether a peer could be reached.
#[pyclass(frozen, get_all, module = "kvferry")]
pub(crate) struct Probe {
    /// The peer engine answered over every kind of lane in use.
    alive: bool,
    /// Why not.
    failure: Option<Failure>,
    /// The path it answered on.
    path: Option<String>,
    /// Seconds there and back.
    round_trip: f64,
}

#[pymethods]
impl Probe {
    fn __bool__(&self) -> bool {
        self.alive
    }

    fn __repr__(&self) -> String {
        match &self.failure {
            Some(why) => format!("Probe({}: {})", why.reason, why.message),
            None => format!("Probe(alive={}, {:.6} s)", self.alive, self.round_trip),
        }
    }
}

impl From<client::Probe> for Probe {
    fn from(probe: client::Probe) -> Self {
        Self {
            alive: probe.alive,
            failure: probe.failure.map(Into::into),
            path: probe.path.map(path),
            round_trip: seconds(probe.round_trip),
        }
    }
}

fn path(path: client::Path) -> String {
    bare(path.as_str_name(), "PATH_")
}

/// A protocol's name without the prefix that its language wants.
pub(crate) fn bare(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_owned()
}

pub(crate) fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

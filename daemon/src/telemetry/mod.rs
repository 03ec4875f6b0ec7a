//! What the daemon says about itself: log lines on standard error and metrics for the admin port.
//!
//! A log line is written once, where something is handled, with session and transfer as fields. Metrics have
//! labels only from closed lists of this program: a peer or an engine can raise a number, never make a series.

mod labels;
mod log;
mod metrics;

pub use labels::SessionState;
pub use log::{LogError, init};
pub use metrics::{Metrics, RegistrarSample};

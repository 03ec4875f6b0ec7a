//! Decisions: retry, health, reconnecting, routes, rails, revocations, liveness and drain.
//!
//! Everything here is pure: an event, the time and a random draw go in, a decision comes out. No clock, socket,
//! task, lock, log or global, so that a simulation with its own clock runs exactly the code that production
//! runs. Two things keep it so: the clippy lists in `clippy.toml`, denied for this folder only, and the test in
//! `purity.rs`, which reads what these files import.
//!
//! Not here: what an event means on the wire, and who carries a decision out. `transfer` and `session` do that.

#![deny(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros)]

mod beat;
mod disposition;
mod drain;
mod health;
mod jitter;
#[cfg(test)]
mod purity;
mod rails;
mod reconnect;
mod retry;
mod revocations;
mod route;

pub use beat::{Beat, Judgement, judge};
pub use disposition::{Disposition, Origin, Retry, disposition};
pub use drain::{Drain, DrainStatus, StopRequest};
pub use health::{FIRST_PROBE, Health, HealthChange, HealthPolicy, HealthState};
pub use rails::{RailError, RailMap, RailQuery, Rails};
pub use reconnect::{MAX_SPACING, Reconnect, ReconnectStep};
pub use retry::{Attempts, RetryPolicy, Verdict};
pub use revocations::{
    Hit, RevocationLimits, RevocationList, Revocations, TOMBSTONE_LIFE, TOMBSTONES, TagRevoked,
};
pub use route::{RouteQuery, route};

//! kvferryd: the per-node daemon that moves KV-cache slices between LLM engines.
//!
//! The way of one transfer, no step back: [`api`] (proto to domain, reject bad input) -> [`transfer`] (plan,
//! settle) -> [`session`] (healthy? which lanes?) -> [`transport`] (local, tcp) -> acknowledgements -> reply.
//! Decisions live in [`policy`]. ARCHITECTURE.md has the map.

pub mod admin;
pub mod api;
pub mod app;
pub mod config;
mod convert;
pub mod domain;
mod durable;
pub mod engine;
mod kernel;
pub mod memory;
pub mod peer;
pub mod policy;
mod prefixed;
pub mod session;
pub mod telemetry;
pub mod transfer;
pub mod transport;

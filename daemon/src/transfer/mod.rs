//! Transfers: planning slices into parts, and the life of one from admission to its settled end.
//!
//! [`plan`] turns a batch into a [`Payload`](crate::transport::Payload); [`run`] is the state of one transfer,
//! synchronous and without I/O, driven by the session that carries it; [`log`] remembers what is under way and
//! what ended, so that a transfer id never runs twice.

pub mod log;
pub mod pages;
pub mod plan;
pub mod run;

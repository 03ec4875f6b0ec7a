//! The client library against a daemon that does what a test tells it.
#![allow(clippy::unwrap_used)]

mod attach;
mod batches;
mod calls;
mod fake;
mod fork;
mod lost;
mod orders;
mod restart;

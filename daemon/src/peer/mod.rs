//! Daemon to daemon: both ends of the control stream, and the endpoint that listens for one engine. prost types
//! stop here.
//!
//! [`initiator`] drives the outbound core of `session` over a stream made by [`client`]; `target` serves the
//! stream at the other end out of the inbound table. Data connections come in through the same [`endpoint`].

pub mod client;
mod context;
mod convert;
mod dice;
pub mod endpoint;
pub mod initiator;
mod lane;
mod life;
mod link;
mod planning;
mod ports;
mod report;
mod resolver;
mod revokes;
pub mod target;

pub use context::{Context, Neighbours, Outcomes, Timing};
pub use ports::{Listening, PortSettings, Ports};
pub use resolver::Resolver;

//! Sessions: an initiator engine's view of one target endpoint, and the target's view of its initiators.
//!
//! [`outbound`] is the initiator's core, synchronous: event in, actions out; the driver in `peer` does its I/O.
//! [`inbound`] is the target's table. [`identity`] proves who is at the other end, [`secret`] that it belongs to this cluster. A session lives as long as
//! its control stream; when that ends, both sides fence its lanes.

mod handle;
pub mod identity;
pub mod inbound;
pub mod outbound;
mod peer_table;
pub mod secret;

pub use handle::{Command, Handle, Known};
pub use peer_table::PeerTable;

//! Client library of kvferry: attach an engine process to its node's daemon, register memory once, move slices.
//!
//! ```no_run
//! use kvferry_client::{Engine, EngineOptions, Lengths, Memory, Op, Outcome, Policy, SharedBuffer, Slices, Transfer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::attach(EngineOptions::default())?;
//! let mut pool = SharedBuffer::new(1 << 20)?;
//! pool.as_mut_slice().fill(7);
//! engine.register(&[Memory::Shared(&pool)])?;
//!
//! // Out of band: the target engine told us its session id and the address of its own pool.
//! let (session, target) = ("10.0.0.2:20001".to_owned(), 0x7f00_0000_0000);
//! let report = engine.transfer(Transfer {
//!     session,
//!     op: Op::Write,
//!     slices: Slices {
//!         local: vec![pool.address(), pool.address() + 65_536],
//!         remote: vec![target, target + 16_384],
//!         lengths: Lengths::Uniform(16_384),
//!     },
//!     tag: None,
//!     deadline: None,
//!     policy: Policy::default(),
//!     id: None,
//! })?;
//! assert_eq!(report.outcome, Outcome::Done, "{:?}", report.failure);
//! # Ok(())
//! # }
//! ```
//!
//! What a caller must know:
//!
//! - **Failed means settled.** A report that says DONE, FAILED or CANCELLED also says that nobody can touch the
//!   caller's memory for that transfer any more. UNSETTLED says that this is not proven: leave the memory alone
//!   and [`wait`](Engine::wait).
//! - The destination of a transfer that is not DONE is undefined, and a retry may mix source contents of
//!   different moments.
//! - Pages are given away only after what may still come to them was revoked: [`Engine::revoke`] for ranges,
//!   [`Engine::revoke_tag`] for all of a request. A peer that was never met is stopped by a tag alone.
//! - [`Engine`] blocks, [`aio::Engine`] does not. Both keep one background thread, `kvferry-lease`, and a second one,
//!   `kvferry-assist`, where private memory is registered that the daemon cannot reach by itself: that thread copies for
//!   it. [`Engine::process_access`] tells.
//! - A daemon restart is survived: the engine attaches again by itself, with its key, its port and everything
//!   registered ([`Event::Reattached`]). Calls fail with [`Error::NoDaemon`] meanwhile.
//! - Handles do not survive fork: a child gets [`Error::Forked`] and must attach for itself.
//!
//! The way of a call through the modules: `engine` or `aio` (whose thread, whose runtime) -> `caller` and
//! `submit` (which messages, and what their loss means) -> `pipe` (a blocking thread's open stream) ->
//! `connection`. `holder` is the background thread: `attach` and `reattach` begin a lease, `watch` sees its end;
//! `assist` is the second one.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod aio;

mod assist;
mod attach;
mod attachment;
mod batch;
mod buffer;
mod caller;
mod connection;
mod cuts;
mod engine;
mod error;
mod event;
mod facts;
mod fds;
mod fork;
mod holder;
mod lease;
mod links;
mod memory;
mod node;
mod options;
mod orders;
mod peers;
mod pipe;
mod private;
mod rails;
mod reattach;
mod regions;
mod revocations;
mod settling;
mod submit;
mod transfer;
mod unsettled;
mod watch;

pub use buffer::SharedBuffer;
pub use caller::Probe;
pub use engine::{Engine, Pending};
pub use error::{Error, Failure};
pub use event::Event;
pub use kvferry_proto::{
    engine::v1::ProcessAccess,
    types::v1::{MemoryKind, Op, Path, Reason, SessionState},
};
pub use lease::Limits;
pub use memory::{Memory, Region};
pub use node::Node;
pub use options::{EngineOptions, Policy};
pub use revocations::{Range, tag};
pub use transfer::{Lengths, Outcome, Report, Settlement, Slices, Transfer, TransferId};

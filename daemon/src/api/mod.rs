//! The edge towards engines: gRPC on the Unix socket, and the fd socket beside it. prost types stop here.

mod attach;
mod convert;
pub mod fd_socket;
mod refusal;
mod regions;
mod revoke;
mod service;
pub mod socket;
mod status;
mod transfers;

pub use service::EngineService;

//! The words of the design as types: identities, reasons, batches and reports.
//!
//! Leaf module: it knows no protocol, no transport and no clock. Raw integers and strings become these types
//! at the edges (`api`, `peer`) and stay these types inside.

mod batch;
mod ids;
mod range;
mod reason;

pub use batch::{BatchError, Op, Outcome, PathKind, PeerHalf, Report, SliceBatch, Timings};
pub use ids::{
    BootId, EngineId, Epoch, Generation, Incarnation, LaneId, LayoutId, RegionId, SessionId, Tag, TransferId,
};
pub use range::AddressRange;
pub use reason::{Class, Failure, Reason};

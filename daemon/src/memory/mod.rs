//! Engine memory: regions, how their bytes are reached, who may touch them, and the one registrar.
//!
//! [`EngineMemory`] is what one engine has registered. Who touches it looks into its [`View`] inside its
//! [`Gate`]; what is registered and released goes through the [`Registrar`]. Unsafe code lives in `mapping`
//! and in `assistant/ring` only.

mod assistant;
mod engine;
mod fds;
mod gate;
mod mapping;
mod process;
mod region;
mod registrar;
#[cfg(test)]
pub(crate) mod testing;

use assistant::Assistant;
pub use engine::{
    Awaited, EngineMemory, LayoutRequest, PendingRelease, ProcessAccess, Quota, Raised, RegionRequest,
    RevocationBook, Source, Unregister, View,
};
pub use fds::FdShelf;
pub use gate::{Gate, Inside, Seat, Version};
pub use mapping::{MapOptions, Mapping};
pub use process::{Extent, ProcessMemory};
pub use region::{Backing, Described, Layout, MemoryKind, Miss, Region, RegionInfo, RegionTable};
pub use registrar::{
    Acquire, Grant, HandRegistrar, LockPolicy, RegionDriver, Registrar, RegistrarStats, SystemDriver, Urgency,
};

/// Where every endpoint's probe region lies: an address no engine's own memory can have.
pub const PROBE_BASE: u64 = 0xffff_f000_0000_0000;

/// Length of the probe region.
pub const PROBE_BYTES: u64 = 4096;

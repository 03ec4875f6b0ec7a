//! Engine memory: regions, how their bytes are reached, who may touch them, and the one registrar.

mod engine;
mod fds;
mod gate;
mod mapping;
mod process;
mod region;
mod registrar;

pub use engine::{EngineMemory, Quota, RegionRequest, Source, Unregister, View};
pub use fds::FdShelf;
pub use gate::{Gate, Inside, Seat, Version};
pub use mapping::Mapping;
pub use process::ProcessMemory;
pub use region::{Backing, Described, Layout, MemoryKind, Miss, Region, RegionInfo, RegionTable};
pub use registrar::{Registrar, RegistrarStats};

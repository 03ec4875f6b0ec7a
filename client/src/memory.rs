//! What can be registered, and what a registration is.

use std::{ops::Range, sync::Arc};

use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use crate::{Error, MemoryKind, SharedBuffer, buffer::Mapping};

/// What to register.
#[derive(Clone, Debug)]
pub enum Memory<'a> {
    /// A whole shared buffer.
    Shared(&'a SharedBuffer),
    /// Some bytes of a shared buffer.
    SharedRange(&'a SharedBuffer, Range<usize>),
    /// Plain memory of this process. Stays the caller's to keep alive until unregistered and settled.
    Process {
        /// In this process.
        address: u64,
        /// Bytes.
        length: u64,
    },
}

/// A registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Names it in [`Engine::unregister`](crate::Engine::unregister).
    pub id: u32,
    /// Tells this registration from an earlier one with the same id.
    pub generation: u32,
    /// First address, in this process.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// How the daemon reaches it.
    pub kind: MemoryKind,
}

impl From<types::Region> for Region {
    fn from(region: types::Region) -> Self {
        Self {
            id: region.id,
            generation: region.generation,
            base: region.base,
            length: region.length,
            kind: region.kind(),
        }
    }
}

/// One registration, seen from the wire: the range, and the file where it has one.
#[derive(Clone, Debug)]
pub(crate) struct Backing {
    pub(crate) base: u64,
    pub(crate) length: u64,
    pub(crate) file: Option<(Arc<Mapping>, u64)>,
}

impl Backing {
    /// Whole list, or the first entry that is not a range of its buffer.
    pub(crate) fn all(memory: &[Memory<'_>]) -> Result<Vec<Self>, Error> {
        memory.iter().enumerate().map(|(index, memory)| Self::new(memory, index as u64)).collect()
    }

    fn new(memory: &Memory<'_>, index: u64) -> Result<Self, Error> {
        match memory {
            Memory::Shared(buffer) => Ok(Self::shared(buffer, 0..buffer.len())),
            Memory::SharedRange(buffer, range) if range.start <= range.end && range.end <= buffer.len() => {
                Ok(Self::shared(buffer, range.clone()))
            }
            Memory::SharedRange(buffer, range) => {
                let text = format!("{range:?} is not a range of a buffer of {} bytes", buffer.len());
                Err(Error::argument(text, Some(index)))
            }
            Memory::Process { address, length } => Ok(Self { base: *address, length: *length, file: None }),
        }
    }

    /// Base and length, where it is memory of this process alone.
    pub(crate) fn private(&self) -> Option<(u64, u64)> {
        self.file.is_none().then_some((self.base, self.length))
    }

    fn shared(buffer: &SharedBuffer, range: Range<usize>) -> Self {
        Self {
            base: buffer.address() + range.start as u64,
            length: range.len() as u64,
            file: Some((buffer.mapping().clone(), range.start as u64)),
        }
    }

    /// `handle` is what the file was handed over under.
    pub(crate) fn spec(&self, handle: Option<u64>) -> wire::RegionSpec {
        use wire::region_spec::Backing as Wire;
        let backing = match (&self.file, handle) {
            (Some((_, offset)), Some(handle)) => Wire::SharedFd(wire::SharedFd { handle, offset: *offset }),
            _ => Wire::Process(wire::ProcessMemory {}),
        };
        wire::RegionSpec { base: self.base, length: self.length, backing: Some(backing), cuda_ipc: None }
    }
}

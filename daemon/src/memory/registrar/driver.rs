//! The driver calls that the registrar makes, as a seam.
//!
//! Few and blocking. Tests and the simulation put counting, slow and failing ones in their place; what else
//! pins memory (verbs) will be further calls here, under the same registrar.

use std::{fmt, os::fd::BorrowedFd};

use super::super::{MapOptions, Mapping, ProcessMemory};
use crate::domain::Failure;

/// One call each; none waits for a peer, a lane or a transfer.
pub trait RegionDriver: Send + Sync + fmt::Debug {
    /// Maps a range of an engine's memfd.
    fn map(&self, fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Mapping, Failure>;

    /// Finds out whether a range of an engine's private memory is there, without writing to it.
    fn probe_process(&self, memory: &ProcessMemory, base: u64, length: u64) -> Result<(), Failure>;

    /// Releases a mapping.
    fn unmap(&self, mapping: Mapping);
}

/// The kernel.
#[derive(Debug, Default)]
pub struct SystemDriver {
    /// What may be mapped.
    pub options: MapOptions,
}

impl RegionDriver for SystemDriver {
    fn map(&self, fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Mapping, Failure> {
        Mapping::new(fd, offset, length, self.options)
    }

    fn probe_process(&self, memory: &ProcessMemory, base: u64, length: u64) -> Result<(), Failure> {
        memory.probe(base, length)
    }

    fn unmap(&self, mapping: Mapping) {
        drop(mapping);
    }
}

//! One engine's half of a plan: its buffers, what is written into them, and the errors planted on purpose.
//!
//! Whoever calls these methods has made sure that no transfer touches the memory meanwhile, with one
//! exception: `fill` overwrites a source right after a cancel, which is the very moment the demo is about.

use kvferry_client::{Memory, SharedBuffer};

use super::protocol::{Sabotage, Side};
use crate::{
    pattern::Stream,
    workloads::{Backing, Plan, Slice},
};

/// Memory that outlives its registration: the worker drops a pool only after unregistering it.
#[derive(Debug)]
enum Buffer {
    Shared(SharedBuffer),
    Process(Box<[u8]>),
}

impl Buffer {
    fn new(backing: Backing, length: u64) -> anyhow::Result<Self> {
        let length = usize::try_from(length)?;
        Ok(match backing {
            Backing::Shared => Self::Shared(SharedBuffer::new(length)?),
            Backing::Process => Self::Process(vec![0; length].into_boxed_slice()),
        })
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Shared(buffer) => buffer.as_slice(),
            Self::Process(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Shared(buffer) => buffer.as_mut_slice(),
            Self::Process(bytes) => bytes,
        }
    }

    fn base(&mut self) -> u64 {
        match self {
            Self::Shared(buffer) => buffer.address(),
            // Taken from a mutable pointer: the daemon will write through it.
            Self::Process(bytes) => bytes.as_mut_ptr() as u64,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) plan: Plan,
    pub(crate) side: Side,
    /// Base addresses in this process.
    pub(crate) bases: Vec<u64>,
    buffers: Vec<Buffer>,
}

impl Pool {
    pub(crate) fn new(plan: Plan, side: Side) -> anyhow::Result<Self> {
        let lengths = match side {
            Side::Source => &plan.source,
            Side::Sink => &plan.sink,
        };
        let mut buffers = lengths
            .iter()
            .map(|length| Buffer::new(plan.backing, *length))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let bases = buffers.iter_mut().map(Buffer::base).collect();
        Ok(Self { plan, side, bases, buffers })
    }

    /// What to register, in the order of `bases`.
    pub(crate) fn memory(&self) -> Vec<Memory<'_>> {
        self.buffers
            .iter()
            .zip(&self.bases)
            .map(|(buffer, base)| match buffer {
                Buffer::Shared(shared) => Memory::Shared(shared),
                Buffer::Process(bytes) => Memory::Process { address: *base, length: bytes.len() as u64 },
            })
            .collect()
    }

    pub(crate) fn bytes(&self) -> Vec<&[u8]> {
        self.buffers.iter().map(Buffer::bytes).collect()
    }

    /// Every source slice gets the content of `transfer`.
    pub(crate) fn fill(&mut self, transfer: u64) {
        let mut buffers: Vec<_> = self.buffers.iter_mut().map(Buffer::bytes_mut).collect();
        for (number, slice) in (0..).zip(&self.plan.slices) {
            let range = slice.source_offset as usize..(slice.source_offset + slice.length) as usize;
            Stream::slice(transfer, number).fill(&mut buffers[slice.source_buffer as usize][range], 0);
        }
    }

    pub(crate) fn clear(&mut self) {
        for (number, buffer) in (0..).zip(&mut self.buffers) {
            Stream::background(number).fill(buffer.bytes_mut(), 0);
        }
    }

    /// Plants one error in a sink that has received `transfer`, in the middle of the plan.
    pub(crate) fn sabotage(&mut self, how: Sabotage, transfer: u64) -> anyhow::Result<()> {
        let number = self.plan.slices.len() / 2;
        let slice = self.plan.slices[number];
        match how {
            Sabotage::Flip => self.sink_bytes(slice)[slice.length as usize / 2] ^= 1,
            Sabotage::Skip => {
                Stream::background(slice.sink_buffer.into()).fill(self.sink_bytes(slice), slice.sink_offset);
            }
            Sabotage::Dup => {
                let other = (0..self.plan.slices.len())
                    .find(|at| *at != number && self.plan.slices[*at].length == slice.length)
                    .ok_or_else(|| anyhow::anyhow!("no second slice of that size to duplicate"))?;
                Stream::slice(transfer, other as u64).fill(self.sink_bytes(slice), 0);
            }
            Sabotage::Stray => {
                let buffer = slice.sink_buffer;
                let at = gap(&self.plan, buffer).ok_or_else(|| {
                    anyhow::anyhow!("every byte of the buffer is expected: nowhere to stray")
                })?;
                self.buffers[buffer as usize].bytes_mut()[at] ^= 0xFF;
            }
        }
        Ok(())
    }

    pub(super) fn sink_bytes(&mut self, slice: Slice) -> &mut [u8] {
        let range = slice.sink_offset as usize..(slice.sink_offset + slice.length) as usize;
        &mut self.buffers[slice.sink_buffer as usize].bytes_mut()[range]
    }
}

/// The first offset of a sink buffer that no slice covers.
fn gap(plan: &Plan, buffer: u32) -> Option<usize> {
    let mut ranges: Vec<_> = plan
        .slices
        .iter()
        .filter(|slice| slice.sink_buffer == buffer)
        .map(|slice| (slice.sink_offset, slice.sink_offset + slice.length))
        .collect();
    ranges.sort_unstable();
    let mut free = 0;
    for (start, end) in ranges {
        if start > free {
            break;
        }
        free = free.max(end);
    }
    (free < plan.sink[buffer as usize]).then_some(free as usize)
}

//! The way into an engine's private memory. Which one it is, is settled when the engine attaches, because the threads of
//! its lanes depend on it; an assistant comes later, when the engine first needs one.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    super::{Acquire, Assistant, Backing, ProcessMemory, Urgency},
    EngineMemory, RegionRequest, Source,
};
use crate::domain::{Failure, Reason};

/// How an engine's private memory is reached.
#[derive(Debug)]
pub enum ProcessAccess {
    /// Not at all: it cannot be registered.
    OutOfReach,
    /// Through its `/proc/<pid>/mem`.
    Direct(Arc<ProcessMemory>),
    /// By its own client library.
    Assisted(Awaited),
}

/// An assistant, from the engine's attach on.
#[derive(Debug)]
pub struct Awaited {
    /// How long a request waits to be claimed.
    answer: Duration,
    /// The engine's pidfd.
    process: Option<Arc<OwnedFd>>,
    /// Held for a look or a change.
    offered: Mutex<Option<Arc<ProcessMemory>>>,
    /// Probes wait for the engine on a thread that is not theirs: one at a time.
    probing: Arc<tokio::sync::Mutex<()>>,
}

impl Awaited {
    /// Not offered yet. `process` is the engine's pidfd, where it can be had; `answer` is `process.answer_ms`.
    pub fn new(process: Option<Arc<OwnedFd>>, answer: Duration) -> Self {
        Self { answer, process, offered: Mutex::default(), probing: Arc::default() }
    }

    fn offered(&self) -> Option<Arc<ProcessMemory>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn take(&self) -> Option<Arc<ProcessMemory>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Keeps it, unless there is one.
    fn put(&self, memory: &Arc<ProcessMemory>) -> bool {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let first = offered.is_none();
        offered.get_or_insert_with(|| memory.clone());
        first
    }
}

impl EngineMemory {
    /// How private memory is reached.
    pub fn process_access(&self) -> &ProcessAccess {
        &self.process
    }

    /// Whether a touch of this memory may have to wait for the engine.
    pub fn is_assisted(&self) -> bool {
        matches!(self.process, ProcessAccess::Assisted(_))
    }

    /// Takes up the ring that the engine's client library serves: once, and only where it is needed.
    ///
    /// BAD_ARGUMENT where it is not, or where there is one; UNSUPPORTED_MEMORY and others where the memfd is no ring.
    pub async fn take_assistant(&self, memfd: Arc<OwnedFd>) -> Result<(), Failure> {
        let ProcessAccess::Assisted(awaited) = &self.process else {
            return Err(Failure::new(Reason::BadArgument, "no assistant is needed here"));
        };
        let call =
            Acquire::Shared { fd: memfd.clone(), offset: 0, length: kvferry_proto::ring::BYTES as u64 };
        let grant = tokio::select! {
            biased;
            () = self.closed() => return Err(Failure::plain(Reason::EngineGone)),
            grant = self.registrar.acquire(vec![call]) => grant?,
        };
        let Some(Backing::Shared(mapping)) = grant.into_backings().pop() else {
            return Err(Failure::new(Reason::Driver, "a memfd became something else"));
        };
        let assistant = Assistant::new(mapping, memfd, awaited.process.clone(), awaited.answer)?;
        let memory = Arc::new(ProcessMemory::assisted(assistant));
        let refused = if !awaited.put(&memory) {
            self.registrar.release(vec![Backing::Process(memory)], Urgency::Ordinary).await;
            Failure::new(Reason::BadArgument, "the engine has an assistant already")
        } else if self.view().closed {
            self.release_assistant().await;
            Failure::plain(Reason::EngineGone)
        } else {
            return Ok(());
        };
        Err(refused)
    }

    /// The call that makes a region of private memory.
    pub(super) fn acquire_process(&self, base: u64, length: u64) -> Result<Acquire, Failure> {
        let unsupported = |what: &str| Failure::new(Reason::UnsupportedMemory, what);
        match &self.process {
            ProcessAccess::OutOfReach => Err(unsupported("no access to the engine's private memory")),
            ProcessAccess::Direct(memory) => Ok(Acquire::Process { memory: memory.clone(), base, length }),
            ProcessAccess::Assisted(awaited) => match awaited.offered() {
                Some(memory) => Ok(Acquire::Probed { memory }),
                None => Err(unsupported(
                    "private memory of this engine needs an assistant, and it has offered none",
                )),
            },
        }
    }

    /// Finds out whether assisted ranges are there. Not on the registrar's thread, which waits for no engine.
    ///
    /// A failure names the region by its index.
    pub(super) async fn probe_assisted(&self, regions: &[RegionRequest]) -> Result<(), Failure> {
        let ProcessAccess::Assisted(awaited) = &self.process else { return Ok(()) };
        let private = |(_, request): &(usize, &RegionRequest)| matches!(request.source, Source::Process);
        let (indices, ranges): (Vec<_>, Vec<_>) = regions
            .iter()
            .enumerate()
            .filter(private)
            .map(|(index, request)| (index, (request.base, request.length)))
            .unzip();
        let Some(memory) = awaited.offered().filter(|_| !ranges.is_empty()) else { return Ok(()) };
        // It goes with the thread, not with whoever waits for that: a stopped engine holds one thread.
        let turn = awaited.probing.clone().lock_owned().await;
        let probed = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            memory.probe_all(&ranges)
        });
        match probed.await {
            Ok(result) => result.map_err(|(which, failure)| {
                let index = indices[which];
                Failure { message: format!("regions[{index}]: {}", failure.message), ..failure }
                    .at(index as u64)
            }),
            Err(error) => Err(Failure::new(Reason::Draining, format!("the probe was given up: {error}"))),
        }
    }

    /// The engine is out of reach: nobody waits for its assistant any more.
    pub(super) fn close_assistant(&self) {
        if let ProcessAccess::Assisted(awaited) = &self.process
            && let Some(memory) = awaited.offered()
        {
            memory.close();
        }
    }

    /// Lets go of the ring, on the registrar's thread (I7). Regions that are still leased keep it (I6).
    pub(super) async fn release_assistant(&self) {
        if let ProcessAccess::Assisted(awaited) = &self.process
            && let Some(memory) = awaited.take()
        {
            self.registrar.release(vec![Backing::Process(memory)], Urgency::Dead).await;
        }
    }
}

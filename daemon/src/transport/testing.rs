//! Engines with memory, payloads and listening sinks, for the tests of every transport.

use std::{
    os::fd::OwnedFd,
    process::{Child, Command},
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use rustix::process::Pid;
use tokio::runtime::Runtime;

use super::{
    LaneEvent, LaneKind, LaneRecord, LaneSink, PART_BYTES, PART_RUNS, Part, PartBounds, Payload,
    RemoteRegion, Run, SequencedPart, TargetSink,
};
use crate::{
    domain::{AddressRange, Epoch, Failure, LaneId, Op, Tag, TransferId},
    memory::{
        EngineMemory, LockPolicy, PendingRelease, ProcessMemory, Quota, RegionInfo, RegionRequest, Registrar,
        Source, SystemDriver, Unregister,
        testing::{own_memory, sealed_memfd},
    },
};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long lane threads look for work: as in production.
pub(crate) const SPIN: Duration = Duration::from_micros(200);

/// An engine's address space begins here; regions lie far apart.
const BASE: u64 = 0x10_0000_0000;

/// Waits until something holds.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} never came true");
        std::thread::yield_now();
    }
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let build = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    RUNTIME.get_or_init(|| build().expect("a runtime"))
}

/// Runs to the end, which must come in time.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    runtime().block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("it ends in time") })
}

/// An engine and its memory.
pub(crate) struct Engine {
    pub(crate) memory: Arc<EngineMemory>,
    next_base: AtomicU64,
    /// What private regions are made of: kept as long as they are registered, and reached only through
    /// `/proc/self/mem`.
    private: Mutex<Vec<Vec<u8>>>,
}

/// A registered range that a test can look into from the engine's side.
pub(crate) struct TestRegion {
    pub(crate) info: RegionInfo,
    bytes: Bytes,
}

enum Bytes {
    Shared(Arc<OwnedFd>),
    Process,
}

impl Engine {
    pub(crate) fn new() -> Self {
        Self::with(own_memory())
    }

    /// The engine is another process, and its registered range its stack.
    pub(crate) fn of_a_child() -> (Self, Dying) {
        let child = Command::new("sleep").arg("1000").spawn().expect("a child");
        let pid = Pid::from_child(&child);
        let maps = || std::fs::read_to_string(format!("/proc/{}/maps", child.id())).expect("its maps");
        // Until it has become `sleep` the maps are those of this process's copy.
        wait_until("the child's start", || maps().contains("/sleep") && maps().contains("[stack]"));
        let maps = maps();
        let stack = maps.lines().find(|line| line.ends_with("[stack]")).expect("a stack");
        let (range, _) = stack.split_once(' ').expect("a range");
        let (_, end) = range.split_once('-').expect("a range");
        let end = u64::from_str_radix(end, 16).expect("an address");
        let engine = Self::with(Arc::new(ProcessMemory::open(pid).expect("its memory")));
        let info = engine.register(end - 4096, 4096, Source::Process);
        (engine, Dying { child, info })
    }

    fn with(process: Arc<ProcessMemory>) -> Self {
        let policy = LockPolicy::Node { lock_file: None };
        let registrar =
            Registrar::start(&policy, Arc::new(SystemDriver::default()), 100).expect("a registrar");
        let quota = Quota { regions: 1000, bytes: 1 << 40, layouts: 1 };
        let memory = EngineMemory::new(registrar, quota, Some(process));
        Self { memory, next_base: AtomicU64::new(BASE), private: Mutex::default() }
    }

    fn register(&self, base: u64, length: u64, source: Source) -> RegionInfo {
        let request = RegionRequest { base, length, source };
        block_on(self.memory.register(vec![request], Vec::new())).expect("a region").0[0]
    }

    /// A mapped region of zeros.
    pub(crate) fn shared(&self, length: u64) -> TestRegion {
        let fd = Arc::new(sealed_memfd(length));
        let base = self.next_base.fetch_add(BASE, SeqCst);
        let info = self.register(base, length, Source::SharedFd { fd: fd.clone(), offset: 0 });
        TestRegion { info, bytes: Bytes::Shared(fd) }
    }

    /// A region of private memory, of zeros.
    pub(crate) fn private(&self, length: u64) -> TestRegion {
        let bytes = vec![0u8; length as usize];
        let info = self.register(bytes.as_ptr() as u64, length, Source::Process);
        self.private.lock().expect("no test panicked").push(bytes);
        TestRegion { info, bytes: Bytes::Process }
    }

    pub(crate) fn region(&self, private: bool, length: u64) -> TestRegion {
        if private { self.private(length) } else { self.shared(length) }
    }

    pub(crate) fn unregister(&self, region: &TestRegion) -> PendingRelease {
        let unregister = Unregister { ids: vec![region.info.id], ..Unregister::default() };
        block_on(self.memory.unregister(unregister)).expect("a live region")
    }

    /// Returns when nobody admitted before can touch the range.
    pub(crate) fn revoke(&self, base: u64, length: u64) {
        let raised = self.memory.revoke(vec![AddressRange::new(base, length).expect("a range")]);
        block_on(self.memory.gate().quiet(raised.version));
    }

    /// Returns when nobody with the tag can touch anything.
    pub(crate) fn revoke_tag(&self, tag: Tag) {
        let raised = self.memory.revoke_tag(tag).expect("room");
        block_on(self.memory.gate().quiet(raised.version));
    }

    /// Returns when everyone acts under the rules that hold now.
    pub(crate) fn settle(&self) {
        let version = self.memory.gate().raise();
        block_on(self.memory.gate().quiet(version));
    }
}

/// A child that is an engine.
pub(crate) struct Dying {
    child: Child,
    info: RegionInfo,
}

impl Dying {
    /// Ends it, and gives what its memory was.
    pub(crate) fn end(mut self) -> TestRegion {
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
        TestRegion { info: self.info, bytes: Bytes::Process }
    }
}

impl TestRegion {
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        match &self.bytes {
            Bytes::Shared(fd) => assert_eq!(rustix::io::pwrite(fd, bytes, offset), Ok(bytes.len())),
            Bytes::Process => own_memory().write_at(self.info.base + offset, bytes).expect("our memory"),
        }
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.info.length as usize];
        match &self.bytes {
            Bytes::Shared(fd) => assert_eq!(rustix::io::pread(fd, &mut bytes, 0), Ok(bytes.len())),
            Bytes::Process => own_memory().read_at(self.info.base, &mut bytes).expect("our memory"),
        }
        bytes
    }

    /// Bytes that depend on place and seed, never 0.
    pub(crate) fn paint(&self, seed: u64) {
        let bytes: Vec<u8> = (0..self.info.length).map(|at| pattern(at, seed)).collect();
        self.write(0, &bytes);
    }
}

pub(crate) fn pattern(at: u64, seed: u64) -> u8 {
    let mixed = (at ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 56) as u8).max(1)
}

/// A slice by offsets: local, remote, bytes.
pub(crate) type Slice = (u64, u64, u64);

/// One slice a run, cut into parts as planning would.
pub(crate) fn payload(
    kind: LaneKind,
    engine: &Engine,
    local: &TestRegion,
    remote: &TestRegion,
    slices: &[Slice],
) -> Arc<Payload> {
    let run = |&(from, to, length): &Slice| Run {
        local: local.info.base + from,
        remote: remote.info.base + to,
        length,
        local_region: 0,
        remote_region: 0,
    };
    let runs: Vec<Run> = slices.iter().map(run).collect();
    let view = engine.memory.view();
    let lease = view.table.get(local.info.id).expect("a live region").clone();
    Arc::new(Payload {
        transfer: TransferId::random(),
        op: if kind == LaneKind::Write { Op::Write } else { Op::Read },
        tag: Some(Tag([7; 16])),
        admit_epoch: Epoch(0),
        local_regions: vec![lease],
        remote_regions: vec![RemoteRegion { id: remote.info.id, generation: remote.info.generation }],
        parts: cut(&runs),
        slices: runs.len() as u64,
        bytes: runs.iter().map(|run| run.length).sum(),
        runs,
        stopped: AtomicBool::new(false),
    })
}

fn cut(runs: &[Run]) -> Vec<PartBounds> {
    let mut parts = Vec::new();
    let (mut run, mut skip) = (0, 0);
    while run < runs.len() {
        let (first_run, first_skip) = (run, skip);
        let (mut bytes, mut slices, mut touched) = (0, 0, 0);
        while run < runs.len() && touched < PART_RUNS as u32 && bytes < PART_BYTES {
            let step = (runs[run].length - skip).min(PART_BYTES - bytes);
            bytes += step;
            skip += step;
            touched += 1;
            if skip == runs[run].length {
                (run, skip, slices) = (run + 1, 0, slices + 1);
            }
        }
        let first = first_run as u32;
        let bounds = PartBounds {
            first_run: first,
            runs: touched,
            skip: first_skip,
            bytes: bytes as u32,
            first_slice: first,
            slices,
        };
        parts.push(bounds);
    }
    parts
}

/// All parts of a payload, numbered from `first`.
pub(crate) fn sequenced(payload: &Arc<Payload>, first: u64) -> Vec<SequencedPart> {
    let part = |index| Part { payload: payload.clone(), index };
    (0..payload.parts.len() as u32)
        .map(|index| SequencedPart { sequence: first + u64::from(index), part: part(index) })
        .collect()
}

/// Keeps what an initiator's lane tells.
#[derive(Debug, Default)]
pub(crate) struct Events {
    seen: Mutex<Vec<LaneEvent>>,
    changed: Condvar,
}

impl Events {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn seen(&self) -> Vec<LaneEvent> {
        self.seen.lock().expect("no test panicked").clone()
    }

    fn wait<T>(&self, what: &str, mut found: impl FnMut(&[LaneEvent]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.seen.lock().expect("no test panicked");
        loop {
            if let Some(found) = found(&seen) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} never came: {seen:?}");
            seen = self.changed.wait_timeout(seen, left).expect("no test panicked").0;
        }
    }

    /// Waits until so many parts are processed. A lane that closes first fails the test.
    pub(crate) fn wait_processed(&self, parts: u64) {
        self.wait("the parts", |seen| {
            if let Some(LaneEvent::Closed { cause }) = seen.last() {
                panic!("closed: {cause}");
            }
            (processed(seen) >= parts).then_some(())
        });
    }

    pub(crate) fn wait_closed(&self) -> Failure {
        self.wait("the end", |seen| match seen.last() {
            Some(LaneEvent::Closed { cause }) => Some(cause.clone()),
            _ => None,
        })
    }

    pub(crate) fn processed(&self) -> u64 {
        processed(&self.seen())
    }

    pub(crate) fn refused(&self) -> Vec<(u64, Failure)> {
        let refused = |event| match event {
            LaneEvent::Refused { sequence, failure } => Some((sequence, failure)),
            _ => None,
        };
        self.seen().into_iter().filter_map(refused).collect()
    }
}

fn processed(events: &[LaneEvent]) -> u64 {
    let count = |event: &LaneEvent| match event {
        LaneEvent::Processed { from, through } => through - from + 1,
        _ => 0,
    };
    events.iter().map(count).sum()
}

impl LaneSink for Events {
    fn lane_event(&self, _: LaneId, event: LaneEvent) {
        let mut seen = self.seen.lock().expect("no test panicked");
        assert!(!matches!(seen.last(), Some(LaneEvent::Closed { .. })), "{event:?} after the end");
        seen.push(event);
        self.changed.notify_all();
    }
}

/// Panics at the first event, as no sink may.
#[derive(Debug, Default)]
pub(crate) struct Faulty(AtomicBool);

impl LaneSink for Faulty {
    fn lane_event(&self, _: LaneId, event: LaneEvent) {
        assert!(self.0.swap(true, SeqCst), "made to panic at {event:?}");
    }
}

/// Keeps what a target's lane tells at its end.
#[derive(Debug, Default)]
pub(crate) struct TargetEnd {
    end: Mutex<Option<(LaneRecord, Failure)>>,
    changed: Condvar,
}

impl TargetEnd {
    pub(crate) fn wait(&self) -> (LaneRecord, Failure) {
        let end = self.end.lock().expect("no test panicked");
        let (end, _) =
            self.changed.wait_timeout_while(end, PATIENCE, |end| end.is_none()).expect("no test panicked");
        end.clone().expect("the lane ends in time")
    }
}

impl TargetSink for TargetEnd {
    fn lane_closed(&self, _: LaneId, record: LaneRecord, cause: Failure) {
        let before = self.end.lock().expect("no test panicked").replace((record, cause));
        assert_eq!(before, None, "the end is told once");
        self.changed.notify_all();
    }
}

use std::{os::fd::AsFd, time::Duration};

use tokio::time::timeout;

use super::{
    super::{
        LockPolicy, MemoryKind, RegionInfo, Urgency,
        testing::{Behaviour, DriverCall, TestDriver, own_memory, sealed_memfd},
    },
    *,
};
use crate::domain::{Failure, Generation, Reason};

const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;
const HOUR: Duration = Duration::from_secs(3600);
const QUOTA: Quota = Quota { regions: 100, bytes: 1 << 30, layouts: 10 };

struct Node {
    driver: Arc<TestDriver>,
    registrar: Arc<Registrar>,
    memory: Arc<EngineMemory>,
}

impl Node {
    fn new(behaviour: Behaviour) -> Self {
        let driver = TestDriver::new(behaviour);
        let policy = LockPolicy::Node { lock_file: None };
        let registrar = Registrar::start(&policy, driver.clone(), 100).expect("a registrar");
        let memory = EngineMemory::new(registrar.clone(), QUOTA, Some(own_memory()));
        Self { driver, registrar, memory }
    }

    fn ordinary() -> Self {
        Self::new(Behaviour::default())
    }

    async fn register(&self, requests: &[RegionRequest]) -> Result<Vec<RegionInfo>, Failure> {
        self.memory.register(requests.to_vec(), Vec::new()).await.map(|(infos, _)| infos)
    }

    async fn unregister(&self, id: RegionId) -> PendingRelease {
        let unregister = Unregister { ids: vec![id], ..Unregister::default() };
        self.memory.unregister(unregister).await.expect("a region")
    }

    /// Through with everything that the registrar was asked for.
    async fn catch_up(&self) {
        self.registrar.release(Vec::new(), Urgency::Ordinary).await;
    }

    /// The release makes no further step by itself, and nothing was unmapped so far. On a paused clock, where
    /// the hour passes once every task waits for something.
    async fn assert_stuck(&self, pending: &mut PendingRelease) {
        assert!(timeout(HOUR, pending.settled()).await.is_err());
        self.catch_up().await;
        let unmapped = |call: &DriverCall| matches!(call, DriverCall::Unmap { .. });
        assert!(!self.driver.seen().calls.iter().any(unmapped));
    }
}

fn shared(pages: std::ops::Range<u64>) -> RegionRequest {
    let length = (pages.end - pages.start) * PAGE;
    let fd = Arc::new(sealed_memfd(length));
    RegionRequest { base: BASE + pages.start * PAGE, length, source: Source::SharedFd { fd, offset: 0 } }
}

fn layout(layer_bases: &[u64], pages: u64) -> LayoutRequest {
    LayoutRequest {
        layer_bases: layer_bases.to_vec(),
        page_stride: PAGE,
        page_bytes: PAGE,
        pages,
        dtype_tag: "bf16".into(),
    }
}

#[tokio::test]
async fn both_kinds_are_reached_at_the_engine_s_addresses() {
    let node = Node::ordinary();
    let private = [3u8; 64];
    let base = private.as_ptr() as u64;
    let fd = Arc::new(sealed_memfd(2 * PAGE));
    let requests = [
        RegionRequest { base: BASE, length: PAGE, source: Source::SharedFd { fd: fd.clone(), offset: 100 } },
        RegionRequest { base, length: 64, source: Source::Process },
    ];
    let mut changes = node.memory.changes();
    let infos = node.register(&requests).await.expect("two regions");
    assert_eq!((infos[0].kind, infos[1].kind), (MemoryKind::SharedFd, MemoryKind::Process));
    assert_eq!(*changes.borrow_and_update(), node.memory.view().version);

    rustix::io::pwrite(fd.as_fd(), b"x", 107).expect("a byte");
    let view = node.memory.view();
    let region = view.table.find(BASE + 7, 1).expect("the region");
    let offset = |address| region.host_pointer(address).expect("shared memory") as usize;
    assert_eq!(offset(BASE + 7) - offset(BASE), 7);
    assert!(region.process().is_none());
    // Read as a system call would: the kernel takes the raw address.
    let mut byte = [0];
    own_memory().read_at(offset(BASE + 7) as u64, &mut byte).expect("a byte");
    assert_eq!(byte, [b'x']);

    let region = view.table.find(base + 63, 1).expect("the region");
    assert!(region.host_pointer(base).is_none());
    region.process().expect("private memory").read_at(base + 63, &mut byte).expect("a byte");
    assert_eq!(byte, [3]);
    drop(view);
    node.memory.close().await;
    assert_eq!(node.driver.seen().live, 0);
}

/// G1: whichever of the driver calls it is that fails.
#[tokio::test]
async fn g1_a_registration_that_fails_leaves_nothing() {
    for failing in 0..3 {
        let node = Node::new(Behaviour { fail_at: Some(failing), ..Behaviour::default() });
        let requests = [shared(0..1), shared(1..2), shared(2..3)];
        let failure = node.register(&requests).await.expect_err("made to fail");
        assert_eq!((failure.reason, failure.index), (Reason::Driver, Some(failing as u64)));
        assert_eq!((node.driver.seen().live, node.memory.view().version), (0, 0));
        let infos = node.register(&requests).await.expect("nothing is in the way");
        assert_eq!(infos.len(), 3);
        node.memory.close().await;
    }
}

#[tokio::test]
async fn unfit_memory_is_refused_by_index() {
    let node = Node::ordinary();
    let too_small = RegionRequest { length: 2 * PAGE, ..shared(5..6) };
    let failure = node.register(&[shared(0..1), too_small]).await.expect_err("too small");
    assert_eq!((failure.reason, failure.index), (Reason::OutOfBounds, Some(1)));
    let nowhere = RegionRequest { base: PAGE, length: PAGE, source: Source::Process };
    let failure = node.register(&[shared(0..1), nowhere.clone()]).await.expect_err("not there");
    assert_eq!((failure.reason, failure.index), (Reason::UnsupportedMemory, Some(1)));
    let without = EngineMemory::new(node.registrar.clone(), QUOTA, None);
    let failure = without.register(vec![nowhere], Vec::new()).await.expect_err("no access");
    assert_eq!((failure.reason, failure.index), (Reason::UnsupportedMemory, Some(0)));
    assert_eq!(node.driver.seen().live, 0);
}

#[tokio::test]
async fn layouts_must_lie_in_regions_and_leave_with_them() {
    let node = Node::ordinary();
    let register = |requests: Vec<RegionRequest>, layouts: Vec<LayoutRequest>| {
        let memory = node.memory.clone();
        async move { memory.register(requests, layouts).await }
    };
    let cases = [
        (layout(&[BASE, BASE + PAGE], 2), Reason::OutOfBounds),
        (LayoutRequest { page_stride: 1, ..layout(&[BASE], 1) }, Reason::BadArgument),
        (layout(&[BASE], 0), Reason::BadArgument),
        (layout(&[], 1), Reason::BadArgument),
        (LayoutRequest { page_bytes: 0, ..layout(&[BASE], 1) }, Reason::BadArgument),
    ];
    for (bad, reason) in cases {
        let failure = register(vec![shared(0..2)], vec![layout(&[BASE], 2), bad]).await.expect_err("unfit");
        assert_eq!((failure.reason, failure.index), (reason, Some(1)), "{failure}");
        assert_eq!((node.driver.seen().live, node.memory.view().version), (0, 0));
    }
    let eleven = vec![layout(&[BASE], 1); 11];
    let failure = register(vec![shared(0..2)], eleven).await.expect_err("one too many");
    assert_eq!(failure.reason, Reason::Limit);

    let (infos, _) = register(vec![shared(0..2), shared(2..4)], Vec::new()).await.expect("regions");
    let (_, layouts) = register(vec![], vec![layout(&[BASE], 2), layout(&[BASE], 4)]).await.expect("layouts");
    assert_eq!(node.memory.view().layouts.len(), 2);
    node.unregister(infos[1].id).await.settled().await;
    let view = node.memory.view();
    assert_eq!(view.layouts.keys().collect::<Vec<_>>(), [&layouts[0].id]);
    drop(view);
    let gone = Unregister { layouts: vec![layouts[0].id], ..Unregister::default() };
    node.memory.unregister(gone.clone()).await.expect("the layout").settled().await;
    let failure = node.memory.unregister(gone).await.expect_err("gone");
    assert_eq!((failure.reason, failure.index), (Reason::Unregistered, Some(0)));
    node.memory.close().await;
}

/// I6: not while somebody may be inside who saw it.
#[tokio::test(start_paused = true)]
async fn an_unregistration_waits_for_the_gate() {
    let node = Node::ordinary();
    let infos = node.register(&[shared(0..1)]).await.expect("a region");
    let mut seat = node.memory.gate().seat();
    let inside = seat.enter();
    let mut pending = node.unregister(infos[0].id).await;
    node.assert_stuck(&mut pending).await;
    drop(inside);
    pending.settled().await;
    assert_eq!(node.driver.seen().live, 0);
}

/// I6: not while somebody holds it.
#[tokio::test(start_paused = true)]
async fn an_unregistration_waits_for_leases() {
    let node = Node::ordinary();
    let infos = node.register(&[shared(0..1), shared(1..2)]).await.expect("regions");
    let lease = node.memory.view().table.get(infos[0].id).expect("the region").clone();
    let mut pending = node.unregister(infos[0].id).await;
    assert!(lease.is_retired() && node.memory.view().table.get(infos[0].id).is_none());
    let other = node.memory.view().table.get(infos[1].id).expect("the other").clone();
    assert!(!other.is_retired());
    node.assert_stuck(&mut pending).await;
    drop(lease);
    pending.settled().await;
    assert_eq!(node.driver.seen().live, 1);
}

/// Whoever enters after the change finds it.
#[tokio::test]
async fn a_change_is_visible_before_it_counts() {
    let node = Node::ordinary();
    let mut seat = node.memory.gate().seat();
    let before = seat.enter().version();
    let infos = node.register(&[shared(0..1)]).await.expect("a region");
    let registered = seat.enter().version();
    node.unregister(infos[0].id).await;
    let retired = seat.enter().version();
    assert!(before < registered && registered < retired);
    assert!(node.memory.view().table.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_second_call_joins_a_release_and_a_third_finds_nothing() {
    let node = Node::ordinary();
    let infos = node.register(&[shared(0..2)]).await.expect("a region");
    let lease = node.memory.view().table.get(infos[0].id).expect("the region").clone();
    let mut first = node.unregister(infos[0].id).await;
    let by_base = Unregister { bases: vec![BASE], ..Unregister::default() };
    let mut second = node.memory.unregister(by_base.clone()).await.expect("joined");
    node.assert_stuck(&mut first).await;
    node.assert_stuck(&mut second).await;
    // Its addresses are in quarantine.
    let failure = node.register(&[shared(1..3)]).await.expect_err("not released yet");
    assert_eq!((failure.reason, failure.index), (Reason::Overlap, Some(0)));
    drop(lease);
    second.settled().await;
    first.settled().await;
    let failure = node.memory.unregister(by_base).await.expect_err("gone");
    assert_eq!((failure.reason, failure.index), (Reason::Unregistered, Some(0)));
    assert_eq!(node.register(&[shared(1..3)]).await.expect("free again").len(), 1);
}

#[tokio::test]
async fn unregistering_is_all_or_nothing() {
    let node = Node::ordinary();
    let infos = node.register(&[shared(0..1)]).await.expect("a region");
    let (good, bad) = (infos[0].id, RegionId(99));
    let of = |ids: Vec<RegionId>, bases: Vec<u64>, layouts| Unregister { ids, bases, layouts };
    let cases = [
        (of(vec![good, bad], vec![], vec![]), 1),
        (of(vec![good, good], vec![], vec![]), 1),
        (of(vec![good], vec![BASE], vec![]), 0),
        (of(vec![], vec![BASE, BASE + 1], vec![]), 1),
        (of(vec![good], vec![], vec![LayoutId(1)]), 0),
    ];
    for (unregister, index) in cases {
        let failure = node.memory.unregister(unregister).await.expect_err("a refusal");
        assert_eq!((failure.reason, failure.index), (Reason::Unregistered, Some(index)), "{failure}");
    }
    let view = node.memory.view();
    assert!(view.table.get(good).is_some_and(|region| !region.is_retired()));
    assert_eq!(view.version, 1);
}

/// I4: the number may return, the generation never does.
#[tokio::test]
async fn registering_again_gives_a_new_generation() {
    let node = Node::ordinary();
    let mut seen = std::collections::HashSet::<Generation>::new();
    for _ in 0..5 {
        let infos = node.register(&[shared(0..1), shared(1..2)]).await.expect("regions");
        assert!(infos.iter().all(|info| seen.insert(info.generation) && info.id <= RegionId(2)));
        let ids = infos.iter().map(|info| info.id).collect();
        let both = Unregister { ids, ..Unregister::default() };
        node.memory.unregister(both).await.expect("both").settled().await;
    }
    assert_eq!(node.driver.seen().live, 0);
}

#[tokio::test]
async fn a_dropped_registration_registers_nothing() {
    let node = Node::ordinary();
    node.driver.hold();
    let mut dropped = Box::pin(node.memory.register(vec![shared(0..2), shared(2..4)], Vec::new()));
    tokio::select! {
        biased;
        _ = &mut dropped => panic!("the driver is held"),
        () = std::future::ready(()) => {}
    }
    let failure = node.register(&[shared(1..2)]).await.expect_err("its range is claimed");
    assert_eq!(failure.reason, Reason::Overlap);
    drop(dropped);
    node.driver.let_go();
    node.catch_up().await;
    assert_eq!((node.driver.seen().live, node.memory.view().version), (0, 0));
    node.register(&[shared(1..2)]).await.expect("its range is free");
    node.memory.close().await;
}

/// I10.
#[tokio::test(start_paused = true)]
async fn death_releases_everything_ahead_of_others() {
    let node = Node::ordinary();
    let infos = node.register(&[shared(0..3), shared(3..6)]).await.expect("regions");
    let lease = node.memory.view().table.get(infos[0].id).expect("the region").clone();
    let mut seat = node.memory.gate().seat();
    let inside = seat.enter();
    let mut unregistered = node.unregister(infos[0].id).await;

    let version = node.memory.begin_close();
    let view = node.memory.view();
    assert!(view.closed && view.table.is_empty() && lease.is_retired());
    assert!(!node.memory.gate().is_quiet(version));
    let refused = node.register(&[shared(6..7)]).await.expect_err("closed");
    assert_eq!(refused.reason, Reason::EngineGone);
    let refused = node.memory.unregister(Unregister::default()).await.expect_err("closed");
    assert_eq!(refused.reason, Reason::EngineGone);

    let closing = tokio::spawn({
        let memory = node.memory.clone();
        async move { memory.close().await }
    });
    node.assert_stuck(&mut unregistered).await;
    assert!(!closing.is_finished());
    drop((inside, lease));
    closing.await.expect("no panic");
    unregistered.settled().await;
    node.memory.close().await;
    assert_eq!(node.driver.seen().live, 0);
}

#[tokio::test]
async fn death_ends_a_registration_that_waits() {
    let node = Node::ordinary();
    let other = EngineMemory::new(node.registrar.clone(), QUOTA, None);
    node.driver.hold();
    let die = async {
        node.driver.wait_in_progress(1);
        node.memory.begin_close();
        // The registration has its turn while the driver is still held.
        tokio::task::yield_now().await;
        node.driver.let_go();
    };
    let requests = vec![shared(0..1), shared(1..2), shared(2..3)];
    let (registered, (), others) =
        tokio::join!(node.memory.register(requests, vec![]), die, other.register(vec![shared(0..9)], vec![]));
    assert_eq!(registered.expect_err("closed").reason, Reason::EngineGone);
    others.expect("another engine's region");
    node.memory.close().await;
    node.catch_up().await;
    assert_eq!(node.driver.seen().live, 1);
    other.close().await;
    assert_eq!(node.driver.seen().live, 0);
}

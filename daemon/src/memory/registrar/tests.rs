use super::{
    super::testing::{Behaviour, DriverCall, TestDriver, sealed_memfd},
    *,
};

const PAGE: u64 = 4096;

fn node() -> LockPolicy {
    LockPolicy::Node { lock_file: None }
}

fn start(policy: &LockPolicy, driver: &Arc<TestDriver>) -> Arc<Registrar> {
    Registrar::start(policy, driver.clone(), 1000).expect("a registrar")
}

/// Calls to map this many pages each.
fn pages(lengths: &[u64]) -> Vec<Acquire> {
    let fd = Arc::new(sealed_memfd(64 * PAGE));
    lengths.iter().map(|pages| Acquire::Shared { fd: fd.clone(), offset: 0, length: pages * PAGE }).collect()
}

/// Through with everything that waited before.
async fn catch_up(registrar: &Registrar) {
    registrar.release(Vec::new(), Urgency::Ordinary).await;
}

/// What a worker does just after its last answer.
async fn eventually(holds: impl Fn() -> bool) {
    let watch = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), watch).await.expect("it never holds");
}

/// Polls a request until its first driver call is under way, and held there.
async fn begin<T>(driver: &TestDriver, request: &mut (impl Future<Output = T> + Unpin)) {
    tokio::select! {
        biased;
        _ = request => panic!("the driver is held"),
        () = std::future::ready(()) => {}
    }
    driver.wait_in_progress(1);
}

/// 16 threads that register and release 64 times each.
fn storm(registrars: &[Arc<Registrar>]) {
    thread::scope(|scope| {
        for at in 0..16 {
            let registrar = &registrars[at % registrars.len()];
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                runtime.block_on(async {
                    for _ in 0..64 {
                        let grant = registrar.acquire(pages(&[1])).await.expect("a page");
                        registrar.release(grant.into_backings(), Urgency::Ordinary).await;
                    }
                });
            });
        }
    });
}

/// I7, counted on the driver's side and on the registrar's.
#[test]
fn one_driver_call_at_a_time_runs_on_the_node() {
    let driver = TestDriver::new(Behaviour { pause: Duration::from_micros(50), ..Behaviour::default() });
    let registrar = start(&node(), &driver);
    storm(std::slice::from_ref(&registrar));
    let seen = driver.seen();
    assert_eq!((seen.high_water, seen.calls.len(), seen.live), (1, 2 * 16 * 64, 0));
    let stats = registrar.stats();
    assert_eq!((stats.calls_high_water, stats.calls, stats.failures), (1, 2 * 16 * 64, 0));
    assert_eq!((stats.queue_length, stats.calls_in_progress, stats.waits), (0, 0, stats.calls));
    assert!(stats.call_sum >= Duration::from_micros(50) * 2 * 16 * 64 && stats.wait_sum > Duration::ZERO);
}

/// The counter-proof: without the lock the same load does overlap.
#[test]
fn without_the_lock_calls_run_side_by_side() {
    let driver = TestDriver::new(Behaviour { wants_company: true, ..Behaviour::default() });
    let registrar = start(&LockPolicy::Off, &driver);
    storm(std::slice::from_ref(&registrar));
    let seen = driver.seen();
    assert!(seen.high_water > 1 && seen.high_water <= UNLOCKED_WORKERS, "{}", seen.high_water);
    assert!(registrar.stats().calls_high_water > 1);
    assert_eq!(seen.live, 0);
}

#[test]
fn the_lock_file_makes_two_registrars_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let policy = LockPolicy::Node { lock_file: Some(directory.path().join("registrar.lock")) };
    let driver = TestDriver::new(Behaviour { pause: Duration::from_micros(50), ..Behaviour::default() });
    storm(&[start(&policy, &driver), start(&policy, &driver)]);
    let seen = driver.seen();
    assert_eq!((seen.high_water, seen.calls.len()), (1, 2 * 16 * 64));
}

#[test]
fn a_lock_file_that_cannot_be_had_is_told_at_the_start() {
    let policy = LockPolicy::Node { lock_file: Some("/nonexistent/registrar.lock".into()) };
    let started = Registrar::start(&policy, TestDriver::new(Behaviour::default()), 1);
    assert_eq!(started.expect_err("no such directory").kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_small_request_does_not_wait_for_a_large_one() {
    let driver = TestDriver::new(Behaviour::default());
    let registrar = start(&node(), &driver);
    driver.hold();
    let mut large = Box::pin(registrar.acquire(pages(&[1; 40])));
    begin(&driver, &mut large).await;
    let look = async {
        // Polled after the small one.
        assert!(registrar.longest_running().is_some());
        assert_eq!((registrar.stats().queue_length, registrar.stats().calls_in_progress), (39 + 2, 1));
        driver.let_go();
    };
    let (large, small, ()) = tokio::join!(large, registrar.acquire(pages(&[2, 2])), look);
    let (large, small) = (large.expect("forty"), small.expect("two"));
    let calls = driver.seen().calls;
    let map = |pages| DriverCall::Map { length: pages * PAGE };
    assert_eq!(calls[..5], [map(1), map(2), map(1), map(2), map(1)]);
    assert_eq!((large.into_backings().len(), small.into_backings().len()), (40, 2));
    eventually(|| registrar.longest_running().is_none()).await;
}

/// I10: at the head of the queue, behind the one call in progress only.
#[tokio::test]
async fn the_memory_of_the_dead_is_released_first() {
    let driver = TestDriver::new(Behaviour::default());
    let registrar = start(&node(), &driver);
    let dead = registrar.acquire(pages(&[3, 3])).await.expect("two").into_backings();
    driver.hold();
    let mut first = Box::pin(registrar.acquire(pages(&[1, 1])));
    begin(&driver, &mut first).await;
    let (first, second, (), ()) =
        tokio::join!(first, registrar.acquire(pages(&[1])), registrar.release(dead, Urgency::Dead), async {
            driver.let_go()
        });
    let (map, unmap) = (DriverCall::Map { length: PAGE }, DriverCall::Unmap { length: 3 * PAGE });
    assert_eq!(driver.seen().calls[2..], [map, unmap, unmap, map, map]);
    drop((first, second));
}

#[tokio::test]
async fn a_failed_call_takes_the_earlier_ones_back() {
    for failing in 0..4 {
        let driver = TestDriver::new(Behaviour { fail_at: Some(failing), ..Behaviour::default() });
        let registrar = start(&node(), &driver);
        let failure = registrar.acquire(pages(&[1; 4])).await.expect_err("made to fail");
        assert_eq!((failure.reason, failure.index), (Reason::Driver, Some(failing as u64)));
        let seen = driver.seen();
        assert_eq!((seen.live, seen.calls.len()), (0, 2 * failing + 1));
        assert_eq!(registrar.stats().failures, 1);
    }
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_goes_back() {
    let driver = TestDriver::new(Behaviour::default());
    let registrar = start(&node(), &driver);
    driver.hold();
    let mut dropped = Box::pin(registrar.acquire(pages(&[1; 4])));
    begin(&driver, &mut dropped).await;
    drop(dropped);
    driver.let_go();
    catch_up(&registrar).await;
    // The call in progress was finished and undone; the others were never made.
    let calls = [DriverCall::Map { length: PAGE }, DriverCall::Unmap { length: PAGE }];
    assert_eq!(driver.seen().calls, calls);

    drop(registrar.acquire(pages(&[1; 4])).await.expect("a grant"));
    catch_up(&registrar).await;
    let seen = driver.seen();
    assert_eq!((seen.live, seen.calls.len()), (0, 2 + 8));
}

#[tokio::test]
async fn the_queue_is_bounded_but_for_releases() {
    let driver = TestDriver::new(Behaviour::default());
    let registrar = Registrar::start(&node(), driver.clone(), 1).expect("a registrar");
    let held = registrar.acquire(pages(&[1])).await.expect("a page").into_backings();
    driver.hold();
    let mut running = Box::pin(registrar.acquire(pages(&[1])));
    begin(&driver, &mut running).await;
    let full = async {
        let failure = registrar.acquire(pages(&[1])).await.expect_err("one waits already");
        assert_eq!(failure.reason, Reason::Limit);
        driver.let_go();
    };
    let (waiting, (), ()) =
        tokio::join!(registrar.acquire(pages(&[1])), registrar.release(held, Urgency::Ordinary), full);
    waiting.expect("the one that waited");
    running.await.expect("the one that ran");
}

#[tokio::test]
async fn what_waits_when_it_ends_is_still_done() {
    let driver = TestDriver::new(Behaviour::default());
    let registrar = start(&node(), &driver);
    let grant = registrar.acquire(pages(&[1, 1])).await.expect("two");
    drop(grant);
    drop(registrar);
    eventually(|| driver.seen().live == 0 && Arc::strong_count(&driver) == 1).await;
}

/// I4: whoever asks, and however often it attached before.
#[test]
fn i4_generations_never_return() {
    let (registrar, _calls) = Registrar::by_hand(TestDriver::new(Behaviour::default()), 1);
    let given = |count| registrar.generations(count).map(Iterator::collect::<Vec<_>>);
    assert_eq!(given(2), Ok(vec![Generation(1), Generation(2)]));
    assert_eq!(given(1), Ok(vec![Generation(3)]));
    registrar.generations.store(u32::MAX - 3, SeqCst);
    assert_eq!(given(2), Ok(vec![Generation(u32::MAX - 2), Generation(u32::MAX - 1)]));
    assert_eq!(given(2).err().map(|failure| failure.reason), Some(Reason::Limit));
}

//! G3: registrations of many engine processes at once.
//!
//! At most one driver call runs at a time (I7), counted on this side: the daemon runs inside the test with a
//! driver of the test's own, which counts and then calls the real one. The engines are processes of their own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::fd::BorrowedFd,
    path::Path,
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use harness::{
    engine::EngineProcess,
    oracle::Kind,
    wire::{Answer, Command},
};
use kvferryd::{
    app::Daemon,
    config::{Config, Flags},
    domain::Failure,
    memory::{Mapping, ProcessMemory, RegionDriver, SystemDriver},
};

const PROCESSES: usize = 16;
const EACH: usize = 4;

/// How long a call is stretched, so that calls that may overlap do.
const STRETCH: Duration = Duration::from_millis(3);

/// Counts the calls in progress.
#[derive(Debug, Default)]
struct Counting {
    system: SystemDriver,
    calls: AtomicUsize,
    running: AtomicUsize,
    high_water: AtomicUsize,
}

impl Counting {
    fn counted<T>(&self, call: impl FnOnce(&SystemDriver) -> T) -> T {
        self.calls.fetch_add(1, SeqCst);
        let running = self.running.fetch_add(1, SeqCst) + 1;
        self.high_water.fetch_max(running, SeqCst);
        thread::sleep(STRETCH);
        let result = call(&self.system);
        self.running.fetch_sub(1, SeqCst);
        result
    }
}

impl RegionDriver for Counting {
    fn map(&self, fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Mapping, Failure> {
        self.counted(|system| system.map(fd, offset, length))
    }

    fn probe_process(&self, memory: &ProcessMemory, base: u64, length: u64) -> Result<(), Failure> {
        self.counted(|system| system.probe_process(memory, base, length))
    }

    fn unmap(&self, mapping: Mapping) {
        self.counted(|system| system.unmap(mapping));
    }
}

/// 64 registrations from 16 processes, all begun together. Returns the most calls that ran at once.
fn storm(lock: &str) -> usize {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), lock);
    let socket = config.endpoint.socket.clone();
    let driver = Arc::new(Counting::default());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let daemon = runtime.block_on(Daemon::start(config, driver.clone())).unwrap();

    let start = Barrier::new(PROCESSES);
    let register = |number: usize| {
        let engine = EngineProcess::attach(&socket, &format!("storm-{number}"));
        // Whoever fails must not leave the others waiting.
        start.wait();
        let mut engine = engine.unwrap();
        let command = Command::RegisterAtOnce { kind: Kind::Shared, buffers: EACH, length: 4 << 20 };
        match engine.ask(&command).unwrap() {
            Answer::Registered { regions } => assert_eq!(regions, EACH),
            other => panic!("process {number}: {other:?}"),
        }
        engine
    };
    let register = &register;
    let engines: Vec<EngineProcess> = thread::scope(|scope| {
        let threads: Vec<_> = (0..PROCESSES).map(|number| scope.spawn(move || register(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    // Each engine has a probe region besides.
    assert!(driver.calls.load(SeqCst) >= PROCESSES * (EACH + 1));
    drop(engines);
    runtime.block_on(daemon.drain());
    driver.high_water.load(SeqCst)
}

fn config(directory: &Path, lock: &str) -> Config {
    let file = directory.join("kvferryd.toml");
    std::fs::write(&file, format!("[registration]\nlock = \"{lock}\"\n")).unwrap();
    let path = |name: &str| Some(directory.join(name).display().to_string());
    let flags = Flags {
        config: Some(file),
        socket: path("engine.sock"),
        state_dir: path("state"),
        admin: Some(String::new()),
        ..Flags::default()
    };
    Config::load(&flags, []).unwrap()
}

#[test]
fn g3_one_driver_call_at_a_time() {
    assert_eq!(storm("node"), 1);
}

/// The count can tell: without the lock it is not one.
#[test]
fn g3_without_the_lock_calls_overlap() {
    let high_water = storm("off");
    assert!(high_water > 1, "{high_water} calls at once");
}

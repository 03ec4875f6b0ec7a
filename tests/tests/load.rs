//! Many engines at once, and how few system calls many slices take.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    process::{Command as Program, Stdio},
    sync::Barrier,
    thread,
    time::Duration,
};

use harness::{
    batch::Move,
    daemon::{Daemon, Launch},
    engine::EngineProcess,
    oracle::Kind,
    pattern::Stamp,
    process::Signal,
    scene::{Nodes, Peer, SOURCE, TARGET, done, request},
    wire::Command,
};
use kvferry_client::{Op, Path};

/// Slices of `size` bytes, scattered over pools of `slots` places on both sides. The strides are odd primes, so no
/// place is used twice where `slots` does not divide by them.
fn scattered(count: u64, size: u64, slots: u64) -> Vec<Move> {
    const FROM: u64 = 2_731;
    const TO: u64 = 1_237;
    assert!(count <= slots && !slots.is_multiple_of(FROM) && !slots.is_multiple_of(TO));
    (0..count)
        .map(|index| Move {
            from: (index * FROM % slots) * size,
            to: (index * TO % slots) * size,
            length: size,
        })
        .collect()
}

/// W5, a hybrid model's request: 3,072 pages of 64 KiB.
fn w5() -> Vec<Move> {
    scattered(3_072, 64 << 10, 4_096)
}

const W5_POOL: u64 = 256 << 20;

/// Ten prefill and ten decode processes; each receiver checks every byte of its own pool.
#[test]
fn i3_ten_pairs_of_engine_processes_at_once() {
    const PAIRS: u32 = 10;
    let nodes = Nodes::start(Path::Tcp, "").unwrap();
    let ready = Barrier::new(PAIRS as usize);
    thread::scope(|scope| {
        for number in 0..PAIRS {
            let (nodes, ready) = (&nodes, &ready);
            scope.spawn(move || one_pair(nodes, number, ready));
        }
    });
}

fn one_pair(nodes: &Nodes, number: u32, ready: &Barrier) {
    // Odd and even, and no two pairs alike: what goes to the wrong pair shows.
    let (source, target) = (Stamp::of(2 * number + 1), Stamp::of(2 * number + 2));
    let attach = |daemon: &Daemon, role: &str, stamp| {
        let mut engine = EngineProcess::attach(daemon.socket(), &format!("{role}-{number}"))?;
        let address = engine.pool(Kind::Shared, W5_POOL, stamp)?;
        anyhow::Ok((engine, address))
    };
    let sender = attach(nodes.initiator(), "prefill", source);
    let receiver = attach(nodes.target(), "decode", target);
    // Whoever fails must not leave the others waiting.
    ready.wait();
    let ((mut sender, _), (mut receiver, remote)) = (sender.unwrap(), receiver.unwrap());
    let moves = w5();
    receiver.expect(source, moves.clone()).unwrap();
    let session = receiver.session().to_owned();
    sender.send(&Command::Transfer { session, write: true, remote, moves }).unwrap();
    let ended = sender.ended().unwrap();
    assert!(ended.done, "pair {number}: {:?}: {}", ended.reason(), ended.text);
    assert_eq!(ended.path(), Some(Path::Tcp));
    assert_eq!((ended.slices, ended.bytes_done), (3_072, 3_072 * (64 << 10)));
    let verdict = receiver.verify().unwrap();
    verdict.assert_clean(&format!("pair {number}"));
    assert_eq!(verdict.moved, 3_072 * (64 << 10));
}

/// W1c, the worst case of a free-list allocator: 655,360 slices of 256 B. A data call per slice would make it
/// hopeless; gathered into parts they must need fewer than one call per hundred slices, on each daemon.
#[test]
fn many_small_slices_take_few_system_calls() {
    if !harness::long() {
        println!("skipped: a long case; set KVFERRY_LONG=1");
        return;
    }
    let strace = Program::new("strace").arg("-V").stdout(Stdio::null()).status();
    if !strace.is_ok_and(|status| status.success()) {
        println!("skipped: no strace");
        return;
    }
    const SLICES: u64 = 655_360;
    const SLOTS: u64 = 2 * SLICES;
    let folder = tempfile::tempdir().unwrap();
    let counts = ["initiator", "target"].map(|side| folder.path().join(side));
    let [mut initiator, mut target] = counts.each_ref().map(|file| {
        // -D: strace stands aside, so that the child is the daemon itself.
        let file = file.to_string_lossy();
        Launch::new().unwrap().under(&["strace", "-D", "-f", "-c", "-o", &file]).start().unwrap()
    });
    {
        let source = Peer::attach(&initiator, Kind::Shared, SLOTS * 256, SOURCE).unwrap();
        let mut sink = Peer::attach(&target, Kind::Shared, SLOTS * 256, TARGET).unwrap();
        let moves = scattered(SLICES, 256, SLOTS);
        let session = sink.engine.session_id().to_owned();
        let mut transfer = request(Op::Write, &session, &moves, &source.pool, &sink.pool);
        // Being traced is slow.
        transfer.deadline = Some(Duration::from_secs(120));
        done(source.engine.transfer(transfer), &moves);
        sink.pool.expect(&source.pool, &moves);
        sink.pool.verify().assert_clean("traced");
    }
    for (daemon, file) in [&mut initiator, &mut target].into_iter().zip(&counts) {
        daemon.process().signal(Signal::TERM).unwrap();
        daemon.wait_exit(Duration::from_secs(60)).unwrap();
        let limit = Duration::from_secs(10);
        harness::eventually("strace has written its table", limit, || data_calls(file) > 0);
        let calls = data_calls(file);
        assert!(calls < SLICES / 100, "{calls} data calls for {SLICES} slices");
    }
}

/// Sum of the calls that can move payload in a `strace -c` table; 0 while there is none.
fn data_calls(file: &std::path::Path) -> u64 {
    const MOVES_BYTES: [&str; 18] = [
        "read",
        "readv",
        "pread64",
        "preadv",
        "preadv2",
        "recvfrom",
        "recvmsg",
        "recvmmsg",
        "write",
        "writev",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "sendto",
        "sendmsg",
        "sendmmsg",
        "process_vm_readv",
        "process_vm_writev",
    ];
    let table = fs::read_to_string(file).unwrap_or_default();
    // The last line is written last.
    if !table.lines().any(|line| line.ends_with("total")) {
        return 0;
    }
    let calls = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let moves_bytes = words.last().is_some_and(|name| MOVES_BYTES.contains(name));
        moves_bytes.then(|| words.get(3)?.parse::<u64>().ok()).flatten()
    };
    table.lines().filter_map(calls).sum()
}

#[test]
fn a_strace_table_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("table");
    let table = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.010000          10      1000         3 readv
 30.00    0.010000          10        20           sendmsg
 10.00    0.010000          10       500           futex
------ ----------- ----------- --------- --------- ----------------
";
    fs::write(&file, table).unwrap();
    assert_eq!(data_calls(&file), 0, "not complete yet");
    fs::write(&file, format!("{table}100.00    0.030000          19      1520         3 total\n")).unwrap();
    assert_eq!(data_calls(&file), 1020);
}

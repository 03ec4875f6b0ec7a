//! The late-write probes, a few runs each; `make late-writes` makes a hundred.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use harness::late::{self, Memory};
use kvferry_client::Path;

/// Or the other tests would show nothing.
#[test]
fn who_does_not_wait_for_the_answer_is_seen() {
    assert!(late::impatient().unwrap() > 0);
}

/// After the answer nothing of the transfer touches what the answer settled.
fn nothing_is_written_after_the_answer(path: Path, memory: Memory) {
    let mut text = late::heading();
    let rows = late::run(path, memory, 5, |row| text = format!("{text}\n{row}")).unwrap();
    println!("{text}");
    assert_eq!(rows.iter().map(|row| row.late).sum::<u64>(), 0, "late bytes:\n{text}");
    assert!(rows.len() >= 6, "{text}");
    // One miss in five is bad luck, more is a probe that proves nothing.
    assert!(rows.iter().all(|row| row.in_flight + 1 >= row.runs || row.proves_something()), "{text}");
}

#[test]
fn i1_nothing_is_written_after_the_answer_over_tcp() {
    nothing_is_written_after_the_answer(Path::Tcp, Memory::Shared);
}

#[test]
fn i1_nothing_is_written_after_the_answer_within_a_node() {
    nothing_is_written_after_the_answer(Path::Local, Memory::Shared);
}

#[test]
fn i1_no_engine_writes_for_its_daemon_after_the_answer_over_tcp() {
    nothing_is_written_after_the_answer(Path::Tcp, Memory::Assisted);
}

#[test]
fn i1_no_engine_writes_for_its_daemon_after_the_answer_within_a_node() {
    nothing_is_written_after_the_answer(Path::Local, Memory::Assisted);
}

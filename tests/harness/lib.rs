//! What the suites share: real daemons, real engine processes, an oracle for every byte, a network that fails
//! on command.
//!
//! The suites drive kvferry as its users do, through the `kvferryd` binary and the client library; nothing
//! here reaches into the daemon. Whatever waits, waits for a condition and has a limit ([`eventually`]).

#![allow(clippy::unwrap_used, reason = "a harness that cannot set its scene up has nothing better to do")]

pub mod batch;
pub mod canvas;
pub mod daemon;
pub mod dice;
pub mod engine;
pub mod faulty;
pub mod handover;
pub mod late;
pub mod metrics;
pub mod netpath;
pub mod oracle;
pub mod painter;
pub mod pairwise;
pub mod pattern;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod scene;
#[path = "../sim/mod.rs"]
pub mod sim;
pub mod soak;
pub mod stranger;
pub mod wire;

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

/// Polls `condition` until it holds and says how long that took.
///
/// # Panics
/// When it does not hold within `limit`; the message is `what`.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
    begin.elapsed()
}

/// Whether the long cases were asked for (`make test-full`).
pub fn long() -> bool {
    std::env::var_os("KVFERRY_LONG").is_some_and(|value| value == "1")
}

/// The `kvferry` command of this build.
///
/// # Errors
/// It was not built.
pub fn kvferry() -> anyhow::Result<PathBuf> {
    binary("kvferry", "KVFERRY_BIN", "kvferry-cli")
}

/// A binary of this build: beside the test binary, unless the variable names another.
pub(crate) fn binary(name: &str, variable: &str, package: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let path = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    path.ok_or_else(|| {
        anyhow::anyhow!(
            "{name} is not beside {}: run `cargo build -p {package}` first, or set {variable}",
            own.display()
        )
    })
}

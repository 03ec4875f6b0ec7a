//! The state directory: what outlives the daemon, and what keeps two of them apart.
//!
//! `lock` is held while a daemon runs; `daemon` says which process it is; `node-id` is the node's name; `ports`
//! is written by [`Ports`](crate::peer::Ports). A spoilt file never stops a start: it is logged, and as good as
//! none.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use super::{StartError, predecessor::Identity};
use crate::{domain::BootId, durable};

/// Pause between two looks whether the lock is free.
const LOOK: Duration = Duration::from_millis(10);

/// Held while the daemon runs.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    node_id: String,
    _lock: File,
}

impl StateDir {
    /// Makes the directory where it is missing, waits until the daemon before this one has exited, and takes
    /// its place.
    ///
    /// # Errors
    /// The earlier daemon has not exited within `patience`: the message names its pid. Or the directory cannot
    /// be used.
    pub(super) async fn open(path: &Path, patience: Duration) -> Result<Self, StartError> {
        let wrong = |wrong: String| StartError::StateDir { path: path.to_owned(), wrong };
        let io = |error: io::Error| wrong(error.to_string());
        // Whoever can open the lock can hold it, and keep the daemon from starting: nobody else can.
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(io)?;
        let record = path.join("daemon");
        let own = Identity::own().map_err(io)?;
        if !succeed(&lock, &record, &own, Instant::now() + patience).await {
            let who =
                predecessor(&record).map_or_else(String::new, |daemon| format!(" (pid {})", daemon.pid()));
            let waited = patience.as_millis();
            return Err(wrong(format!(
                "another daemon{who} uses it and has not exited within {waited} ms (restart.predecessor_ms)"
            )));
        }
        durable::replace(&record, own.to_string().as_bytes()).map_err(io)?;
        let node_id = node_id(&path.join("node-id")).map_err(io)?;
        Ok(Self { path: path.to_owned(), node_id, _lock: lock })
    }

    pub(super) fn node_id(&self) -> &str {
        &self.node_id
    }

    /// Where ports are recorded.
    pub(super) fn ports(&self) -> PathBuf {
        self.path.join("ports")
    }
}

/// Whether the lock is ours and the daemon that had it before has exited, by `end`.
async fn succeed(lock: &File, record: &Path, own: &Identity, end: Instant) -> bool {
    while flock(lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    // Read under the lock: whoever wrote it last is the one before us.
    match predecessor(record) {
        Some(predecessor) => predecessor.exited(own, end).await,
        None => true,
    }
}

fn predecessor(record: &Path) -> Option<Identity> {
    match std::fs::read(record) {
        Ok(bytes) => {
            let identity = Identity::parse(&String::from_utf8_lossy(&bytes));
            if identity.is_none() {
                tracing::warn!(file = %record.display(), "the record of the last daemon is spoilt");
            }
            identity
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(file = %record.display(), %error, "the record of the last daemon cannot be read");
            None
        }
    }
}

/// Read, or minted and recorded.
fn node_id(file: &Path) -> io::Result<String> {
    match std::fs::read_to_string(file) {
        Ok(text) if is_node_id(text.trim()) => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        _ => tracing::warn!(file = %file.display(), "the node id is spoilt: the node gets a new one"),
    }
    let id: String = BootId::random().0.iter().map(|byte| format!("{byte:02x}")).collect();
    durable::replace(file, format!("{id}\n").as_bytes())?;
    Ok(id)
}

fn is_node_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIEF: Duration = Duration::from_millis(50);
    const PATIENT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn the_node_id_outlives_the_daemon_and_the_lock_does_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let first = StateDir::open(directory.path(), BRIEF).await.expect("opens");
        let id = first.node_id().to_owned();
        assert!(is_node_id(&id));
        let refused = StateDir::open(directory.path(), BRIEF).await.expect_err("locked").to_string();
        assert!(refused.contains(&format!("(pid {})", std::process::id())), "{refused}");
        drop(first);
        // The record names this very process, which lives on: as if killed, but not gone yet.
        let refused = StateDir::open(directory.path(), BRIEF).await.expect_err("not exited").to_string();
        assert!(refused.contains("restart.predecessor_ms"), "{refused}");
        std::fs::remove_file(directory.path().join("daemon")).expect("forgotten");
        assert_eq!(StateDir::open(directory.path(), BRIEF).await.expect("opens again").node_id(), id);
    }

    #[tokio::test]
    async fn a_lock_that_becomes_free_in_time_is_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let lock = File::create(directory.path().join("lock")).expect("created");
        flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("locked");
        let opens = StateDir::open(directory.path(), PATIENT);
        let unlocks = async {
            tokio::time::sleep(BRIEF).await;
            drop(lock);
        };
        let (opened, ()) = tokio::join!(opens, unlocks);
        opened.expect("it became free");
    }

    #[tokio::test]
    async fn spoilt_files_stop_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        for file in ["daemon", "node-id"] {
            std::fs::write(directory.path().join(file), b"\xff\0spoilt").expect("written");
        }
        let opened = StateDir::open(directory.path(), BRIEF).await.expect("opens");
        assert!(is_node_id(opened.node_id()));
    }
}

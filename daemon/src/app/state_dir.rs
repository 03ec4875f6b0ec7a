//! The state directory: what outlives the daemon, and the lock that keeps two of them apart.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    path::Path,
};

use rustix::fs::{FlockOperation, flock};

use super::StartError;
use crate::domain::BootId;

/// Held while the daemon runs.
#[derive(Debug)]
pub(super) struct StateDir {
    node_id: String,
    _lock: File,
}

impl StateDir {
    /// Makes the directory where it is missing, locks it, and reads or mints the node id.
    pub(super) fn open(path: &Path) -> Result<Self, StartError> {
        let wrong = |wrong: String| StartError::StateDir { path: path.to_owned(), wrong };
        let io = |error: io::Error| wrong(error.to_string());
        std::fs::create_dir_all(path).map_err(io)?;
        let open = |name| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path.join(name))
        };
        let lock = open("lock").map_err(io)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| wrong("another daemon uses it".to_owned()))?;
        let mut file = open("node-id").map_err(io)?;
        let mut node_id = String::new();
        // A half-written id, from a crash at the first start, is as good as none.
        if file.read_to_string(&mut node_id).is_err() || !is_node_id(node_id.trim()) {
            node_id = mint();
            file.set_len(0).map_err(io)?;
            io::Seek::rewind(&mut file).map_err(io)?;
            writeln!(file, "{node_id}").and_then(|()| file.sync_all()).map_err(io)?;
        }
        Ok(Self { node_id: node_id.trim().to_owned(), _lock: lock })
    }

    pub(super) fn node_id(&self) -> &str {
        &self.node_id
    }
}

fn mint() -> String {
    BootId::random().0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_node_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_id_outlives_the_daemon_and_the_lock_does_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let first = StateDir::open(directory.path()).expect("opens");
        let id = first.node_id().to_owned();
        assert!(is_node_id(&id));
        let refused = StateDir::open(directory.path()).expect_err("locked");
        assert!(refused.to_string().contains("another daemon"));
        drop(first);
        assert_eq!(StateDir::open(directory.path()).expect("opens again").node_id(), id);
    }
}

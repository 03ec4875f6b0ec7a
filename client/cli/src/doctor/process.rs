//! This process and its limits: what an engine beside it will have too.

use std::fs;

use kvferry_client::SharedBuffer;
use kvferry_proto::{engine::v1::NodeInfo, types::v1::Path};
use rustix::process::{Resource, getrlimit};

use super::finding::Finding;

/// Each thread of an engine that calls has a connection, and each shared buffer a descriptor.
const FEW_DESCRIPTORS: u64 = 1024;

/// Sealed memfds are what the daemon maps.
pub(super) fn shared_memory() -> Finding {
    let what = "shared memory";
    match SharedBuffer::new(rustix::param::page_size()) {
        Ok(_) => Finding::ok(what, "a sealed memfd can be had"),
        Err(error) => Finding::fail(
            what,
            error.to_string(),
            "allow memfd_create and its seals in the container's seccomp profile; /dev/shm is not needed",
        ),
    }
}

pub(super) fn descriptors() -> Finding {
    descriptors_of(getrlimit(Resource::Nofile).current)
}

fn descriptors_of(limit: Option<u64>) -> Finding {
    let what = "descriptors";
    match limit {
        None => Finding::ok(what, "RLIMIT_NOFILE is unlimited"),
        Some(limit) if limit >= FEW_DESCRIPTORS => Finding::ok(what, format!("RLIMIT_NOFILE is {limit}")),
        Some(limit) => Finding::warn(
            what,
            format!("RLIMIT_NOFILE is {limit}; each calling thread and each shared buffer takes one"),
            format!("raise it to {FEW_DESCRIPTORS} or more: ulimit -n, docker --ulimit nofile, LimitNOFILE="),
        ),
    }
}

/// Memory is pinned by the daemon, and by rdma alone. Its limit is read where its process can be seen.
pub(super) fn locked_memory(info: &NodeInfo, daemon: Option<u32>) -> Finding {
    let limits = daemon.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/limits")).ok());
    let rdma = info.transports().any(|path| path == Path::Rdma);
    locked_memory_of(getrlimit(Resource::Memlock).current, limits.as_deref(), rdma)
}

fn locked_memory_of(own: Option<u64>, daemons: Option<&str>, rdma: bool) -> Finding {
    let what = "locked memory";
    let bytes = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
    let daemons = daemons.and_then(soft_memlock);
    let shown = daemons.map_or("cannot be seen from here".to_owned(), |limit| format!("is {}", bytes(limit)));
    let why = format!("RLIMIT_MEMLOCK is {} here, the daemon's {shown}", bytes(own));
    match (rdma, daemons) {
        (true, Some(Some(_))) => Finding::warn(
            what,
            format!("{why}; rdma pins all registered memory"),
            "LimitMEMLOCK=infinity in the daemon's unit",
        ),
        (true, _) => Finding::ok(what, why),
        (false, _) => Finding::ok(what, format!("{why}; only rdma, which is not served, would need it")),
    }
}

/// Of `/proc/<pid>/limits`. The inner nothing is "unlimited".
fn soft_memlock(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Status;

    #[test]
    fn few_descriptors_are_a_warning() {
        assert_eq!(descriptors_of(None).status, Status::Ok);
        assert_eq!(descriptors_of(Some(1024)).status, Status::Ok);
        let few = descriptors_of(Some(256));
        assert_eq!(few.status, Status::Warn);
        assert!(few.why.contains("256"), "{few}");
    }

    #[test]
    fn locked_memory_matters_for_rdma_alone() {
        let limits =
            "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         65536    unlimited   bytes\n";
        assert_eq!(locked_memory_of(Some(8), Some(limits), false).status, Status::Ok);
        let little = locked_memory_of(None, Some(limits), true);
        assert_eq!(little.status, Status::Warn);
        assert!(little.why.contains("unlimited here, the daemon's is 65536 bytes"), "{little}");
        let much = "Max locked memory         unlimited    unlimited   bytes\n";
        assert_eq!(locked_memory_of(Some(8), Some(much), true).status, Status::Ok);
        for unknown in [None, Some(""), Some("Max locked memory x")] {
            let finding = locked_memory_of(Some(8), unknown, true);
            assert!(finding.why.contains("cannot be seen"), "{finding}");
        }
    }

    #[test]
    fn this_machine_gives_memory() {
        assert_eq!(shared_memory().status, Status::Ok);
        let own = fs::read_to_string("/proc/self/limits").unwrap();
        assert_eq!(soft_memlock(&own), Some(getrlimit(Resource::Memlock).current));
    }
}

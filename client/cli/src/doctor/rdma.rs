//! Which transports the daemon serves, and why rdma is not among them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kvferry_proto::{engine::v1::NodeInfo, types::v1 as types};

use super::finding::Finding;

const LIBRARY: &str = "libibverbs.so.1";
const DEVICES: &str = "/sys/class/infiniband";

/// Where distributions put libraries.
const LIBRARY_FOLDERS: [&str; 5] =
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/lib/x86_64-linux-gnu"];

/// What rdma needs of a machine. This one is the doctor's: a container may show less than the node has.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    library: bool,
    devices: Vec<String>,
}

impl Machine {
    pub(super) fn here() -> Self {
        let more = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let folders = std::env::split_paths(&more).chain(LIBRARY_FOLDERS.map(PathBuf::from));
        Self { library: has_library(folders), devices: devices(Path::new(DEVICES)) }
    }

    fn lacks(&self) -> String {
        let library = if self.library { "there is" } else { "there is no" };
        let devices = match self.devices.as_slice() {
            [] => format!("no device in {DEVICES}"),
            devices => devices.join(" "),
        };
        format!("here {library} {LIBRARY}, and {devices}")
    }
}

fn has_library(mut folders: impl Iterator<Item = PathBuf>) -> bool {
    folders.any(|folder| folder.join(LIBRARY).exists())
}

fn devices(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

/// sglang asks for rdma unless it is told otherwise, and is refused where there is none.
pub(super) fn transports(
    info: &NodeInfo,
    machine: &Machine,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Finding {
    let what = "transports";
    let names: Vec<_> = info
        .transports()
        .map(|path| path.as_str_name().trim_start_matches("PATH_").to_ascii_lowercase())
        .collect();
    if info.transports().any(|path| path == types::Path::Rdma) {
        return Finding::ok(what, names.join(", "));
    }
    let why = format!(
        "{}; not rdma: kvferryd {} does not serve it; {}",
        names.join(", "),
        info.version,
        machine.lacks()
    );
    let is = |name: &str, value: &str| variable(name).is_some_and(|set| set == value);
    match is("MC_FORCE_TCP", "1") || is("MOONCAKE_PROTOCOL", "tcp") {
        true => Finding::ok(what, why),
        false => Finding::warn(
            what,
            why,
            "set MC_FORCE_TCP=1 for sglang: without it it asks for rdma and is refused",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Status;

    fn serving(paths: &[types::Path]) -> NodeInfo {
        let transports = paths.iter().map(|path| i32::from(*path)).collect();
        NodeInfo { transports, version: "0.1.0".into(), ..NodeInfo::default() }
    }

    #[test]
    fn why_there_is_no_rdma() {
        let machine = Machine { library: false, devices: vec![] };
        let told = transports(&serving(&[types::Path::Local, types::Path::Tcp]), &machine, &|_| None);
        assert_eq!(told.status, Status::Warn);
        assert!(told.why.starts_with("local, tcp; not rdma"), "{told}");
        assert!(
            told.why.ends_with("there is no libibverbs.so.1, and no device in /sys/class/infiniband"),
            "{told}"
        );
        assert!(told.fix.is_some_and(|fix| fix.contains("MC_FORCE_TCP=1")));
        let machine = Machine { library: true, devices: vec!["mlx5_0".into(), "mlx5_1".into()] };
        assert!(machine.lacks().ends_with("there is libibverbs.so.1, and mlx5_0 mlx5_1"));
    }

    #[test]
    fn whoever_asks_for_tcp_misses_nothing() {
        let machine = Machine { library: false, devices: vec![] };
        let tcp = serving(&[types::Path::Tcp]);
        for (name, value, status) in [
            ("MC_FORCE_TCP", "1", Status::Ok),
            ("MC_FORCE_TCP", "0", Status::Warn),
            ("MOONCAKE_PROTOCOL", "tcp", Status::Ok),
            ("MOONCAKE_PROTOCOL", "rdma", Status::Warn),
        ] {
            let set = |asked: &str| (asked == name).then(|| value.to_owned());
            assert_eq!(transports(&tcp, &machine, &set).status, status, "{name}={value}");
        }
        let rdma = serving(&[types::Path::Rdma]);
        assert_eq!(transports(&rdma, &machine, &|_| None).status, Status::Ok);
    }

    #[test]
    fn what_a_machine_has_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let there = || [PathBuf::from("/nowhere"), folder.path().to_owned()].into_iter();
        assert!(!has_library(there()));
        fs::write(folder.path().join(LIBRARY), "").unwrap();
        assert!(has_library(there()));
        assert_eq!(devices(folder.path()), [LIBRARY]);
        assert!(devices(Path::new("/nowhere")).is_empty());
    }
}

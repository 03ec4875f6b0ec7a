//! Which rails an attaching engine gets: by its own rail map, or else by the daemon's configuration.
//!
//! rdma must find the devices it is told to use. An engine that does not ask for it may carry the same command line
//! where there are none: its map is read, wrong forms are refused, and devices that are not there are noted.

use std::path::{Path, PathBuf};

use super::AttachRequest;
use crate::{
    domain::{Failure, PathKind},
    policy::{RailError, RailMap, RailQuery, Rails},
};

/// A folder with an entry for each device.
const DEVICES: &str = "/sys/class/infiniband";

/// Most devices that are looked at.
const MAX_DEVICES: usize = 256;

/// The devices of this node, and who may use which.
#[derive(Clone, Debug)]
pub struct RailSettings {
    configured: Option<RailMap>,
    devices: PathBuf,
}

impl RailSettings {
    /// With the rail map of the configuration, if it has one.
    pub fn new(configured: Option<RailMap>) -> Self {
        Self { configured, devices: DEVICES.into() }
    }

    /// The rails of an engine, best first; none: any. Which devices there are is looked up now: they come and go.
    ///
    /// # Errors
    /// BAD_ARGUMENT names the engine's `rail_map`, or the key of the configuration.
    pub(super) fn of(&self, engine: &AttachRequest) -> Result<Vec<String>, Failure> {
        let available = devices(&self.devices);
        let must_exist = engine.transports.contains(&PathKind::Rdma);
        let query = RailQuery { gpu: engine.gpu_id, available: &available, must_exist };
        let rails = match (&engine.rail_map, &self.configured) {
            (Some(own), _) => own.rails(query).map_err(|error| error.of("rail_map"))?,
            (None, Some(configured)) => configured_rails(configured, query)?,
            (None, None) => Rails::default(),
        };
        if rails.repeats {
            tracing::warn!(name = engine.name, rails = ?rails.devices, "a rail map names a device twice");
        }
        if !rails.absent.is_empty() {
            tracing::warn!(
                name = engine.name, absent = ?rails.absent, ?available,
                "a rail map names devices that are not here; the engine does not ask for rdma"
            );
        }
        Ok(rails.devices)
    }
}

/// Engines cannot help what the daemon's map lacks: one that needs no rails is not refused for it.
fn configured_rails(map: &RailMap, query: RailQuery<'_>) -> Result<Rails, Failure> {
    match map.rails(query) {
        Err(RailError::NoGpu | RailError::NoList { .. }) if !query.must_exist => Ok(Rails::default()),
        judged => judged.map_err(|error| error.of("rdma.rail_map of the daemon's configuration")),
    }
}

/// By name; none where the kernel has no RDMA.
fn devices(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_DEVICES);
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ed25519_dalek::SigningKey;
    use tempfile::TempDir;

    use super::*;
    use crate::{domain::Reason, engine::EnginePolicy, policy::RevocationList};

    /// A node with these devices, whose configuration says so.
    struct Node {
        settings: RailSettings,
        _folder: TempDir,
    }

    impl Node {
        fn new(devices: &[&str], configured: &str) -> Self {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let infiniband = folder.path().join("infiniband");
            if !devices.is_empty() {
                std::fs::create_dir(&infiniband).expect("a folder");
            }
            for device in devices {
                std::fs::create_dir(infiniband.join(device)).expect("a device");
            }
            let configured = (!configured.is_empty()).then(|| RailMap::parse(configured).expect("valid"));
            Self { settings: RailSettings { configured, devices: infiniband }, _folder: folder }
        }

        fn rails(&self, gpu: Option<u32>, map: Option<&str>, path: PathKind) -> Result<Vec<String>, Failure> {
            self.settings.of(&AttachRequest {
                key: SigningKey::from_bytes(&[1; 32]),
                name: "rank".into(),
                gpu_id: gpu,
                rail_map: map.map(|map| RailMap::parse(map).expect("valid")),
                policy: EnginePolicy::default(),
                labels: BTreeMap::new(),
                advertise_host: None,
                preferred_port: None,
                transports: vec![path],
                known_peers: vec![],
                revocations: RevocationList::default(),
            })
        }
    }

    use PathKind::{Rdma, Tcp};

    const BY_GPU: &str = r#"{"0":"mlx5_0,mlx5_1","1":"mlx5_2"}"#;

    #[test]
    fn an_engines_own_map_goes_before_the_configurations() {
        let node = Node::new(&["mlx5_0", "mlx5_1", "mlx5_2"], BY_GPU);
        assert_eq!(node.rails(Some(1), Some("mlx5_0"), Rdma).expect("its own"), ["mlx5_0"]);
        assert_eq!(node.rails(Some(1), None, Rdma).expect("the daemon's"), ["mlx5_2"]);
        assert_eq!(node.rails(Some(0), None, Rdma).expect("the daemon's"), ["mlx5_0", "mlx5_1"]);
        let free = Node::new(&["mlx5_0"], "");
        assert_eq!(free.rails(Some(0), None, Rdma).expect("any"), Vec::<String>::new());
    }

    #[test]
    fn what_is_wrong_is_named_after_whose_map_it_is() {
        let node = Node::new(&["mlx5_0"], r#"{"0":"mlx5_9"}"#);
        let own = node.rails(Some(0), Some("mlx5_8"), Rdma).expect_err("no such device");
        assert_eq!(own.reason, Reason::BadArgument);
        assert_eq!(
            own.message,
            r#"rail_map: Invalid IB devices specified for all GPUs: ["mlx5_8"]. Available devices: ["mlx5_0"]"#
        );
        let daemons = node.rails(Some(0), None, Rdma).expect_err("no such device");
        assert!(daemons.message.starts_with("rdma.rail_map of the daemon's configuration: "), "{daemons}");
    }

    #[test]
    fn without_devices_only_rdma_is_refused() {
        let node = Node::new(&[], "");
        let refused = node.rails(None, Some("mlx5_0"), Rdma).expect_err("rdma needs it");
        assert!(refused.message.ends_with("Available devices: []"), "{refused}");
        assert_eq!(node.rails(None, Some("mlx5_0"), Tcp).expect("noted"), ["mlx5_0"]);
        assert_eq!(node.rails(None, Some("mlx5_0:1"), Tcp).expect_err("no name").reason, Reason::BadArgument);
        assert_eq!(node.rails(Some(2), Some(BY_GPU), Tcp).expect_err("no list").reason, Reason::BadArgument);
    }

    #[test]
    fn what_the_configuration_lacks_stops_only_who_needs_rails() {
        let node = Node::new(&["mlx5_0", "mlx5_1", "mlx5_2"], BY_GPU);
        for gpu in [None, Some(2)] {
            assert_eq!(node.rails(gpu, None, Tcp).expect("it needs none"), Vec::<String>::new());
            assert_eq!(node.rails(gpu, None, Rdma).expect_err("whose?").reason, Reason::BadArgument);
        }
    }
}

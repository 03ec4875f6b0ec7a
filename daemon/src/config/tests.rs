//! Layers, complaints and the example file.

use std::{collections::BTreeSet, fs, path::PathBuf};

use clap::Parser as _;

use super::*;

fn flags(arguments: &[&str]) -> Flags {
    Flags::parse_from(std::iter::once(&"kvferryd").chain(arguments))
}

fn environment(variables: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    variables.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("kvferryd.toml");
    fs::write(&path, text).expect("the file is written");
    (folder, path.display().to_string())
}

/// The problems of one file.
fn problems_of(text: &str) -> Vec<Problem> {
    let (_folder, path) = file(text);
    match Config::load(&flags(&["--config", &path]), []) {
        Err(ConfigError::Keys(problems)) => {
            assert!(problems.iter().all(|p| p.origin == path || p.origin == "the default"), "{problems:?}");
            problems
        }
        other => panic!("{text:?} gave {other:?}"),
    }
}

#[test]
fn nothing_given_is_the_defaults() {
    assert_eq!(Config::load(&flags(&[]), []).expect("the defaults are valid"), Config::default());
}

#[test]
fn later_layers_win() {
    let (_folder, path) = file(
        "transports = [\"tcp\"]\n[retry]\nattempts = 5\nbackoff_ms = 6\n[endpoint]\nsocket = \"/file.sock\"\n\
         ports = \"21000-21001\"",
    );
    let environment = environment(&[
        ("KVFERRYD__RETRY__BACKOFF_MS", "7"),
        ("KVFERRYD__ENDPOINT__SOCKET", "/env.sock"),
        ("KVFERRYD__SECURITY__ALLOW_UIDS", "1000,1001"),
        ("KVFERRYD__MEMORY__ALLOW_HUGETLB", "true"),
        ("KVFERRYD__TRANSPORTS", "tcp,local"),
        ("KVFERRYD__ENDPOINT__ADVERTISE_HOST", "12"),
    ]);
    let config = Config::load(&flags(&["--config", &path, "--socket", "/flag.sock"]), environment)
        .expect("a valid configuration");
    assert_eq!(config.retry.attempts, 5);
    assert_eq!(config.retry.backoff_ms, 7);
    assert_eq!(config.endpoint.socket, PathBuf::from("/flag.sock"));
    assert_eq!(config.endpoint.ports, PortRange { first: 21_000, last: 21_001 });
    assert_eq!(config.endpoint.advertise_host, "12");
    assert_eq!(config.transports, [Transport::Tcp, Transport::Local]);
    assert_eq!(config.security.allow_uids, [1000, 1001]);
    assert!(config.memory.allow_hugetlb);
    assert_eq!(config.retry.deadline_ms, Retry::default().deadline_ms);
}

#[test]
fn every_flag_sets_its_key() {
    let config = Config::load(
        &flags(&[
            "--socket=/s",
            "--advertise-host=node-1",
            "--bind-host=127.0.0.2",
            "--endpoint-ports=1-2",
            "--state-dir=/d",
            "--admin=127.0.0.1:0",
            "--log=debug",
        ]),
        [],
    )
    .expect("valid flags");
    let endpoint = &config.endpoint;
    assert_eq!((endpoint.socket.to_str(), endpoint.state_dir.to_str()), (Some("/s"), Some("/d")));
    assert_eq!(
        (endpoint.advertised(), endpoint.bind_host.to_string()),
        ("node-1".into(), "127.0.0.2".into())
    );
    assert_eq!(endpoint.ports.ports().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(config.admin.address().map(|address| address.port()), Some(0));
    assert_eq!(config.log.filter, "debug");
}

#[test]
fn names_of_clients_and_of_kubernetes_disturb_nothing() {
    let environment = environment(&[
        ("KVFERRY_SOCKET", "/somewhere"),
        ("KVFERRY_PORT", "tcp://10.0.0.1:80"),
        ("KVFERRYD_PORT", "tcp://10.0.0.1:80"),
        ("KVFERRYD_SERVICE_HOST", "10.0.0.1"),
        ("kvferryd__retry__attempts", "9"),
        ("RETRY__ATTEMPTS", "9"),
    ]);
    assert_eq!(Config::load(&flags(&[]), environment).expect("nothing was said"), Config::default());
}

#[test]
fn an_unknown_key_is_named_with_its_origin() {
    for (text, key) in [
        ("[retry]\natempts = 3", "retry.atempts"),
        ("[retri]\nattempts = 3", "retri.attempts"),
        ("[rdmx]", "rdmx"),
        ("attempts = 3", "attempts"),
        ("retry = 3", "retry"),
        ("[retry.attempts]\nmore = 3", "retry.attempts.more"),
    ] {
        let problems = problems_of(text);
        assert_eq!(problems.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(), [key]);
    }
    let variable = "KVFERRYD__RETRY__ATEMPTS";
    let error = Config::load(&flags(&[]), environment(&[(variable, "3")])).expect_err("no such key");
    assert_eq!(error.to_string(), format!("retry.atempts (from {variable}): there is no such key"));
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_origin() {
    for (text, key) in [
        ("[retry]\nattempts = true", "retry.attempts"),
        ("[retry]\nattempts = 1.5", "retry.attempts"),
        ("[retry]\nattempts = \"three\"", "retry.attempts"),
        ("[retry]\nattempts = -1", "retry.attempts"),
        ("[retry]\nattempts = 4294967296", "retry.attempts"),
        ("[security]\ninsecure = 1", "security.insecure"),
        ("[security]\nallow_uids = [-1]", "security.allow_uids[0]"),
        ("[security]\nallow_uids = 7", "security.allow_uids"),
        ("[endpoint]\nbind_host = \"localhost\"", "endpoint.bind_host"),
        ("[endpoint]\nports = \"27999-20000\"", "endpoint.ports"),
        ("[endpoint]\nports = \"0-10\"", "endpoint.ports"),
        ("[endpoint]\nports = \"20000\"", "endpoint.ports"),
        ("[registration]\nlock = \"process\"", "registration.lock"),
        ("transports = [\"tcp\", \"rdma\"]", "transports[1]"),
    ] {
        let problems = problems_of(text);
        assert_eq!(
            problems.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(),
            [key],
            "{text:?}: {problems:?}"
        );
    }
    let variable = "KVFERRYD__RETRY__ATTEMPTS";
    let error = Config::load(&flags(&[]), environment(&[(variable, "x")])).expect_err("no number");
    assert_eq!(
        error.to_string(),
        format!("retry.attempts (from {variable}): expected a whole number, found \"x\"")
    );
    let error = Config::load(&flags(&["--endpoint-ports", "x"]), []).expect_err("no ports");
    assert!(error.to_string().starts_with("endpoint.ports (from --endpoint-ports): "), "{error}");
}

#[test]
fn a_value_that_cannot_be_is_named_with_its_origin() {
    let long = format!("[endpoint]\nsocket = \"/{}\"", "s".repeat(104));
    for (text, key) in [
        (long.as_str(), "endpoint.socket"),
        ("[endpoint]\nsocket = \"\"", "endpoint.socket"),
        ("[endpoint]\nstate_dir = \"\"", "endpoint.state_dir"),
        ("[endpoint]\nadvertise_host = \"a b\"", "endpoint.advertise_host"),
        ("[endpoint]\nbind_host = \"10.0.0.1\"", "endpoint.bind_host"),
        ("security.insecure = true\n[endpoint]\nbind_host = \"0.0.0.0\"", "endpoint.advertise_host"),
        ("transports = []", "transports"),
        ("transports = [\"tcp\", \"tcp\"]", "transports"),
        ("[retry]\nattempts = 0", "retry.attempts"),
        ("[retry]\ndeadline_ms = 86400001", "retry.deadline_ms"),
        ("[session]\nsilence_ms = 1000", "session.silence_ms"),
        ("[session]\nheartbeat_ms = 1500", "session.silence_ms"),
        ("[tcp]\nlanes = 17", "tcp.lanes"),
        ("[limits]\nregions = 65536", "limits.regions"),
        ("[limits]\nchunk_slices = 1048576", "limits.message_bytes"),
        ("[limits]\nslices = 1000", "limits.chunk_slices"),
        ("[admin]\nlisten = \"9464\"", "admin.listen"),
        ("[admin]\nlisten = \"0.0.0.0:9464\"", "admin.listen"),
        ("[log]\nfilter = \"kvferryd=loud\"", "log.filter"),
        ("[rdma]\nrail_map = \" \"", "rdma.rail_map"),
        ("[rdma]\nrail_map = '{0: \"mlx5_0\"}'", "rdma.rail_map"),
        ("[rdma]\nrail_map = '{\"0\": 3}'", "rdma.rail_map"),
        ("[rdma]\nrail_map = \"/no/such/rails.json\"", "rdma.rail_map"),
    ] {
        let problems = problems_of(text);
        assert_eq!(
            problems.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(),
            [key],
            "{text:?}: {problems:?}"
        );
    }
}

#[test]
fn the_longest_socket_path_fits() {
    let longest = format!("/{}", "s".repeat(103));
    Config::load(&flags(&["--socket", &longest]), []).expect("104 bytes and .fd make 107");
}

/// Which devices there are is another matter: the configuration may be checked on another machine.
#[test]
fn a_rail_map_may_be_a_list_a_map_or_a_file() {
    let load = |value: &str| {
        let environment = environment(&[("KVFERRYD__RDMA__RAIL_MAP", value)]);
        Config::load(&flags(&[]), environment).map(|config| config.rdma.rail_map().expect("validated"))
    };
    assert_eq!(load("").expect("none"), None);
    assert!(load("mlx5_0, mlx5_1").expect("a list").is_some_and(|map| !map.is_by_gpu()));
    assert!(load(r#"{"0": "mlx5_0", "1": "mlx5_1"}"#).expect("a map").is_some_and(|map| map.is_by_gpu()));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("rails.json");
    let name = path.display().to_string();
    fs::write(&path, "{\"0\": \"mlx5_0\"}\n").expect("the file is written");
    assert!(load(&format!(" {name} ")).expect("a file").is_some_and(|map| map.is_by_gpu()));

    for (content, says) in [
        ("{0: 1}", format!("Failed to parse JSON content from file {name}: ")),
        (
            "[\"mlx5_0\"]",
            format!("{name}: Invalid format: expected a mapping from GPU id to IB device string"),
        ),
        (" ".repeat(20_000).as_str(), format!("{name}: a rail map of 20000 bytes")),
    ] {
        fs::write(&path, content).expect("the file is written");
        let error = load(&name).expect_err("refused").to_string();
        let expected = format!("rdma.rail_map (from KVFERRYD__RDMA__RAIL_MAP): {says}");
        assert!(error.starts_with(&expected), "{error}");
    }
    let error = load(&folder.path().join("none.json").display().to_string()).expect_err("refused");
    assert!(error.to_string().ends_with("none.json does not exist."), "{error}");
}

#[test]
fn all_problems_are_told_at_once() {
    assert_eq!(problems_of("[retry]\nattempts = 0\n[tcp]\nlanes = 0").len(), 2);
    assert_eq!(problems_of("[retry]\nattemps = 0\n[tcp]\nlanes = true").len(), 2);
}

#[test]
fn beyond_loopback_only_when_told_twice() {
    let (_folder, path) = file(
        "[security]\ninsecure = true\n[endpoint]\nbind_host = \"0.0.0.0\"\nadvertise_host = \"node-1\"\n\
         [admin]\nlisten = \"0.0.0.0:9464\"",
    );
    Config::load(&flags(&["--config", &path]), []).expect("insecure was asked for");
}

#[test]
fn a_file_that_is_not_there_or_not_toml() {
    let error = Config::load(&flags(&["--config", "/no/such/file"]), []).expect_err("it is not there");
    assert!(matches!(error, ConfigError::Unreadable { .. }), "{error}");
    assert!(error.to_string().starts_with("/no/such/file: "), "{error}");
    let (_folder, path) = file("[retry\n");
    let error = Config::load(&flags(&["--config", &path]), []).expect_err("it is not TOML");
    assert!(matches!(error, ConfigError::Syntax { .. }), "{error}");
}

#[test]
fn what_is_printed_can_be_read_back() {
    let mut config = Config::default();
    config.endpoint.ports = PortRange { first: 1, last: 2 };
    config.security.allow_gids = vec![4];
    let (_folder, path) = file(&config.to_toml());
    assert_eq!(Config::load(&flags(&["--config", &path]), []).expect("its own output"), config);
}

/// The example names every key, no other, and each with its default.
#[test]
fn the_example_file_is_complete_and_true() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kvferryd.example.toml");
    assert_eq!(Config::load(&flags(&["--config", path]), []).expect("it is valid"), Config::default());
    let text = fs::read_to_string(path).expect("the example");
    let mut section = String::new();
    let mut named = BTreeSet::new();
    let mut documented = false;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = format!("{name}.");
        } else if let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            assert!(documented, "{section}{key} has no comment above it");
            named.insert(format!("{section}{key}"));
        }
        documented = line.starts_with('#');
    }
    let known: BTreeSet<String> = layers::known_keys(&Config::default()).into_keys().collect();
    assert_eq!(named, known);
}

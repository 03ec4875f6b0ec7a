//! Rail maps on their way from an engine's options, or the daemon's configuration, to what is shown.
//!
//! Device names here are none that a kernel gives, so that the tests say the same where there are devices.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, time::Duration};

use harness::{
    daemon::{Daemon, Launch},
    eventually,
    raw::RawEngine,
};
use kvferry_client::{Engine, EngineOptions, Error, Path, Reason};
use kvferry_proto::engine::v1::{AttachRequest, EngineInfo};

const BY_GPU: &str = r#"{"0": "nowhere_0, nowhere_1", "1": "nowhere_2"}"#;

fn with_map(daemon: &Daemon, gpu: Option<u32>, map: &str) -> EngineOptions {
    EngineOptions { gpu_id: gpu, rail_map: Some(map.to_owned()), ..daemon.options("rank") }
}

/// What the daemon lists of its only engine.
fn shown(daemon: &Daemon) -> EngineInfo {
    let engines = daemon.node().unwrap().engines().unwrap();
    assert_eq!(engines.len(), 1, "{engines:?}");
    engines.into_iter().next().unwrap()
}

fn refusal(options: EngineOptions) -> String {
    match Engine::attach(options) {
        Err(Error::Refused(failure)) if failure.reason == Reason::BadArgument => failure.message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_engines_gpu_and_rails_are_shown() {
    let daemon = Daemon::start().unwrap();
    {
        let _engine = daemon.attach("plain").unwrap();
        let engine = shown(&daemon);
        assert_eq!((engine.gpu_id, engine.rails), (None, vec![]));
    }
    eventually("it is gone", Duration::from_secs(5), || daemon.node().unwrap().engines().unwrap().is_empty());
    let _engine = Engine::attach(with_map(&daemon, Some(1), BY_GPU)).unwrap();
    let engine = shown(&daemon);
    assert_eq!((engine.gpu_id, engine.rails), (Some(1), vec!["nowhere_2".to_owned()]));
    assert!(daemon.log().contains("nowhere_0"), "what is not there is noted: {}", daemon.log());
}

#[test]
fn rdma_must_find_its_devices_and_tcp_need_not() {
    let daemon = Daemon::start().unwrap();
    let asking = |transports: &[Path]| EngineOptions {
        transports: transports.to_vec(),
        ..with_map(&daemon, None, "nowhere_0")
    };
    let told = refusal(asking(&[Path::Rdma, Path::Tcp]));
    assert!(
        told.starts_with(r#"rail_map: Invalid IB devices specified for all GPUs: ["nowhere_0"]. Avail"#),
        "{told}"
    );
    Engine::attach(asking(&[Path::Tcp])).unwrap();
}

#[test]
fn a_wrong_map_is_refused_whatever_the_transport() {
    let daemon = Daemon::start().unwrap();
    for (map, says) in [
        (" ", "No valid IB devices specified"),
        ("{}", "No valid GPU mappings found in JSON"),
        (r#"{"0": ["x"]}"#, "Invalid format: keys must be integers"),
        (r#"{"7": "x"}"#, "No IB devices configured for GPU 0. Available GPUs: [7]"),
        ("x:1", "Invalid IB devices specified for all GPUs"),
    ] {
        let told = refusal(with_map(&daemon, Some(0), map));
        assert!(told.starts_with(&format!("rail_map: {says}")), "{told}");
    }
}

/// The client library reads it; what the daemon is sent is the content, and after a restart too.
#[test]
fn a_file_is_read_once_by_the_engine() {
    let mut daemon = Daemon::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rails.json");
    fs::write(&file, BY_GPU).unwrap();
    let engine = Engine::attach(with_map(&daemon, Some(0), &file.display().to_string())).unwrap();
    let expected = ["nowhere_0".to_owned(), "nowhere_1".to_owned()];
    assert_eq!(shown(&daemon).rails, expected);

    fs::remove_file(&file).unwrap();
    let told = refusal(with_map(&daemon, Some(0), &file.display().to_string()));
    assert_eq!(told, format!("rail_map: File {} does not exist.", file.display()));
    daemon.kill_and_restart().unwrap();
    eventually("it is back", Duration::from_secs(20), || daemon.lists(engine.session_id()).unwrap());
    let engine = shown(&daemon);
    assert_eq!((engine.gpu_id, engine.rails.as_slice()), (Some(0), &expected[..]));
}

/// It runs as another user, in another place: whoever may attach must not learn what files it can read.
#[test]
fn the_daemon_opens_nothing_that_an_engine_names() {
    let daemon = Daemon::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there.json");
    fs::write(&there, BY_GPU).unwrap();
    let refused = |path: &std::path::Path| {
        let rail_map = Some(path.display().to_string());
        let request =
            AttachRequest { key: vec![7; 32], gpu_id: Some(0), rail_map, ..AttachRequest::default() };
        format!("{:#}", RawEngine::attach_as(daemon.socket(), request).unwrap_err())
    };
    let told = refused(&there);
    assert!(told.contains("rail_map: a file is read where its path means something"), "{told}");
    assert_eq!(told, refused(&folder.path().join("not.json")));
}

#[test]
fn the_configurations_map_is_for_engines_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rails.json");
    fs::write(&file, BY_GPU).unwrap();
    let config = format!("[rdma]\nrail_map = \"{}\"\n", file.display());
    let daemon = Daemon::with_config(&config).unwrap();
    let rails = |options: EngineOptions| {
        let engine = Engine::attach(options).unwrap();
        let rails = shown(&daemon).rails;
        drop(engine);
        eventually("it is gone", Duration::from_secs(5), || {
            daemon.node().unwrap().engines().unwrap().is_empty()
        });
        rails
    };
    assert_eq!(rails(EngineOptions { gpu_id: Some(1), ..daemon.options("rank") }), ["nowhere_2"]);
    assert_eq!(rails(with_map(&daemon, Some(1), "own_0")), ["own_0"]);
    // They cannot help it, and do without rdma.
    assert_eq!(rails(EngineOptions { gpu_id: Some(5), ..daemon.options("rank") }), Vec::<String>::new());
    assert_eq!(rails(daemon.options("rank")), Vec::<String>::new());

    fs::write(&file, "{").unwrap();
    let refusal = Launch::new().unwrap().config(&config).refused().unwrap();
    assert_eq!(refusal.code, Some(2), "{}", refusal.said);
    assert!(refusal.said.contains("rdma.rail_map (from "), "{}", refusal.said);
    assert!(refusal.said.contains("Failed to parse JSON content from file"), "{}", refusal.said);
}

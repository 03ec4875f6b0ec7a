//! A daemon that cannot run as it was told says why, names the key, and has bound nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::TcpListener, os::unix::net::UnixListener, time::Duration};

use harness::daemon::{Daemon, Launch, Refusal};
use kvferry_client::{Engine, EngineOptions, Error};

/// Starts a daemon with this configuration while its admin port is taken: had it bound a port before it looked at
/// its configuration, it would fail with 3, not 2.
fn refused(toml: &str) -> Refusal {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let launch = Launch::new().unwrap().config(toml).admin(taken.local_addr().unwrap().to_string());
    launch.refused().unwrap()
}

fn assert_names(refusal: &Refusal, key: &str) {
    assert_eq!(refusal.code, Some(2), "{}", refusal.said);
    assert!(refusal.said.contains(key), "{key} is not named: {}", refusal.said);
}

#[test]
fn j2_an_unknown_key() {
    assert_names(&refused("[retry]\natempts = 3\n"), "atempts");
    assert_names(&refused("[retries]\nattempts = 3\n"), "retries");
    assert_names(&refused("colour = \"blue\"\n"), "colour");
}

#[test]
fn j2_a_bad_value() {
    assert_names(&refused("[retry]\nattempts = \"many\"\n"), "attempts");
    assert_names(&refused("[retry]\nattempts = 0\n"), "attempts");
    assert_names(&refused("[retry]\nattempts = -1\n"), "attempts");
    assert_names(&refused("[session]\nsilence_ms = 0\n"), "silence_ms");
    assert_names(&refused("transports = [\"carrier pigeon\"]\n"), "transports");
    assert_names(&refused("[registration]\nlock = \"perhaps\"\n"), "lock");
}

#[test]
fn j2_a_file_that_is_no_toml() {
    let refusal = refused("[retry\nattempts = 3\n");
    assert_eq!(refusal.code, Some(2), "{}", refusal.said);
    assert!(refusal.said.contains("kvferryd.toml"), "the file is not named: {}", refusal.said);
}

#[test]
fn j2_a_bad_environment_variable_of_the_daemons_own() {
    let launch = Launch::new().unwrap().env("KVFERRYD__RETRY__ATTEMPTS", "many");
    assert_names(&launch.refused().unwrap(), "attempts");
    let launch = Launch::new().unwrap().env("KVFERRYD__RETRY__ATEMPTS", "3");
    assert_names(&launch.refused().unwrap(), "atempts");
}

#[test]
fn what_is_meant_for_clients_does_not_disturb() {
    let elsewhere = tempfile::tempdir().unwrap();
    let decoy = elsewhere.path().join("decoy.sock");
    let _decoy = UnixListener::bind(&decoy).unwrap();
    let daemon = Launch::new()
        .unwrap()
        .env("KVFERRY_SOCKET", &decoy.to_string_lossy())
        // As Kubernetes sets it for a service called kvferry.
        .env("KVFERRY_PORT", "tcp://10.0.0.1:443")
        .env("KVFERRY_SERVICE_HOST", "10.0.0.1")
        .start()
        .unwrap();
    daemon.attach("undisturbed").unwrap();
}

#[test]
fn j2_a_socket_path_that_is_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("s".repeat(200));
    let refusal = Launch::new().unwrap().socket(&long).refused().unwrap();
    assert_names(&refusal, "socket");

    // The client says so as well: an error that names the path, not a panic.
    let options = EngineOptions { socket: long.clone(), ..EngineOptions::default() };
    match Engine::attach(options) {
        Err(Error::NoDaemon { path, .. }) => assert_eq!(path, long),
        other => panic!("{other:?}"),
    }
}

#[test]
fn j2_a_path_that_leaves_no_room_for_the_fd_socket() {
    let folder = tempfile::tempdir().unwrap();
    // 107 bytes fit into an address; with `.fd` it is 108.
    let room = 105 - folder.path().as_os_str().len() - 1;
    let launch = Launch::new().unwrap().socket(folder.path().join("s".repeat(room)));
    assert_names(&launch.refused().unwrap(), "socket");
}

#[test]
fn no_daemon_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nobody.sock");
    let attach_timeout = Duration::from_secs(2);
    let options = EngineOptions { socket: socket.clone(), attach_timeout, ..EngineOptions::default() };
    match Engine::attach(options) {
        Err(Error::NoDaemon { path, .. }) => assert_eq!(path, socket),
        other => panic!("{other:?}"),
    }
}

#[test]
fn j2_a_taken_admin_port_is_exit_code_3() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let refusal = Launch::new().unwrap().admin(&address).refused().unwrap();
    assert_eq!(refusal.code, Some(3), "{}", refusal.said);
    assert!(refusal.said.contains(&address), "{address} is not named: {}", refusal.said);
}

#[test]
fn j2_a_second_daemon_on_a_live_socket_is_refused_and_the_first_unharmed() {
    let first = Daemon::start().unwrap();
    let refusal = Launch::new().unwrap().socket(first.socket()).refused().unwrap();
    assert_eq!(refusal.code, Some(3), "{}", refusal.said);
    let path = first.socket().to_string_lossy().into_owned();
    assert!(refusal.said.contains(&path), "{path} is not named: {}", refusal.said);
    first.attach("after the attempt").unwrap();
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("engine.sock");
    for path in [socket.clone(), folder.path().join("engine.sock.fd")] {
        // Closed and not unlinked, as a killed daemon leaves it.
        drop(UnixListener::bind(path).unwrap());
    }
    let daemon = Launch::new().unwrap().socket(&socket).start().unwrap();
    daemon.attach("on a fresh socket").unwrap();
}

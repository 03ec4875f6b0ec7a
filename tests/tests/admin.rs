//! The admin port of a real daemon: what people and their tools see.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use harness::{batch::Arrangement, scene::Scene};
use kvferry_client::Path;

const LIMIT: Duration = Duration::from_secs(10);

/// Status line and body.
fn get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: kvferry\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[test]
fn what_a_transfer_leaves_is_seen() {
    let mut scene = Scene::new(Path::Tcp, 8 << 20).unwrap();
    let moves = Arrangement::Reversed.moves(16, 64 << 10);
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &moves);
    let node = scene.nodes.initiator().node().unwrap();
    let admin = node.info().unwrap().admin;
    let address = admin.strip_prefix("http://").unwrap();

    assert_eq!(get(address, "/healthz").0, "HTTP/1.1 200 OK");
    assert_eq!(get(address, "/readyz").0, "HTTP/1.1 200 OK");
    let (status, metrics) = get(address, "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let has = |line: &str| assert!(metrics.lines().any(|have| have == line), "{line} is not in\n{metrics}");
    has(r#"kvferry_transfers_total{outcome="done",reason="none",path="tcp"} 1"#);
    has(&format!(r#"kvferry_transfer_bytes_total{{path="tcp",op="write"}} {}"#, 16 * (64 << 10)));
    has("kvferry_attached_engines 1");
    has("kvferry_active_transfers 0");

    let (status, body) = get(address, "/status.json");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["sessions"][0]["state"], "Healthy");
    assert_eq!(body["sessions"][0]["transfers_done"], 1);
    assert_eq!(body["engines"][0]["session_id"], scene.initiator.engine.session_id());
}

//! A real port, a plain socket.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use super::*;

#[derive(Default)]
struct Fake {
    sick: AtomicBool,
}

impl AdminSource for Fake {
    fn metrics_text(&self) -> String {
        "# EOF\n".to_owned()
    }

    fn health(&self) -> Result<(), String> {
        match self.sick.load(SeqCst) {
            false => Ok(()),
            true => Err("the registrar hangs\na lane thread ended".to_owned()),
        }
    }

    fn ready(&self) -> bool {
        !self.sick.load(SeqCst)
    }

    fn status(&self) -> serde_json::Value {
        serde_json::json!({ "engines": [] })
    }
}

fn start() -> (Admin, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let admin = Admin::start(([127, 0, 0, 1], 0).into(), fake.clone()).expect("a free port");
    (admin, fake)
}

fn connect(admin: &Admin) -> TcpStream {
    let stream = TcpStream::connect(admin.local_addr()).expect("the port is open");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    stream
}

/// Status line, head and body of the answer.
fn ask(admin: &Admin, request: &str) -> (String, String, String) {
    let mut stream = connect(admin);
    stream.write_all(request.as_bytes()).expect("the request is sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer, then the end");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let (status, head) = head.split_once("\r\n").unwrap_or((head, ""));
    (status.to_owned(), head.to_lowercase(), body.to_owned())
}

fn get(admin: &Admin, path: &str) -> (String, String, String) {
    ask(admin, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
}

#[test]
fn a_healthy_daemon() {
    let (admin, _fake) = start();
    let (status, head, body) = get(&admin, "/metrics");
    assert_eq!((status.as_str(), body.as_str()), ("HTTP/1.1 200 OK", "# EOF\n"));
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert_eq!(get(&admin, "/healthz").2, "ok\n");
    assert_eq!(get(&admin, "/readyz").2, "ready\n");
    let (_, head, body) = get(&admin, "/status.json");
    assert!(head.contains("content-type: application/json"), "{head}");
    assert_eq!(body, "{\"engines\":[]}");
    assert_eq!(get(&admin, "/other").0, "HTTP/1.1 404 Not Found");
    admin.shutdown();
}

#[test]
fn a_sick_daemon_says_why() {
    let (admin, fake) = start();
    fake.sick.store(true, SeqCst);
    let (status, _, body) = get(&admin, "/healthz");
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body, "the registrar hangs\na lane thread ended\n");
    assert_eq!(get(&admin, "/readyz").0, "HTTP/1.1 503 Service Unavailable");
}

#[test]
fn only_reading_is_possible() {
    let (admin, _fake) = start();
    let request = "POST /status.json HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    assert_eq!(ask(&admin, request).0, "HTTP/1.1 405 Method Not Allowed");
}

#[test]
fn garbage_and_silence_disturb_nobody() {
    let (admin, _fake) = start();
    let silent: Vec<TcpStream> = (0..16).map(|_| connect(&admin)).collect();
    for garbage in
        [&b"\x16\x03\x01\x00\x00"[..], b"KVFL\0\0\0\0\r\n\r\n", b"GET / HTTP/9\r\n\r\n", &[0; 70_000]]
    {
        let mut stream = connect(&admin);
        // The port may close before it has read everything.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    assert_eq!(get(&admin, "/healthz").2, "ok\n");
    drop(silent);
}

#[test]
fn a_port_that_is_taken_is_an_error() {
    let (admin, fake) = start();
    let error = Admin::start(admin.local_addr(), fake).expect_err("it is taken");
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn shutdown_closes_the_port_and_what_is_open() {
    let (admin, _fake) = start();
    let address = admin.local_addr();
    let mut open = connect(&admin);
    admin.shutdown();
    // An end, or a reset where the connection was still waiting to be accepted; but no timeout.
    match open.read(&mut [0; 1]) {
        Ok(bytes) => assert_eq!(bytes, 0),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
    TcpStream::connect(address).expect_err("nobody listens");
}

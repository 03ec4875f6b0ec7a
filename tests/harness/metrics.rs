//! What a daemon has counted, read from its admin port.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use crate::daemon::Daemon;

const PATIENCE: Duration = Duration::from_secs(10);

/// The value of a series, written as it is shown: name and labels. 0 where it was never touched.
///
/// # Panics
/// When the daemon does not answer.
pub fn counted(daemon: &Daemon, series: &str) -> u64 {
    let admin = daemon.node().unwrap().info().unwrap().admin;
    let mut stream = TcpStream::connect(admin.strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: kvferry\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let value = answer.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map_or(0, |value| value.trim().parse().unwrap())
}

//! Garbage, half greetings and silence on everything that listens: the daemon closes what says nothing sensible,
//! keeps nothing of it, and serves on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::Duration,
};

use harness::{batch::Arrangement, daemon::Daemon, scene::Scene};
use kvferry_client::Path;

const LIMIT: Duration = Duration::from_secs(15);
/// Half a second, so that silence can be waited out.
const CONFIG: &str = "[endpoint]\nhandshake_timeout_ms = 500\n";

/// What no peer would say. Each is sent on a connection of its own.
fn greetings() -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..4096u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    vec![
        noise.clone(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        // Each first byte that means something, and then nothing that does.
        [b"K".as_slice(), &noise].concat(),
        [b"KVFL".as_slice(), &[0xff; 48]].concat(),
        [b"P".as_slice(), &noise].concat(),
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &noise].concat(),
        [&[0x16][..], &noise].concat(),
        [b"KVFD".as_slice(), &[0xff; 48]].concat(),
    ]
}

/// Beginnings of something proper, that never go on; the first is silence.
fn halves() -> Vec<Vec<u8>> {
    let halves: [&[u8]; 6] = [b"", b"K", b"KVF", b"KVFL\x01\x00\x01\x00abc", b"P", b"PRI * HT"];
    halves.iter().map(|half| half.to_vec()).collect()
}

/// Reads until the other side closes.
fn closed(stream: &mut impl Read) -> bool {
    let mut scrap = [0; 4096];
    loop {
        match stream.read(&mut scrap) {
            Ok(0) => return true,
            // It may say what it thinks of us first.
            Ok(_) => {}
            Err(error) => {
                let waited = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::TimedOut];
                return !waited.contains(&error.kind());
            }
        }
    }
}

fn serves_on(scene: &mut Scene) {
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &Arrangement::Reversed.moves(16, 4096));
}

/// Whatever the strangers made the daemon open, it closes again.
fn forgets(daemon: &Daemon, before: usize) {
    harness::eventually("descriptors are back to what they were", LIMIT, || {
        daemon.process().descriptors().unwrap() <= before
    });
}

#[test]
fn garbage_on_an_endpoint() {
    let mut scene = Scene::with_config(Path::Tcp, 1 << 20, CONFIG).unwrap();
    serves_on(&mut scene);
    let before = scene.nodes.target().process().descriptors().unwrap();
    for greeting in greetings() {
        let mut stream = TcpStream::connect(scene.session()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // The daemon may close while we still talk.
        let _ = stream.write_all(&greeting);
        let begin = &greeting[..greeting.len().min(8)];
        assert!(closed(&mut stream), "{begin:02x?} is listened to for ever");
    }
    forgets(scene.nodes.target(), before);
    serves_on(&mut scene);
}

#[test]
fn half_a_preface_or_none_on_an_endpoint() {
    let mut scene = Scene::with_config(Path::Tcp, 1 << 20, CONFIG).unwrap();
    serves_on(&mut scene);
    let before = scene.nodes.target().process().descriptors().unwrap();
    let mut streams: Vec<_> = halves()
        .into_iter()
        .map(|half| {
            let mut stream = TcpStream::connect(scene.session()).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(&half).unwrap();
            (half, stream)
        })
        .collect();
    // They hold nobody up while they last.
    serves_on(&mut scene);
    for (half, stream) in &mut streams {
        assert!(closed(stream), "after {half:02x?} it is waited for ever");
    }
    drop(streams);
    forgets(scene.nodes.target(), before);
}

#[test]
fn garbage_and_silence_on_both_unix_sockets() {
    let mut scene = Scene::with_config(Path::Local, 1 << 20, CONFIG).unwrap();
    serves_on(&mut scene);
    let daemon = scene.nodes.initiator();
    let before = daemon.process().descriptors().unwrap();
    for socket in [daemon.socket().to_owned(), daemon.fd_socket()] {
        let mut held = Vec::new();
        for bytes in greetings().into_iter().chain(halves()) {
            let mut stream = UnixStream::connect(&socket).unwrap();
            let _ = stream.write_all(&bytes);
            held.push(stream);
        }
        // Another engine attaches and hands over a descriptor beside them.
        let other = daemon.attach("beside strangers").unwrap();
        let buffer = kvferry_client::SharedBuffer::new(4096).unwrap();
        other.register(&[kvferry_client::Memory::Shared(&buffer)]).unwrap();
        drop(held);
    }
    forgets(daemon, before);
    serves_on(&mut scene);
}

#[test]
fn garbage_in_a_flood() {
    let mut scene = Scene::with_config(Path::Tcp, 1 << 20, CONFIG).unwrap();
    serves_on(&mut scene);
    let target = scene.nodes.target();
    let before = target.process().resident().unwrap();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(scene.session()).unwrap();
        let _ = stream.write_all(&[b'x'; 64 << 10]);
    }
    let after = target.process().resident().unwrap();
    assert!(after < before + (64 << 20), "{before} -> {after} bytes resident");
    serves_on(&mut scene);
}

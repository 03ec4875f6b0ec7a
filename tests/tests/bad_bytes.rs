//! D5. Garbage, half greetings, too much and silence on everything that listens: the daemon closes what says nothing
//! sensible, keeps nothing of it, and serves on.
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
fn d5_garbage_on_an_endpoint() {
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
fn d5_half_a_preface_or_none_on_an_endpoint() {
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
fn d5_garbage_and_silence_on_both_unix_sockets() {
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
fn d5_garbage_in_a_flood() {
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

/// Where a daemon listens with a port, and how a stranger reaches it.
fn admin(daemon: &Daemon) -> String {
    let admin = daemon.node().unwrap().info().unwrap().admin;
    admin.strip_prefix("http://").unwrap().to_owned()
}

#[test]
fn d5_garbage_and_silence_on_the_admin_port() {
    let mut scene = Scene::with_config(Path::Tcp, 1 << 20, CONFIG).unwrap();
    serves_on(&mut scene);
    let daemon = scene.nodes.target();
    let address = admin(daemon);
    let before = daemon.process().descriptors().unwrap();
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(&address).unwrap()).collect();
    for bytes in greetings().into_iter().filter(|bytes| !bytes.starts_with(b"GET")) {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = stream.write_all(&bytes);
        assert!(closed(&mut stream), "{:02x?} is listened to for ever", &bytes[..8]);
    }
    drop(silent);
    forgets(daemon, before);
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    serves_on(&mut scene);
}

/// A proper beginning and then no end of it, on every kind of socket: nobody collects what has no place to go.
#[test]
fn d5_oversized_messages_on_every_port_cost_bounded_memory() {
    const SAID: usize = 64 << 20;
    let mut scene = Scene::with_config(Path::Tcp, 1 << 20, CONFIG).unwrap();
    serves_on(&mut scene);
    let target = scene.nodes.target();
    let before = target.process().resident().unwrap();
    // An HTTP/2 preface, SETTINGS, and a gRPC message that says it is 4 GiB long, as DATA of a stream nobody opened;
    // a header line that never ends; a lane's preface followed by everything.
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00".to_vec();
    let data = [&http2[..], b"\xff\xff\xff\x00\x00\x00\x00\x00\x01\x00\xff\xff\xff\xff"].concat();
    let header = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
    let (endpoint, admin) = (scene.session().to_owned(), admin(target));
    let unix = [target.socket().to_owned(), target.fd_socket()];
    let flood = |stream: &mut dyn Write, begin: &[u8]| {
        let chunk = vec![b'x'; 1 << 20];
        // It is cut off long before, where it is not merely passed over.
        let mut sent = stream.write_all(begin);
        for _ in 0..SAID / chunk.len() {
            sent = sent.and_then(|()| stream.write_all(&chunk));
        }
    };
    let tcp = |address: &str| {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        stream
    };
    flood(&mut tcp(&endpoint), &data);
    flood(&mut tcp(&endpoint), b"KVFL");
    flood(&mut tcp(&admin), &header);
    for socket in &unix {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        flood(&mut stream, if *socket == unix[0] { &data } else { b"KVFD" });
    }
    let after = target.process().resident().unwrap();
    println!("{before} -> {after} bytes resident");
    assert!(after < before + (16 << 20), "{before} -> {after} bytes resident");
    serves_on(&mut scene);
}

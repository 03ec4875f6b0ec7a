//! The proxy against plain sockets: what the fault suite takes for granted.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

struct Line {
    listener: TcpListener,
    proxy: Proxy,
}

impl Line {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::start(&listener.local_addr().unwrap().to_string()).unwrap();
        Self { listener, proxy }
    }

    fn connect(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.proxy.address).unwrap();
        let (server, _) = self.listener.accept().unwrap();
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
        }
        (client, server)
    }
}

fn read(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn rule(kind: Kind, fault: Fault) -> Rule {
    Rule { kind, fault, times: 1 }
}

fn cut_after(bytes: u64, how: Cut) -> Fault {
    Fault::CutAfter { toward: Toward::Target, bytes, how }
}

#[test]
fn bytes_pass_both_ways_and_are_counted() {
    let line = Line::new();
    let (mut client, mut server) = line.connect();
    client.write_all(b"Kabc").unwrap();
    assert_eq!(read(&mut server, 4), b"Kabc");
    server.write_all(b"answer").unwrap();
    assert_eq!(read(&mut client, 6), b"answer");
    line.proxy.drain(LIMIT);
    let passed = line.proxy.stats();
    assert_eq!(passed.len(), 1);
    assert_eq!((passed[0].kind, passed[0].to_target, passed[0].to_client), (Some(Kind::Data), 4, 6));
    assert!(!passed[0].ended);
}

#[test]
fn a_half_close_is_passed_on_and_the_other_half_lives() {
    let line = Line::new();
    let (mut client, mut server) = line.connect();
    client.write_all(b"P").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"P");
    server.write_all(b"still here").unwrap();
    assert_eq!(read(&mut client, 10), b"still here");
    assert!(!line.proxy.stats()[0].ended);
    server.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    crate::eventually("nothing is left to pass on", LIMIT, || line.proxy.stats()[0].ended);
}

#[test]
fn a_cut_lets_exactly_its_bytes_pass() {
    let line = Line::new();
    line.proxy.script(rule(Kind::Data, cut_after(100_000, Cut::Fin)));
    let (mut client, mut server) = line.connect();
    // More than is let through: the write may see the end, or fit into buffers.
    let _ = client.write_all(&vec![b'K'; 150_000]);
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 100_000);
    crate::eventually("the record says so", LIMIT, || line.proxy.stats()[0].ended);
}

#[test]
fn a_reset_is_a_reset_and_strikes_only_its_kind() {
    let line = Line::new();
    line.proxy.script(rule(Kind::Data, cut_after(0, Cut::Reset)));
    let (mut control, mut there) = line.connect();
    control.write_all(b"PRI").unwrap();
    assert_eq!(read(&mut there, 3), b"PRI");
    let (mut data, _there) = line.connect();
    data.write_all(b"K").unwrap();
    let error = data.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    control.write_all(b"more").unwrap();
    assert_eq!(read(&mut there, 4), b"more");
    // Once only: the next data connection passes.
    let (mut data, mut there) = line.connect();
    data.write_all(b"Kok").unwrap();
    assert_eq!(read(&mut there, 3), b"Kok");
}

#[test]
fn a_cut_counts_its_own_direction() {
    let line = Line::new();
    let fault = Fault::CutAfter { toward: Toward::Client, bytes: 5, how: Cut::Fin };
    line.proxy.script(rule(Kind::Data, fault));
    let (mut client, mut server) = line.connect();
    client.write_all(&[b'K'; 1000]).unwrap();
    read(&mut server, 1000);
    server.write_all(b"0123456789").unwrap();
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"01234");
}

#[test]
fn one_byte_is_flipped() {
    let line = Line::new();
    line.proxy.script(rule(Kind::Data, Fault::Flip { at: 70_001 }));
    let (mut client, mut server) = line.connect();
    client.write_all(&vec![b'K'; 100_000]).unwrap();
    let bytes = read(&mut server, 100_000);
    let wrong: Vec<_> = (0..bytes.len()).filter(|&at| bytes[at] != b'K').collect();
    assert_eq!(wrong, [70_001]);
}

#[test]
fn bytes_vanish_and_the_connection_lives() {
    let line = Line::new();
    // Far more than is read at once.
    line.proxy.script(rule(Kind::Data, Fault::Drop { at: 70_001, bytes: 200_000 }));
    let (mut client, mut server) = line.connect();
    let sent: Vec<u8> = (0..400_000u32).map(|at| if at == 0 { b'K' } else { (at % 251) as u8 }).collect();
    let writes = std::thread::spawn({
        let sent = sent.clone();
        move || {
            client.write_all(&sent).unwrap();
            client
        }
    });
    let bytes = read(&mut server, 200_000);
    assert!(bytes[..70_001] == sent[..70_001] && bytes[70_001..] == sent[270_001..]);
    let mut client = writes.join().unwrap();
    client.write_all(b"next").unwrap();
    assert_eq!(read(&mut server, 4), b"next");
}

#[test]
fn a_delay_holds_in_its_direction() {
    let line = Line::new();
    let (mut client, mut server) = line.connect();
    client.write_all(b"K").unwrap();
    read(&mut server, 1);
    line.proxy.delay(Toward::Client, Duration::from_millis(80));
    let begin = Instant::now();
    client.write_all(b"to").unwrap();
    read(&mut server, 2);
    let there = begin.elapsed();
    server.write_all(b"back").unwrap();
    read(&mut client, 4);
    let back = begin.elapsed() - there;
    assert!(back >= Duration::from_millis(80) && there < back, "{there:?} there, {back:?} back");
    line.proxy.delay(Toward::Client, Duration::ZERO);
    server.write_all(b"again").unwrap();
    assert_eq!(read(&mut client, 5), b"again");
}

#[test]
fn bytes_that_passed_can_be_repeated() {
    let line = Line::new();
    let (mut client, mut server) = line.connect();
    client.write_all(b"K12345").unwrap();
    read(&mut server, 6);
    line.proxy.drain(LIMIT);
    assert_eq!(line.proxy.replay_data(3).unwrap(), 3);
    assert_eq!(read(&mut server, 3), b"345");
    client.write_all(b"next").unwrap();
    assert_eq!(read(&mut server, 4), b"next");
}

#[test]
fn a_black_hole_gives_everything_back_when_it_ends() {
    let line = Line::new();
    let (mut client, mut server) = line.connect();
    line.proxy.hold(true);
    client.write_all(b"Kheld").unwrap();
    crate::eventually("the proxy has read it", LIMIT, || line.proxy.stats()[0].held == 5);
    server.set_nonblocking(true).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    server.set_nonblocking(false).unwrap();
    line.proxy.hold(false);
    assert_eq!(read(&mut server, 5), b"Kheld");
}

#[test]
fn refused_means_refused_and_ends() {
    let line = Line::new();
    line.proxy.refuse(true);
    crate::eventually("connections are refused", LIMIT, || {
        TcpStream::connect(line.proxy.address)
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    line.proxy.refuse(false);
    crate::eventually("connections are taken again", LIMIT, || {
        TcpStream::connect(line.proxy.address).is_ok()
    });
}

#[test]
fn everything_can_be_cut_and_go_elsewhere() {
    let line = Line::new();
    let (mut client, _server) = line.connect();
    client.write_all(b"P").unwrap();
    crate::eventually("it passed", LIMIT, || line.proxy.stats()[0].to_target == 1);
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    line.proxy.retarget(&elsewhere.local_addr().unwrap().to_string()).unwrap();
    line.proxy.cut_all(Cut::Reset);
    assert!(client.read(&mut [0]).is_err());
    let mut client = TcpStream::connect(line.proxy.address).unwrap();
    let (mut server, _) = elsewhere.accept().unwrap();
    client.write_all(b"K").unwrap();
    assert_eq!(read(&mut server, 1), b"K");
}

#[test]
fn a_throttle_is_kept_and_ends() {
    let line = Line::new();
    let (mut client, mut server) = line.connect();
    client.write_all(b"K").unwrap();
    read(&mut server, 1);
    line.proxy.throttle(Some(200_000));
    // A read that began before the throttle may still take a whole buffer: it takes this byte.
    client.write_all(b"x").unwrap();
    read(&mut server, 1);
    let begin = Instant::now();
    client.write_all(&[0; 60_000]).unwrap();
    read(&mut server, 60_000);
    let took = begin.elapsed();
    // 60 kB at 200 kB/s are 0.3 s, less one chunk.
    assert!(took > Duration::from_millis(150), "{took:?}");
    line.proxy.throttle(None);
    client.write_all(&[0; 60_000]).unwrap();
    read(&mut server, 60_000);
}

#[test]
fn a_storm_cuts_each_connection_at_a_byte_of_its_own() {
    let line = Line::new();
    line.proxy.storm(Some(Storm { seed: 1, bytes: 1000..50_000, how: Cut::Fin }));
    let passed = || {
        let (mut client, mut server) = line.connect();
        let _ = client.write_all(&[b'K'; 60_000]);
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        all.len()
    };
    let lengths = [passed(), passed(), passed()];
    assert!(lengths.iter().all(|length| (1000..50_000).contains(length)), "{lengths:?}");
    assert!(lengths[0] != lengths[1] && lengths[1] != lengths[2], "{lengths:?}");
    assert_eq!(line.proxy.struck(), 3);
    line.proxy.storm(None);
    let (mut client, mut server) = line.connect();
    client.write_all(&[b'K'; 60_000]).unwrap();
    read(&mut server, 60_000);
}

#[test]
fn one_data_connection_is_held_and_the_others_go_on() {
    let line = Line::new();
    let (mut first, mut first_server) = line.connect();
    first.write_all(b"K1").unwrap();
    assert_eq!(read(&mut first_server, 2), b"K1");
    let (mut second, mut second_server) = line.connect();
    second.write_all(b"K2").unwrap();
    assert_eq!(read(&mut second_server, 2), b"K2");
    line.proxy.hold_data(0, true);
    first.write_all(b"late").unwrap();
    second.write_all(b"now").unwrap();
    assert_eq!(read(&mut second_server, 3), b"now");
    crate::eventually("the first one's bytes are inside", LIMIT, || line.proxy.data()[0].held == 4);
    assert_eq!(line.proxy.data()[0].to_target, 2);
    line.proxy.hold_data(0, false);
    assert_eq!(read(&mut first_server, 4), b"late");
}

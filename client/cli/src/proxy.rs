//! A TCP proxy between two daemons that can slow data connections down and cut them.
//!
//! kvferry's identity is not an address, so a session through a proxy is a session like any other. Control
//! connections (first byte `P` of HTTP/2 or 0x16 of TLS, as the daemon's own listener tells them) pass
//! untouched: what is shown here is the loss of data paths, not of the peer.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

const CHUNK_BYTES: usize = 64 << 10;
/// More than two daemons ever open; one more is refused.
const CONNECTIONS_MAX: usize = 64;
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(1);
/// No payload passes that is smaller; acknowledgements and beats are.
const NOISE_BYTES: u64 = 4096;
const NEVER: u64 = u64::MAX;

#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    data: bool,
}

impl Connection {
    fn shut(&self) {
        // Failure means that it is closed already.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    /// Bytes passed on data connections, both ways.
    forwarded: AtomicU64,
    /// When `forwarded` reaches it, data connections are cut, once.
    cut_at: AtomicU64,
    /// Bytes a second and direction on data connections; 0: unlimited.
    rate: AtomicU64,
    closing: AtomicBool,
    open: Mutex<Vec<Arc<Connection>>>,
}

/// Listening until dropped; all its threads have ended then.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    pub(crate) fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            forwarded: AtomicU64::new(0),
            cut_at: AtomicU64::new(NEVER),
            rate: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            open: Mutex::new(Vec::new()),
        });
        let own = shared.clone();
        let acceptor = thread::Builder::new().name("proxy".into()).spawn(move || accept(&own, &listener))?;
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that have passed on data connections so far.
    pub(crate) fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(Ordering::SeqCst)
    }

    /// Cuts all data connections when that many more bytes have passed; later connections are let through.
    pub(crate) fn cut_after(&self, bytes: u64) {
        self.shared.cut_at.store(self.forwarded() + bytes, Ordering::SeqCst);
    }

    /// Whether a cut that was asked for has happened.
    pub(crate) fn has_cut(&self) -> bool {
        self.shared.cut_at.load(Ordering::SeqCst) == NEVER
    }

    /// Bytes a second; 0 takes the limit away.
    pub(crate) fn limit_rate(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Waits until that many bytes have passed in all; whether they did in time.
    pub(crate) fn wait_forwarded(&self, bytes: u64, within: Duration) -> bool {
        let end = Instant::now() + within;
        while self.forwarded() < bytes {
            if Instant::now() > end {
                return false;
            }
            thread::sleep(LOOK);
        }
        true
    }

    /// Waits until hardly a byte has passed for `period`; whether that came in time.
    pub(crate) fn wait_quiet(&self, period: Duration, within: Duration) -> bool {
        let end = Instant::now() + within;
        let (mut since, mut mark) = (Instant::now(), self.forwarded());
        while since.elapsed() < period {
            if Instant::now() > end {
                return false;
            }
            thread::sleep(LOOK);
            if self.forwarded() > mark + NOISE_BYTES {
                (since, mark) = (Instant::now(), self.forwarded());
            }
        }
        true
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.shared.open().iter().for_each(|connection| connection.shut());
        // Wakes the acceptor, which then sees that it is closing.
        let _ = TcpStream::connect_timeout(&self.address, CONNECT_WITHIN);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    /// Held for list operations and shutdowns only, none of which blocks.
    fn open(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        self.open().iter().filter(|connection| connection.data).for_each(|connection| connection.shut());
    }

    /// How much of `length` may still pass, and whether the cut comes right after it.
    fn admit(&self, length: usize) -> (usize, bool) {
        let cut_at = self.cut_at.load(Ordering::SeqCst);
        let left = cut_at.saturating_sub(self.forwarded.load(Ordering::SeqCst));
        if left > length as u64 {
            return (length, false);
        }
        // Two directions may get here at once; one of them does the cut.
        let mine = self.cut_at.compare_exchange(cut_at, NEVER, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        (left as usize, mine)
    }
}

/// The scope joins every pump before the acceptor ends.
fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    thread::scope(|scope| {
        while let Ok((client, _)) = listener.accept() {
            if shared.closing.load(Ordering::SeqCst) {
                break;
            }
            if shared.open().len() < CONNECTIONS_MAX {
                scope.spawn(move || serve(shared, client));
            }
        }
    });
}

/// One connection, from its first byte to its end. Errors end it: that is all a proxy can do about them.
fn serve(shared: &Shared, client: TcpStream) {
    let Ok(connection) = connect(shared, client) else { return };
    let connection = Arc::new(connection);
    {
        let mut open = shared.open();
        if shared.closing.load(Ordering::SeqCst) {
            return;
        }
        open.push(connection.clone());
    }
    thread::scope(|scope| {
        scope.spawn(|| pump(shared, &connection, &connection.server, &connection.client));
        pump(shared, &connection, &connection.client, &connection.server);
    });
    shared.open().retain(|other| !Arc::ptr_eq(other, &connection));
}

/// Classifies by the first byte without taking it. A single blocking peek: the first byte is all that is asked.
fn connect(shared: &Shared, client: TcpStream) -> io::Result<Connection> {
    client.set_read_timeout(Some(CONNECT_WITHIN))?;
    let mut first = [0];
    if client.peek(&mut first)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    client.set_read_timeout(None)?;
    let server = TcpStream::connect_timeout(&shared.target, CONNECT_WITHIN)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    Ok(Connection { client, server, data: !matches!(first[0], b'P' | 0x16) })
}

/// Copies one direction until it ends, then closes both: neither protocol uses half-closed connections.
fn pump(shared: &Shared, connection: &Connection, mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut due = Instant::now();
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let (pass, cut) = if connection.data { shared.admit(length) } else { (length, false) };
        if to.write_all(&buffer[..pass]).is_err() {
            break;
        }
        if connection.data {
            shared.forwarded.fetch_add(pass as u64, Ordering::SeqCst);
            due = throttle(shared, due, pass);
        }
        if cut {
            shared.cut();
        }
    }
    connection.shut();
}

/// Sleeps as long as the rate asks for; returns when the next chunk is due. A changed rate counts at once.
fn throttle(shared: &Shared, due: Instant, bytes: usize) -> Instant {
    let now = Instant::now();
    let rate = shared.rate.load(Ordering::SeqCst);
    if rate == 0 {
        return now;
    }
    let due = due.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
    thread::sleep(due - now);
    due
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A server that counts what each connection brings and hands the totals over when it ends.
    fn counting_server() -> (SocketAddr, std::sync::mpsc::Receiver<usize>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (send, totals) = std::sync::mpsc::sync_channel(8);
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let send = send.clone();
                thread::spawn(move || {
                    let mut all = Vec::new();
                    let _ = stream.read_to_end(&mut all);
                    let _ = send.send(all.len());
                });
            }
        });
        (address, totals)
    }

    #[test]
    fn a_data_connection_is_cut_after_exactly_that_many_bytes_and_a_new_one_passes() {
        let (server, totals) = counting_server();
        let proxy = Proxy::start(server).unwrap();
        proxy.cut_after(100_000);
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        // The cut may come while these are being written.
        let _ = stream.write_all(&vec![7; 1_000_000]);
        assert_eq!(totals.recv_timeout(SOON).unwrap(), 100_000);
        assert!(proxy.has_cut());

        let mut again = TcpStream::connect(proxy.address()).unwrap();
        again.write_all(&[7; 5000]).unwrap();
        drop(again);
        assert_eq!(totals.recv_timeout(SOON).unwrap(), 5000);
    }

    #[test]
    fn control_connections_are_neither_counted_nor_cut() {
        let (server, totals) = counting_server();
        let proxy = Proxy::start(server).unwrap();
        proxy.cut_after(10);
        let mut control = TcpStream::connect(proxy.address()).unwrap();
        control.write_all(&[b'P'; 50_000]).unwrap();
        drop(control);
        assert_eq!(totals.recv_timeout(SOON).unwrap(), 50_000);
        assert_eq!((proxy.forwarded(), proxy.has_cut()), (0, false));
    }

    #[test]
    fn a_limited_rate_takes_the_time_it_should() {
        let (server, totals) = counting_server();
        let proxy = Proxy::start(server).unwrap();
        proxy.limit_rate(1_000_000);
        let start = Instant::now();
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        stream.write_all(&[7; 200_000]).unwrap();
        drop(stream);
        assert_eq!(totals.recv_timeout(SOON).unwrap(), 200_000);
        assert!(start.elapsed() >= Duration::from_millis(130), "{:?}", start.elapsed());
        assert!(proxy.wait_forwarded(200_000, SOON) && proxy.wait_quiet(LOOK * 20, SOON));
    }

    #[test]
    fn dropping_the_proxy_ends_its_connections() {
        let (server, totals) = counting_server();
        let proxy = Proxy::start(server).unwrap();
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        stream.write_all(&[7; 10]).unwrap();
        assert!(proxy.wait_forwarded(10, SOON));
        drop(proxy);
        assert_eq!(totals.recv_timeout(SOON).unwrap(), 10);
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    }
}

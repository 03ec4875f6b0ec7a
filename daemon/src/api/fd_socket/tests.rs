use std::{
    io::{IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as Client,
    },
    path::PathBuf,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{runtime::Runtime, sync::oneshot, task::JoinHandle};

use super::{
    message::{MAGIC, VERSION},
    *,
};

const TOKEN: [u8; 32] = [5; 32];

/// A server on a runtime of its own, so that the tests can speak to it with plain blocking calls.
struct Server {
    shelf: Arc<FdShelf>,
    path: PathBuf,
    runtime: Runtime,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start(limits: FdSocketLimits, allow: bool) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("engine.sock.fd");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let shelf = Arc::new(FdShelf::new(2));
        let shelf_of: ShelfOf = {
            let shelf = shelf.clone();
            Arc::new(move |token| (*token == TOKEN).then(|| shelf.clone()))
        };
        let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let allow: Allow = Arc::new(move |uid, gid| allow && (uid, gid) == own);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = {
            let _inside = runtime.enter();
            let listener = UnixListener::bind(&path).expect("a listener");
            let server = FdSocket::new(shelf_of, allow, limits);
            runtime.spawn(server.serve(listener, async { drop(stopped.await) }))
        };
        Self { shelf, path, runtime, stop: Some(stop), task: Some(task), _directory: directory }
    }

    fn ordinary() -> Self {
        Self::start(FdSocketLimits::default(), true)
    }

    fn connect(&self) -> Client {
        let client = Client::connect(&self.path).expect("a connection");
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            self.runtime.block_on(task).expect("the server never panics");
        }
    }
}

fn message(token: [u8; 32], handle: u64) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(token);
    bytes.extend(handle.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// A pipe: when the daemon has closed the end it was sent, the other one reads the end of the stream.
fn pipe() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    (reader, writer.into())
}

fn send(client: &Client, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(client, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).expect("sent");
    assert_eq!(sent, bytes.len());
}

fn reply(client: &mut Client) -> Option<Reason> {
    let mut bytes = [0; 4];
    client.read_exact(&mut bytes).expect("a reply");
    assert_eq!(bytes[2..], [0, 0]);
    match u16::from_le_bytes([bytes[0], bytes[1]]) {
        0 => None,
        number => Some(Reason::from_number(number).expect("a known reason")),
    }
}

fn assert_closed(client: &mut Client) {
    match client.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0),
        // What we sent and nobody read makes the kernel say it this way.
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn descriptors_arrive_under_their_handles_on_one_connection() {
    let server = Server::ordinary();
    let mut client = server.connect();
    let mut readers = Vec::new();
    for handle in [7, 8] {
        let (reader, writer) = pipe();
        send(&client, &message(TOKEN, handle), &[writer.as_fd()]);
        assert_eq!(reply(&mut client), None);
        readers.push(reader);
    }
    for (handle, mut reader) in [8, 7].into_iter().zip(readers.into_iter().rev()) {
        let fd = server.shelf.take(handle).expect("the descriptor");
        assert!(rustix::io::fcntl_getfd(&*fd).expect("its flags").contains(rustix::io::FdFlags::CLOEXEC));
        rustix::io::write(&*fd, &[handle as u8]).expect("a byte");
        drop(fd);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).expect("the byte and the end");
        assert_eq!(bytes, [handle as u8]);
    }
}

#[test]
fn a_message_may_come_in_pieces() {
    let server = Server::ordinary();
    let mut client = server.connect();
    let (_reader, writer) = pipe();
    let bytes = message(TOKEN, 1);
    send(&client, &bytes[..3], &[]);
    send(&client, &bytes[3..20], &[writer.as_fd()]);
    send(&client, &bytes[20..], &[]);
    assert_eq!(reply(&mut client), None);
    assert!(server.shelf.get(1).is_some());
}

#[test]
fn bad_messages_are_refused_by_type_and_leave_no_descriptor() {
    let good = message(TOKEN, 1);
    let altered = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0xff;
        bytes
    };
    let cases = [
        ("magic", altered(0), 1, Reason::BadArgument),
        ("version", altered(4), 1, Reason::BadArgument),
        ("token", altered(8), 1, Reason::Unauthorised),
        ("reserved", altered(48), 1, Reason::BadArgument),
        ("no descriptor", good.clone(), 0, Reason::BadArgument),
        ("two descriptors", good.clone(), 2, Reason::BadArgument),
        ("truncated control data", good.clone(), 8, Reason::BadArgument),
    ];
    let server = Server::ordinary();
    for (what, bytes, count, reason) in cases {
        let mut client = server.connect();
        let (mut reader, writer) = pipe();
        send(&client, &bytes, &vec![writer.as_fd(); count]);
        drop(writer);
        assert_eq!(reply(&mut client), Some(reason), "{what}");
        assert_closed(&mut client);
        // Blocks for as long as anybody holds a copy of the writing end.
        assert_eq!(reader.read(&mut [0]).expect("the end"), 0, "{what}");
    }
    assert!(server.shelf.get(1).is_none());
}

#[test]
fn descriptors_spread_over_the_pieces_are_refused() {
    let server = Server::ordinary();
    let mut client = server.connect();
    let (mut reader, writer) = pipe();
    let bytes = message(TOKEN, 1);
    send(&client, &bytes[..10], &[writer.as_fd()]);
    send(&client, &bytes[10..], &[writer.as_fd()]);
    drop(writer);
    assert_eq!(reply(&mut client), Some(Reason::BadArgument));
    assert_eq!(reader.read(&mut [0]).expect("the end"), 0);
}

#[test]
fn a_full_shelf_and_a_used_handle_are_told_apart() {
    let server = Server::ordinary();
    let offer = |handle| {
        let mut client = server.connect();
        let (_reader, writer) = pipe();
        send(&client, &message(TOKEN, handle), &[writer.as_fd()]);
        reply(&mut client)
    };
    assert_eq!(offer(1), None);
    assert_eq!(offer(1), Some(Reason::BadArgument));
    assert_eq!(offer(2), None);
    assert_eq!(offer(3), Some(Reason::Limit));
}

#[test]
fn silence_and_half_messages_end_in_time() {
    let limits = FdSocketLimits { silence: Duration::from_millis(50), ..FdSocketLimits::default() };
    let server = Server::start(limits, true);
    let mut silent = server.connect();
    let mut half = server.connect();
    half.write_all(b"KVF").expect("three bytes");
    assert_eq!(reply(&mut silent), Some(Reason::Deadline));
    assert_eq!(reply(&mut half), Some(Reason::Deadline));
    assert_closed(&mut silent);
    assert_closed(&mut half);
}

#[test]
fn the_end_inside_a_message_is_told_from_the_end_between_two() {
    let server = Server::ordinary();
    let mut cut = server.connect();
    cut.write_all(b"KVF").expect("three bytes");
    cut.shutdown(std::net::Shutdown::Write).expect("an end");
    assert_eq!(reply(&mut cut), Some(Reason::BadArgument));
    let mut done = server.connect();
    done.shutdown(std::net::Shutdown::Write).expect("an end");
    assert_closed(&mut done);
}

#[test]
fn strangers_are_refused() {
    let server = Server::start(FdSocketLimits::default(), false);
    let mut client = server.connect();
    assert_eq!(reply(&mut client), Some(Reason::Unauthorised));
    assert_closed(&mut client);
}

#[test]
fn no_more_connections_are_served_than_allowed() {
    let limits = FdSocketLimits { connections: 1, ..FdSocketLimits::default() };
    let server = Server::start(limits, true);
    let mut first = server.connect();
    let (_reader, writer) = pipe();
    send(&first, &message(TOKEN, 1), &[writer.as_fd()]);
    assert_eq!(reply(&mut first), None);
    let mut second = server.connect();
    send(&second, &message(TOKEN, 2), &[writer.as_fd()]);
    second.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    assert_eq!(second.read(&mut [0]).expect_err("nobody answers").kind(), io::ErrorKind::WouldBlock);
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    assert_eq!(reply(&mut second), None);
}

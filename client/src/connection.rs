//! Connections to the daemon's engine socket.

use std::{io, os::unix::ffi::OsStrExt, path::Path};

use hyper_util::rt::TokioIo;
use kvferry_proto::engine::v1::engine_client::EngineClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::Error;

/// Bytes an unacknowledged HTTP/2 stream or connection may hold: answers never wait for window updates.
const WINDOW: u32 = 16 << 20;
/// Bytes of the largest answer taken: lists of regions and sessions are the large ones.
const LARGEST_REPLY: usize = 64 << 20;
/// Bytes of `sockaddr_un.sun_path`, the final zero not counted.
const LONGEST_SOCKET_PATH: usize = 107;

/// Connects, or says why there is no daemon and what helps.
pub(crate) async fn open(socket: &Path) -> Result<UnixStream, Error> {
    let no_daemon = |cause: String| Error::NoDaemon { path: socket.to_owned(), cause };
    let bytes = socket.as_os_str().as_bytes().len();
    if bytes > LONGEST_SOCKET_PATH {
        return Err(no_daemon(format!(
            "the path has {bytes} bytes, a Unix socket path can have {LONGEST_SOCKET_PATH}; use a shorter one"
        )));
    }
    UnixStream::connect(socket).await.map_err(|error| no_daemon(cause(&error)))
}

fn cause(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("{error}; start kvferryd or set KVFERRY_SOCKET"),
        io::ErrorKind::ConnectionRefused => {
            format!("{error}: the socket is left over from a daemon that is gone; start kvferryd")
        }
        io::ErrorKind::PermissionDenied => {
            let uid = rustix::process::getuid().as_raw();
            format!("{error}: uid {uid} may not use this socket; join its group")
        }
        _ => error.to_string(),
    }
}

/// A channel that connects when first used, and again when its connection broke. Needs a runtime around it.
pub(crate) fn lazy(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    endpoint().connect_with_connector_lazy(tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { open(&socket).await.map(TokioIo::new) }
    }))
}

/// A channel over this one connection: when it breaks, the channel stays broken.
pub(crate) fn over(stream: UnixStream) -> Channel {
    let mut stream = Some(stream);
    endpoint().connect_with_connector_lazy(tower::service_fn(move |_| {
        let stream = stream.take().map(TokioIo::new);
        async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    }))
}

/// The stub, with room for large answers. Requests are bounded by the daemon.
pub(crate) fn client(channel: Channel) -> EngineClient<Channel> {
    EngineClient::new(channel).max_decoding_message_size(LARGEST_REPLY)
}

fn endpoint() -> Endpoint {
    // The name only fills the `:authority` of HTTP/2; the connector decides where to connect.
    Endpoint::from_static("http://kvferry")
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
}

//! The Unix socket that engines call: who may connect, and what a connection must say first.
//!
//! A connection is let in by what the kernel says of its owner, and reaches the gRPC server once it has sent
//! HTTP/2's preface, under a deadline; garbage and silence end here.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kvferry_proto::engine::v1::engine_server::EngineServer;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use super::EngineService;
use crate::prefixed::{Prefixed, http2_preface};

/// Connections of engines and tools that may be open at once.
const MAX_CONNECTIONS: usize = 4096;

/// HTTP/2 window: a request of ten megabytes must not wait for a window's worth of round trips.
const WINDOW_BYTES: u32 = 16 << 20;

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody serves there.
    #[error("{0}: a daemon serves on this socket already")]
    Taken(PathBuf),
    /// It cannot be made.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Binds with mode 0660. A socket file that nobody serves is replaced.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |source| SocketError::Io { path: path.to_owned(), source };
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(SocketError::Taken(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(io)?
        }
        // Nothing there, or nothing that a connect can tell of: the bind will.
        Err(_) => {}
    }
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory).map_err(io)?;
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(io)?;
    Ok(listener)
}

/// Who may connect, by user and group.
pub type Allow = Arc<dyn Fn(u32, u32) -> bool + Send + Sync>;

/// Serves until `stop`; then waits for nobody.
pub async fn serve(
    listener: UnixListener,
    service: EngineService,
    allow: Allow,
    deadline: Duration,
    message_bytes: usize,
    stop: impl Future<Output = ()> + Send,
) {
    let (connections, incoming) = mpsc::channel::<io::Result<Prefixed<UnixStream>>>(64);
    let service = EngineServer::new(service)
        .max_decoding_message_size(message_bytes)
        .max_encoding_message_size(usize::MAX);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(kvferry_proto::DESCRIPTOR_SET)
        .build_v1()
        .expect("the checked-in descriptors are well-formed");
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<EngineServer<EngineService>>().await;
    let router = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .add_service(service)
        .add_service(reflection)
        .add_service(health_service);
    let mut grpc = tokio::spawn(router.serve_with_incoming(ReceiverStream::new(incoming)));
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut newcomers = JoinSet::new();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let Ok(permit) = room.clone().try_acquire_owned() else { continue };
                    let (allow, connections) = (allow.clone(), connections.clone());
                    newcomers.spawn(async move {
                        if let Ok(stream) = greet(stream, &allow, deadline).await {
                            let _ = connections.send(Ok(Prefixed::new(stream, permit))).await;
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an engine");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = newcomers.join_next() => {}
            () = &mut stop => break,
        }
    }
    grpc.abort();
    let _ = (&mut grpc).await;
}

async fn greet(mut stream: UnixStream, allow: &Allow, deadline: Duration) -> io::Result<UnixStream> {
    let credentials = stream.peer_cred()?;
    if !allow(credentials.uid(), credentials.gid()) {
        tracing::warn!(
            uid = credentials.uid(),
            gid = credentials.gid(),
            "a user that is not allowed was refused"
        );
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    tokio::time::timeout(deadline, http2_preface(&mut stream, None)).await??;
    Ok(stream)
}

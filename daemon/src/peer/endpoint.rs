//! The endpoint of one engine: one `host:port` through which control and data both enter.
//!
//! The first byte tells which: `P` begins HTTP/2 and goes to the gRPC server once its preface is complete, `K`
//! begins a data connection and goes, with its token, to a lane's owner. Nothing is peeked at in a loop: bytes
//! are read as they come, under one deadline, and the number of connections that have not said yet what they
//! are is capped, so garbage, half a preface and silence cost little and end soon.

use std::{io, sync::Arc, time::Duration};

use kvferry_proto::peer::v1::peer_server::PeerServer;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use super::target::{Target, TargetService};
use crate::{
    domain::{Failure, Reason},
    prefixed::{Prefixed, http2_preface},
    transport::tcp::{PREFACE_BYTES, Preface},
};

/// Control connections that may wait for the gRPC server.
const MAX_OPENING: usize = 256;

/// Control connections that may be open: one for each session, and as many on their way.
const MAX_CONTROL: usize = 2048;

/// A control connection that does not answer pings holds its place no longer than twice this.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// How connections are let in.
#[derive(Clone, Copy, Debug)]
pub struct Admission {
    /// For a connection to say what it is.
    pub timeout: Duration,
    /// Connections that have not said it yet.
    pub unclassified: usize,
}

/// A listening endpoint. Dropped, it stops listening; open sessions end through [`Target`].
#[derive(Debug)]
pub struct Endpoint {
    closing: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Endpoint {
    /// Listens until closed. Nobody is let in before `ready`: they wait, as connections do that the kernel has
    /// accepted and the daemon has not. Must be called within the control runtime.
    pub fn open(
        listener: std::net::TcpListener,
        target: Arc<Target>,
        admission: Admission,
        ready: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::from_std(listener)?;
        let (closing, closed) = watch::channel(false);
        let mut over = closed.clone();
        let task = tokio::spawn(async move {
            let over = async {
                let _ = over.wait_for(|closed| *closed).await;
            };
            let opens = tokio::select! {
                () = ready => true,
                () = over => false,
            };
            if opens {
                serve(listener, target, admission, closed).await;
            }
        });
        Ok(Self { closing, task })
    }

    /// Stops listening and waits until the port is free and all control streams are gone.
    pub async fn close(self) {
        self.closing.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "an endpoint's task did not end well");
        }
    }
}

async fn serve(
    listener: TcpListener,
    target: Arc<Target>,
    admission: Admission,
    mut closed: watch::Receiver<bool>,
) {
    let (control, streams) = mpsc::channel::<io::Result<Prefixed<TcpStream>>>(MAX_OPENING);
    let mut shutdown = closed.clone();
    let service =
        PeerServer::new(TargetService(target.clone())).max_decoding_message_size(super::client::MAX_MESSAGE);
    let mut grpc = tokio::spawn(
        Server::builder()
            .tcp_nodelay(true)
            .max_concurrent_streams(8)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_service(service)
            .serve_with_incoming_shutdown(ReceiverStream::new(streams), async move {
                let _ = shutdown.wait_for(|closed| *closed).await;
            }),
    );
    let room = Arc::new(Semaphore::new(admission.unclassified));
    let control = Control { places: Arc::new(Semaphore::new(MAX_CONTROL)), streams: control };
    let mut newcomers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, from)) => {
                    let Ok(permit) = room.clone().try_acquire_owned() else {
                        target.metrics().unclassified.inc();
                        continue;
                    };
                    let (target, control) = (target.clone(), control.clone());
                    newcomers.spawn(async move {
                        let _permit = permit;
                        if let Err(failure) = classify(stream, &target, &control, admission.timeout).await {
                            target.metrics().handshake_refused(failure.reason);
                            tracing::debug!(%from, %failure, "connection refused");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = newcomers.join_next() => {}
            Ok(()) = closed.changed() => break,
        }
    }
    drop(listener);
    newcomers.shutdown().await;
    drop(control);
    target.sessions_over().await;
    grpc.abort();
    let _ = (&mut grpc).await;
}

async fn classify(
    stream: TcpStream,
    target: &Target,
    control: &Control,
    timeout: Duration,
) -> Result<(), Failure> {
    let broken = |error: io::Error| Failure::io(Reason::ConnectionLost, "reading a preface", &error);
    let silent = |_| Failure::new(Reason::ConnectTimeout, "the connection did not say what it is in time");
    stream.set_nodelay(true).map_err(broken)?;
    match tokio::time::timeout(timeout, first_bytes(stream)).await.map_err(silent)?.map_err(broken)? {
        Opening::Control(stream) => {
            let full = || Failure::new(Reason::Limit, "too many control connections are open");
            let place = control.places.clone().try_acquire_owned().map_err(|_| full())?;
            control.streams.try_send(Ok(Prefixed::new(stream, place))).map_err(|_| full())
        }
        Opening::Lane(bytes, stream) => {
            let preface = Preface::parse(&bytes)?;
            target.attach(&preface, stream.into_std().map_err(broken)?)
        }
        Opening::Unknown(byte) => {
            Err(Failure::new(Reason::HandshakeFailed, format!("a connection began with byte {byte:#04x}")))
        }
    }
}

/// The way of control connections to the gRPC server.
#[derive(Clone)]
struct Control {
    places: Arc<Semaphore>,
    streams: mpsc::Sender<io::Result<Prefixed<TcpStream>>>,
}

enum Opening {
    Control(TcpStream),
    Lane([u8; PREFACE_BYTES], TcpStream),
    Unknown(u8),
}

async fn first_bytes(mut stream: TcpStream) -> io::Result<Opening> {
    match stream.read_u8().await? {
        first @ b'P' => {
            http2_preface(&mut stream, Some(first)).await?;
            Ok(Opening::Control(stream))
        }
        first @ b'K' => {
            let mut bytes = [first; PREFACE_BYTES];
            stream.read_exact(&mut bytes[1..]).await?;
            Ok(Opening::Lane(bytes, stream))
        }
        other => Ok(Opening::Unknown(other)),
    }
}

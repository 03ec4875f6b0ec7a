//! The fd socket: where engines hand over descriptors, which gRPC cannot carry.
//!
//! A Unix stream socket beside the gRPC one (`<socket>.fd`). All numbers are little endian.
//!
//! ```text
//! engine -> daemon   52 bytes, with exactly one descriptor in SCM_RIGHTS
//!    0  magic      4  "KVFD"
//!    4  version    4  1
//!    8  token     32  the engine token of the attach: it, not the connection, says who speaks
//!   40  handle     8  chosen by the engine; a later RegisterRegions names it
//!   48  reserved   4  0
//! daemon -> engine   4 bytes
//!    0  reason     2  number of `kvferry.types.v1.Reason`, 0 when the descriptor was taken
//!    2  reserved   2  0
//! ```
//!
//! Several messages may follow each other on a connection, each within five seconds of the reply before it.
//! After a refusal the connection is closed, and so is every descriptor that came with what was refused. The
//! kernel closes those that did not fit into the buffer for them.
//!
//! What it deliberately does not do: look at the descriptors. Registration does that.

mod message;
#[cfg(test)]
mod tests;

use std::{future::Future, io, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};

use self::message::{Greeting, receive};
use crate::{
    domain::{Failure, Reason},
    memory::FdShelf,
};

/// Finds the shelf of the engine that a token belongs to.
pub type ShelfOf = Arc<dyn Fn(&[u8; 32]) -> Option<Arc<FdShelf>> + Send + Sync>;

/// Whether a process of this user and group may speak here.
pub type Allow = Arc<dyn Fn(u32, u32) -> bool + Send + Sync>;

/// After `accept` failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a client can hold of the daemon's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FdSocketLimits {
    /// Connections served at once; more wait unaccepted.
    pub connections: usize,
    /// How long a message, or the taking of a reply, may take.
    pub silence: Duration,
}

impl Default for FdSocketLimits {
    fn default() -> Self {
        Self { connections: 64, silence: Duration::from_secs(5) }
    }
}

/// The server of the fd socket.
#[derive(Clone)]
pub struct FdSocket {
    shelf_of: ShelfOf,
    allow: Allow,
    limits: FdSocketLimits,
}

impl FdSocket {
    /// A server that asks these two who is who.
    pub fn new(shelf_of: ShelfOf, allow: Allow, limits: FdSocketLimits) -> Self {
        Self { shelf_of, allow, limits }
    }

    /// Serves until `stop` resolves; open connections are closed then.
    pub async fn serve(self, listener: UnixListener, stop: impl Future<Output = ()>) {
        let permits = Arc::new(Semaphore::new(self.limits.connections));
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => return,
                Some(_) = connections.join_next() => continue,
                accepted = accept(&listener, &permits) => accepted,
            };
            match accepted {
                Ok((stream, permit)) => {
                    let server = self.clone();
                    connections.spawn(async move {
                        server.connection(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the fd socket");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(&self, mut stream: UnixStream) {
        loop {
            let served = match timeout(self.limits.silence, self.message(&stream)).await {
                Ok(Ok(Some(()))) => Ok(()),
                // The engine is through.
                Ok(Ok(None)) => return,
                Ok(Err(failure)) => Err(failure),
                Err(_) => Err(Failure::new(Reason::Deadline, "no whole message in time")),
            };
            let number = served.as_ref().map_or_else(|failure| failure.reason as u16, |()| 0);
            let [low, high] = number.to_le_bytes();
            let replied = timeout(self.limits.silence, stream.write_all(&[low, high, 0, 0])).await;
            if let Err(failure) = served {
                tracing::info!(%failure, "a message on the fd socket was refused");
                return;
            }
            if !matches!(replied, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// Takes one message; nothing where the connection ended before one began.
    async fn message(&self, stream: &UnixStream) -> Result<Option<()>, Failure> {
        let credentials =
            stream.peer_cred().map_err(|error| Failure::io(Reason::Driver, "SO_PEERCRED", &error))?;
        if !(self.allow)(credentials.uid(), credentials.gid()) {
            let message = format!("user {} may not speak here", credentials.uid());
            return Err(Failure::new(Reason::Unauthorised, message));
        }
        let Some((bytes, fd)) = receive(stream).await? else { return Ok(None) };
        let Greeting { token, handle } = Greeting::parse(&bytes)?;
        let shelf = (self.shelf_of)(&token)
            .ok_or_else(|| Failure::new(Reason::Unauthorised, "the token belongs to no engine"))?;
        shelf.put(handle, fd)?;
        Ok(Some(()))
    }
}

/// A place first, then the connection: what cannot be served stays in the kernel's queue.
async fn accept(
    listener: &UnixListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

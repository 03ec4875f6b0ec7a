//! Questions to a daemon that need no attachment.

use std::{
    fmt,
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use kvferry_proto::engine::v1::{self as wire, engine_client::EngineClient};
use tonic::{Response, Status, transport::Channel};

use crate::{Error, connection, error::NoReply, fork::Owned, links::Link};

/// A daemon answers such questions from memory.
const PATIENCE: Duration = Duration::from_secs(5);

/// Read-only questions to a daemon, no attachment needed: what `kvferry status` shows. Its methods block, and
/// panic inside an async context.
pub struct Node {
    socket: PathBuf,
    link: Owned<Link>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Node {
    /// Finds out whether somebody listens at the daemon's engine socket.
    ///
    /// # Errors
    /// [`Error::NoDaemon`] says what is there instead.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let link = Link::new(socket, 0)?;
        link.block_on(connection::open(socket))?;
        Ok(Self { socket: socket.to_owned(), link: Owned::new(link) })
    }

    /// Who the daemon is.
    ///
    /// # Errors
    /// [`Error::NoDaemon`], or [`Error::Timeout`] after 5 s.
    pub fn info(&self) -> Result<wire::NodeInfo, Error> {
        self.ask("GetNode", async |mut client| client.get_node(wire::GetNodeRequest {}).await)
    }

    /// The engines attached to it.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    pub fn engines(&self) -> Result<Vec<wire::EngineInfo>, Error> {
        self.ask("ListEngines", async |mut client| client.list_engines(wire::ListEnginesRequest {}).await)
            .map(|reply| reply.engines)
    }

    /// Their sessions, inbound ones included.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    pub fn sessions(&self) -> Result<Vec<wire::SessionInfo>, Error> {
        self.ask("ListSessions", async |mut client| client.list_sessions(wire::ListSessionsRequest {}).await)
            .map(|reply| reply.sessions)
    }

    fn ask<T, F>(
        &self,
        call: &'static str,
        question: impl FnOnce(EngineClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let link = self.link.get()?;
        let client = connection::client(link.channel.clone());
        let reply = link.block_on(async { tokio::time::timeout(PATIENCE, question(client)).await });
        match reply.map_err(|_| Error::Timeout(PATIENCE))? {
            Ok(reply) => Ok(reply.into_inner()),
            Err(status) => Err(match NoReply::from_status(call, &status) {
                NoReply::Answered(error) => error,
                NoReply::Lost(_, cause) => Error::NoDaemon { path: self.socket.clone(), cause },
            }),
        }
    }
}

//! The gRPC service: each call says who calls, then goes to the part that carries it out.

use std::{path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use kvferry_proto::{TOKEN_METADATA, engine::v1 as wire, engine::v1::engine_server::Engine as EngineApi};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming, transport::server::UdsConnectInfo};

use super::{
    attach, convert, refusal::status, regions, revoke, status as tables, transfers, transfers::Patience,
};
use crate::{
    domain::{BootId, Failure, Reason},
    engine::{Caller, Engine, Node},
};

/// The service of one node.
#[derive(Clone, Debug)]
pub struct EngineService {
    pub(super) node: Arc<Node>,
    pub(super) fd_socket: PathBuf,
    pub(super) admin: String,
}

type Reply<T> = Result<Response<T>, Status>;
type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl EngineService {
    /// Serves this node. `fd_socket` and `admin` are told to those who ask.
    pub fn new(node: Arc<Node>, fd_socket: PathBuf, admin: String) -> Self {
        Self { node, fd_socket, admin }
    }

    /// Who calls, by its token.
    fn engine<T>(&self, request: &Request<T>) -> Result<Arc<Engine>, Status> {
        let refused = |what: &str| status(&Failure::new(Reason::Unauthorised, what.to_owned()));
        let token = request.metadata().get_bin(TOKEN_METADATA).ok_or_else(|| refused("no engine token"))?;
        let token = token.to_bytes().map_err(|_| refused("the engine token is malformed"))?;
        self.node.by_token(&token).ok_or_else(|| refused("no engine with this token is attached"))
    }
}

/// Whom the kernel says is at the other end.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let credentials = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    let credentials = credentials
        .ok_or_else(|| status(&Failure::new(Reason::Unauthorised, "the kernel does not say who calls")))?;
    let pid = credentials.pid().filter(|pid| *pid > 0);
    Ok(Caller { pid, uid: credentials.uid(), gid: credentials.gid() })
}

#[tonic::async_trait]
impl EngineApi for EngineService {
    type AttachStream = Replies<wire::EngineEvent>;
    type TransferStreamStream = Replies<wire::TransferReply>;

    async fn attach(&self, request: Request<wire::AttachRequest>) -> Reply<Self::AttachStream> {
        let caller = caller(&request)?;
        attach::attach(self, request.into_inner(), caller).await.map(Response::new)
    }

    async fn register_regions(
        &self,
        request: Request<wire::RegisterRegionsRequest>,
    ) -> Reply<wire::RegisterRegionsReply> {
        let engine = self.engine(&request)?;
        Ok(Response::new(regions::register(&engine, request.into_inner()).await))
    }

    async fn unregister_regions(
        &self,
        request: Request<wire::UnregisterRegionsRequest>,
    ) -> Reply<wire::SettleReply> {
        let engine = self.engine(&request)?;
        let settle = self.node.resources.config.fence.settle();
        Ok(Response::new(regions::unregister(&engine, request.into_inner(), settle).await))
    }

    async fn offer_assistant(
        &self,
        request: Request<wire::OfferAssistantRequest>,
    ) -> Reply<wire::OfferAssistantReply> {
        let engine = self.engine(&request)?;
        Ok(Response::new(regions::take_assistant(&engine, request.into_inner()).await))
    }

    async fn transfer(&self, request: Request<wire::TransferRequest>) -> Reply<wire::TransferReply> {
        let engine = self.engine(&request)?;
        transfers::transfer(&self.node, &engine, request.into_inner()).await.map(Response::new)
    }

    async fn transfer_stream(
        &self,
        request: Request<Streaming<wire::TransferRequest>>,
    ) -> Reply<Self::TransferStreamStream> {
        let engine = self.engine(&request)?;
        let replies = transfers::stream(self.node.clone(), engine, request.into_inner());
        Ok(Response::new(Box::pin(replies)))
    }

    async fn wait(&self, request: Request<wire::WaitRequest>) -> Reply<wire::TransferReply> {
        let engine = self.engine(&request)?;
        let request = request.into_inner();
        let boot = BootId(crate::convert::bytes("boot_id", &request.boot_id)?);
        let id = convert::transfer_id("transfer_id", &request.transfer_id)?;
        if boot != self.node.resources.boot {
            let report = transfers::of_an_earlier_boot(&engine, id).map_err(|failure| status(&failure))?;
            return Ok(Response::new(convert::report(&report)));
        }
        let verdict = engine.find(&self.node, id).map_err(|failure| status(&failure))?;
        let limit = (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms));
        let report = transfers::ended(verdict, Patience::End(limit)).await;
        report.map(|report| Response::new(convert::report(&report))).map_err(|failure| status(&failure))
    }

    async fn cancel(&self, request: Request<wire::CancelRequest>) -> Reply<wire::SettleReply> {
        let engine = self.engine(&request)?;
        let id = convert::transfer_id("transfer_id", &request.get_ref().transfer_id)?;
        let settle = self.node.resources.config.fence.settle();
        let reply = match engine.cancel(&self.node, id, settle).await {
            Ok(settled) => regions::settled(settled),
            Err(failure) => regions::not_applied(&failure),
        };
        Ok(Response::new(reply))
    }

    async fn revoke(&self, request: Request<wire::RevokeRequest>) -> Reply<wire::SettleReply> {
        let engine = self.engine(&request)?;
        let settle = self.node.resources.config.fence.settle();
        Ok(Response::new(revoke::ranges(&engine, request.into_inner(), settle).await))
    }

    async fn revoke_tag(&self, request: Request<wire::RevokeTagRequest>) -> Reply<wire::SettleReply> {
        let engine = self.engine(&request)?;
        let settle = self.node.resources.config.fence.settle();
        Ok(Response::new(revoke::tag(&engine, request.into_inner(), settle).await))
    }

    async fn probe(&self, request: Request<wire::ProbeRequest>) -> Reply<wire::ProbeReply> {
        let engine = self.engine(&request)?;
        let request = request.into_inner();
        let session = convert::session_id(request.session_id)?;
        let limit = Duration::from_millis(if request.timeout_ms == 0 { 5000 } else { request.timeout_ms });
        let probe = engine.probe(&session, limit).await.map_err(|failure| status(&failure))?;
        Ok(Response::new(tables::probe(&probe)))
    }

    async fn reset_session(
        &self,
        request: Request<wire::ResetSessionRequest>,
    ) -> Reply<wire::ResetSessionReply> {
        let engine = self.engine(&request)?;
        let session = convert::session_id(request.into_inner().session_id)?;
        let failure = engine.reset(&session).await.err();
        Ok(Response::new(wire::ResetSessionReply { failure: failure.as_ref().map(Into::into) }))
    }

    async fn get_node(&self, _: Request<wire::GetNodeRequest>) -> Reply<wire::NodeInfo> {
        Ok(Response::new(tables::node(&self.node, &self.admin)))
    }

    async fn list_engines(&self, _: Request<wire::ListEnginesRequest>) -> Reply<wire::ListEnginesReply> {
        let engines = self.node.engines_by_id().iter().map(|engine| tables::engine(engine)).collect();
        Ok(Response::new(wire::ListEnginesReply { engines }))
    }

    async fn list_regions(
        &self,
        request: Request<wire::ListRegionsRequest>,
    ) -> Reply<wire::ListRegionsReply> {
        let engine = match request.get_ref().engine_id {
            0 => self.engine(&request)?,
            id => {
                let mut engines = self.node.engines_by_id().into_iter();
                engines.find(|engine| engine.id.0 == id).ok_or_else(|| {
                    status(&Failure::new(
                        Reason::BadArgument,
                        format!("engine_id: no engine {id} is attached"),
                    ))
                })?
            }
        };
        Ok(Response::new(tables::regions(&engine)))
    }

    async fn list_sessions(&self, _: Request<wire::ListSessionsRequest>) -> Reply<wire::ListSessionsReply> {
        let mut sessions = Vec::new();
        for engine in self.node.engines_by_id() {
            sessions.extend(tables::sessions(&engine).await);
        }
        Ok(Response::new(wire::ListSessionsReply { sessions }))
    }
}

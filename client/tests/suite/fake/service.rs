//! The fake's gRPC service.

use std::{pin::Pin, sync::Arc};

use kvferry_proto::{
    REASON_METADATA, TOKEN_METADATA,
    engine::v1::{self as wire, engine_server::Engine},
    types::v1 as types,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use super::{Answer, First, SESSION, Shared, State};

#[derive(Clone)]
pub(super) struct Service {
    pub(super) shared: Arc<Shared>,
    pub(super) first: First,
}

fn token<T>(request: &Request<T>) -> Option<Vec<u8>> {
    request.metadata().get_bin(TOKEN_METADATA).map(|token| token.to_bytes().unwrap().to_vec())
}

fn status(code: Code, reason: Option<i32>) -> Status {
    let mut metadata = MetadataMap::new();
    if let Some(reason) = reason {
        metadata.insert(REASON_METADATA, reason.to_string().parse().unwrap());
    }
    Status::with_metadata(code, "as told", metadata)
}

impl Service {
    /// Notes the call, then answers as told: `Ok` with the failure to put into the reply, if any.
    async fn told<T>(
        &self,
        call: &'static str,
        request: Request<T>,
        note: impl FnOnce(&mut State, &T),
    ) -> Result<(T, Option<types::Failure>), Status> {
        let token = token(&request);
        let message = request.into_inner();
        let failure = self.answer(call, token, |state| note(state, &message)).await?;
        Ok((message, failure))
    }

    /// As `told`, for what came with another call.
    async fn answer(
        &self,
        call: &'static str,
        token: Option<Vec<u8>>,
        note: impl FnOnce(&mut State),
    ) -> Result<Option<types::Failure>, Status> {
        let now = self.shared.update(|state| {
            state.calls.push((call, token));
            note(state);
            state.answer.clone()
        });
        let answer = if matches!(now, Answer::Later) { self.shared.answer().await } else { now };
        match answer {
            Answer::Later | Answer::Good | Answer::Outcome(_) => Ok(None),
            Answer::Failure(failure) => Ok(Some(failure)),
            Answer::Status(code, reason) => Err(status(code, reason)),
            Answer::Nothing => std::future::pending().await,
        }
    }

    /// The transfers of one stream, one after the other; each counts as a call.
    async fn serve(
        self,
        mut messages: tonic::Streaming<wire::TransferRequest>,
        token: Option<Vec<u8>>,
        replies: mpsc::Sender<Result<wire::TransferReply, Status>>,
    ) {
        let mut slices = 0;
        while let Some(Ok(message)) = messages.next().await {
            slices += message.slices.as_ref().map_or(0, |slices| slices.local.len() as u64);
            let (id, more) = (message.transfer_id.clone(), message.more);
            self.shared.update(|state| state.transfers.push(message));
            if more {
                continue;
            }
            let told = self.answer("TransferStream", token.clone(), |_| {}).await;
            let reply = told.map(|failure| self.reply(id, std::mem::take(&mut slices), failure));
            let other = self.reply(vec![0xee; 16], 0, None);
            for reply in [Ok(other), reply] {
                if replies.send(reply).await.is_err() {
                    return;
                }
            }
        }
    }

    fn revoked(&self, failure: Option<types::Failure>) -> Response<wire::SettleReply> {
        let epoch = self.shared.update(|state| {
            state.epoch += 1;
            state.epoch
        });
        settled(failure).map(|reply| wire::SettleReply { epoch, ..reply })
    }

    fn reply(&self, id: Vec<u8>, slices: u64, failure: Option<types::Failure>) -> wire::TransferReply {
        let outcome = match self.shared.update(|state| state.answer.clone()) {
            Answer::Outcome(outcome) => outcome,
            _ if failure.is_some() => wire::Outcome::Failed,
            _ => wire::Outcome::Done,
        };
        let done = if outcome == wire::Outcome::Done { slices } else { 0 };
        let sent = failure.is_none();
        wire::TransferReply {
            transfer_id: id,
            outcome: outcome.into(),
            peer_half: wire::PeerHalf::Confirmed.into(),
            failure,
            slices,
            slices_done: done,
            bytes: slices * 100,
            bytes_done: done * 100,
            attempts: 0,
            known_target: self.shared.update(|state| {
                state.replies += 1;
                state.known_target.clone()
            }),
            path: if sent { types::Path::Tcp } else { types::Path::Unspecified }.into(),
            timings: Some(wire::Timings { total_us: 10, ..Default::default() }),
            ..Default::default()
        }
    }
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Engine for Service {
    type AttachStream = Streamed<wire::EngineEvent>;
    type TransferStreamStream = Streamed<wire::TransferReply>;

    async fn attach(
        &self,
        request: Request<wire::AttachRequest>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (sender, events) = mpsc::channel(4096);
        match self.first.clone() {
            First::Attached(attached) => {
                let event = Some(wire::engine_event::Event::Attached(*attached));
                sender.try_send(Ok(wire::EngineEvent { event })).unwrap();
            }
            First::Other(event) => sender.try_send(Ok(*event)).unwrap(),
            First::Ends => return Ok(Response::new(Box::pin(tokio_stream::empty()))),
            First::Silence => {}
            First::Status(code, reason) => return Err(status(code, reason)),
        }
        self.shared.update(|state| {
            state.attached = Some(request.into_inner());
            state.attaches += 1;
            state.lease = Some(sender);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn register_regions(
        &self,
        request: Request<wire::RegisterRegionsRequest>,
    ) -> Result<Response<wire::RegisterRegionsReply>, Status> {
        let (message, failure) = self
            .told("RegisterRegions", request, |state, message| state.registered.push(message.clone()))
            .await?;
        let (begin, refused) = self.shared.update(|state| {
            let begin = state.first_region;
            state.first_region += message.regions.len() as u32;
            (begin, state.refused_base)
        });
        let at = message.regions.iter().position(|spec| Some(spec.base) == refused);
        let failure = failure.or(at.map(|at| types::Failure {
            reason: types::Reason::UnsupportedMemory.into(),
            index: Some(at as u64),
            ..Default::default()
        }));
        let region = |(index, spec): (usize, wire::RegionSpec)| types::Region {
            id: begin + index as u32 + 1,
            generation: 1,
            base: spec.base,
            length: spec.length,
            kind: types::MemoryKind::SharedFd.into(),
        };
        let regions = match failure {
            None => message.regions.into_iter().enumerate().map(region).collect(),
            Some(_) => Vec::new(),
        };
        Ok(Response::new(wire::RegisterRegionsReply { regions, failure, ..Default::default() }))
    }

    async fn unregister_regions(
        &self,
        request: Request<wire::UnregisterRegionsRequest>,
    ) -> Result<Response<wire::SettleReply>, Status> {
        self.told("UnregisterRegions", request, |state, message| state.unregistered.push(message.clone()))
            .await
            .map(|(_, failure)| settled(failure))
    }

    async fn offer_assistant(
        &self,
        request: Request<wire::OfferAssistantRequest>,
    ) -> Result<Response<wire::OfferAssistantReply>, Status> {
        self.told("OfferAssistant", request, |_, _| {})
            .await
            .map(|(_, failure)| Response::new(wire::OfferAssistantReply { failure }))
    }

    async fn transfer(
        &self,
        request: Request<wire::TransferRequest>,
    ) -> Result<Response<wire::TransferReply>, Status> {
        let (message, failure) =
            self.told("Transfer", request, |state, message| state.transfers.push(message.clone())).await?;
        let slices = message.slices.map_or(0, |slices| slices.local.len() as u64);
        Ok(Response::new(self.reply(message.transfer_id, slices, failure)))
    }

    async fn transfer_stream(
        &self,
        request: Request<tonic::Streaming<wire::TransferRequest>>,
    ) -> Result<Response<Self::TransferStreamStream>, Status> {
        let (replies, outgoing) = mpsc::channel(16);
        let token = token(&request);
        self.shared.update(|state| state.streams += 1);
        tokio::spawn(self.clone().serve(request.into_inner(), token, replies));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn wait(
        &self,
        request: Request<wire::WaitRequest>,
    ) -> Result<Response<wire::TransferReply>, Status> {
        let (message, failure) =
            self.told("Wait", request, |state, message| state.waits.push(message.clone())).await?;
        Ok(Response::new(self.reply(message.transfer_id, 1, failure)))
    }

    async fn cancel(
        &self,
        request: Request<wire::CancelRequest>,
    ) -> Result<Response<wire::SettleReply>, Status> {
        let unknown = self.shared.update(|state| {
            let unknown = state.unknown_cancels > 0;
            state.unknown_cancels -= u32::from(unknown);
            unknown
        });
        if unknown {
            return Err(status(Code::InvalidArgument, Some(types::Reason::BadArgument.into())));
        }
        self.told("Cancel", request, |state, message| state.cancels.push(message.transfer_id.clone()))
            .await
            .map(|(_, failure)| settled(failure))
    }

    async fn probe(
        &self,
        request: Request<wire::ProbeRequest>,
    ) -> Result<Response<wire::ProbeReply>, Status> {
        let (_, failure) = self.told("Probe", request, |_, _| {}).await?;
        let path = types::Path::Tcp.into();
        Ok(Response::new(wire::ProbeReply { alive: failure.is_none(), failure, path, round_trip_us: 250 }))
    }

    async fn reset_session(
        &self,
        request: Request<wire::ResetSessionRequest>,
    ) -> Result<Response<wire::ResetSessionReply>, Status> {
        let (_, failure) = self.told("ResetSession", request, |_, _| {}).await?;
        Ok(Response::new(wire::ResetSessionReply { failure }))
    }

    async fn get_node(&self, _: Request<wire::GetNodeRequest>) -> Result<Response<wire::NodeInfo>, Status> {
        Ok(Response::new(wire::NodeInfo { node_id: "fake".into(), ..Default::default() }))
    }

    async fn list_engines(
        &self,
        _: Request<wire::ListEnginesRequest>,
    ) -> Result<Response<wire::ListEnginesReply>, Status> {
        let engines = vec![wire::EngineInfo { engine_id: 7, ..Default::default() }];
        Ok(Response::new(wire::ListEnginesReply { engines }))
    }

    async fn list_sessions(
        &self,
        _: Request<wire::ListSessionsRequest>,
    ) -> Result<Response<wire::ListSessionsReply>, Status> {
        let sessions = vec![wire::SessionInfo { session_id: SESSION.into(), ..Default::default() }];
        Ok(Response::new(wire::ListSessionsReply { sessions }))
    }

    async fn list_regions(
        &self,
        _: Request<wire::ListRegionsRequest>,
    ) -> Result<Response<wire::ListRegionsReply>, Status> {
        Err(Status::unimplemented("the client library does not ask this"))
    }

    async fn revoke(
        &self,
        request: Request<wire::RevokeRequest>,
    ) -> Result<Response<wire::SettleReply>, Status> {
        self.told("Revoke", request, |_, _| {}).await.map(|(_, failure)| self.revoked(failure))
    }

    async fn revoke_tag(
        &self,
        request: Request<wire::RevokeTagRequest>,
    ) -> Result<Response<wire::SettleReply>, Status> {
        self.told("RevokeTag", request, |_, _| {}).await.map(|(_, failure)| self.revoked(failure))
    }
}

fn settled(failure: Option<types::Failure>) -> Response<wire::SettleReply> {
    Response::new(wire::SettleReply {
        settlement: wire::Settlement::Settled.into(),
        failure,
        ..Default::default()
    })
}

//! The target's end of the control stream: proves who comes, then serves what the initiator asks.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ed25519_dalek::SigningKey;
use kvferry_proto::peer::v1::{
    self as wire, peer_server::Peer, to_initiator::Message as ToInitiator,
    to_target::Message as FromInitiator,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{client, context::Timing, convert, life::Life};
use crate::{
    convert::bytes,
    domain::{BootId, Epoch, Failure, Incarnation, LaneId, Reason, TransferId},
    session::{
        identity::{self, Challenge, Open, PROTOCOL, Role, Transcript},
        inbound::{Inbound, InboundSession},
        secret::Secret,
    },
    telemetry::Metrics,
    transport::tcp::Preface,
};

/// Messages to an initiator that may wait for the network.
const OUTGOING: usize = 256;

/// Fences and stops of one session under way at once.
const MAX_JOBS: usize = 4096;

/// Who an endpoint is, and under which terms it takes sessions.
#[derive(Debug)]
pub struct Terms {
    /// This daemon's run.
    pub boot: BootId,
    /// The engine's key: proves who is here.
    pub key: SigningKey,
    /// What this daemon can do.
    pub capabilities: Vec<String>,
    /// What initiators' daemons must know too, if anything.
    pub secret: Option<Secret>,
    /// Beats.
    pub timing: Timing,
    /// For a handshake.
    pub handshake: Duration,
}

/// What an endpoint is the target of.
#[derive(Debug)]
pub struct Target {
    terms: Terms,
    /// Its sessions.
    inbound: Arc<Inbound>,
    /// Set once: sessions end with this, and no new one is taken.
    closing: watch::Sender<Option<Failure>>,
    metrics: Arc<Metrics>,
}

impl Target {
    /// Takes sessions from now on.
    pub fn new(terms: Terms, inbound: Arc<Inbound>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { terms, inbound, closing: watch::Sender::new(None), metrics })
    }

    /// Ends all sessions with this failure; peers are told.
    pub fn close(&self, failure: Failure) {
        self.closing.send_replace(Some(failure));
    }

    /// Waits until no session's task is left.
    pub(super) async fn sessions_over(&self) {
        self.closing.closed().await;
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) fn attach(&self, preface: &Preface, stream: std::net::TcpStream) -> Result<(), Failure> {
        self.inbound.attach(preface, stream)
    }
}

/// The gRPC face of a [`Target`].
#[derive(Clone, Debug)]
pub(super) struct TargetService(pub(super) Arc<Target>);

#[tonic::async_trait]
impl Peer for TargetService {
    type SessionStream = ReceiverStream<Result<wire::ToInitiator, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<wire::ToTarget>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (to_initiator, outgoing) = mpsc::channel(OUTGOING);
        let conversation = Conversation {
            target: self.0.clone(),
            from_initiator: request.into_inner(),
            to_initiator,
            closing: self.0.closing.subscribe(),
            news: self.0.inbound.memory().revocations().news(),
            told: Epoch(0),
        };
        // Owned by the endpoint: `sessions_over` waits for the `closing` receivers these tasks hold.
        tokio::spawn(conversation.run());
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

struct Conversation {
    target: Arc<Target>,
    from_initiator: Streaming<wire::ToTarget>,
    to_initiator: mpsc::Sender<Result<wire::ToInitiator, Status>>,
    closing: watch::Receiver<Option<Failure>>,
    /// The endpoint's newest revocation, and the newest that this initiator was told.
    news: watch::Receiver<Epoch>,
    told: Epoch,
}

impl Conversation {
    async fn run(mut self) {
        let silent = |_| Err(Failure::new(Reason::ConnectTimeout, "the handshake was not completed in time"));
        let handshake = self.target.terms.handshake;
        let met = tokio::time::timeout(handshake, self.shake_hands()).await.unwrap_or_else(silent);
        match met {
            Ok(session) => {
                let failure = self.serve(&session).await;
                self.target.inbound.fence_all(&session, &failure).await;
                self.say(ToInitiator::Bye(wire::Bye { failure: Some((&failure).into()) })).await.ok();
                tracing::info!(initiator = session.label(), cause = %failure, "inbound session ended");
            }
            Err(failure) => {
                self.target.metrics.handshake_refused(failure.reason);
                tracing::warn!(%failure, "a session was refused");
                self.say(ToInitiator::Refused(convert::refused(&failure))).await.ok();
            }
        }
    }

    /// Nothing is fenced before Confirm has proven who comes.
    async fn shake_hands(&mut self) -> Result<Arc<InboundSession>, Failure> {
        if let Some(failure) = self.closing.borrow().clone() {
            return Err(failure);
        }
        let FromInitiator::Open(open) = self.hear().await? else { return Err(out_of_turn("Open")) };
        let open = convert::open_in(open)?;
        self.prove(&open).await?;
        let checksums = identity::checksums(&open.capabilities, &self.target.terms.capabilities);
        let inbound = &self.target.inbound;
        let (session, fenced) = inbound.confirm(open.incarnation, open.session_id, checksums).await?;
        let fenced = fenced.iter().map(|(lane, record)| convert::fenced_out(*lane, record)).collect();
        let revoked = self.target.inbound.memory().revocations().since(Epoch(0));
        self.told = revoked.epoch;
        let revocations = Some(convert::revocations_out(revoked));
        self.say(ToInitiator::Accept(wire::Accept { fenced, revocations })).await?;
        let FromInitiator::Ready(_) = self.hear().await? else { return Err(out_of_turn("Ready")) };
        session.ready();
        let table = convert::table_out(&self.target.inbound.memory().view(), 0);
        self.say(ToInitiator::Welcome(wire::Welcome { table: Some(table) })).await?;
        tracing::info!(initiator = session.label(), "inbound session open");
        Ok(session)
    }

    /// Challenge and Confirm.
    async fn prove(&mut self, open: &Open) -> Result<(), Failure> {
        let own = identity::incarnation(&self.target.terms.key);
        if let Some(expected) = open.expected.filter(|expected| *expected != own) {
            let message = format!("engine {own} lives here, not {expected}");
            return Err(Failure::new(Reason::PeerRestarted, message));
        }
        let challenge = Challenge {
            protocol: PROTOCOL.agree(open.protocol)?,
            nonce: Incarnation::random().0,
            boot: self.target.terms.boot,
            incarnation: own,
            capabilities: self.target.terms.capabilities.clone(),
        };
        let transcript = Transcript::new(open, &challenge);
        let signature = transcript.sign(Role::Target, &self.target.terms.key);
        let target = self.target.clone();
        let secret = target.terms.secret.as_ref();
        let proof = secret.map_or_else(Vec::new, |secret| secret.prove(Role::Target, &transcript).to_vec());
        self.say(ToInitiator::Challenge(convert::challenge_out(&challenge, &signature, proof))).await?;
        let FromInitiator::Confirm(confirm) = self.hear().await? else { return Err(out_of_turn("Confirm")) };
        transcript.verify(Role::Initiator, &open.incarnation, &confirm.signature)?;
        secret.map_or(Ok(()), |secret| secret.verify(Role::Initiator, &transcript, &confirm.proof))
    }

    /// Until the stream ends; returns why it did.
    async fn serve(&mut self, session: &Arc<InboundSession>) -> Failure {
        let mut changes = self.target.inbound.memory().changes();
        let closing = self.closing.clone();
        let mut jobs = JoinSet::new();
        let timing = self.target.terms.timing;
        let mut beat = tokio::time::interval(timing.heartbeat);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut life = Life::new();
        let (mut planned_beat, mut sequence) = (Instant::now(), 0);
        loop {
            let judge_at = life.judge_at(&timing);
            let step = tokio::select! {
                heard = self.from_initiator.message() => {
                    life.heard_now();
                    match heard {
                        Ok(Some(message)) => self.answer(message, session, &mut jobs),
                        Ok(None) => Err(Failure::plain(Reason::ConnectionLost)),
                        Err(status) => Err(client::lost(&status)),
                    }
                }
                Ok(()) = changes.changed() => {
                    let table = convert::table_out(&self.target.inbound.memory().view(), 0);
                    self.say(ToInitiator::Table(table)).await
                }
                Ok(()) = self.news.changed() => self.tell_revocations().await,
                _ = beat.tick() => {
                    let overslept = Life::overslept(planned_beat);
                    // From now, not from when this one was due: a sleep is slept once.
                    planned_beat = Instant::now() + timing.heartbeat;
                    sequence += 1;
                    self.beat(sequence);
                    life.judge(session.pulse(), overslept, &timing)
                }
                () = tokio::time::sleep_until(judge_at.into()) => {
                    life.judge(session.pulse(), Life::overslept(judge_at), &timing)
                }
                Some(_) = jobs.join_next() => Ok(()),
                () = session.superseded() => Err(self.superseded()),
                failure = closed(closing.clone()) => Err(failure),
            };
            if let Err(failure) = step {
                return failure;
            }
        }
    }

    /// A newer session has taken its place, or all sessions end: then the peer hears why.
    fn superseded(&self) -> Failure {
        let closing = self.closing.borrow().clone();
        closing.unwrap_or_else(|| Failure::new(Reason::ConnectionLost, "superseded by a newer session"))
    }

    /// So that transfers which are hit end at once. The proof does not need it: the gate refuses their parts.
    async fn tell_revocations(&mut self) -> Result<(), Failure> {
        let news = self.target.inbound.memory().revocations().since(self.told);
        if std::mem::replace(&mut self.told, news.epoch) == news.epoch {
            return Ok(());
        }
        for revoked in convert::revoked_out(news) {
            self.say(ToInitiator::Revoked(revoked)).await?;
        }
        Ok(())
    }

    fn beat(&self, sequence: u64) {
        let message = ToInitiator::Beat(wire::Beat { sequence });
        // A full queue is a peer that does not read: it will be judged silent.
        let _ = self.to_initiator.try_send(Ok(wire::ToInitiator { message: Some(message) }));
    }

    /// Answers at once, or in a job where the answer waits for a lane's owner or the gate.
    fn answer(
        &self,
        message: wire::ToTarget,
        session: &Arc<InboundSession>,
        jobs: &mut JoinSet<()>,
    ) -> Result<(), Failure> {
        // A kind of message this version does not know is passed over.
        let Some(message) = message.message else { return Ok(()) };
        if jobs.len() >= MAX_JOBS {
            return Err(Failure::new(Reason::Limit, "too many fences and stops at once"));
        }
        let (inbound, session) = (self.target.inbound.clone(), session.clone());
        let reply = self.to_initiator.clone();
        let send = move |message| async move {
            let _ = reply.send(Ok(wire::ToInitiator { message: Some(message) })).await;
        };
        match message {
            // tcp and local need nobody's word: what is refused here does not get through, seen or not.
            FromInitiator::Beat(_) | FromInitiator::RevocationsSeen(_) => {}
            FromInitiator::LaneRequest(request) => {
                let lane = LaneId(request.lane_id);
                let kind = convert::kind_in(request.kind);
                let granted =
                    kind.map_err(Failure::from).and_then(|kind| inbound.grant(&session, lane, kind));
                let grant = match granted {
                    Ok(token) => wire::LaneGrant { lane_id: lane.0, token: token.to_vec(), failure: None },
                    Err(failure) => {
                        wire::LaneGrant { lane_id: lane.0, token: vec![], failure: Some((&failure).into()) }
                    }
                };
                jobs.spawn(send(ToInitiator::LaneGrant(grant)));
            }
            FromInitiator::FenceLane(fence) => {
                jobs.spawn(async move {
                    let lane = LaneId(fence.lane_id);
                    let cause = Failure::new(Reason::ConnectionLost, "fenced by the initiator");
                    let record = inbound.fence_lane(&session, lane, &cause).await;
                    send(ToInitiator::LaneFenced(convert::fenced_out(lane, &record))).await;
                });
            }
            FromInitiator::Stop(stop) => {
                let transfer = TransferId(bytes("stop.transfer_id", &stop.transfer_id)?);
                let marks: Vec<_> =
                    stop.marks.iter().map(|mark| (LaneId(mark.lane_id), mark.sequence)).collect();
                session.stops().mark(transfer, &marks);
                let version = inbound.memory().gate().raise();
                jobs.spawn(async move {
                    inbound.memory().gate().quiet(version).await;
                    send(ToInitiator::Stopped(wire::Stopped { transfer_id: transfer.0.to_vec() })).await;
                });
            }
            FromInitiator::TableRequest(request) => {
                let table = convert::table_out(&inbound.memory().view(), request.nonce);
                jobs.spawn(send(ToInitiator::Table(table)));
            }
            FromInitiator::Bye(bye) => return Err(convert::told(bye.failure)),
            FromInitiator::Open(_) | FromInitiator::Confirm(_) | FromInitiator::Ready(_) => {
                return Err(out_of_turn("a request"));
            }
        }
        Ok(())
    }

    async fn hear(&mut self) -> Result<FromInitiator, Failure> {
        loop {
            let message = self.from_initiator.message().await.map_err(|status| client::lost(&status))?;
            let message = message.ok_or_else(|| Failure::plain(Reason::ConnectionLost))?;
            if let Some(message) = message.message {
                return Ok(message);
            }
        }
    }

    /// An initiator that takes no message for the silence limit is gone.
    async fn say(&self, message: ToInitiator) -> Result<(), Failure> {
        let message = Ok(wire::ToInitiator { message: Some(message) });
        match tokio::time::timeout(self.target.terms.timing.silence, self.to_initiator.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Failure::plain(Reason::ConnectionLost)),
            Err(_) => Err(Failure::plain(Reason::PeerSilent)),
        }
    }
}

/// Resolves when the endpoint closes; says why.
async fn closed(mut closing: watch::Receiver<Option<Failure>>) -> Failure {
    let why = closing.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
    why.unwrap_or_else(|| Failure::plain(Reason::EngineGone))
}

fn out_of_turn(expected: &str) -> Failure {
    Failure::new(
        Reason::HandshakeFailed,
        format!("the initiator said something else where {expected} was due"),
    )
}

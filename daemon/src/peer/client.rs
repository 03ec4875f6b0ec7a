//! The initiator's end of the control stream: dial, shake hands, then pass messages on.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ed25519_dalek::SigningKey;
use hyper_util::rt::TokioIo;
use kvferry_proto::peer::v1::{
    self as wire, peer_client::PeerClient, to_initiator::Message as FromTarget,
    to_target::Message as ToTarget,
};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{Resolver, convert};
use crate::{
    domain::{BootId, Failure, Incarnation, PathKind, Reason, SessionId},
    policy::{RouteQuery, route},
    session::{
        identity::{self, Challenge, Open, PROTOCOL, Role, Transcript},
        outbound::Opened,
        secret::Secret,
    },
};

/// Messages to the target that may wait for the network.
const OUTGOING: usize = 256;

/// Who dials whom.
#[derive(Debug)]
pub struct Dial<'a> {
    /// The target's endpoint.
    pub target: &'a SessionId,
    /// The initiator engine's key.
    pub key: &'a SigningKey,
    /// This daemon's run.
    pub boot: BootId,
    /// The initiator engine's own endpoint.
    pub own: &'a SessionId,
    /// Who must be there, if anybody was met there before.
    pub expected: Option<Incarnation>,
    /// Paths allowed, best first.
    pub allowed: &'a [PathKind],
    /// Payload on tcp is to be summed, where the target can.
    pub checksum: bool,
    /// What the target's daemon must know too, if anything.
    pub secret: Option<&'a Secret>,
    /// Finds the target's addresses.
    pub resolver: &'a Resolver,
    /// For everything until the tables are here.
    pub timeout: Duration,
}

/// An open control stream.
#[derive(Debug)]
pub struct Connection {
    /// What the handshake brought.
    pub opened: Opened,
    /// Where data lanes connect to.
    pub address: SocketAddr,
    /// Payload on tcp lanes is summed.
    pub checksums: bool,
    /// To the target.
    pub to_target: mpsc::Sender<wire::ToTarget>,
    /// From the target.
    pub from_target: Streaming<wire::ToInitiator>,
}

/// A message to the target.
pub fn message(message: ToTarget) -> wire::ToTarget {
    wire::ToTarget { message: Some(message) }
}

/// Dials and shakes hands.
pub async fn connect(dial: Dial<'_>) -> Result<Connection, Failure> {
    let target = dial.target.clone();
    let timeout = dial.timeout;
    tokio::time::timeout(timeout, shake_hands(dial)).await.unwrap_or_else(|_| {
        let message = format!("{target} did not complete the handshake within {} ms", timeout.as_millis());
        Err(Failure::new(Reason::ConnectTimeout, message))
    })
}

async fn dial_tcp(target: &SessionId, resolver: &Resolver) -> Result<TcpStream, Failure> {
    let Some((host, port)) = target.authority() else {
        return Err(Failure::new(Reason::UnknownSession, format!("{target:?} is not host:port")));
    };
    let stream = match host.parse::<IpAddr>() {
        Ok(address) => TcpStream::connect((address, port)).await,
        Err(_) => match resolver.resolve(host, port).await {
            Ok(addresses) => TcpStream::connect(&addresses[..]).await,
            Err(error) => Err(error),
        },
    };
    let stream = stream.map_err(|error| refusal(target, &error))?;
    stream.set_nodelay(true).map_err(|error| refusal(target, &error))?;
    Ok(stream)
}

fn refusal(target: &SessionId, error: &io::Error) -> Failure {
    let reason = match error.kind() {
        io::ErrorKind::ConnectionRefused => Reason::ConnectRefused,
        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
        _ => Reason::ConnectionLost,
    };
    Failure::io(reason, format_args!("connecting to {target}"), error)
}

async fn shake_hands(dial: Dial<'_>) -> Result<Connection, Failure> {
    let stream = dial_tcp(dial.target, dial.resolver).await?;
    let address = stream.peer_addr().map_err(|error| refusal(dial.target, &error))?;
    let mut client = PeerClient::new(channel(stream).await?).max_decoding_message_size(MAX_MESSAGE);
    let (to_target, outgoing) = mpsc::channel(OUTGOING);
    let open = Open {
        protocol: PROTOCOL,
        nonce: crate::domain::Incarnation::random().0,
        boot: dial.boot,
        incarnation: identity::incarnation(dial.key),
        session_id: dial.own.to_string(),
        expected: dial.expected,
        capabilities: identity::capabilities(dial.allowed, dial.checksum),
    };
    say(&to_target, ToTarget::Open(convert::open_out(&open))).await?;
    let response = client.session(ReceiverStream::new(outgoing)).await.map_err(|status| lost(&status))?;
    let mut from_target = response.into_inner();

    let challenge = meet(&dial, &open, &mut from_target, &to_target).await?;
    let FromTarget::Accept(accept) = hear(&mut from_target).await? else { return Err(out_of_turn("Accept")) };
    say(&to_target, ToTarget::Ready(wire::Ready {})).await?;
    let FromTarget::Welcome(welcome) = hear(&mut from_target).await? else {
        return Err(out_of_turn("Welcome"));
    };
    let path = route(RouteQuery {
        allowed: dial.allowed,
        same_boot: challenge.boot == dial.boot,
        offered: &identity::offers(&challenge.capabilities),
    })?;
    let checksums = identity::checksums(&open.capabilities, &challenge.capabilities);
    let opened = Opened {
        incarnation: challenge.incarnation,
        boot: challenge.boot,
        path,
        revocations: convert::revocations_in(accept.revocations.unwrap_or_default())?,
        table: convert::table_in(welcome.table.unwrap_or_default())?,
        fenced: accept.fenced.into_iter().map(convert::fenced_in).collect(),
    };
    Ok(Connection { opened, address, checksums, to_target, from_target })
}

/// Largest message of the peer protocol: a table of 65,535 regions, with room.
pub(super) const MAX_MESSAGE: usize = 8 << 20;

/// A channel over a stream that is connected already, so that errors of dialling keep their errno.
async fn channel(stream: TcpStream) -> Result<tonic::transport::Channel, Failure> {
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = once.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        std::future::ready(stream)
    });
    Endpoint::from_static("http://peer.kvferry")
        .connect_with_connector(connector)
        .await
        .map_err(|error| Failure::new(Reason::HandshakeFailed, format!("HTTP/2: {error}")))
}

/// Open -> Challenge -> Confirm, from the initiator's side.
async fn meet(
    dial: &Dial<'_>,
    open: &Open,
    from_target: &mut Streaming<wire::ToInitiator>,
    to_target: &mpsc::Sender<wire::ToTarget>,
) -> Result<Challenge, Failure> {
    let FromTarget::Challenge(challenge) = hear(from_target).await? else {
        return Err(out_of_turn("Challenge"));
    };
    let (challenge, signature, proof) = convert::challenge_in(challenge)?;
    if PROTOCOL.agree(identity::ProtocolRange { min: challenge.protocol, max: challenge.protocol }).is_err() {
        let message = format!("the target chose protocol version {}", challenge.protocol);
        return Err(Failure::new(Reason::HandshakeFailed, message));
    }
    let transcript = Transcript::new(open, &challenge);
    transcript.verify(Role::Target, &challenge.incarnation, &signature)?;
    dial.secret.map_or(Ok(()), |secret| secret.verify(Role::Target, &transcript, &proof))?;
    if let Some(expected) = dial.expected.filter(|expected| *expected != challenge.incarnation) {
        let message =
            format!("engine {} lives at {} now, not {expected}", challenge.incarnation, dial.target);
        return Err(Failure::new(Reason::PeerRestarted, message));
    }
    let signature = transcript.sign(Role::Initiator, dial.key).to_vec();
    let proof =
        dial.secret.map_or_else(Vec::new, |secret| secret.prove(Role::Initiator, &transcript).to_vec());
    say(to_target, ToTarget::Confirm(wire::Confirm { signature, proof })).await?;
    Ok(challenge)
}

async fn say(to_target: &mpsc::Sender<wire::ToTarget>, what: ToTarget) -> Result<(), Failure> {
    to_target.send(message(what)).await.map_err(|_| Failure::plain(Reason::ConnectionLost))
}

/// The next message but a refusal, which is a failure.
async fn hear(from_target: &mut Streaming<wire::ToInitiator>) -> Result<FromTarget, Failure> {
    loop {
        let message = from_target.message().await.map_err(|status| lost(&status))?;
        let message = message.ok_or_else(|| Failure::plain(Reason::ConnectionLost))?;
        match message.message {
            Some(FromTarget::Refused(refused)) => return Err(convert::told(refused.failure)),
            Some(FromTarget::Bye(bye)) => return Err(convert::told(bye.failure)),
            Some(message) => return Ok(message),
            // A kind of message this version does not know.
            None => {}
        }
    }
}

fn out_of_turn(expected: &str) -> Failure {
    Failure::new(Reason::HandshakeFailed, format!("the target said something else where {expected} was due"))
}

/// A stream that ended with a status: the connection's end, whatever gRPC calls it.
pub fn lost(status: &tonic::Status) -> Failure {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Failure::io(Reason::ConnectionLost, "the control stream", error);
        }
        cause = error.source();
    }
    Failure::new(Reason::ConnectionLost, format!("the control stream ended: {}", status.message()))
}

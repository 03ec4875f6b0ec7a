//! The live control stream of an outbound session: what goes out, what comes in, and whether the peer lives.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::peer::v1::{
    self as wire, to_initiator::Message as FromTarget, to_target::Message as ToTarget,
};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tonic::Streaming;

use super::{client, context::Timing, convert, initiator::Feedback, life::Life};
use crate::{
    convert::BadField,
    domain::{Epoch, Failure, Incarnation, LaneId, Reason, TransferId},
    session::outbound::Event,
    transport::{LaneKind, tcp::Pulse},
};

/// Tells a stream from those before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct LinkNumber(u64);

impl LinkNumber {
    pub(super) fn advance(&mut self) {
        self.0 += 1;
    }
}

/// What the target says, in domain terms.
#[derive(Debug)]
pub(super) enum Incoming {
    /// For the core.
    Event(Event),
    /// Life, and nothing else.
    Beat,
    /// The lane asked for: its token.
    Grant(LaneId, Result<[u8; 32], Failure>),
    /// The stream is over.
    Ended(Failure),
}

/// One stream.
#[derive(Debug)]
pub(super) struct Link {
    number: LinkNumber,
    incarnation: Incarnation,
    address: SocketAddr,
    checksums: bool,
    to_target: mpsc::Sender<wire::ToTarget>,
    /// Reads the stream; ended with the link, so that an abandoned stream holds no descriptor.
    listener: Option<AbortHandle>,
    pulse: Arc<Pulse>,
    life: Life,
    sequence: u64,
    overflowed: bool,
}

impl Link {
    pub(super) fn new(
        number: LinkNumber,
        incarnation: Incarnation,
        address: SocketAddr,
        checksums: bool,
        to_target: mpsc::Sender<wire::ToTarget>,
    ) -> Self {
        Self {
            number,
            incarnation,
            address,
            checksums,
            to_target,
            listener: None,
            pulse: Pulse::new(),
            life: Life::new(),
            sequence: 0,
            overflowed: false,
        }
    }

    pub(super) fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Payload on tcp lanes is summed.
    pub(super) fn checksums(&self) -> bool {
        self.checksums
    }

    pub(super) fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }

    pub(super) fn heard_now(&mut self) {
        self.life.heard_now();
    }

    pub(super) fn overflowed(&mut self) {
        self.overflowed = true;
    }

    /// Reads the stream in a task of its own until it ends.
    pub(super) fn listen(
        &mut self,
        mut from_target: Streaming<wire::ToInitiator>,
        feedback: mpsc::Sender<Feedback>,
        tasks: &mut JoinSet<()>,
    ) {
        let number = self.number;
        let listener = tasks.spawn(async move {
            loop {
                let incoming = match from_target.message().await {
                    Ok(Some(message)) => translate(message),
                    Ok(None) => Some(Incoming::Ended(Failure::plain(Reason::ConnectionLost))),
                    Err(status) => Some(Incoming::Ended(client::lost(&status))),
                };
                let Some(incoming) = incoming else { continue };
                let over = matches!(incoming, Incoming::Ended(_));
                if feedback.send(Feedback::Heard(number, incoming)).await.is_err() || over {
                    return;
                }
            }
        });
        self.listener = Some(listener);
    }

    /// Tells the peer that this daemon lives.
    pub(super) fn beat(&mut self) {
        self.sequence += 1;
        let sequence = self.sequence;
        self.say(ToTarget::Beat(wire::Beat { sequence }));
    }

    /// When to judge, beats aside.
    pub(super) fn judge_at(&self, timing: &Timing) -> Instant {
        self.life.judge_at(timing)
    }

    /// Judges the peer (I9). An error ends the session.
    pub(super) fn judge(&mut self, overslept: Duration, timing: &Timing) -> Result<(), Failure> {
        if self.overflowed {
            return Err(Failure::new(Reason::PeerSilent, "the peer takes no more messages"));
        }
        self.life.judge(&self.pulse, overslept, timing)
    }

    pub(super) fn request_table(&self, nonce: u64) -> bool {
        self.say(ToTarget::TableRequest(wire::TableRequest { nonce }))
    }

    pub(super) fn request_lane(&self, lane: LaneId, kind: LaneKind) -> bool {
        let kind = convert::kind_out(kind).into();
        let path = kvferry_proto::types::v1::Path::Tcp.into();
        self.say(ToTarget::LaneRequest(wire::LaneRequest { lane_id: lane.0, kind, path }))
    }

    pub(super) fn fence_lane(&self, lane: LaneId) -> bool {
        self.say(ToTarget::FenceLane(wire::FenceLane { lane_id: lane.0 }))
    }

    pub(super) fn stop(&self, transfer: TransferId, marks: &[(LaneId, u64)]) -> bool {
        let mark = |&(lane, sequence): &(LaneId, u64)| wire::LaneMark { lane_id: lane.0, sequence };
        let marks = marks.iter().map(mark).collect();
        self.say(ToTarget::Stop(wire::Stop { transfer_id: transfer.0.to_vec(), marks }))
    }

    pub(super) fn revocations_seen(&self, epoch: Epoch) -> bool {
        self.say(ToTarget::RevocationsSeen(wire::RevocationsSeen { epoch: epoch.0 }))
    }

    pub(super) fn bye(&self, failure: &Failure) {
        self.say(ToTarget::Bye(wire::Bye { failure: Some(failure.into()) }));
    }

    fn say(&self, message: ToTarget) -> bool {
        self.to_target.try_send(client::message(message)).is_ok()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(listener) = &self.listener {
            listener.abort();
        }
    }
}

/// Nothing for a kind of message this version does not know.
fn translate(message: wire::ToInitiator) -> Option<Incoming> {
    Some(match message.message? {
        FromTarget::Beat(_) => Incoming::Beat,
        FromTarget::LaneGrant(grant) => {
            let token = match grant.failure {
                Some(failure) => Err(crate::convert::failure(failure)),
                None => crate::convert::bytes("lane_grant.token", &grant.token).map_err(Failure::from),
            };
            Incoming::Grant(LaneId(grant.lane_id), token)
        }
        FromTarget::LaneFenced(fenced) => {
            let (lane, record) = convert::fenced_in(fenced);
            Incoming::Event(Event::LaneFenced(lane, record))
        }
        FromTarget::Stopped(stopped) => {
            match crate::convert::bytes("stopped.transfer_id", &stopped.transfer_id) {
                Ok(id) => Incoming::Event(Event::Stopped(TransferId(id))),
                Err(bad) => malformed(&bad),
            }
        }
        FromTarget::Table(table) => {
            let nonce = table.nonce;
            match convert::table_in(table) {
                Ok(table) => Incoming::Event(Event::Table(table, nonce)),
                Err(bad) => malformed(&bad),
            }
        }
        FromTarget::Revoked(revoked) => {
            let (epoch, floor) = (revoked.epoch, revoked.floor);
            match convert::revocations_in(wire::Revocations { epoch, floor, recent: vec![revoked] }) {
                Ok(revoked) => Incoming::Event(Event::Revoked(Box::new(revoked))),
                Err(failure) => Incoming::Ended(failure),
            }
        }
        FromTarget::Bye(bye) => Incoming::Ended(convert::told(bye.failure)),
        FromTarget::Refused(refused) => Incoming::Ended(convert::told(refused.failure)),
        FromTarget::Challenge(_) | FromTarget::Accept(_) | FromTarget::Welcome(_) => {
            Incoming::Ended(Failure::new(Reason::HandshakeFailed, "a handshake message after the handshake"))
        }
    })
}

fn malformed(bad: &BadField) -> Incoming {
    Incoming::Ended(Failure::new(Reason::HandshakeFailed, bad.to_string()))
}

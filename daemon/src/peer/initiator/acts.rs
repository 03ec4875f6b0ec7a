//! What the core of an outbound session asks for, done or begun: streams, lanes, plans, proofs.

use std::sync::Arc;

use super::{
    super::{
        client::{self, Dial},
        lane,
        link::Link,
        planning::make_plan,
        report::announce,
    },
    Driver, Feedback, OpenLane,
};
use crate::{
    domain::{Failure, Incarnation, LaneId, PathKind, Reason, TransferId},
    session::outbound::{Action, Event, PlanFailure, PlanOrder},
    transfer::run::Request,
    transport::{Lane, LaneEvent, LaneKind, Payload, local, tcp},
};

/// Batches larger than this are planned off the async workers.
const INLINE_PLAN_SLICES: usize = 4096;

impl Driver {
    /// Does it, or starts it. What is done at once may be an event again.
    pub(super) fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Connect(expected) => self.connect(expected),
            Action::Disconnect(failure) => {
                if let Some(link) = self.link.take() {
                    link.bye(&failure);
                }
                self.link_number.advance();
                self.awaiting_grant.clear();
            }
            Action::Plan(order) => return self.plan(order),
            Action::RequestTable(nonce) => self.tell(|link| link.request_table(nonce)),
            Action::OpenLane(lane, kind, PathKind::Local) => return Some(self.open_local(lane, kind)),
            Action::OpenLane(lane, kind, _) => {
                self.awaiting_grant.insert(lane, kind);
                self.tell(|link| link.request_lane(lane, kind));
            }
            Action::CloseLane(lane, cause) => match self.lanes.get(&lane) {
                Some(open) => open.lane.close(cause),
                None => return Some(Event::Lane(lane, LaneEvent::Closed { cause })),
            },
            Action::FenceLane(lane) => self.tell(|link| link.fence_lane(lane)),
            Action::Submit(lane, parts) => {
                if let Some(open) = self.lanes.get(&lane) {
                    open.lane.submit(parts);
                }
            }
            Action::StopLocal(payload) => return self.stop_local(&payload),
            Action::StopPeer(transfer, marks) => self.tell(|link| link.stop(transfer, &marks)),
            Action::RevocationsSeen(epoch) => self.tell(|link| link.revocations_seen(epoch)),
            Action::HitHere(ticket, transfers) => self.revokes.hit(ticket, transfers),
            Action::Unsettled(transfer, report) => self.context.outcomes.unsettled(transfer, report),
            Action::Finish(run, report) => announce(&self.context, &self.target, *run, report),
            Action::Probed(ticket, result) => {
                if let Some(answer) = self.probes.remove(&ticket) {
                    let _ = answer.send(result);
                }
            }
            Action::State(state, pin, cause) => {
                self.context.outcomes.session_changed(&self.target, state, pin, cause);
            }
        }
        None
    }

    fn connect(&mut self, expected: Option<Incarnation>) {
        self.link_number.advance();
        let (number, context, target) = (self.link_number, self.context.clone(), self.target.clone());
        let feedback = self.feedback.clone();
        self.tasks.spawn(async move {
            let dial = Dial {
                target: &target,
                key: &context.key,
                boot: context.boot,
                own: &context.own,
                expected,
                allowed: &context.allowed,
                checksum: context.checksum,
                secret: context.secret.as_ref(),
                resolver: &context.resolver,
                timeout: context.timing.silence,
            };
            let report = match client::connect(dial).await {
                Ok(connection) => Feedback::Connected(number, Box::new(connection)),
                Err(failure) => Feedback::NotConnected(number, failure),
            };
            let _ = feedback.send(report).await;
        });
    }

    fn plan(&mut self, order: PlanOrder) -> Option<Event> {
        let large = match &*order.request {
            Request::Slices(batch) => batch.len() > INLINE_PLAN_SLICES,
            Request::Pages(_) => true,
        };
        let context = self.context.clone();
        if !large {
            return Some(make_plan(&context, &order));
        }
        let feedback = self.feedback.clone();
        self.tasks.spawn(async move {
            let (transfer, boot) = (order.order.transfer, order.boot);
            let planned = tokio::task::spawn_blocking(move || make_plan(&context, &order)).await;
            let event = planned.unwrap_or_else(|_| {
                let failure = Failure::new(Reason::Limit, "planning was interrupted");
                Event::Planned(transfer, boot, Err(PlanFailure { failure, wants_newer_table: false }))
            });
            let _ = feedback.send(Feedback::Event(event)).await;
        });
        None
    }

    fn open_local(&mut self, lane: LaneId, kind: LaneKind) -> Event {
        let incarnation = self.link.as_ref().map(|link| link.incarnation());
        let Some(target) = incarnation.and_then(|who| self.context.neighbours.memory_of(&who)) else {
            return Event::LaneOpenFailed(lane, Failure::plain(Reason::ConnectionLost));
        };
        let setup = local::LocalSetup {
            lane,
            kind,
            source: self.context.memory.clone(),
            target,
            sink: self.sink.clone(),
        };
        let open = Lane::Local(self.context.copies.open(setup));
        self.lane_opened(lane, OpenLane { lane: open, kind, path: PathKind::Local })
    }

    fn lane_opened(&mut self, lane: LaneId, open: OpenLane) -> Event {
        self.context.metrics.lane_opened(open.path, open.kind.op());
        self.lanes.insert(lane, open);
        Event::LaneOpened(lane)
    }

    pub(super) fn connect_lane(&mut self, lane: LaneId, token: [u8; 32]) {
        let (Some(kind), Some(link)) = (self.awaiting_grant.remove(&lane), &self.link) else { return };
        let (address, timeout, feedback) =
            (link.address(), self.context.timing.silence, self.feedback.clone());
        self.tasks.spawn(async move {
            let report = match lane::connect(address, lane, kind, token, timeout).await {
                Ok(stream) => Feedback::LaneConnected(lane, kind, stream),
                Err(failure) => Feedback::Event(Event::LaneOpenFailed(lane, failure)),
            };
            let _ = feedback.send(report).await;
        });
    }

    pub(super) fn lane_connected(&mut self, lane: LaneId, kind: LaneKind, stream: std::net::TcpStream) {
        // Without a link the session fenced this lane while it was being connected; the core forgot it.
        let Some(link) = &self.link else { return };
        let setup = tcp::InitiatorSetup {
            lane,
            kind,
            memory: self.context.memory.clone(),
            sink: self.sink.clone(),
            pulse: link.pulse(),
            checksums: link.checksums(),
        };
        let open = Lane::Tcp(self.context.carriers.initiate(stream, setup));
        let event = self.lane_opened(lane, OpenLane { lane: open, kind, path: PathKind::Tcp });
        self.feed(event);
    }

    /// Marks the payload stopped and proves that nobody on this node is at its memory any more (I1).
    fn stop_local(&mut self, payload: &Arc<Payload>) -> Option<Event> {
        payload.stop();
        let transfer: TransferId = payload.transfer;
        let gate = self.context.memory.gate().clone();
        let version = gate.raise();
        if gate.is_quiet(version) {
            return Some(Event::LocalQuiet(transfer));
        }
        let feedback = self.feedback.clone();
        self.tasks.spawn(async move {
            gate.quiet(version).await;
            let _ = feedback.send(Feedback::Event(Event::LocalQuiet(transfer))).await;
        });
        None
    }

    /// A stream too full to take a message is as good as silent: the beat's judgement ends it.
    fn tell(&mut self, say: impl FnOnce(&Link) -> bool) {
        if let Some(link) = &mut self.link
            && !say(link)
        {
            link.overflowed();
        }
    }
}

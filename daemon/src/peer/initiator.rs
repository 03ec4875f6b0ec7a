//! The driver of an outbound session: owns its core, feeds it events, carries out its actions.
//!
//! One task per session. It decides nothing: what to do comes from [`Outbound`], what happened goes to it, with
//! the time and a random draw. Everything slow (dialling, planning a large batch, waiting for a gate) runs in
//! tasks of its own that report back through the same inbox.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use super::{
    client::Dial,
    context::Context,
    dice::Dice,
    life::Life,
    link::{Incoming, Link, LinkNumber},
    planning::make_plan,
    report::announce,
    revokes::{Revokes, judge_plan},
};
use crate::{
    domain::{Failure, LaneId, PathKind, Reason, SessionId, TransferId},
    session::{
        Command, Handle, Known,
        outbound::{Action, Event, Outbound, PlanFailure, PlanOrder},
    },
    transfer::run::Request,
    transport::{Lane, LaneEvent, LaneKind, LaneSink, Payload, local, tcp},
};

/// Reports of the driver's own tasks that may wait; their number is bounded by the actions under way.
const FEEDBACK: usize = 1024;

/// Batches larger than this are planned off the async workers.
const INLINE_PLAN_SLICES: usize = 4096;

/// What a task of the driver reports.
#[derive(Debug)]
pub(super) enum Feedback {
    /// For the core as it is.
    Event(Event),
    /// A control stream is up.
    Connected(LinkNumber, Box<super::client::Connection>),
    /// It could not be had.
    NotConnected(LinkNumber, Failure),
    /// The target said something.
    Heard(LinkNumber, Incoming),
    /// A data connection is up, its preface sent.
    LaneConnected(LaneId, LaneKind, std::net::TcpStream),
}

/// Lane events, from lane threads to the session's task.
///
/// The channel has no limit of its own because its content has: a lane posts at most two events for each part
/// in doubt (at most `tcp.window_parts`) and one when it closes.
#[derive(Debug)]
struct LaneEvents(mpsc::UnboundedSender<(LaneId, LaneEvent)>);

impl LaneSink for LaneEvents {
    fn lane_event(&self, lane: LaneId, event: LaneEvent) {
        // A session that is gone has fenced its lanes; nobody is left to tell.
        let _ = self.0.send((lane, event));
    }
}

/// Starts a session's task. It runs until it was shut down.
pub fn start(context: Arc<Context>, target: SessionId, core: Outbound, tasks: &mut JoinSet<()>) -> Handle {
    let (known, knows) = watch::channel(None);
    let (handle, commands) = Handle::new(target.clone(), knows);
    let (feedback, reports) = mpsc::channel(FEEDBACK);
    let (events, lane_events) = mpsc::unbounded_channel();
    let driver = Driver {
        target,
        core,
        context,
        feedback,
        sink: Arc::new(LaneEvents(events)),
        link: None,
        link_number: LinkNumber::default(),
        lanes: HashMap::new(),
        awaiting_grant: HashMap::new(),
        probes: HashMap::new(),
        next_ticket: 0,
        revokes: Revokes::default(),
        known,
        over: Vec::new(),
        idle: handle.idle(),
        dice: Dice::new(),
        tasks: JoinSet::new(),
    };
    tasks.spawn(driver.run(commands, reports, lane_events));
    handle
}

/// A lane with what it is counted as.
struct OpenLane {
    lane: Lane,
    kind: LaneKind,
    path: PathKind,
}

struct Driver {
    target: SessionId,
    core: Outbound,
    context: Arc<Context>,
    feedback: mpsc::Sender<Feedback>,
    sink: Arc<LaneEvents>,
    link: Option<Link>,
    link_number: LinkNumber,
    lanes: HashMap<LaneId, OpenLane>,
    awaiting_grant: HashMap<LaneId, LaneKind>,
    probes: HashMap<u64, oneshot::Sender<Result<(), Failure>>>,
    next_ticket: u64,
    revokes: Revokes,
    known: watch::Sender<Option<Known>>,
    over: Vec<oneshot::Sender<()>>,
    idle: Arc<AtomicBool>,
    dice: Dice,
    tasks: JoinSet<()>,
}

impl Driver {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut reports: mpsc::Receiver<Feedback>,
        mut lane_events: mpsc::UnboundedReceiver<(LaneId, LaneEvent)>,
    ) {
        let mut changes = self.context.memory.changes();
        let mut beat = tokio::time::interval(self.context.timing.heartbeat);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut planned_beat = Instant::now();
        loop {
            let wake = self.core.next_wake();
            let judge_at = self.link.as_ref().map(|link| link.judge_at(&self.context.timing));
            tokio::select! {
                Some((lane, event)) = lane_events.recv() => {
                    self.lane_event(lane, event);
                    while let Ok((lane, event)) = lane_events.try_recv() {
                        self.lane_event(lane, event);
                    }
                }
                Some(command) = commands.recv() => self.command(command),
                Some(report) = reports.recv() => self.report(report),
                Ok(()) = changes.changed() => self.feed(Event::LocalRegionsRetired),
                _ = beat.tick() => {
                    let overslept = Life::overslept(planned_beat);
                    // From now, not from when this one was due: a sleep is slept once, and must not be held
                    // against the session that was opened after it.
                    planned_beat = Instant::now() + self.context.timing.heartbeat;
                    self.beat(overslept);
                }
                () = sleep_until(wake) => self.feed(Event::Tick),
                () = sleep_until(judge_at) => self.judge(judge_at.map_or(Duration::ZERO, Life::overslept)),
                Some(_) = self.tasks.join_next() => {}
            }
            self.idle.store(self.core.is_forgettable(Instant::now()) && self.lanes.is_empty(), SeqCst);
            if self.core.is_over() {
                break;
            }
        }
        // What was sent to a session that is over still gets its answer.
        commands.close();
        while let Ok(command) = commands.try_recv() {
            self.command(command);
        }
        for tell in self.over.drain(..) {
            let _ = tell.send(());
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit(admitted) => self.feed(Event::Submit(admitted)),
            Command::End(transfer, failure) => self.feed(Event::End(transfer, failure)),
            Command::Reset(answer) => {
                self.feed(Event::Reset);
                let _ = answer.send(());
            }
            Command::Describe(answer) => {
                let _ = answer.send(self.core.summary());
            }
            Command::Probe(answer) => {
                self.next_ticket += 1;
                self.probes.insert(self.next_ticket, answer);
                self.feed(Event::Probe(self.next_ticket));
            }
            Command::Revoke(revoked, answer) => {
                self.next_ticket += 1;
                self.revokes.begin(self.next_ticket, answer);
                self.feed(Event::RevokedHere(self.next_ticket, revoked));
            }
            Command::Shutdown(failure, answer) => {
                self.over.push(answer);
                self.feed(Event::Shutdown(failure));
            }
        }
    }

    fn report(&mut self, report: Feedback) {
        match report {
            Feedback::Event(event) => self.feed(event),
            Feedback::LaneConnected(lane, kind, stream) => self.lane_connected(lane, kind, stream),
            Feedback::NotConnected(number, failure) if number == self.link_number => {
                self.feed(Event::OpenFailed(failure));
            }
            Feedback::Connected(number, connection) if number == self.link_number => {
                let super::client::Connection { opened, address, checksums, to_target, from_target } =
                    *connection;
                let mut link = Link::new(number, opened.incarnation, address, checksums, to_target);
                link.listen(from_target, self.feedback.clone(), &mut self.tasks);
                self.link = Some(link);
                self.feed(Event::Opened(Box::new(opened)));
            }
            Feedback::Heard(number, incoming) if number == self.link_number => self.heard(incoming),
            // Of a stream that was given up meanwhile.
            Feedback::NotConnected(..) | Feedback::Connected(..) | Feedback::Heard(..) => {}
        }
    }

    fn heard(&mut self, incoming: Incoming) {
        if let Some(link) = &mut self.link {
            link.heard_now();
        }
        match incoming {
            Incoming::Event(event) => self.feed(event),
            Incoming::Beat => {}
            Incoming::Grant(lane, Ok(token)) => self.connect_lane(lane, token),
            Incoming::Grant(lane, Err(failure)) => {
                // A refusal counts only for a lane that was asked for and is not there yet.
                if self.awaiting_grant.remove(&lane).is_some() {
                    self.feed(Event::LaneOpenFailed(lane, failure));
                }
            }
            Incoming::Ended(failure) => self.control_ended(failure),
        }
    }

    fn control_ended(&mut self, failure: Failure) {
        self.link = None;
        self.link_number.advance();
        self.awaiting_grant.clear();
        self.feed(Event::ControlEnded(failure));
    }

    fn beat(&mut self, overslept: Duration) {
        for (lane, moved) in self.movement() {
            self.feed(Event::Moved(lane, moved));
        }
        if let Some(link) = &mut self.link {
            link.beat();
        }
        self.judge(overslept);
    }

    fn judge(&mut self, overslept: Duration) {
        if let Some(link) = &mut self.link
            && let Err(failure) = link.judge(overslept, &self.context.timing)
        {
            self.control_ended(failure);
        }
    }

    fn movement(&self) -> Vec<(LaneId, u64)> {
        let moved = |lane: LaneId| self.lanes.get(&lane).map(|open| (lane, open.lane.moved()));
        self.core.busy_lanes().filter_map(moved).collect()
    }

    fn lane_event(&mut self, lane: LaneId, event: LaneEvent) {
        if let LaneEvent::Closed { cause } = &event
            && let Some(open) = self.lanes.remove(&lane)
        {
            self.context.metrics.lane_closed(open.path, open.kind.op(), cause.reason);
        }
        self.feed(Event::Lane(lane, event));
    }

    /// One step of the core, and of whatever its actions bring about at once.
    fn feed(&mut self, event: Event) {
        // All actions of a step before the events they bring: parts reach a lane in the order of their sequences.
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let draw = self.dice.draw();
            tracing::trace!(session = %self.target, event = event.name(), "event");
            let event = judge_plan(&self.core, &self.context.memory, event);
            for action in self.core.handle(Instant::now(), draw, event) {
                tracing::trace!(session = %self.target, action = action.name(), "action");
                events.extend(self.carry_out(action));
            }
        }
        self.revokes.answer(&self.core);
        let known = self.core.known();
        self.known.send_if_modified(|told| std::mem::replace(told, known) != known);
    }

    /// Does it, or starts it. What is done at once may be an event again.
    fn carry_out(&mut self, action: Action) -> Option<Event> {
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

    fn connect(&mut self, expected: Option<crate::domain::Incarnation>) {
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
                timeout: context.timing.silence,
            };
            let report = match super::client::connect(dial).await {
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

    fn connect_lane(&mut self, lane: LaneId, token: [u8; 32]) {
        let (Some(kind), Some(link)) = (self.awaiting_grant.remove(&lane), &self.link) else { return };
        let (address, timeout, feedback) =
            (link.address(), self.context.timing.silence, self.feedback.clone());
        self.tasks.spawn(async move {
            let report = match super::lane::connect(address, lane, kind, token, timeout).await {
                Ok(stream) => Feedback::LaneConnected(lane, kind, stream),
                Err(failure) => Feedback::Event(Event::LaneOpenFailed(lane, failure)),
            };
            let _ = feedback.send(report).await;
        });
    }

    fn lane_connected(&mut self, lane: LaneId, kind: LaneKind, stream: std::net::TcpStream) {
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

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

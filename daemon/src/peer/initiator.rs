//! The driver of an outbound session: owns its core, feeds it events, carries out its actions.
//!
//! One task per session. It decides nothing: what to do comes from [`Outbound`], what happened goes to it, with
//! the time and a random draw. How each action is carried out is in [`acts`]. Everything slow (dialling, planning a large batch, waiting for a gate) runs in
//! tasks of its own that report back through the same inbox.

mod acts;

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
    context::Context,
    dice::Dice,
    life::Life,
    link::{Incoming, Link, LinkNumber},
    revokes::{Revokes, judge_plan},
};
use crate::{
    domain::{Failure, LaneId, PathKind, SessionId},
    session::{
        Command, Handle, Known,
        outbound::{Event, Outbound},
    },
    transport::{Lane, LaneEvent, LaneKind, LaneSink},
};

/// Reports of the driver's own tasks that may wait; their number is bounded by the actions under way.
const FEEDBACK: usize = 1024;

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
            Command::Cancel(transfer, failure, answer) => {
                if self.core.carries(transfer) {
                    self.next_ticket += 1;
                    self.revokes.begin(self.next_ticket, answer);
                    self.revokes.hit(self.next_ticket, vec![transfer]);
                    self.feed(Event::End(transfer, failure));
                }
            }
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
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

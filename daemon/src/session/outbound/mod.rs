//! The initiator's side of a session: the core that decides everything and does nothing.
//!
//! One owner (the driver in `peer`) feeds [`Event`]s and carries out [`Action`]s; time and randomness come in
//! with the event, so a simulation can run this very code. The parts:
//!
//! - [`event`]: the words it is spoken to in, and answers in;
//! - [`link`]: is the control stream up, and when is it tried again;
//! - [`runs`]: its transfers, and what is asked of all of them at every event;
//! - [`planning`]: which table a plan is made from, and when it is made anew;
//! - [`dispatch`]: which part goes where next;
//! - [`lanes`], [`lane_life`]: which parts are in doubt on which lane, and until when (I2);
//! - [`ending`]: how transfers end (I1), the settle ladder's first step;
//! - [`revoking`]: what a revocation ends, at either end;
//! - [`probe`]: how a failed session heals.

mod dispatch;
mod ending;
mod event;
mod lane_life;
pub mod lanes;
mod link;
mod planning;
mod probe;
mod revoking;
mod runs;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, sync::Arc, time::Instant};

pub use event::{Action, Counts, Event, Opened, PlanFailure, PlanOrder, Policy, State, Summary};
use lanes::{LaneState, Lanes};
pub use link::Link;
use runs::{Patience, Runs};

use super::PeerTable;
use crate::{
    domain::{BootId, Epoch, Failure, Incarnation, LaneId, Op, PathKind, Reason, SessionId, TransferId},
    policy::{Health, Reconnect},
    transfer::run::{Admitted, Run},
    transport::LaneEvent,
};

/// Lanes of one session that are closing, or closed and not confirmed fenced: beyond it no new one is asked for.
const MAX_DYING_LANES: usize = 64;

/// Who the session leads to, as far as it was ever met.
#[derive(Clone, Debug)]
struct Peer {
    incarnation: Incarnation,
    boot: BootId,
    epoch: Epoch,
    table: Arc<PeerTable>,
}

/// Whom an engine has met at this session id: nobody else is accepted until then (I4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pin {
    /// Who it is.
    pub incarnation: Incarnation,
    /// When the pin lapses.
    pub until: Instant,
}

/// The core of one session.
#[derive(Debug)]
pub struct Outbound {
    id: SessionId,
    policy: Policy,
    now: Instant,
    /// In [0, 1): the jitter of decisions taken in this step.
    draw: f64,
    link: Link,
    path: Option<PathKind>,
    peer: Option<Peer>,
    /// Since the last open the engine has said that it accepts whoever is there.
    accepts_anyone: bool,
    lanes: Lanes,
    next_lane: u64,
    lane_retry_at: Option<Instant>,
    runs: Runs,
    rotation: [VecDeque<TransferId>; 2],
    /// Runs from the first failure of an outage until the session is fully open again, or given up.
    reconnect: Option<Reconnect>,
    /// The peer said that it drains: it will be back, and nothing is counted meanwhile.
    peer_draining: bool,
    pin: Option<Pin>,
    health: Health,
    probe_at: Option<Instant>,
    probing: probe::Probing,
    next_nonce: u64,
    shutdown: Option<Failure>,
    told: (State, Option<Incarnation>),
    last_failure: Option<Failure>,
    counts: Counts,
    actions: Vec<Action>,
}

impl Outbound {
    /// A session nobody has used yet, pinned to whom the engine knows there. `first_lane` begins the range its
    /// lane ids are taken from.
    pub fn new(id: SessionId, policy: Policy, pin: Option<Pin>, first_lane: u64, now: Instant) -> Self {
        Self {
            id,
            now,
            draw: 0.0,
            link: Link::Idle,
            path: None,
            peer: None,
            accepts_anyone: false,
            lanes: Lanes::new(),
            next_lane: first_lane,
            lane_retry_at: None,
            runs: Runs::new(Patience { peer_wait: policy.peer_wait, settle: policy.settle }),
            rotation: Default::default(),
            reconnect: None,
            peer_draining: false,
            pin,
            health: Health::new(policy.health),
            probe_at: None,
            probing: probe::Probing::default(),
            next_nonce: 1,
            shutdown: None,
            told: (State::Idle, pin.filter(|pin| now < pin.until).map(|pin| pin.incarnation)),
            last_failure: None,
            counts: Counts::default(),
            actions: Vec::new(),
            policy,
        }
    }

    /// One step: takes an event, returns what is to be done, in order.
    pub fn handle(&mut self, now: Instant, draw: f64, event: Event) -> Vec<Action> {
        self.now = now;
        self.draw = draw;
        self.apply(event);
        self.proceed();
        self.tell_state();
        self.runs.catch_up();
        std::mem::take(&mut self.actions)
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Submit(admitted) => self.submit(*admitted),
            Event::End(transfer, failure) => self.end(transfer, failure),
            Event::Shutdown(failure) => self.shut_down(failure),
            Event::Planned(transfer, boot, result) => self.planned(transfer, boot, result),
            Event::LocalRegionsRetired => self.local_regions_retired(),
            Event::LocalQuiet(transfer) => self.local_quiet(transfer),
            Event::Opened(opened) => self.opened(*opened),
            Event::OpenFailed(failure) => self.open_failed(failure),
            Event::ControlEnded(failure) => self.control_ended(failure),
            Event::Table(table, nonce) => self.table(table, nonce),
            Event::Revoked(revoked) => self.revoked(&revoked),
            Event::RevokedHere(ticket, revoked) => self.revoked_here(ticket, &revoked),
            Event::Stopped(transfer) => self.peer_stopped(transfer),
            Event::LaneFenced(lane, record) => self.lane_fenced(lane, record),
            Event::LaneOpened(lane) => self.lane_opened(lane),
            Event::LaneOpenFailed(lane, failure) => self.lane_open_failed(lane, failure),
            Event::Lane(lane, LaneEvent::Processed { from, through }) => self.processed(lane, from, through),
            Event::Lane(lane, LaneEvent::Refused { sequence, failure }) => {
                self.refused(lane, sequence, failure);
            }
            Event::Lane(lane, LaneEvent::Closed { cause }) => self.lane_closed(lane, cause),
            Event::Moved(lane, bytes) => self.moved(lane, bytes),
            Event::Probe(ticket) => self.probe(ticket),
            Event::Reset => self.reset(),
            Event::Tick => {}
        }
    }

    /// Whatever time or the last event made possible.
    fn proceed(&mut self) {
        self.expire();
        self.retire_stuck_lanes();
        self.shed_unfenced_lanes();
        self.run_probe();
        self.drive_link();
        self.dispatch();
        self.close_outage();
    }

    fn submit(&mut self, admitted: Admitted) {
        let refusal = self.refusal().or_else(|| {
            let retired = admitted.local.iter().any(|region| region.is_retired());
            retired.then(|| Failure::plain(Reason::RegionChanged))
        });
        let refusal = refusal.or_else(|| self.too_late(&admitted));
        let id = admitted.id;
        let mut run = self.admit(admitted);
        if let Some(failure) = refusal {
            let report = run.report(ending::untouched(&failure), None, self.now);
            self.counts.failed += 1;
            self.actions.push(Action::Finish(Box::new(run), report));
            return;
        }
        self.plan(&mut run);
        self.runs.insert(id, run);
    }

    /// The call arrived for an engine that this session does not lead to any more: its addresses are not for
    /// whoever is there since (I4).
    fn too_late(&self, admitted: &Admitted) -> Option<Failure> {
        let ((meant, _), peer) = (admitted.known?, self.peer.as_ref()?);
        let another = self.accepts_anyone || peer.incarnation != meant;
        let message = format!("the call was made for engine {meant}, before the session was reset");
        another.then(|| Failure::new(Reason::PeerRestarted, message))
    }

    fn admit(&self, admitted: Admitted) -> Run {
        let admit_epoch = match (admitted.known, &self.peer) {
            (Some((who, epoch)), Some(peer)) if who == peer.incarnation => Some(epoch),
            // Nobody was ever met there when the call arrived: it is admitted now.
            (None, Some(peer)) => Some(peer.epoch),
            // Nobody was met yet: it waits for whom it was meant for, under what was known of them.
            (Some((who, epoch)), None) => return Run::new(admitted, Some(who), Some(epoch)),
            _ => None,
        };
        Run::new(admitted, self.met(), admit_epoch)
    }

    /// Who must be met, as long as the pin holds.
    fn pinned(&self) -> Option<Incarnation> {
        self.pin.filter(|pin| self.now < pin.until).map(|pin| pin.incarnation)
    }

    /// Whether it leads nowhere, carries nothing, and pins nobody: another session to the same place is as good.
    pub fn is_forgettable(&self, now: Instant) -> bool {
        self.state() == State::Idle && self.pin.is_none_or(|pin| pin.until <= now)
    }

    /// Whom the engine is to expect there after a restart of this daemon: who is there, or was while the pin holds.
    fn met(&self) -> Option<Incarnation> {
        match &self.peer {
            Some(peer) if self.link.is_up() => Some(peer.incarnation),
            _ => self.pinned(),
        }
    }

    /// Why a new transfer would not even be queued.
    fn refusal(&self) -> Option<Failure> {
        if let Some(failure) = &self.shutdown {
            return Some(failure.clone());
        }
        if !self.health.is_failed() {
            return None;
        }
        let why = self.last_failure.as_ref().map_or(String::new(), |failure| format!(" ({failure})"));
        let next = match self.probe_at {
            Some(at) => format!("next probe in {} ms", at.saturating_duration_since(self.now).as_millis()),
            None => "a probe is under way".to_owned(),
        };
        Some(Failure::new(Reason::SessionFailed, format!("the session has failed{why}; {next}")))
    }

    /// When time alone may change something.
    pub fn next_wake(&self) -> Option<Instant> {
        let lanes = self.lanes.values().filter_map(|lane| self.lane_wake(lane)).min();
        let cycle = self.reconnect.as_ref().filter(|_| !self.link.is_up()).map(|cycle| cycle.ends());
        let own = [self.link.wake(), self.lane_retry_at, self.probe_at];
        own.into_iter().chain([self.runs.next_wake(), lanes, cycle]).flatten().min()
    }

    /// Lanes whose movement matters now.
    pub fn busy_lanes(&self) -> impl Iterator<Item = LaneId> + '_ {
        self.lanes.iter().filter(|(_, lane)| lane.is_open() && lane.outstanding() > 0).map(|(id, _)| *id)
    }

    fn tell_state(&mut self) {
        let (state, pin) = (self.state(), self.met());
        if std::mem::replace(&mut self.told, (state, pin)) != (state, pin) {
            self.actions.push(Action::State(state, pin, self.last_failure.clone()));
        }
    }

    /// How it stands.
    pub fn state(&self) -> State {
        match (&self.link, self.health.is_failed()) {
            (_, true) => State::Failed,
            (Link::Up, _) => State::Healthy,
            (Link::Idle | Link::Backoff(_), _) if self.runs.is_empty() => State::Idle,
            _ if self.reconnect.is_some() => State::Recovering,
            _ => State::Opening,
        }
    }

    /// For tables: what it has done, the failures in a row, the last failure and the time of the next probe.
    pub fn summary(&self) -> Summary {
        Summary {
            state: self.state(),
            path: self.path.filter(|_| self.link.is_up()),
            lanes: self.lanes.values().filter(|lane| lane.is_open()).count(),
            active: self.runs.len(),
            counts: self.counts,
            consecutive_failures: self.health.count(Op::Write).max(self.health.count(Op::Read)),
            last_failure: self.last_failure.clone(),
            next_probe: self.probe_at,
            incarnation: self.pinned(),
        }
    }

    /// Whose session it is.
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// Whether a shutdown has run its course: nothing of this session can touch memory any more.
    pub fn is_over(&self) -> bool {
        let out_of_reach = |lane: &LaneState| lane.phase == lanes::LanePhase::Closed;
        self.shutdown.is_some() && self.runs.is_empty() && self.lanes.values().all(out_of_reach)
    }
}

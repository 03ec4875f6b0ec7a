//! The control stream of a session: when it is opened, what its opening and its end mean for everything else.

use std::time::{Duration, Instant};

use super::{
    Action, Event, Opened, Outbound, Peer, Pin,
    lanes::{LanePhase, LaneState},
};
use crate::{
    domain::{Class, Failure, Incarnation, LaneId, Reason, TransferId},
    policy::{Reconnect, ReconnectStep},
    transfer::run::Run,
    transport::LaneRecord,
};

/// A draining peer will be back: it is tried at this pace until the waiting transfers' own deadlines.
const DRAINING_RETRY: Duration = Duration::from_millis(250);

/// Where the control stream stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Link {
    /// Not there, and not asked for.
    Idle,
    /// Being opened, expecting this incarnation; one open at a time, whoever asked joins it.
    Opening(Option<Incarnation>),
    /// Not there; tried again then.
    Backoff(Instant),
    /// There.
    Up,
}

impl Link {
    /// Whether messages can be exchanged.
    pub fn is_up(self) -> bool {
        self == Self::Up
    }

    pub(super) fn wake(self) -> Option<Instant> {
        match self {
            Self::Backoff(until) => Some(until),
            _ => None,
        }
    }
}

impl Outbound {
    /// Opens the stream when something wants it, and gives up when the reconnect cycle has run out.
    pub(super) fn drive_link(&mut self) {
        if self.shutdown.is_some() {
            if self.link.is_up() && self.is_over() {
                self.actions.push(Action::Disconnect(Failure::plain(Reason::EngineGone)));
                self.link = Link::Idle;
            }
            return;
        }
        if !self.link.is_up() && self.reconnect.as_ref().is_some_and(|cycle| cycle.ends() <= self.now) {
            self.give_up_waiting(|_| true);
        }
        let due = match self.link {
            Link::Idle => true,
            Link::Backoff(until) => until <= self.now,
            Link::Opening(_) | Link::Up => false,
        };
        if due && !self.wants_link() {
            self.link = Link::Idle;
        } else if due {
            let expected = self.pinned();
            self.link = Link::Opening(expected);
            self.actions.push(Action::Connect(expected));
        }
    }

    pub(super) fn wants_link(&mut self) -> bool {
        self.runs.any_live()
    }

    pub(super) fn opened(&mut self, opened: Opened) {
        if !matches!(self.link, Link::Opening(_)) {
            return;
        }
        let who = opened.incarnation;
        self.link = Link::Up;
        self.path = Some(opened.path);
        self.peer_draining = false;
        self.pin = Some(Pin { incarnation: who, until: self.now + self.policy.pin_idle });
        self.lane_retry_at = None;
        // Its word, even where more was known: a daemon that was not told what its predecessor knew judges by it.
        let epoch = opened.revocations.epoch();
        let peer = Peer { incarnation: who, boot: opened.boot, epoch, table: opened.table.into() };
        let met_before = self.peer.replace(peer);
        self.accepts_anyone = false;
        // Addresses are an engine's own: whoever was admitted for another one ends.
        let of_another = |run: &Run| run.expects.is_some_and(|expected| expected != who);
        self.fail_waiting(&Failure::plain(Reason::PeerRestarted), of_another);
        let old = met_before.as_ref().map(|old| (old.incarnation, old.boot));
        if old.is_some_and(|(incarnation, _)| incarnation != who) {
            self.engine_replaced();
        }
        self.end_hit_there(&opened.revocations);
        if old.is_some_and(|(incarnation, boot)| incarnation == who && boot != opened.boot) {
            self.daemon_replaced();
        }
        // Accept is I2's confirmation for every lane of earlier sessions, named in its list or not.
        let mut records: std::collections::HashMap<LaneId, LaneRecord> = opened.fenced.into_iter().collect();
        let lanes: Vec<LaneId> = self.lanes.keys().copied().collect();
        for lane in lanes {
            self.lane_fenced(lane, records.remove(&lane).unwrap_or_default());
        }
        self.plan_where(Run::is_waiting);
    }

    /// Another engine is there. Its daemon can say nothing of the lanes to the earlier one, so what ends stays
    /// unconfirmed. Who survives was admitted for nobody in particular, and is planned with this one's epoch.
    fn engine_replaced(&mut self) {
        self.peer_is_lost();
        for run in self.runs.values_mut().filter(|run| !run.is_ending()) {
            run.admit_epoch = None;
            run.unplan();
        }
    }

    /// Another run of the same engine's daemon is there. What was sent is lost for good; what was not is planned
    /// again against the new tables, with the epoch it was admitted under.
    fn daemon_replaced(&mut self) {
        self.fail_waiting(&Failure::plain(Reason::PeerDaemonRestarted), |run| run.sent);
        for run in self.runs.values_mut().filter(|run| !run.is_ending()) {
            run.unplan();
        }
    }

    pub(super) fn open_failed(&mut self, failure: Failure) {
        let Link::Opening(expected) = self.link else { return };
        self.link = Link::Idle;
        self.last_failure = Some(failure.clone());
        if failure.reason == Reason::Draining {
            self.peer_draining = true;
        } else if failure.class() != Class::Fabric {
            // Where the pin went while this open was under way, those admitted since accept whoever is there.
            let unpinned =
                failure.reason == Reason::PeerRestarted && expected.is_some() && self.pinned().is_none();
            self.reconnect = None;
            self.fail_waiting(&failure, |run| !unpinned || run.expects.is_some());
            return;
        }
        if self.peer_draining {
            self.reconnect = None;
            self.link = Link::Backoff(self.now + DRAINING_RETRY);
            return;
        }
        self.health.outage_began();
        self.fail_waiting(&failure, |run| !run.admitted.policy.outlives_failed_open());
        match self.cycle().failed_now() {
            ReconnectStep::TryAt(at) => self.link = Link::Backoff(at),
            ReconnectStep::GiveUp => self.give_up_waiting(|_| true),
        }
    }

    pub(super) fn control_ended(&mut self, failure: Failure) {
        if !self.link.is_up() {
            return;
        }
        self.link = Link::Idle;
        self.last_failure = Some(failure.clone());
        self.peer_draining = failure.reason == Reason::Draining;
        if failure.class() == Class::Fabric {
            self.health.outage_began();
            // Without a retry there is nothing to wait for: not even for the session to open again.
            self.fail_waiting(&failure, |run| !run.admitted.policy.outlives_failed_open());
        }
        let live: Vec<LaneId> = self.lanes.keys().copied().collect();
        for lane in live {
            self.close_lane(lane, failure.clone());
        }
        for run in self.runs.values_mut().filter(|run| run.is_waiting()) {
            run.unplan();
        }
        // The peer cannot confirm anything now; endings that only waited for its word are over.
        self.finish_settled();
        if self.shutdown.is_some() {
            return;
        }
        if self.peer_draining {
            self.reconnect = None;
            self.fail_waiting(&failure, |run| run.sent);
            self.link = Link::Backoff(self.now + DRAINING_RETRY);
        } else if self.wants_link() {
            self.begin_cycle();
        }
    }

    /// Something was lost while the stream was up. A cycle that ran out meanwhile took nothing with it, because
    /// nobody waited for the stream; this loss has a cycle of its own.
    pub(super) fn begin_cycle(&mut self) {
        self.reconnect.take_if(|cycle| cycle.ends() <= self.now);
        self.cycle();
    }

    /// The running reconnect cycle; begins one if there is none.
    pub(super) fn cycle(&mut self) -> Cycle<'_> {
        let (now, draw) = (self.now, self.draw);
        let retry = self.policy.retry;
        let reconnect = self.reconnect.get_or_insert_with(|| Reconnect::begin(&retry, now));
        Cycle { reconnect, now, draw }
    }

    /// The cycle is over: whoever waits for it is given up, and the outage ends with it.
    pub(super) fn give_up_waiting(&mut self, waits: impl Fn(&Run) -> bool) {
        self.reconnect = None;
        let cause = self.last_failure.clone().unwrap_or_else(|| Failure::plain(Reason::ConnectionLost));
        self.fail_waiting(&cause, waits);
        self.health.outage_ended();
        if matches!(self.link, Link::Backoff(_)) {
            self.link = Link::Idle;
        }
    }

    pub(super) fn fail_waiting(&mut self, failure: &Failure, choose: impl Fn(&Run) -> bool) {
        let chosen: Vec<TransferId> =
            self.runs.iter().filter(|(_, run)| !run.is_ending() && choose(run)).map(|(id, _)| *id).collect();
        for transfer in chosen {
            self.end(transfer, failure.clone());
        }
    }

    /// Ends the outage when everything that is needed is open again, or when nobody waits for it to be.
    pub(super) fn close_outage(&mut self) {
        let whole = |lane: &LaneState| lane.phase == LanePhase::Open;
        let open = self.link.is_up() && self.lane_retry_at.is_none() && self.lanes.values().all(whole);
        if open || !self.wants_link() {
            self.reconnect = None;
            self.health.outage_ended();
        }
    }

    pub(super) fn reset(&mut self) {
        self.pin = None;
        self.accepts_anyone = true;
        self.reconnect = None;
        self.probe_at = None;
        self.health.reset();
        if matches!(self.link, Link::Backoff(_)) {
            self.link = Link::Idle;
        }
        if self.link.is_up() {
            // Whoever is there now proves it anew; the stream's end is of our own making and not counted.
            let failure = Failure::new(Reason::Cancelled, "the engine reset the session");
            self.actions.push(Action::Disconnect(failure.clone()));
            self.apply(Event::ControlEnded(failure));
        }
        self.last_failure = None;
    }

    pub(super) fn shut_down(&mut self, failure: Failure) {
        self.shutdown = Some(failure.clone());
        self.probe_at = None;
        self.reconnect = None;
        self.fail_waiting(&failure, |_| true);
        let lanes: Vec<LaneId> = self.lanes.keys().copied().collect();
        for lane in lanes {
            self.close_lane(lane, failure.clone());
        }
        if !self.link.is_up() {
            self.link = Link::Idle;
        }
    }
}

/// A step of the reconnect cycle, with this event's time and draw.
pub(super) struct Cycle<'a> {
    reconnect: &'a mut Reconnect,
    now: Instant,
    draw: f64,
}

impl Cycle<'_> {
    pub(super) fn failed_now(self) -> ReconnectStep {
        self.reconnect.failed(self.now, self.draw)
    }
}

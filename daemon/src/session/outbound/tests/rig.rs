//! A driver without I/O, and the words the stories are told in.

use std::{
    mem::take,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use super::super::{Action, Event, Opened, Outbound, Pin, PlanFailure, PlanOrder, Policy, State};
pub(super) use super::words::*;
use crate::{
    domain::{
        Epoch, Failure, Incarnation, LaneId, Op, Outcome, PeerHalf, Reason, Report, SessionId, TransferId,
    },
    memory::{Backing, PROBE_BASE, PROBE_BYTES, Region, RegionTable, testing::own_memory},
    policy::RetryPolicy,
    transfer::{
        plan,
        run::{Admitted, Request},
    },
    transport::{LaneEvent, LaneKind, LaneRecord, Payload},
};

/// A part on a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sent {
    pub(super) lane: LaneId,
    pub(super) sequence: u64,
    pub(super) transfer: TransferId,
    pub(super) part: u32,
    /// As its header says.
    pub(super) admitted: Epoch,
}

impl Sent {
    /// Which part it is, wherever it is sent.
    pub(super) fn name(&self) -> (TransferId, u32) {
        (self.transfer, self.part)
    }
}

/// The core, the time, and what was asked of the driver and not looked at yet.
pub(super) struct Rig {
    pub(super) core: Outbound,
    pub(super) now: Instant,
    local: RegionTable<Arc<Region>>,
    /// Plans are made at once; otherwise they wait in `plans`.
    pub(super) plans_at_once: bool,
    pub(super) plans: Vec<PlanOrder>,
    pub(super) connects: Vec<Option<Incarnation>>,
    pub(super) disconnects: usize,
    pub(super) table_requests: Vec<u64>,
    pub(super) opens: Vec<(LaneId, LaneKind)>,
    pub(super) closes: Vec<LaneId>,
    pub(super) fences: Vec<LaneId>,
    pub(super) sent: Vec<Sent>,
    pub(super) stops: Vec<Arc<Payload>>,
    pub(super) peer_stops: Vec<(TransferId, Vec<(LaneId, u64)>)>,
    pub(super) seen: Vec<Epoch>,
    pub(super) hit_here: Vec<(u64, Vec<TransferId>)>,
    pub(super) unsettled: Vec<Report>,
    pub(super) finished: Vec<Report>,
    pub(super) probed: Vec<(u64, Result<(), Failure>)>,
    pub(super) states: Vec<State>,
    pub(super) told_pin: Option<Incarnation>,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::with(policy())
    }

    pub(super) fn with(policy: Policy) -> Self {
        Self::knowing(policy, None)
    }

    pub(super) fn knowing(policy: Policy, known: Option<Incarnation>) -> Self {
        let now = Instant::now();
        let known = known.map(|incarnation| Pin { incarnation, until: now + policy.pin_idle });
        let region = |info| Region::new(info, Backing::Process(own_memory())).0;
        let regions = [info(1, BASE, LENGTH), info(2, PROBE_BASE, PROBE_BYTES)];
        Self {
            core: Outbound::new(SessionId::new("peer:1"), policy, known, 1, now),
            now,
            local: RegionTable::new(regions.map(region).into()),
            plans_at_once: true,
            plans: vec![],
            connects: vec![],
            disconnects: 0,
            table_requests: vec![],
            opens: vec![],
            closes: vec![],
            fences: vec![],
            sent: vec![],
            stops: vec![],
            peer_stops: vec![],
            seen: vec![],
            hit_here: vec![],
            unsettled: vec![],
            finished: vec![],
            probed: vec![],
            states: vec![],
            told_pin: None,
        }
    }

    /// A session that is up, with nothing asked of the driver since.
    pub(super) fn up() -> Self {
        Self::up_with(policy())
    }

    pub(super) fn up_with(policy: Policy) -> Self {
        let mut rig = Self::with(policy);
        // Nothing is to be moved, so that no lane is asked for.
        rig.write(251, 0);
        rig.open(opened());
        assert_eq!(rig.finished(), [(251, Outcome::Done)]);
        rig.forget();
        rig
    }

    /// A session that is up with one lane for WRITE.
    pub(super) fn with_lane() -> (Self, LaneId) {
        let mut rig = Self::up();
        let lane = rig.first_lane();
        (rig, lane)
    }

    /// Moves a part, so that a lane is there.
    pub(super) fn first_lane(&mut self) -> LaneId {
        self.write(250, 1);
        let lane = self.open_lane();
        self.processed(lane, 1, 1);
        assert_eq!(self.finished(), [(250, Outcome::Done)]);
        self.forget();
        lane
    }

    fn forget(&mut self) {
        self.connects.clear();
        self.disconnects = 0;
        self.table_requests.clear();
        self.opens.clear();
        self.closes.clear();
        self.fences.clear();
        self.sent.clear();
        self.stops.clear();
        self.peer_stops.clear();
        self.finished.clear();
        self.probed.clear();
        self.states.clear();
    }

    /// One event, and the plans it asks for.
    pub(super) fn feed(&mut self, event: Event) {
        let actions = self.core.handle(self.now, 0.5, event);
        self.core.runs.check();
        for action in actions {
            match action {
                Action::Connect(expected) => self.connects.push(expected),
                Action::Disconnect(_) => {
                    self.disconnects += 1;
                    self.forget_questions();
                }
                Action::Plan(order) => self.plans.push(order),
                Action::RequestTable(nonce) => self.table_requests.push(nonce),
                Action::OpenLane(lane, kind, _) => self.opens.push((lane, kind)),
                Action::CloseLane(lane, _) => self.closes.push(lane),
                Action::FenceLane(lane) => self.fences.push(lane),
                Action::Submit(lane, parts) => self.sent.extend(parts.iter().map(|part| Sent {
                    lane,
                    sequence: part.sequence,
                    transfer: part.part.payload.transfer,
                    part: part.part.index,
                    admitted: part.part.payload.admit_epoch,
                })),
                Action::StopLocal(payload) => self.stops.push(payload),
                Action::StopPeer(transfer, marks) => self.peer_stops.push((transfer, marks)),
                Action::RevocationsSeen(epoch) => self.seen.push(epoch),
                Action::HitHere(ticket, transfers) => self.hit_here.push((ticket, transfers)),
                Action::Unsettled(_, report) => self.unsettled.push(report),
                Action::Finish(_, report) => self.finished.push(report),
                Action::Probed(ticket, result) => self.probed.push((ticket, result)),
                Action::State(state, pin, _) => {
                    self.told_pin = pin;
                    if self.states.last() != Some(&state) {
                        self.states.push(state);
                    }
                }
            }
        }
        while self.plans_at_once && !self.plans.is_empty() {
            self.make_plan();
        }
    }

    /// Makes the plan asked for first.
    pub(super) fn make_plan(&mut self) {
        let order = self.plans.remove(0);
        let planned = self.planned(&order);
        self.feed(planned);
    }

    pub(super) fn planned(&self, order: &PlanOrder) -> Event {
        let Request::Slices(batch) = &*order.request else { panic!("no story has pages") };
        let result = plan::plan(order.order, batch, &self.local, &order.table.regions).map_err(|fault| {
            PlanFailure { wants_newer_table: plan::wants_newer_table(&fault), failure: fault.into() }
        });
        Event::Planned(order.order.transfer, order.boot, result)
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.feed(Event::Tick);
    }

    /// Lets time pass to the next moment at which the core wants to be woken.
    pub(super) fn wake(&mut self) {
        self.now = self.core.next_wake().expect("something waits for time").max(self.now);
        self.feed(Event::Tick);
    }

    pub(super) fn submit(&mut self, number: u8, op: Op, parts: u64, policy: RetryPolicy) {
        self.feed(Event::Submit(Box::new(admitted(id(number), op, parts, policy, self.now))));
    }

    pub(super) fn write(&mut self, number: u8, parts: u64) {
        self.submit(number, Op::Write, parts, policy().retry);
    }

    /// A WRITE that is not tried again.
    pub(super) fn write_once(&mut self, number: u8, parts: u64) {
        self.submit(number, Op::Write, parts, RetryPolicy { attempts: 1, ..policy().retry });
    }

    pub(super) fn read(&mut self, number: u8, parts: u64) {
        self.submit(number, Op::Read, parts, policy().retry);
    }

    pub(super) fn cancel(&mut self, number: u8) {
        self.feed(Event::End(id(number), cancelled()));
    }

    pub(super) fn probe(&mut self, ticket: u64) {
        self.feed(Event::Probe(ticket));
    }

    /// The open that was asked for succeeds.
    pub(super) fn open(&mut self, opened: Opened) {
        assert_eq!(take(&mut self.connects).len(), 1, "an open is under way");
        self.feed(Event::Opened(Box::new(opened)));
    }

    /// The open that was asked for fails.
    pub(super) fn refuse(&mut self, reason: Reason) {
        assert_eq!(take(&mut self.connects).len(), 1, "an open is under way");
        self.feed(Event::OpenFailed(Failure::plain(reason)));
    }

    /// What was asked of the peer and not answered goes with the stream.
    fn forget_questions(&mut self) {
        self.opens.clear();
        self.table_requests.clear();
        self.fences.clear();
        self.peer_stops.clear();
    }

    pub(super) fn control_ends(&mut self, reason: Reason) {
        self.forget_questions();
        self.feed(Event::ControlEnded(Failure::plain(reason)));
    }

    /// The one lane that was asked for is there.
    pub(super) fn open_lane(&mut self) -> LaneId {
        let opens = take(&mut self.opens);
        assert_eq!(opens.len(), 1, "one lane was asked for");
        self.feed(Event::LaneOpened(opens[0].0));
        opens[0].0
    }

    pub(super) fn processed(&mut self, lane: LaneId, from: u64, through: u64) {
        self.feed(Event::Lane(lane, LaneEvent::Processed { from, through }));
    }

    pub(super) fn refused(&mut self, lane: LaneId, sequence: u64, reason: Reason) {
        let failure = Failure::plain(reason).at(0);
        self.feed(Event::Lane(lane, LaneEvent::Refused { sequence, failure }));
    }

    pub(super) fn closed(&mut self, lane: LaneId, cause: Failure) {
        self.feed(Event::Lane(lane, LaneEvent::Closed { cause }));
    }

    /// Lost, and confirmed by the target at once.
    pub(super) fn dies(&mut self, lane: LaneId, record: LaneRecord) {
        self.closed(lane, lost());
        self.feed(Event::LaneFenced(lane, record));
    }

    /// The gate proves the own half of everything that was to be stopped.
    pub(super) fn quiet(&mut self) {
        for payload in take(&mut self.stops) {
            self.feed(Event::LocalQuiet(payload.transfer));
        }
    }

    /// Whose parts were sent since the last look, and which, in order.
    pub(super) fn parts(&mut self) -> Vec<(u8, u32)> {
        take(&mut self.sent).iter().map(|sent| (sent.transfer.0[0], sent.part)).collect()
    }

    /// Who ended since the last look, and how.
    pub(super) fn finished(&mut self) -> Vec<(u8, Outcome)> {
        take(&mut self.finished).iter().map(|report| (report.transfer.0[0], report.outcome)).collect()
    }

    /// Who ended since the last look, and why.
    pub(super) fn failures(&mut self) -> Vec<(u8, Reason)> {
        let reason = |report: &Report| report.failure.as_ref().map_or(Reason::Unspecified, |why| why.reason);
        take(&mut self.finished).iter().map(|report| (report.transfer.0[0], reason(report))).collect()
    }

    /// What is proven of the peer's half of the one that ended.
    pub(super) fn half(&mut self) -> PeerHalf {
        let finished = take(&mut self.finished);
        assert_eq!(finished.len(), 1, "one ended: {finished:?}");
        finished[0].peer_half
    }

    /// Nothing is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.core.runs.is_empty()
    }

    pub(super) fn state(&self) -> State {
        self.core.state()
    }

    /// A payload made by hand, for answers that nobody asked for.
    pub(super) fn payload(transfer: TransferId) -> Payload {
        Payload {
            transfer,
            op: Op::Write,
            tag: None,
            admit_epoch: Epoch(0),
            local_regions: vec![],
            remote_regions: vec![],
            runs: vec![],
            parts: vec![],
            slices: 0,
            bytes: 0,
            stopped: AtomicBool::new(false),
        }
    }

    /// As `write`, holding the regions it names, as an engine's call does.
    pub(super) fn write_holding(&mut self, number: u8, parts: u64) {
        let asked = admitted(id(number), Op::Write, parts, policy().retry, self.now);
        let local = self.local.iter().cloned().collect();
        self.feed(Event::Submit(Box::new(Admitted { local, ..asked })));
    }

    /// The engine unregisters all of its memory.
    pub(super) fn retire_regions(&mut self) {
        self.local.iter().for_each(|region| region.retire());
        self.feed(Event::LocalRegionsRetired);
    }

    /// It does so and registers it anew, and the session was not told yet.
    pub(super) fn retire_quietly(&mut self) {
        let renewed = |region: &Arc<Region>| {
            region.retire();
            Region::new(region.info, Backing::Process(own_memory())).0
        };
        self.local = RegionTable::new(self.local.iter().map(renewed).collect());
    }
}

//! The peer, the network and the memory that random lives are played in, with the rules checked at each step.
//!
//! The peer is as unhelpful as it may be: it applies what was sent on a lane until the very moment it confirms
//! the fence, tells of it late or never, and comes back as another run of its daemon or as another engine.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    mem::take,
};

use super::rig::*;
use crate::{
    domain::{BootId, Epoch, Failure, Incarnation, LaneId, Op, Outcome, PeerHalf, Reason, TransferId},
    policy::{RetryPolicy, RevocationLimits, Revocations},
    session::outbound::{Event, Opened},
    transfer::run::Admitted,
    transport::{LaneEvent, LaneKind, LaneRecord, PART_BYTES},
};

mod revoking;

/// A lane as both ends see it.
pub(super) struct Lane {
    kind: LaneKind,
    boot: BootId,
    incarnation: Incarnation,
    pub(super) parts: Vec<Sent>,
    /// How far the target came, and how far it told.
    applied: u64,
    told: u64,
    refused: Vec<(u64, Failure)>,
    /// The target's end may still apply something.
    live_there: bool,
    /// The own end has said that it is closed; the core was told that the other one is fenced.
    closed: bool,
    fenced: bool,
    stopped: HashMap<TransferId, u64>,
}

pub(super) struct World {
    pub(super) rig: Rig,
    up: bool,
    pub(super) boot: BootId,
    pub(super) incarnation: Incarnation,
    pub(super) lanes: BTreeMap<LaneId, Lane>,
    pub(super) submitted: Vec<(TransferId, Op, u64)>,
    /// Calls that have arrived and wait for their turn.
    inbox: Vec<Admitted>,
    /// What the target has revoked; the next run of its daemon knows it, another engine does not.
    revoked: Revocations,
    /// The same of the engine that is not there now.
    others: Revocations,
    /// How far the initiator was told.
    told: Epoch,
    /// Admitted before a revocation that hits them.
    doomed: HashSet<TransferId>,
    /// Parts that the target refused for it.
    pub(super) hits: usize,
    /// What the own engine has revoked.
    own: Revocations,
    own_doomed: HashSet<TransferId>,
    pub(super) ended: HashMap<TransferId, (Outcome, PeerHalf)>,
    /// Parts in the memory of this incarnation.
    applied: HashMap<TransferId, (Incarnation, HashSet<u32>)>,
    /// Whose local memory is proven out of reach.
    quiet: HashSet<TransferId>,
    pub(super) tickets: u64,
}

impl World {
    pub(super) fn new() -> Self {
        let mut rig = Rig::new();
        rig.plans_at_once = false;
        Self {
            rig,
            up: false,
            boot: BOOT,
            incarnation: ALICE,
            lanes: BTreeMap::new(),
            submitted: vec![],
            inbox: vec![],
            revoked: revocations(7, &[]),
            others: revocations(7, &[]),
            told: Epoch(0),
            doomed: HashSet::new(),
            hits: 0,
            own: Revocations::new(RevocationLimits::ranges(1000)),
            own_doomed: HashSet::new(),
            ended: HashMap::new(),
            applied: HashMap::new(),
            quiet: HashSet::new(),
            tickets: 0,
        }
    }

    /// A call arrives. Its turn comes at once, or late.
    pub(super) fn submit(&mut self, read: bool, parts: u64, attempts: u32, deadline: u64, late: bool) {
        let op = if read { Op::Read } else { Op::Write };
        let transfer = id(self.submitted.len() as u8 + 1);
        let retry = RetryPolicy { attempts, deadline: ms(deadline), ..policy().retry };
        self.submitted.push((transfer, op, parts));
        let admitted = admitted(transfer, op, parts, retry, self.rig.now);
        let (known, own_epoch) = (self.rig.core.known(), self.own.epoch());
        self.inbox.push(Admitted { known, own_epoch, ..admitted });
        if !late {
            self.take_call(self.inbox.len() - 1);
        }
    }

    fn take_call(&mut self, at: usize) {
        let admitted = self.inbox.remove(at);
        self.feed(Event::Submit(Box::new(admitted)));
    }

    pub(super) fn feed(&mut self, event: Event) {
        self.rig.feed(event);
        if take(&mut self.rig.disconnects) > 0 {
            self.up = false;
        }
        let asked = [
            self.rig.opens.len(),
            self.rig.fences.len(),
            self.rig.peer_stops.len(),
            self.rig.table_requests.len(),
        ];
        assert!(self.up || asked == [0; 4], "nobody is there to be asked");
        for sent in take(&mut self.rig.sent) {
            self.sent(sent);
        }
        for report in take(&mut self.rig.finished) {
            self.check_end(report.transfer, report.outcome, report.peer_half);
        }
    }

    /// Lets time pass to the next alarm, after which there must be another one or none.
    pub(super) fn wake(&mut self) {
        if let Some(at) = self.rig.core.next_wake() {
            self.rig.now = self.rig.now.max(at);
            self.feed(Event::Tick);
            assert_ne!(self.rig.core.next_wake(), Some(at), "an alarm that goes on for ever");
        }
    }

    /// I2 and I8, at every part that is handed out.
    fn sent(&mut self, sent: Sent) {
        for (id, earlier) in &self.lanes {
            let carried = |other: &Sent| other.transfer == sent.transfer && other.part == sent.part;
            if *id != sent.lane && earlier.parts.iter().any(carried) {
                assert!(earlier.closed && earlier.fenced, "{sent:?} is still in doubt on lane {id}");
            }
        }
        assert!(!self.ended.contains_key(&sent.transfer), "{sent:?} after its end");
        assert!(!self.own_doomed.contains(&sent.transfer), "{sent:?} after its engine revoked it");
        let lane = self.lanes.get_mut(&sent.lane).expect("a lane that was opened");
        lane.parts.push(sent);
        assert_eq!(sent.sequence, lane.parts.len() as u64, "sequences follow each other");
        assert!(sent.sequence <= lane.told + policy().window_parts as u64, "beyond the window");
    }

    /// I3, and that nothing ends twice.
    fn check_end(&mut self, transfer: TransferId, outcome: Outcome, peer_half: PeerHalf) {
        let before = self.ended.insert(transfer, (outcome, peer_half));
        assert_eq!(before, None, "{transfer} ended twice");
        let submitted = self.submitted.iter().find(|(id, ..)| *id == transfer);
        let (_, _, parts) = submitted.expect("only what was submitted ends");
        if outcome == Outcome::Done {
            let applied = self.applied.get(&transfer).map_or(0, |(_, parts)| parts.len() as u64);
            assert_eq!(applied, *parts, "{transfer} is done, but not all of it is there");
        }
    }

    pub(super) fn pick_lane(&self, which: u8) -> Option<LaneId> {
        let lanes: Vec<LaneId> = self.lanes.keys().rev().take(3).copied().collect();
        pick(&lanes, which).copied()
    }

    /// The target works on what was sent, whether the initiator's end still lives or not.
    pub(super) fn apply(&mut self, id: LaneId, parts: u64, tell: bool) {
        let lane = self.lanes.get_mut(&id).expect("a lane");
        let until = (lane.applied + parts).min(lane.parts.len() as u64);
        while lane.live_there && lane.applied < until {
            let sent = lane.parts[lane.applied as usize];
            lane.applied += 1;
            let address = slot(sent.transfer.0[0]) + u64::from(sent.part) * PART_BYTES;
            if let Err(hit) = self.revoked.judge(sent.admitted, None, [(address, PART_BYTES)], self.rig.now) {
                self.hits += 1;
                lane.refused.push((lane.applied, Failure::from(hit)));
                continue;
            }
            let marked = lane.stopped.get(&sent.transfer).is_some_and(|through| sent.sequence <= *through);
            let local = lane.kind == LaneKind::Read && (lane.closed || self.quiet.contains(&sent.transfer));
            if !marked && !local {
                let doomed = self.doomed.contains(&sent.transfer);
                assert!(!doomed, "A8: {sent:?} reaches memory that was revoked");
                let end = self.ended.get(&sent.transfer);
                let settled =
                    end.is_some_and(|(_, half)| *half == PeerHalf::Confirmed || lane.kind == LaneKind::Read);
                assert!(!settled, "I1: {sent:?} reaches memory after {end:?}");
                let (whose, applied) =
                    self.applied.entry(sent.transfer).or_insert_with(|| (lane.incarnation, HashSet::new()));
                if *whose != lane.incarnation {
                    (*whose, *applied) = (lane.incarnation, HashSet::new());
                }
                applied.insert(sent.part);
            }
        }
        if tell && !lane.closed && lane.applied > lane.told {
            let from = lane.told + 1;
            let through = lane.applied;
            lane.told = through;
            let refused: Vec<_> =
                lane.refused.iter().filter(|(sequence, _)| *sequence >= from).cloned().collect();
            for (sequence, failure) in refused {
                self.feed(Event::Lane(id, LaneEvent::Refused { sequence, failure }));
            }
            self.feed(Event::Lane(id, LaneEvent::Processed { from, through }));
        }
    }

    pub(super) fn refuse(&mut self, id: LaneId) {
        let lane = self.lanes.get_mut(&id).expect("a lane");
        if lane.live_there && lane.applied < lane.parts.len() as u64 {
            lane.applied += 1;
            let sequence = lane.applied;
            let failure = Failure::plain(Reason::Revoked);
            lane.refused.push((sequence, failure.clone()));
            if !lane.closed {
                self.feed(Event::Lane(id, LaneEvent::Refused { sequence, failure }));
            }
        }
    }

    /// The own end of a lane is gone. What is on its way may still arrive.
    pub(super) fn close(&mut self, id: LaneId) {
        let lane = self.lanes.get_mut(&id).expect("a lane");
        if !std::mem::replace(&mut lane.closed, true) {
            self.rig.closes.retain(|closing| *closing != id);
            self.feed(Event::Lane(id, LaneEvent::Closed { cause: lost() }));
        }
    }

    pub(super) fn end_control(&mut self, which: u8) {
        if std::mem::replace(&mut self.up, false) {
            let reasons = [Reason::ConnectionLost, Reason::PeerSilent, Reason::Draining, Reason::EngineGone];
            self.rig.control_ends(reasons[usize::from(which) % reasons.len()]);
            self.feed(Event::Tick);
        }
    }

    /// Another engine is there, with a past of its own.
    pub(super) fn replace_engine(&mut self) {
        self.incarnation = if self.incarnation == ALICE { BOB } else { ALICE };
        self.peer_goes();
        std::mem::swap(&mut self.revoked, &mut self.others);
        // Whoever was not sent yet is admitted anew, by somebody else.
        self.doomed.clear();
    }

    /// The peer's process, or its engine, is gone, and with it what it could still do.
    pub(super) fn peer_goes(&mut self) {
        self.lanes.values_mut().for_each(|lane| lane.live_there = false);
        self.end_control(0);
    }

    /// How many of each kind wait for an answer.
    fn questions(&self) -> [usize; 10] {
        let rig = &self.rig;
        [
            rig.plans.len(),
            rig.connects.len(),
            rig.opens.len(),
            rig.closes.len(),
            rig.fences.len(),
            rig.stops.len(),
            rig.peer_stops.len(),
            rig.table_requests.len(),
            self.inbox.len(),
            usize::from(self.up && self.told < self.revoked.epoch()),
        ]
    }

    pub(super) fn answer(&mut self, which: u8) {
        let questions = self.questions();
        let open: Vec<usize> = (0..questions.len()).filter(|kind| questions[*kind] > 0).collect();
        let Some(&kind) = pick(&open, which) else { return };
        let at = usize::from(which / 8) % questions[kind];
        match kind {
            0 => {
                let order = self.rig.plans.remove(at);
                let planned = self.plan(&order);
                self.feed(planned);
            }
            1 => self.answer_connect(),
            2 => self.answer_open(at),
            3 => {
                let lane = self.rig.closes.remove(at);
                if self.lanes.contains_key(&lane) {
                    self.close(lane);
                }
            }
            4 => self.answer_fence(at),
            5 => {
                let payload = self.rig.stops.remove(at);
                self.quiet.insert(payload.transfer);
                self.feed(Event::LocalQuiet(payload.transfer));
            }
            6 => {
                let (transfer, marks) = self.rig.peer_stops.remove(at);
                for (lane, through) in marks {
                    let lane = self.lanes.get_mut(&lane).expect("a lane");
                    lane.stopped.insert(transfer, through);
                }
                self.feed(Event::Stopped(transfer));
            }
            8 => self.take_call(at),
            9 => self.tell_revocations(),
            _ => {
                let nonce = self.rig.table_requests.remove(at);
                self.feed(Event::Table(peer_table(2), nonce));
            }
        }
    }

    fn answer_connect(&mut self) {
        let expected = self.rig.connects.remove(0);
        if expected.is_some_and(|expected| expected != self.incarnation) {
            return self.feed(Event::OpenFailed(Failure::plain(Reason::PeerRestarted)));
        }
        self.up = true;
        let mut fenced = vec![];
        for (id, lane) in &mut self.lanes {
            lane.live_there = false;
            lane.fenced = true;
            if (lane.boot, lane.incarnation) == (self.boot, self.incarnation) {
                fenced.push((*id, lane.record()));
            }
        }
        self.told = self.revoked.epoch();
        let revocations = self.revoked.clone();
        let opened =
            Opened { incarnation: self.incarnation, boot: self.boot, fenced, revocations, ..opened() };
        self.feed(Event::Opened(Box::new(opened)));
    }

    fn answer_open(&mut self, at: usize) {
        let (id, kind) = self.rig.opens.remove(at);
        let lane = Lane {
            kind,
            boot: self.boot,
            incarnation: self.incarnation,
            parts: vec![],
            applied: 0,
            told: 0,
            refused: vec![],
            live_there: true,
            closed: false,
            fenced: false,
            stopped: HashMap::new(),
        };
        self.lanes.insert(id, lane);
        self.feed(Event::LaneOpened(id));
    }

    fn answer_fence(&mut self, at: usize) {
        let id = self.rig.fences.remove(at);
        let record = match self.lanes.get_mut(&id) {
            Some(lane) => {
                lane.live_there = false;
                lane.fenced = true;
                lane.record()
            }
            None => LaneRecord::default(),
        };
        self.feed(Event::LaneFenced(id, record));
    }

    pub(super) fn fail(&mut self, which: u8) {
        let reasons =
            [Reason::ConnectRefused, Reason::ConnectTimeout, Reason::Draining, Reason::Limit, Reason::NoPath];
        let failure = Failure::plain(reasons[usize::from(which) % reasons.len()]);
        if take(&mut self.rig.connects).len() == 1 {
            self.feed(Event::OpenFailed(failure));
        } else if let Some((lane, _)) = self.rig.opens.pop() {
            self.feed(Event::LaneOpenFailed(lane, failure));
        }
    }

    /// From now on everybody helps: every question is answered, every part applied, and time passes.
    pub(super) fn heal(&mut self) {
        if self.rig.core.summary().incarnation.is_some_and(|pinned| pinned != self.incarnation) {
            self.feed(Event::Reset);
        }
        for _ in 0..3000 {
            while self.questions() != [0; 10] {
                self.answer(0);
            }
            let lanes: Vec<LaneId> = self.lanes.keys().copied().collect();
            for lane in lanes {
                self.apply(lane, 1000, true);
            }
            if self.questions() != [0; 10] {
                continue;
            }
            if self.rig.core.next_wake().is_none() {
                return;
            }
            self.wake();
        }
        panic!("it never comes to rest: {:?}", self.rig.core);
    }
}

impl Lane {
    fn record(&self) -> LaneRecord {
        LaneRecord { processed: self.applied, refused: self.refused.clone() }
    }
}

pub(super) fn pick<T>(from: &[T], which: u8) -> Option<&T> {
    from.get(usize::from(which).checked_rem(from.len())?)
}

//! The initiator's driver: what `peer/initiator.rs` does with sockets and tasks, done with the world's.

use std::{collections::VecDeque, sync::Arc};

use kvferryd::{
    domain::{BootId, Failure, LaneId, Reason, SessionId},
    policy::{Beat, Judgement, judge},
    session::outbound::{Action, Event, Outbound, Pin, PlanFailure, PlanOrder},
    transfer::{plan, run::Request},
    transport::{LaneEvent, Payload},
};

use super::{
    daemon::{Answer, Engine, Life, Session, SessionKey},
    dial::DOWN,
    stream::{Down, StreamId, Up},
    world::{HEARTBEAT_US, Happening, SILENCE_US, World},
};

impl World {
    /// An attached engine.
    pub(super) fn engine(&mut self, life: Life) -> Option<&mut Engine> {
        let daemons = self.nodes.iter_mut().filter_map(|node| node.daemon.as_mut());
        daemons.filter_map(|daemon| daemon.engines.get_mut(&life)).next()
    }

    /// A session of an attached engine.
    pub(super) fn session(&mut self, key: SessionKey) -> Option<&mut Session> {
        self.engine(key.life)?.sessions.get_mut(&key.to)
    }

    /// The session to a place; made when it is first asked for.
    pub(super) fn ensure_session(&mut self, key: SessionKey) -> bool {
        let (policy, now) = (self.policy.clone(), self.instant());
        let Some(engine) = self.engine(key.life).filter(|engine| engine.gone.is_none()) else { return false };
        if engine.sessions.contains_key(&key.to) {
            return true;
        }
        engine.next_session += 1;
        let first_lane = engine.number << 48 | engine.next_session << 32 | 1;
        let place = engine.place;
        let known = self.places[place].known.get(&key.to).copied();
        let known = known.map(|incarnation| Pin { incarnation, until: now + policy.pin_idle });
        let id = SessionId::new(format!("place-{}:{}", key.to, 20_000 + key.to));
        let session = Session {
            core: Outbound::new(id, policy, known, first_lane, now),
            link: None,
            link_number: 0,
            lanes: Default::default(),
            awaiting: Default::default(),
            wake_at_us: None,
            probes: 0,
        };
        if let Some(engine) = self.engine(key.life) {
            engine.sessions.insert(key.to, session);
        }
        true
    }

    /// One step of a core, and of whatever its actions bring about at once.
    pub(super) fn feed(&mut self, key: SessionKey, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let (now, draw) = (self.instant(), self.dice.draw());
            if !matches!(event, Event::Tick | Event::Moved(..)) {
                self.say(format_args!("{key} hears {}", name(&event)));
            }
            let event = self.judge_plan(key, event);
            let Some(session) = self.session(key) else { return };
            for action in session.core.handle(now, draw, event) {
                events.extend(self.carry_out(key, action));
            }
        }
        self.plan_wake(key);
    }

    fn plan_wake(&mut self, key: SessionKey) {
        let Some(at) = self.session(key).and_then(|session| session.core.next_wake()) else { return };
        let at = self.micros(at).max(self.now_us);
        let Some(session) = self.session(key) else { return };
        if session.wake_at_us.is_none_or(|planned| planned > at) {
            session.wake_at_us = Some(at);
            self.at(at, Happening::Wake(key));
        }
    }

    pub(super) fn wake(&mut self, key: SessionKey) {
        let now = self.instant();
        let Some(session) = self.session(key) else { return };
        session.wake_at_us = None;
        if session.core.next_wake().is_some_and(|at| at <= now) {
            self.feed(key, Event::Tick);
            let again = self.session(key).and_then(|session| session.core.next_wake());
            assert!(again.is_none_or(|at| at > now), "{key}: an alarm that goes on for ever");
        } else {
            self.plan_wake(key);
        }
    }

    fn carry_out(&mut self, key: SessionKey, action: Action) -> Option<Event> {
        match action {
            Action::Connect(expected) => self.connect(key, expected),
            Action::Disconnect(failure) => {
                if let Some(stream) = self.drop_link(key) {
                    self.send_up(stream, Up::Bye(failure));
                    self.send_up(stream, Up::End);
                }
            }
            Action::Plan(order) => return Some(self.make_plan(key, &order)),
            Action::RequestTable(nonce) => self.tell(key, Up::TableRequest(nonce)),
            Action::OpenLane(lane, kind, _) => {
                self.session(key)?.awaiting.insert(lane, kind);
                self.tell(key, Up::LaneRequest(lane, kind));
            }
            Action::CloseLane(lane, cause) => match self.session(key)?.lanes.get(&lane) {
                Some(open) => open.close(cause),
                None => return Some(Event::Lane(lane, LaneEvent::Closed { cause })),
            },
            Action::FenceLane(lane) => self.tell(key, Up::FenceLane(lane)),
            Action::Submit(lane, parts) => {
                self.note_submission(key, lane, &parts);
                if let Some(open) = self.session(key)?.lanes.get(&lane) {
                    open.submit(parts);
                }
            }
            Action::StopLocal(payload) => return self.stop_local(key, &payload),
            Action::StopPeer(transfer, marks) => self.tell(key, Up::Stop(transfer, marks)),
            // For lanes that no mark can stop; the tcp ones obey the gate.
            Action::RevocationsSeen(_) => {}
            Action::HitHere(ticket, hit) => self.hit_here(key, ticket, hit),
            Action::Unsettled(_, report) => self.note_unsettled(key, &report),
            Action::Finish(run, report) => self.note_end(key, *run, report),
            Action::Probed(_, result) => {
                self.session(key)?.probes -= 1;
                self.count(if result.is_ok() { "probe ok" } else { "probe failed" });
            }
            Action::State(state, ..) => self.say(format_args!("{key} is {state:?}")),
        }
        None
    }

    fn make_plan(&mut self, key: SessionKey, order: &PlanOrder) -> Event {
        let unplanned = |failure| PlanFailure { failure, wants_newer_table: false };
        let view = self.engine(key.life).map(|engine| engine.memory.view());
        let result = match (&*order.request, view) {
            (Request::Slices(batch), Some(view)) => {
                plan::plan(order.order, batch, &view.table, &order.table.regions).map_err(|fault| {
                    PlanFailure { wants_newer_table: plan::wants_newer_table(&fault), failure: fault.into() }
                })
            }
            _ => Err(unplanned(Failure::plain(Reason::EngineGone))),
        };
        Event::Planned(order.order.transfer, order.boot, result)
    }

    fn stop_local(&mut self, key: SessionKey, payload: &Arc<Payload>) -> Option<Event> {
        payload.stop();
        let transfer = payload.transfer;
        let home = self.home(key.life)?;
        let gate = self.engine(key.life)?.memory.gate().clone();
        let version = gate.raise();
        if gate.is_quiet(version) {
            return Some(Event::LocalQuiet(transfer));
        }
        self.count("a stop that waits for a call");
        let daemon = self.nodes[home].daemon.as_ref()?;
        let mail = daemon.mail.clone();
        daemon.runtime.spawn(async move {
            gate.quiet(version).await;
            mail.say(Answer::Quiet(key, transfer));
        });
        None
    }

    pub(super) fn tell(&mut self, key: SessionKey, message: Up) {
        let stream = self.session(key).and_then(|session| session.link.as_ref()).map(|link| link.stream);
        if let Some(stream) = stream {
            self.send_up(stream, message);
        }
    }

    /// The session lets go of its stream.
    pub(super) fn drop_link(&mut self, key: SessionKey) -> Option<StreamId> {
        let session = self.session(key)?;
        session.link_number += 1;
        session.awaiting.clear();
        session.link.take().map(|link| link.stream)
    }

    pub(super) fn control_ended(&mut self, key: SessionKey, failure: Failure) {
        if let Some(stream) = self.drop_link(key) {
            self.send_up(stream, Up::End);
        }
        self.feed(key, Event::ControlEnded(failure));
    }

    /// A message for an initiator.
    pub(super) fn hear_down(&mut self, id: StreamId, message: Down) {
        let now = self.now_us;
        let Some(stream) = self.streams.get(&id).filter(|stream| !stream.lost[DOWN]) else { return };
        let (key, number) = (stream.from, stream.number);
        if self.nodes[stream.from_node].boots != stream.from_boot || self.engine(key.life).is_none() {
            return;
        }
        let live =
            self.session(key).and_then(|session| session.link.as_mut()).filter(|link| link.stream == id);
        let Some(link) = live else { return self.shake_hands(key, number, id, message) };
        link.last_life_us = now;
        let event = match message {
            Down::Beat | Down::Challenge(..) | Down::Accept(..) | Down::Welcome(_) => return,
            Down::Grant(lane, Ok(token)) => return self.dial_lane(key, lane, token),
            Down::Grant(lane, Err(failure)) => {
                let asked = self.session(key).and_then(|session| session.awaiting.remove(&lane));
                match asked {
                    Some(_) => Event::LaneOpenFailed(lane, failure),
                    None => return,
                }
            }
            Down::LaneFenced(lane, record) => Event::LaneFenced(lane, record),
            Down::Stopped(transfer) => Event::Stopped(transfer),
            Down::Table(table, nonce) => Event::Table(table, nonce),
            Down::Revoked(list) => Event::Revoked(Box::new(self.told_revocations(list))),
            Down::Bye(failure) => return self.control_ended(key, failure),
            Down::End => return self.control_ended(key, Failure::plain(Reason::ConnectionLost)),
        };
        self.feed(key, event);
    }

    pub(super) fn lane_event(&mut self, key: SessionKey, lane: LaneId, event: LaneEvent) {
        let Some(session) = self.session(key) else { return };
        if let LaneEvent::Closed { .. } = &event {
            session.lanes.remove(&lane);
        }
        if let LaneEvent::Processed { through, .. } = &event
            && let Some(wire) = self.wire_of(key.life, lane).and_then(|id| self.wires.get_mut(&id))
        {
            wire.told = *through;
        }
        self.feed(key, Event::Lane(lane, event));
    }

    /// What a session does at its daemon's beat.
    pub(super) fn beat_session(&mut self, key: SessionKey, overslept_us: u64) {
        let Some(session) = self.session(key) else { return };
        let busy: Vec<LaneId> = session.core.busy_lanes().collect();
        let moved: Vec<(LaneId, u64)> =
            busy.iter().filter_map(|lane| Some((*lane, session.lanes.get(lane)?.moved()))).collect();
        for (lane, bytes) in moved {
            self.feed(key, Event::Moved(lane, bytes));
        }
        self.tell(key, Up::Beat);
        let now = self.now_us;
        let Some(link) = self.session(key).and_then(|session| session.link.as_mut()) else { return };
        if std::mem::replace(&mut link.heard, link.pulse.total()) != link.pulse.total() {
            link.last_life_us = now;
        }
        let last = link.last_life_us;
        if let Err(failure) = self.judge(last, overslept_us) {
            self.count("peer found silent");
            self.control_ended(key, failure);
        }
    }

    /// Whether a peer heard of last then is alive.
    pub(super) fn judge(&self, last_life_us: u64, overslept_us: u64) -> Result<(), Failure> {
        let us = std::time::Duration::from_micros;
        let beat = Beat {
            now: self.instant(),
            last_life: self.instant() - us(self.now_us - last_life_us),
            overslept: us(overslept_us),
            silence: us(SILENCE_US),
            period: us(HEARTBEAT_US),
        };
        match judge(&beat) {
            Judgement::Alive | Judgement::Defer => Ok(()),
            Judgement::PeerSilent | Judgement::OverSlept => Err(Failure::plain(Reason::PeerSilent)),
        }
    }

    /// Who is at a node now, for the trace.
    pub(super) fn boot_of(&self, node: usize) -> Option<BootId> {
        self.nodes[node].daemon.as_ref().map(|daemon| daemon.boot)
    }
}

fn name(event: &Event) -> String {
    match event {
        Event::Submit(admitted) => format!("Submit {}", admitted.id),
        Event::End(transfer, failure) => format!("End {transfer} {:?}", failure.reason),
        Event::Planned(transfer, _, result) => format!("Planned {transfer} {}", result.is_ok()),
        Event::LocalQuiet(transfer) => format!("LocalQuiet {transfer}"),
        Event::Opened(_) => "Opened".into(),
        Event::Revoked(revoked) => format!("Revoked {}", revoked.epoch()),
        Event::OpenFailed(failure) => format!("OpenFailed {:?}", failure.reason),
        Event::ControlEnded(failure) => format!("ControlEnded {:?}", failure.reason),
        Event::Stopped(transfer) => format!("Stopped {transfer}"),
        Event::LaneFenced(lane, record) => format!("LaneFenced {lane:x?} processed {}", record.processed),
        Event::LaneOpened(lane) => format!("LaneOpened {lane:x?}"),
        Event::LaneOpenFailed(lane, failure) => format!("LaneOpenFailed {lane:x?} {:?}", failure.reason),
        Event::Lane(lane, LaneEvent::Closed { cause }) => format!("Closed {lane:x?} {:?}", cause.reason),
        Event::Lane(lane, LaneEvent::Refused { sequence, failure }) => {
            format!("Refused {lane:x?} {sequence} {:?}", failure.reason)
        }
        Event::Lane(lane, LaneEvent::Processed { from, through }) => {
            format!("Processed {lane:x?} {from}..={through}")
        }
        other => other.name().to_owned(),
    }
}

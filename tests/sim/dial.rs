//! How an initiator comes by its streams and lanes, and how messages travel.

use std::sync::Arc;

use kvferryd::{
    domain::{Failure, LaneId, PathKind, Reason},
    policy::RevocationList,
    session::{
        inbound::Token,
        outbound::{Event, Opened},
    },
    transport::{
        LaneKind,
        tcp::{InitiatorSetup, Preface, Pulse},
    },
};

use super::{
    daemon::{Link, Session, SessionKey, Sink},
    lanes::{Wire, WireId},
    stream::{Down, Stream, StreamId, Up},
    world::{Happening, SILENCE_US, World},
};

/// Ways of a stream.
pub(super) const UP: usize = 0;
/// The other one.
pub(super) const DOWN: usize = 1;

impl World {
    pub(super) fn connect(&mut self, key: SessionKey, expected: Option<kvferryd::domain::Incarnation>) {
        let (Some(from_node), to_node) = (self.home(key.life), self.places[key.to].node) else { return };
        let (stream, from_boot) = (self.stream_count, self.nodes[from_node].boots);
        self.stream_count += 1;
        let Some(engine) = self.engine(key.life) else { return };
        let who = engine.incarnation;
        let Some(session) = engine.sessions.get_mut(&key.to) else { return };
        session.link_number += 1;
        let number = session.link_number;
        let entry = Stream {
            from: key,
            from_node,
            from_boot,
            number,
            to_node,
            arrives_us: [0; 2],
            lost: [false; 2],
            ended: [false; 2],
            dialled: false,
            met: None,
        };
        self.streams.insert(stream, entry);
        self.say(format_args!("{key} dials, stream {stream}"));
        self.send_up(stream, Up::Open(who, expected));
        self.after(SILENCE_US, Happening::OpenTimeout(key, number));
    }

    pub(super) fn open_timeout(&mut self, key: SessionKey, number: u64) {
        let dialing = |session: &&mut Session| session.link_number == number && session.link.is_none();
        if self.session(key).filter(dialing).is_some() {
            let open = self.streams.iter().find(|(_, stream)| stream.from == key && stream.number == number);
            if let Some((&id, _)) = open.filter(|(_, stream)| !stream.dialled) {
                self.not_opened(key, id, true, Failure::plain(Reason::ConnectTimeout));
            }
        }
    }

    /// Puts a message on its way.
    pub(super) fn send_up(&mut self, id: StreamId, message: Up) {
        if let Some(at) = self.travel(id, UP, matches!(message, Up::End)) {
            self.at(at, Happening::Up(id, message));
        }
    }

    /// Puts a message on its way.
    pub(super) fn send_down(&mut self, id: StreamId, message: Down) {
        if let Some(at) = self.travel(id, DOWN, matches!(message, Down::End)) {
            self.at(at, Happening::Down(id, message));
        }
    }

    /// When the next message of that direction arrives, if it is sent at all. Always at an even microsecond, and
    /// daemons thaw at odd ones, so that what waited for a frozen daemon stays in order.
    fn travel(&mut self, id: StreamId, way: usize, end: bool) -> Option<u64> {
        let delay = self.delay();
        let stream = self.streams.get(&id).filter(|stream| !stream.ended[way])?;
        let nodes = (stream.from_node, stream.to_node);
        let blocked = if way == UP { self.blocked(nodes.0, nodes.1) } else { self.blocked(nodes.1, nodes.0) };
        let earliest = (self.now_us + delay).max(blocked);
        let stream = self.streams.get_mut(&id)?;
        stream.ended[way] = end;
        let at = (earliest.max(stream.arrives_us[way]) + 2) & !1;
        stream.arrives_us[way] = at;
        (!stream.lost[way]).then_some(at)
    }

    /// The handshake. A dial that nobody waits for any more goes on, and is hung up when it is through.
    pub(super) fn shake_hands(&mut self, key: SessionKey, number: u64, id: StreamId, message: Down) {
        let wanted =
            self.session(key).is_some_and(|session| session.link_number == number && session.link.is_none());
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.dialled) else { return };
        match (message, stream.met.take()) {
            (Down::Challenge(who, boot), None) => {
                stream.met = Some((who, boot, vec![], RevocationList::default()));
                self.send_up(id, Up::Confirm);
            }
            (Down::Accept(fenced, revoked), Some((who, boot, ..))) => {
                stream.met = Some((who, boot, fenced, revoked));
                self.send_up(id, Up::Ready);
            }
            (Down::Welcome(table), Some((incarnation, boot, fenced, revoked))) if wanted => {
                let revocations = self.told_revocations(revoked);
                let opened = Opened { incarnation, boot, path: PathKind::Tcp, revocations, table, fenced };
                self.opened(key, id, opened);
            }
            (Down::Welcome(_), _) => self.not_opened(key, id, false, Failure::plain(Reason::ConnectionLost)),
            (Down::Beat, met) => stream.met = met,
            (Down::Bye(failure), _) => self.not_opened(key, id, wanted, failure),
            _ => self.not_opened(key, id, wanted, Failure::plain(Reason::ConnectionLost)),
        }
    }

    fn not_opened(&mut self, key: SessionKey, id: StreamId, wanted: bool, failure: Failure) {
        self.send_up(id, Up::End);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.dialled = true;
        }
        if wanted {
            self.feed(key, Event::OpenFailed(failure));
        }
    }

    fn opened(&mut self, key: SessionKey, stream: StreamId, opened: Opened) {
        self.say(format_args!("{key} open, boot {}, {} lanes fenced", opened.boot, opened.fenced.len()));
        self.count("session opened");
        let Some(place) = self.engine(key.life).map(|engine| engine.place) else { return };
        self.places[place].known.insert(key.to, opened.incarnation);
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.dialled = true;
        }
        let link = Link { stream, pulse: Pulse::new(), heard: 0, last_life_us: self.now_us };
        if let Some(session) = self.session(key) {
            session.link = Some(link);
        }
        self.feed(key, Event::Opened(Box::new(opened)));
    }

    pub(super) fn dial_lane(&mut self, key: SessionKey, lane: LaneId, token: Token) {
        let Some(session) = self.session(key) else { return };
        let Some(kind) = session.awaiting.remove(&lane) else { return };
        let (Some(from), to) = (self.home(key.life), self.places[key.to].node) else { return };
        let preface = Preface { lane, kind, token };
        let id = self.wire_count;
        self.wire_count += 1;
        self.wires.insert(id, Wire::new(preface, key, from, to));
        self.lanes.insert((key.life, lane.0), id);
        let (there, back) = (self.delay(), self.delay());
        let arrives = (self.now_us + there).max(self.blocked(from, to));
        let up = (arrives + back).max(self.blocked(to, from));
        // A connection is made by kernels: its preface may reach the daemon long after.
        let late = if self.dice.percent(10) { self.dice.within(1, 1_000_000) } else { 1 };
        self.at(up, Happening::LaneUp(id));
        self.at(arrives + late, Happening::LaneArrives(id));
    }

    pub(super) fn lane_up(&mut self, id: WireId) {
        let Some(wire) = self.wires.get_mut(&id) else { return };
        let (key, lane, kind) = (wire.from, wire.lane, wire.kind);
        let checksums = self.checksums;
        let Some(home) = self.home(key.life) else { return };
        let Some(ours) = self.wires.get_mut(&id).and_then(|wire| wire.ours.take()) else {
            let failure = Failure::plain(Reason::ConnectRefused);
            return self.feed(key, Event::LaneOpenFailed(lane, failure));
        };
        let Some(memory) = self.engine(key.life).map(|engine| engine.memory.clone()) else { return };
        let Some(pulse) =
            self.session(key).and_then(|session| session.link.as_ref()).map(|link| link.pulse.clone())
        else {
            return;
        };
        let Some(daemon) = &self.nodes[home].daemon else { return };
        let sink = Arc::new(Sink(key, daemon.mail.clone()));
        let setup = InitiatorSetup { lane, kind, memory, sink, pulse, checksums };
        let open = daemon.carriers.initiate(ours, setup);
        self.count(if kind == LaneKind::Write { "write lane opened" } else { "read lane opened" });
        if let Some(session) = self.session(key) {
            session.lanes.insert(lane, open);
        }
        self.feed(key, Event::LaneOpened(lane));
    }
}

//! The target's end of control streams: what `peer/target.rs` does, done with the world's messages.

use std::sync::Arc;

use kvferryd::{
    domain::{Epoch, Failure, Incarnation, LaneId, Reason},
    memory::RegionTable,
    session::{PeerTable, inbound::InboundSession},
};
use tokio::task::AbortHandle;

use super::{
    daemon::{Answer, Engine, Life},
    lanes::WireId,
    stream::{Down, StreamId, Up},
    world::{Happening, World},
};

/// Longest handshake.
const HANDSHAKE_US: u64 = 5_000_000;

/// How far a conversation has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Challenged.
    Met,
    /// Earlier sessions are being fenced.
    Confirming,
    /// Accept is said.
    Accepted,
    /// Requests are answered.
    Serving,
    /// Its lanes are being fenced.
    Ending,
}

/// One stream's end at a target.
#[derive(Debug)]
pub(super) struct Conversation {
    /// The engine it is with.
    pub(super) life: Life,
    /// Who came.
    pub(super) who: Incarnation,
    /// How far it has come.
    pub(super) stage: Stage,
    /// Once confirmed.
    pub(super) session: Option<Arc<InboundSession>>,
    last_life_us: u64,
    heard: u64,
    told_version: u64,
    /// The newest revocation that its initiator was told.
    pub(super) told_epoch: Epoch,
    jobs: Vec<AbortHandle>,
}

impl Drop for Conversation {
    /// Its futures are its own: nobody waits for their answers now.
    fn drop(&mut self) {
        self.jobs.iter().for_each(AbortHandle::abort);
    }
}

fn table(engine: &Engine) -> PeerTable {
    let view = engine.memory.view();
    let regions = RegionTable::new(view.table.iter().map(|region| region.info).collect());
    PeerTable { version: view.version, regions, layouts: Default::default() }
}

impl World {
    /// A message for a target.
    pub(super) fn hear_up(&mut self, id: StreamId, message: Up) {
        let Some(stream) = self.streams.get(&id).filter(|stream| !stream.lost[0]) else { return };
        let (node, place) = (stream.to_node, stream.from.to);
        if let Up::Open(who, expected) = message {
            return self.meet(id, place, who, expected);
        }
        let now = self.now_us;
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        conversation.last_life_us = now;
        let (stage, life) = (conversation.stage, conversation.life);
        match (stage, message) {
            (Stage::Ending, _) => {}
            (_, Up::Bye(failure)) => self.end_conversation(id, failure),
            (_, Up::End) => self.end_conversation(id, Failure::plain(Reason::ConnectionLost)),
            (Stage::Met, Up::Confirm) => self.confirm(id, node, life),
            (Stage::Accepted, Up::Ready) => self.ready(id, life),
            (Stage::Serving, message) => self.serve(id, node, life, message),
            (_, Up::Beat) => {}
            (_, other) => panic!("{other:?} out of turn"),
        }
    }

    fn meet(&mut self, id: StreamId, place: usize, who: Incarnation, expected: Option<Incarnation>) {
        let life = self.places[place].life;
        let listening = |engine: &&mut Engine| engine.listens && engine.gone.is_none();
        let Some(engine) = life.and_then(|life| self.engine(life)).filter(listening) else {
            let refused = Failure::plain(Reason::ConnectRefused);
            self.send_down(id, Down::Bye(refused));
            return self.send_down(id, Down::End);
        };
        let (own, boot) = (engine.incarnation, self.boot_of(self.places[place].node));
        if expected.is_some_and(|expected| expected != own) {
            self.count("handshake refused");
            self.send_down(id, Down::Bye(Failure::plain(Reason::PeerRestarted)));
            return self.send_down(id, Down::End);
        }
        let (Some(boot), Some(life)) = (boot, life) else { return };
        let conversation = Conversation {
            life,
            who,
            stage: Stage::Met,
            session: None,
            last_life_us: self.now_us,
            heard: 0,
            told_version: 0,
            told_epoch: Epoch(0),
            jobs: vec![],
        };
        self.conversations.insert(id, conversation);
        self.send_down(id, Down::Challenge(own, boot));
        self.after(HANDSHAKE_US, Happening::HandshakeTimeout(id));
    }

    fn confirm(&mut self, id: StreamId, node: usize, life: Life) {
        let Some(engine) = self.engine(life) else { return };
        let inbound = engine.inbound.clone();
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let mail = daemon.mail.clone();
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        conversation.stage = Stage::Confirming;
        let (who, checksums) = (conversation.who, self.checksums);
        let job = daemon.runtime.spawn(async move {
            mail.say(Answer::Confirmed(id, inbound.confirm(who, String::new(), checksums).await));
        });
        conversation.jobs.push(job.abort_handle());
    }

    fn ready(&mut self, id: StreamId, life: Life) {
        let Some(engine) = self.engine(life) else { return };
        let (table, mail_node) = (table(engine), engine.place);
        let node = self.places[mail_node].node;
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let mail = daemon.mail.clone();
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        conversation.stage = Stage::Serving;
        conversation.told_version = table.version;
        let Some(session) = conversation.session.clone() else { return };
        session.ready();
        let job = daemon.runtime.spawn(async move {
            session.superseded().await;
            mail.say(Answer::Superseded(id));
        });
        conversation.jobs.push(job.abort_handle());
        self.send_down(id, Down::Welcome(table));
    }

    pub(super) fn handshake_timeout(&mut self, id: StreamId) {
        let over = |conversation: &Conversation| {
            matches!(conversation.stage, Stage::Met | Stage::Confirming | Stage::Accepted)
        };
        if self.conversations.get(&id).is_some_and(over) {
            self.count("handshake too slow");
            self.end_conversation(id, Failure::plain(Reason::ConnectTimeout));
        }
    }

    fn serve(&mut self, id: StreamId, node: usize, life: Life, message: Up) {
        let Some(engine) = self.engine(life) else { return };
        let (inbound, memory) = (engine.inbound.clone(), engine.memory.clone());
        let Some(session) = self.conversations.get(&id).and_then(|known| known.session.clone()) else {
            return;
        };
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let mail = daemon.mail.clone();
        let job = match message {
            Up::LaneRequest(lane, kind) => {
                let granted = inbound.grant(&session, lane, kind);
                return self.send_down(id, Down::Grant(lane, granted));
            }
            Up::TableRequest(nonce) => {
                let Some(engine) = self.engine(life) else { return };
                let table = table(engine);
                return self.send_down(id, Down::Table(table, nonce));
            }
            Up::FenceLane(lane) => daemon.runtime.spawn(async move {
                let cause = Failure::new(Reason::ConnectionLost, "fenced by the initiator");
                let record = inbound.fence_lane(&session, lane, &cause).await;
                mail.say(Answer::Fenced(id, lane, record));
            }),
            Up::Stop(transfer, marks) => {
                session.stops().mark(transfer, &marks);
                let version = memory.gate().raise();
                daemon.runtime.spawn(async move {
                    memory.gate().quiet(version).await;
                    mail.say(Answer::Stopped(id, transfer));
                })
            }
            Up::Beat => return,
            other => panic!("{other:?} out of turn"),
        };
        if let Some(conversation) = self.conversations.get_mut(&id) {
            conversation.jobs.retain(|job| !job.is_finished());
            conversation.jobs.push(job.abort_handle());
        }
    }

    /// Nothing more is heard on it; its lanes are fenced, then its initiator is told.
    pub(super) fn end_conversation(&mut self, id: StreamId, failure: Failure) {
        let Some(conversation) = self.conversations.get_mut(&id) else { return };
        if conversation.stage == Stage::Ending {
            return;
        }
        let serving = conversation.stage == Stage::Serving;
        conversation.stage = Stage::Ending;
        conversation.jobs.drain(..).for_each(|job| job.abort());
        let (life, session) = (conversation.life, conversation.session.clone().filter(|_| serving));
        let home = self.home(life);
        let inbound = self.engine(life).map(|engine| engine.inbound.clone());
        let daemon = home.and_then(|home| self.nodes[home].daemon.as_ref());
        let (Some(session), Some(inbound), Some(daemon)) = (session, inbound, daemon) else {
            // A handshake that fails fences nobody: its session waits in the table for the next one.
            return self.hang_up(id, failure);
        };
        let mail = daemon.mail.clone();
        daemon.runtime.spawn(async move {
            inbound.fence_all(&session, &failure).await;
            mail.say(Answer::FencedAll(id, failure));
        });
    }

    fn hang_up(&mut self, id: StreamId, failure: Failure) {
        self.conversations.remove(&id);
        self.send_down(id, Down::Bye(failure));
        self.send_down(id, Down::End);
    }

    /// What a future of a node came to.
    pub(super) fn answer(&mut self, node: usize, answer: Answer) {
        match answer {
            Answer::Confirmed(id, result) => {
                let Some(conversation) = self.conversations.get_mut(&id) else { return };
                if conversation.stage != Stage::Confirming {
                    return;
                }
                match result {
                    Ok((session, fenced)) => {
                        conversation.session = Some(session);
                        conversation.stage = Stage::Accepted;
                        self.say(format_args!("stream {id} confirmed, {} lanes fenced", fenced.len()));
                        let told = self.accept_with(id);
                        self.send_down(id, Down::Accept(fenced, told));
                    }
                    Err(failure) => self.end_conversation(id, failure),
                }
            }
            Answer::Fenced(id, lane, record) => self.send_down_if(id, Down::LaneFenced(lane, record)),
            Answer::Stopped(id, transfer) => self.send_down_if(id, Down::Stopped(transfer)),
            Answer::Superseded(id) => {
                self.count("session superseded");
                self.end_conversation(id, Failure::new(Reason::ConnectionLost, "superseded"));
            }
            Answer::FencedAll(id, failure) => {
                self.say(format_args!("stream {id} over at its target: {:?}", failure.reason));
                self.hang_up(id, failure);
            }
            Answer::Quiet(key, transfer) => {
                self.feed(key, kvferryd::session::outbound::Event::LocalQuiet(transfer));
            }
            Answer::GateQuiet(ticket) => self.gate_quiet(ticket),
            Answer::Registered(life, region, result) => self.registered(node, life, region, result),
            Answer::Released(life, region) => self.released(life, region),
            Answer::Closed(life) => self.memory_closed(node, life),
        }
    }

    fn send_down_if(&mut self, id: StreamId, message: Down) {
        if self.conversations.get(&id).is_some_and(|known| known.stage == Stage::Serving) {
            self.send_down(id, message);
        }
    }

    /// Tells initiators, and the own sessions, of changed memory. True where there was something to tell.
    pub(super) fn push_tables(&mut self, node: usize) -> bool {
        let Some(daemon) = &mut self.nodes[node].daemon else { return false };
        let mut changed = Vec::new();
        for (life, engine) in &mut daemon.engines {
            let version = engine.memory.view().version;
            if std::mem::replace(&mut engine.told_version, version) != version {
                changed.push((*life, engine.sessions.keys().copied().collect::<Vec<_>>()));
            }
        }
        for (life, sessions) in &changed {
            for &to in sessions {
                let key = super::daemon::SessionKey { life: *life, to };
                self.feed(key, kvferryd::session::outbound::Event::LocalRegionsRetired);
            }
            let streams: Vec<StreamId> = self
                .conversations
                .iter()
                .filter(|(_, known)| known.life == *life && known.stage == Stage::Serving)
                .map(|(id, _)| *id)
                .collect();
            for id in streams {
                let Some(table) = self.engine(*life).map(|engine| table(engine)) else { continue };
                let stale = |known: &mut Conversation| {
                    std::mem::replace(&mut known.told_version, table.version) != table.version
                };
                if self.conversations.get_mut(&id).is_some_and(stale) {
                    self.send_down(id, Down::Table(table, 0));
                }
            }
        }
        !changed.is_empty()
    }

    /// What conversations do at their daemon's beat.
    pub(super) fn beat_conversation(&mut self, id: StreamId, overslept_us: u64) {
        let now = self.now_us;
        let Some(known) = self.conversations.get_mut(&id).filter(|known| known.stage == Stage::Serving)
        else {
            return;
        };
        let total = known.session.as_ref().map_or(0, |session| session.pulse().total());
        if std::mem::replace(&mut known.heard, total) != total {
            known.last_life_us = now;
        }
        let last = known.last_life_us;
        self.send_down(id, Down::Beat);
        if let Err(failure) = self.judge(last, overslept_us) {
            self.end_conversation(id, failure);
        }
    }

    /// A data connection presents its preface.
    pub(super) fn lane_arrives(&mut self, id: WireId) {
        let Some(wire) = self.wires.get_mut(&id) else { return };
        let Some(theirs) = wire.theirs.take() else { return };
        let (place, preface) = (wire.from.to, wire.preface.clone());
        let listening = |engine: &&mut Engine| engine.listens && engine.gone.is_none();
        let Some(engine) = self.places[place].life.and_then(|life| self.engine(life)).filter(listening)
        else {
            return;
        };
        let inbound = engine.inbound.clone();
        let attached = inbound.attach(&preface, theirs);
        self.count(if attached.is_ok() { "lane attached" } else { "lane refused" });
        let Some(wire) = self.wires.get_mut(&id) else { return };
        wire.attached = attached.is_ok();
        assert!(!(wire.attached && wire.doomed), "I2: lane {:x?} is taken after it was fenced", wire.lane);
    }

    /// Which lane of its life a wire is.
    pub(super) fn wire_of(&self, life: Life, lane: LaneId) -> Option<WireId> {
        self.lanes.get(&(life, lane.0)).copied()
    }
}

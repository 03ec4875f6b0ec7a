//! How daemons and engines come and go, and what their timers do.

use std::sync::Arc;

use kvferryd::{
    domain::{Failure, Incarnation, Reason, RegionId},
    memory::{PROBE_BASE, PROBE_BYTES, RegionRequest, Source, Unregister},
    session::outbound::Event,
};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{
    daemon::{Answer, Life, SessionKey},
    process::{BASE, Process, REGION_BYTES, REGIONS, Registration},
    stream::{Down, StreamId, Up},
    world::{HEARTBEAT_US, Happening, World},
};

impl World {
    /// An engine process starts if there is none, and attaches to its daemon.
    pub(super) fn attach(&mut self, place: usize) {
        let node = self.places[place].node;
        self.places[place].coming = false;
        if self.places[place].life.is_some() || self.nodes[node].daemon.is_none() {
            return;
        }
        let releasing =
            |daemon: &super::daemon::Daemon| daemon.engines.values().any(|engine| engine.place == place);
        if self.nodes[node].daemon.as_ref().is_some_and(releasing) {
            return self.come(place);
        }
        if self.places[place].process.is_none() {
            let who = Incarnation(self.dice.bytes());
            self.places[place].process = Some(Process::start(who));
            self.places[place].known.clear();
            self.say(format_args!("process {who} starts at place {place}"));
        }
        let Some(process) = &mut self.places[place].process else { return };
        process.regions = [Registration::None; REGIONS];
        let who = process.incarnation;
        let life = self.lives;
        self.lives += 1;
        self.places[place].life = Some(life);
        let revoked = self.hand_over(place);
        if let Some(daemon) = &mut self.nodes[node].daemon {
            daemon.attach(life, (place, who), revoked);
        }
        self.say(format_args!("life {life} at place {place}: {who} attaches"));
        self.count("engine attached");
        self.register(life, None);
    }

    /// Begins the registration of a region, or of the probe region.
    pub(super) fn register(&mut self, life: Life, region: Option<usize>) {
        let Some(node) = self.home(life) else { return };
        let Some(engine) = self.engine(life).filter(|engine| engine.gone.is_none()) else { return };
        let (memory, place) = (engine.memory.clone(), engine.place);
        let request = match region {
            None => RegionRequest { base: PROBE_BASE, length: PROBE_BYTES, source: probe_source() },
            Some(region) => {
                let Some(process) = &mut self.places[place].process else { return };
                process.regions[region] = Registration::Coming;
                let offset = region as u64 * REGION_BYTES;
                let source = Source::SharedFd { fd: process.fd.clone(), offset };
                RegionRequest { base: BASE + offset, length: REGION_BYTES, source }
            }
        };
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let mail = daemon.mail.clone();
        daemon.runtime.spawn(async move {
            let result = memory.register(vec![request], vec![]).await;
            let result = result.map(|(infos, _)| infos[0].id);
            mail.say(Answer::Registered(life, region, result));
        });
    }

    pub(super) fn registered(
        &mut self,
        node: usize,
        life: Life,
        region: Option<usize>,
        result: Result<RegionId, Failure>,
    ) {
        let Some(engine) = self.engine(life).filter(|engine| engine.gone.is_none()) else { return };
        let place = engine.place;
        let Some(process) = &mut self.places[place].process else { return };
        match (region, result) {
            (Some(region), Ok(id)) => process.regions[region] = Registration::Live(id),
            (Some(region), Err(failure)) => {
                process.regions[region] = Registration::None;
                assert_eq!(failure.reason, Reason::Driver, "{failure}");
                self.count("registration failed");
                self.register(life, Some(region));
            }
            (None, Ok(_)) => {
                if let Some(engine) = self.engine(life) {
                    engine.listens = true;
                }
                (0..REGIONS).for_each(|region| self.register(life, Some(region)));
                self.revoke_again(life, place);
            }
            // The attach fails, and its client tries again.
            (None, Err(_)) => {
                self.count("attach failed");
                self.leave(life, Failure::plain(Reason::Driver));
            }
        }
        self.make_due(node);
    }

    /// Begins to unregister a region.
    pub(super) fn unregister(&mut self, life: Life, region: usize) {
        let Some(node) = self.home(life) else { return };
        let Some(engine) = self.engine(life) else { return };
        let (memory, place) = (engine.memory.clone(), engine.place);
        let Some(process) = &mut self.places[place].process else { return };
        let Registration::Live(id) = process.regions[region] else { return };
        process.regions[region] = Registration::Going;
        self.say(format_args!("life {life} unregisters region {region}"));
        self.count("unregister");
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let mail = daemon.mail.clone();
        daemon.runtime.spawn(async move {
            let request = Unregister { ids: vec![id], ..Unregister::default() };
            let mut pending = memory.unregister(request).await.expect("a live region");
            pending.settled().await;
            mail.say(Answer::Released(life, region));
        });
        self.settle(node);
        self.make_due(node);
    }

    /// SETTLED was answered: the engine uses the memory for something else at once.
    pub(super) fn released(&mut self, life: Life, region: usize) {
        let Some(engine) = self.engine(life).filter(|engine| engine.gone.is_none()) else { return };
        let place = engine.place;
        let Some(process) = &mut self.places[place].process else { return };
        if process.regions[region] != Registration::Going {
            return;
        }
        process.regions[region] = Registration::None;
        let who = process.incarnation;
        self.say(format_args!("life {life}: region {region} is settled"));
        let wanted = self.forget_holdings(place, who, Some(region));
        if let Some(process) = &mut self.places[place].process {
            process.reuse_region(region, &wanted);
        }
        self.register(life, Some(region));
    }

    /// The lease of an engine ends; its daemon takes it apart.
    pub(super) fn leave(&mut self, life: Life, why: Failure) {
        let Some(node) = self.home(life) else { return };
        let Some(engine) = self.engine(life).filter(|engine| engine.gone.is_none()) else { return };
        engine.gone = Some(why.clone());
        engine.memory.begin_close();
        let (memory, inbound, place) = (engine.memory.clone(), engine.inbound.clone(), engine.place);
        let sessions: Vec<usize> = engine.sessions.keys().copied().collect();
        self.places[place].life = None;
        self.forget_revokes(life);
        self.say(format_args!("life {life} ends"));
        let with: Vec<StreamId> =
            self.conversations.iter().filter(|(_, known)| known.life == life).map(|(id, _)| *id).collect();
        with.into_iter().for_each(|id| self.end_conversation(id, why.clone()));
        for to in sessions {
            let key = SessionKey { life, to };
            self.feed(key, Event::Shutdown(why.clone()));
        }
        if let Some(daemon) = &self.nodes[node].daemon {
            let mail = daemon.mail.clone();
            daemon.runtime.spawn(async move {
                tokio::join!(inbound.close(&why), memory.close());
                mail.say(Answer::Closed(life));
            });
        }
        self.settle(node);
        self.make_due(node);
        self.come(place);
    }

    pub(super) fn memory_closed(&mut self, node: usize, life: Life) {
        if let Some(engine) = self.engine(life) {
            engine.released = true;
        }
        self.let_go(node);
    }

    /// Forgets engines of which nothing is left.
    pub(super) fn let_go(&mut self, node: usize) {
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        let over = |engine: &super::daemon::Engine| {
            engine.released && engine.sessions.values().all(|session| session.core.is_over())
        };
        let gone: Vec<Life> =
            daemon.engines.iter().filter(|(_, engine)| over(engine)).map(|(life, _)| *life).collect();
        for life in gone {
            let Some(engine) = daemon.engines.remove(&life) else { continue };
            assert_eq!(engine.memory.gate().seat_count(), 0, "life {life} leaves seats behind");
            assert!(engine.inbound.list().is_empty(), "life {life} leaves sessions behind");
            assert_eq!(engine.log.active(), 0, "life {life} leaves transfers behind");
        }
    }

    /// An engine process is killed.
    pub(super) fn kill_process(&mut self, place: usize) {
        let Some(process) = self.places[place].process.take() else { return };
        self.say(format_args!("process {} at place {place} dies", process.incarnation));
        self.cancel_unpinned(place, process.incarnation);
        self.forget_holdings(place, process.incarnation, None);
        if let Some(life) = self.places[place].life {
            self.leave(life, Failure::plain(Reason::EngineGone));
        }
        self.come(place);
    }

    /// A daemon is killed. Its kernel closes its sockets, or is gone with it.
    pub(super) fn kill_daemon(&mut self, node: usize) {
        let Some(daemon) = self.nodes[node].daemon.take() else { return };
        self.say(format_args!("daemon of node {node} dies"));
        let lives: Vec<Life> = daemon.engines.keys().copied().collect();
        let silent = self.dice.percent(20);
        let streams: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in streams {
            let Some(stream) = self.streams.get(&id) else { continue };
            if lives.contains(&stream.from.life) && stream.from_node == node {
                self.send_up(id, Up::End);
            }
            let target = self.conversations.get(&id).is_some_and(|known| lives.contains(&known.life));
            if target {
                self.conversations.remove(&id);
                self.send_down(id, Down::End);
            }
            if silent
                && let Some(stream) = self.streams.get_mut(&id)
                && (stream.from_node == node || stream.to_node == node)
            {
                stream.lost = [true; 2];
            }
        }
        for place in 0..self.places.len() {
            if self.places[place].node == node {
                self.places[place].life = None;
                if let Some(process) = &mut self.places[place].process {
                    process.regions = [Registration::None; REGIONS];
                }
            }
        }
        drop(daemon);
        self.nodes[node].frozen_until_us = 0;
        lives.iter().for_each(|life| self.forget_revokes(*life));
        self.orphan(&lives);
        self.wires_due(node);
        let back = self.dice.within(1_000, 2_000_000);
        self.after(back, Happening::Boot(node));
    }

    pub(super) fn beat(&mut self, node: usize, boot: u32) {
        let now = self.now_us;
        let Some(daemon) = self.daemon(node, boot) else { return };
        let late = now.saturating_sub(daemon.beat_at_us);
        let overslept = if late > 50_000 { late } else { 0 };
        daemon.beat_at_us = now + HEARTBEAT_US;
        let keys: Vec<SessionKey> = daemon
            .engines
            .iter()
            .flat_map(|(life, engine)| engine.sessions.keys().map(|to| SessionKey { life: *life, to: *to }))
            .collect();
        // Releases that are through without a further call are seen to here.
        while daemon.registrar.stats().queue_length == 0 && daemon.calls.step() {}
        self.after(HEARTBEAT_US, Happening::Beat(node, boot));
        for key in keys {
            self.beat_session(key, overslept);
        }
        let streams: Vec<StreamId> = self
            .conversations
            .keys()
            .filter(|id| self.streams.get(id).is_some_and(|stream| stream.to_node == node))
            .copied()
            .collect();
        for id in streams {
            self.beat_conversation(id, overslept);
        }
        self.let_go(node);
    }
}

fn probe_source() -> Source {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("kvferry-sim-probe", flags).expect("a memfd");
    rustix::fs::ftruncate(&fd, PROBE_BYTES).expect("a size");
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).expect("seals");
    Source::SharedFd { fd: Arc::new(fd), offset: 0 }
}

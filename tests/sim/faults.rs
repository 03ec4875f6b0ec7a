//! What breaks, and how.

use std::ops::Range;

use kvferryd::{
    domain::{Failure, Reason},
    transport::Part,
};
use tokio::sync::oneshot;

use super::{
    book::Half,
    daemon::Life,
    lanes::WireId,
    process::{BASE, Process, Role},
    revoked::What,
    stream::{Down, StreamId, Up},
    world::{Happening, World},
};

/// A lane's thread that entered the gate for a part and does not come out of its call for a while.
#[derive(Debug)]
pub(super) struct Stuck {
    /// Lets it come out.
    out: oneshot::Sender<()>,
    /// Whose part it is at.
    number: u32,
    /// Whether the memory is the caller's.
    own: bool,
    /// Whose memory.
    half: Half,
    /// Which of its words.
    words: Vec<Range<usize>>,
}

impl World {
    pub(super) fn fault(&mut self) {
        if self.is_quiet() {
            return;
        }
        let next = self.dice.within(5_000, 400_000);
        self.after(next, Happening::Fault);
        if !self.dice.percent(self.fault_chance) {
            return;
        }
        match self.dice.below(100) {
            0..12 => self.cut_wire(),
            12..20 => self.hold_wire(),
            20..24 => self.blacken_wire(),
            24..34 => self.cut_stream(),
            34..46 => self.partition(),
            46..52 => {
                let place = self.dice.below(self.places.len());
                self.count("fault engine dies");
                self.kill_process(place);
            }
            52..55 => self.detach(),
            55..60 => {
                let node = self.dice.below(self.nodes.len());
                self.count("fault daemon dies");
                self.kill_daemon(node);
            }
            60..68 => self.freeze(),
            68..73 => self.fail_registration(),
            _ => self.stick(),
        }
    }

    fn any_wire(&mut self) -> Option<WireId> {
        let live: Vec<WireId> =
            self.wires.iter().filter(|(_, wire)| !wire.is_over()).map(|(id, _)| *id).collect();
        self.dice.pick(&live)
    }

    fn cut_wire(&mut self) {
        let Some(id) = self.any_wire() else { return };
        let late = self.dice.percent(50);
        let hold = self.now_us + self.dice.within(0, 4_000_000);
        let Some(wire) = self.wires.get_mut(&id) else { return };
        if late {
            wire.flows[0].held_until_us = hold;
            wire.cut_near();
        } else {
            wire.reset();
        }
        let lane = wire.lane;
        self.say(format_args!("lane {lane:x?} is cut, late bytes: {late}"));
        self.count(if late { "fault lane cut, bytes come late" } else { "fault lane reset" });
        self.nudge(id);
    }

    fn hold_wire(&mut self) {
        let Some(id) = self.any_wire() else { return };
        let (way, until) = (self.dice.below(2), self.now_us + self.dice.within(100_000, 8_000_000));
        if let Some(wire) = self.wires.get_mut(&id) {
            wire.flows[way].held_until_us = until;
        }
        self.count(if way == 0 { "fault payload held" } else { "fault acknowledgements held" });
    }

    fn blacken_wire(&mut self) {
        let Some(id) = self.any_wire() else { return };
        let way = self.dice.below(2);
        if let Some(wire) = self.wires.get_mut(&id) {
            wire.flows[way].black = true;
        }
        self.count("fault lane black-holed");
    }

    /// A control stream ends, or one direction of it is lost for good.
    fn cut_stream(&mut self) {
        let live: Vec<StreamId> = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.ended == [false; 2] && stream.lost == [false; 2])
            .map(|(id, _)| *id)
            .collect();
        let Some(id) = self.dice.pick(&live) else { return };
        let kind = self.dice.below(4);
        self.say(format_args!("stream {id} breaks, {kind}"));
        if kind < 2 {
            // Both sides hear of it, the second one perhaps much later.
            self.count("fault control stream cut");
            self.send_up(id, Up::End);
            self.send_down(id, Down::End);
        } else if let Some(stream) = self.streams.get_mut(&id) {
            stream.lost[kind - 2] = true;
            self.count("fault control stream black-holed one way");
        }
    }

    fn partition(&mut self) {
        let nodes = self.nodes.len();
        let from = self.dice.below(nodes);
        let to = (from + 1 + self.dice.below(nodes - 1)) % nodes;
        let until = self.now_us + self.dice.within(50_000, 6_000_000);
        let both = self.dice.percent(50);
        self.say(format_args!("node {from} cannot reach node {to}, both ways: {both}"));
        self.count(if both { "fault partition" } else { "fault partition one way" });
        self.blocked_us.insert((from, to), until);
        if both {
            self.blocked_us.insert((to, from), until);
        }
    }

    /// An engine's lease ends, its process lives and attaches again.
    fn detach(&mut self) {
        let lives: Vec<u32> = self.places.iter().filter_map(|place| place.life).collect();
        if let Some(life) = self.dice.pick(&lives) {
            self.count("fault attach stream lost");
            self.leave(life, Failure::new(Reason::EngineGone, "the attach stream ended"));
        }
    }

    fn freeze(&mut self) {
        let node = self.dice.below(self.nodes.len());
        if self.nodes[node].daemon.is_none() || self.nodes[node].frozen_until_us > self.now_us {
            return;
        }
        let long = self.dice.within(100_000, 7_000_000);
        // At an odd microsecond; messages arrive at even ones.
        self.nodes[node].frozen_until_us = (self.now_us + long) | 1;
        self.say(format_args!("daemon of node {node} is stopped for {} ms", long / 1000));
        self.count("fault daemon stopped");
        let lives: Vec<u32> =
            self.nodes[node].daemon.iter().flat_map(|daemon| daemon.engines.keys().copied()).collect();
        for transfer in self.transfers.values_mut().filter(|known| lives.contains(&known.key.life)) {
            transfer.due_us += long;
        }
    }

    fn fail_registration(&mut self) {
        let (node, calls) = (self.dice.below(self.nodes.len()), self.dice.within(1, 3));
        if let Some(daemon) = &self.nodes[node].daemon {
            daemon.driver.fails_in.store(calls as i64, std::sync::atomic::Ordering::Relaxed);
            self.count("fault registration fails on call k");
        }
    }

    fn nudge(&mut self, id: WireId) {
        if let Some((from, to)) = self.wires.get(&id).map(|wire| (wire.from_node, wire.to_node)) {
            self.wires_due(from);
            self.make_due(from);
            self.make_due(to);
        }
    }

    /// A lane's thread enters the gate for the part that is due on it, and stays inside. Nothing else of its
    /// lanes moves meanwhile.
    fn stick(&mut self) {
        let own = self.dice.percent(50);
        let open: Vec<u32> = self.open.iter().copied().collect();
        let mut found = None;
        for _ in 0..8 {
            let Some(number) = self.dice.pick(&open) else { return };
            found = found.or_else(|| Some((number, self.under_way(number, own)?)));
        }
        let Some((number, (node, half, words))) = found else { return };
        let life = if own { Some(self.transfers[&number].key.life) } else { self.places[half.place].life };
        let Some(gate) = life.and_then(|life| self.engine(life)).map(|engine| engine.memory.gate().clone())
        else {
            return;
        };
        let long = self.dice.within(1_000, 7_000_000);
        let boot = self.nodes[node].boots;
        let (place, held) = (half.place, half.holding.words.clone());
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        let (out, leaves) = oneshot::channel();
        daemon.runtime.spawn(async move {
            let mut seat = gate.seat();
            let _inside = seat.enter();
            // Gone with its daemon, or let out.
            let _ = leaves.await;
        });
        daemon.pump();
        daemon.stuck = Some(Stuck { out, number, own, half, words });
        self.say(format_args!("node {node} is inside a call for transfer {number}, own: {own}, {long} us"));
        self.count(if own {
            "fault stuck in a call, own memory"
        } else {
            "fault stuck in a call, peer's memory"
        });
        self.after(long, Happening::Unstick(node, boot));
        self.want_back(life, place, held);
        self.settle(node);
        self.make_due(node);
    }

    /// Perhaps the engine wants the memory back just then.
    fn want_back(&mut self, life: Option<Life>, place: usize, words: Range<usize>) {
        let Some(life) = life else { return };
        match self.dice.below(4) {
            0 => self.unregister(life, Process::region_of(words.start)),
            1 => self.revoke(life, place, What::Words(vec![words])),
            _ => {}
        }
    }

    /// The part that a lane would be at now: its node, and the words it touches there.
    fn under_way(&mut self, number: u32, own: bool) -> Option<(usize, Half, Vec<Range<usize>>)> {
        let transfer = self.transfers.get(&number)?;
        let payload = transfer.payload.clone().filter(|payload| !payload.is_stopped())?;
        if transfer.end.is_some() || self.is_revoked(number) {
            return None;
        }
        let half = if own { transfer.local.clone() } else { transfer.remote.clone() }?;
        let region = Process::region_of(half.holding.words.start);
        let node = self.places[half.place].node;
        let (key, lasts) = (transfer.key, transfer.last.clone());
        let idle = self.nodes[node].daemon.as_ref().is_some_and(|daemon| daemon.stuck.is_none());
        if !idle || self.nodes[node].frozen_until_us > self.now_us || !self.is_live(half.place, region) {
            return None;
        }
        for (id, parts) in lasts {
            let Some(wire) = self.wires.get(&id) else { continue };
            let (lane, told) = (wire.lane, wire.told);
            let session = self.session(key)?;
            if !session.lanes.contains_key(&lane) {
                continue;
            }
            let stream = session.link.as_ref().map(|link| link.stream);
            let done = match own {
                true => Some(told),
                false => {
                    let known = stream.and_then(|stream| self.conversations.get(&stream));
                    known.and_then(|known| known.session.as_ref()).and_then(|session| session.progress(lane))
                }
            };
            let Some(due) = done.map(|done| done + 1) else { continue };
            let Some((_, part)) = parts.iter().find(|(sequence, _)| *sequence == due) else { continue };
            let part = Part { payload: payload.clone(), index: *part };
            let first = half.holding.words.start;
            let place = |address: u64| ((address - BASE) / 8) as usize - first;
            let words = part.pieces().map(|piece| {
                let at = place(if own { piece.local } else { piece.remote });
                at..at + piece.length as usize / 8
            });
            return Some((node, half.clone(), words.collect()));
        }
        None
    }

    /// It comes out, after it has touched what it went inside for.
    pub(super) fn unstick(&mut self, node: usize, boot: u32) {
        let Some(stuck) = self.daemon(node, boot).and_then(|daemon| daemon.stuck.take()) else { return };
        let Stuck { out, number, own, half, words } = stuck;
        let transfer = &self.transfers[&number];
        let held = if own { &transfer.local } else { &transfer.remote };
        let process =
            self.places[half.place].process.as_ref().filter(|process| process.incarnation == half.who);
        if let Some(process) = process {
            assert!(
                held.is_some(),
                "I1: a call is still at the memory of transfer {number}: {:?}",
                transfer.end
            );
            assert!(process.owns(&half.holding));
            match half.holding.role {
                Role::Source => {
                    let checked = process.check(&half.holding, false);
                    assert_eq!(checked, Ok(()), "I1: a source changed while it was read");
                }
                Role::Destination => words.into_iter().for_each(|words| process.touch(&half.holding, words)),
            }
        }
        // Nobody waits where the daemon was stopped for good.
        let _ = out.send(());
    }
}

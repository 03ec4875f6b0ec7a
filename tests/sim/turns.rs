//! What threads and kernels do by themselves, one turn at a time: lanes, driver calls, bytes on wires.

use kvferryd::domain::BootId;

use super::{
    daemon::Daemon,
    lanes::{self, WireId},
    world::{HEARTBEAT_US, Happening, MOST_MOVED, REVIEW_US, World},
};

impl World {
    /// Sees to it that lanes and driver calls get their turns.
    pub(super) fn make_due(&mut self, node: usize) {
        let boot = self.nodes[node].boots;
        let turn_in = self.dice.within(1, 300);
        let call_in = match self.dice.percent(3) {
            true => self.dice.within(1, 700_000),
            false => self.dice.within(1, 3_000),
        };
        let Some(daemon) = &mut self.nodes[node].daemon else { return };
        let turn = !std::mem::replace(&mut daemon.turn_due, true);
        let call =
            daemon.registrar.stats().queue_length > 0 && !std::mem::replace(&mut daemon.call_due, true);
        if turn {
            self.after(turn_in, Happening::Turn(node, boot));
        }
        if call {
            self.after(call_in, Happening::Drive(node, boot));
        }
    }

    pub(super) fn turn(&mut self, node: usize, boot: u32) {
        let Some(daemon) = self.daemon(node, boot) else { return };
        daemon.turn_due = false;
        if daemon.stuck.is_some() {
            // Due again when it comes out of its call.
            return;
        }
        let ready = daemon.turns.round().expect("an epoll");
        daemon.turn_due = ready;
        self.wires_due(node);
        if ready {
            let soon = self.dice.within(1, 300);
            self.after(soon, Happening::Turn(node, boot));
        }
    }

    pub(super) fn review(&mut self, node: usize, boot: u32) {
        let Some(daemon) = self.daemon(node, boot) else { return };
        if daemon.stuck.is_none() {
            daemon.turns.review();
        }
        self.after(REVIEW_US, Happening::Review(node, boot));
    }

    pub(super) fn drive(&mut self, node: usize, boot: u32) {
        let Some(daemon) = self.daemon(node, boot) else { return };
        let more = daemon.calls.step();
        daemon.call_due = more;
        if more {
            let wait = self.dice.within(1, 2_000);
            self.after(wait, Happening::Drive(node, boot));
        }
    }

    /// A daemon starts, and its engines come back to it.
    pub(super) fn boot(&mut self, node: usize) {
        if self.nodes[node].daemon.is_some() {
            return;
        }
        self.nodes[node].boots += 1;
        let boot = self.nodes[node].boots;
        let id = BootId(self.dice.bytes());
        let mut daemon = Daemon::start(id);
        daemon.beat_at_us = self.now_us + HEARTBEAT_US;
        self.nodes[node].daemon = Some(daemon);
        self.say(format_args!("node {node} boots, run {boot}"));
        self.after(HEARTBEAT_US, Happening::Beat(node, boot));
        self.after(REVIEW_US, Happening::Review(node, boot));
        let places: Vec<usize> = (0..self.places.len()).filter(|at| self.places[*at].node == node).collect();
        for place in places {
            self.come(place);
        }
    }

    /// Has an engine attach after a while.
    pub(super) fn come(&mut self, place: usize) {
        if !std::mem::replace(&mut self.places[place].coming, true) {
            let wait = self.dice.within(1_000, 300_000);
            self.after(wait, Happening::Attach(place));
        }
    }

    /// Bytes may move on the wires of a node.
    pub(super) fn wires_due(&mut self, node: usize) {
        let idle = self
            .wires
            .iter()
            .filter(|(_, wire)| !wire.due && (wire.from_node == node || wire.to_node == node));
        for wire in lanes::ready(idle.map(|(id, wire)| (*id, wire))) {
            self.wire_due(wire, 0);
        }
    }

    fn wire_due(&mut self, id: WireId, at_least_us: u64) {
        let wait = self.delay().min(5_000);
        let at = at_least_us.max(self.now_us + wait);
        if let Some(wire) = self.wires.get_mut(&id) {
            wire.due = true;
            self.at(at, Happening::Wire(id));
        }
    }

    pub(super) fn move_bytes(&mut self, id: WireId) {
        let most = [64, 4096, 20_000, 100_000, MOST_MOVED][self.dice.below(5)];
        let Some((from, to)) = self.wires.get(&id).map(|wire| (wire.from_node, wire.to_node)) else { return };
        let blocked = [self.blocked(from, to), self.blocked(to, from)];
        let now = self.now_us;
        let Some(wire) = self.wires.get_mut(&id) else { return };
        wire.due = false;
        let (moved, wait) = wire.tick(now, blocked, &mut self.room[..most]);
        if let Some(until) = wait {
            self.wire_due(id, until);
        } else if moved {
            self.wire_due(id, 0);
        }
        if moved {
            self.make_due(from);
            self.make_due(to);
        }
    }
}

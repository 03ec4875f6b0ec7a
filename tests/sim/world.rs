//! The loop: what happens next, to whom, and what follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kvferryd::{
    domain::Incarnation,
    policy::{HealthPolicy, RetryPolicy},
    session::outbound::Policy,
};

use super::{
    book::Transfer,
    daemon::{Daemon, Life, SessionKey},
    dice::Dice,
    lanes::{Wire, WireId},
    process::Process,
    revoking::Revoke,
    stream::{Down, Stream, StreamId, Up},
    target::Conversation,
    trace::Trace,
};

/// From one beat to the next.
pub(super) const HEARTBEAT_US: u64 = 500_000;
/// A peer silent for so long is dead.
pub(super) const SILENCE_US: u64 = 3_000_000;
/// A thread's look at lanes that hold leases.
pub(super) const REVIEW_US: u64 = 50_000;
/// Bytes that move on a wire at once.
pub(super) const MOST_MOVED: usize = 200_000;
/// A life in which so much happens is going round in circles.
const MOST_HAPPENINGS: u64 = 3_000_000;

/// What the loop carries out.
#[derive(Debug)]
pub(super) enum Happening {
    /// Somebody calls.
    Call,
    /// Something breaks.
    Fault,
    /// The oracle looks.
    Check,
    /// A node's lane thread has a turn.
    Turn(usize, u32),
    /// It looks after stuck lanes.
    Review(usize, u32),
    /// Its registrar makes a driver call.
    Drive(usize, u32),
    /// Its beat.
    Beat(usize, u32),
    /// Its lane thread comes out of the call it was stuck in.
    Unstick(usize, u32),
    /// A session's core is woken.
    Wake(SessionKey),
    /// A message reaches the target.
    Up(StreamId, Up),
    /// A message reaches the initiator.
    Down(StreamId, Down),
    /// An open took too long.
    OpenTimeout(SessionKey, u64),
    /// A handshake took too long at the target.
    HandshakeTimeout(StreamId),
    /// A data connection is up at the initiator.
    LaneUp(WireId),
    /// It reaches the target.
    LaneArrives(WireId),
    /// Bytes move on a wire.
    Wire(WireId),
    /// An engine process starts, or comes back, and attaches.
    Attach(usize),
    /// A daemon starts.
    Boot(usize),
}

/// A machine.
pub(super) struct Node {
    /// The present run of its daemon.
    pub(super) daemon: Option<Daemon>,
    /// How many runs there were.
    pub(super) boots: u32,
    /// Its daemon is stopped until then.
    pub(super) frozen_until_us: u64,
}

/// Where an engine lives.
#[derive(Debug)]
pub(super) struct Place {
    /// On which machine.
    pub(super) node: usize,
    /// Its process, while there is one.
    pub(super) process: Option<Process>,
    /// Whom it has met where: survives its daemon, not itself.
    pub(super) known: BTreeMap<usize, Incarnation>,
    /// Its attach, while its endpoint listens.
    pub(super) life: Option<Life>,
    /// An attach is on its way.
    pub(super) coming: bool,
}

/// All of it.
pub(super) struct World {
    /// Microseconds since the beginning.
    pub(super) now_us: u64,
    base: Instant,
    /// Every choice.
    pub(super) dice: Dice,
    /// What is said.
    pub(super) trace: Arc<Mutex<Trace>>,
    queue: BTreeMap<(u64, u64), Happening>,
    serial: u64,
    /// Machines.
    pub(super) nodes: Vec<Node>,
    /// Engines.
    pub(super) places: Vec<Place>,
    /// Attaches so far.
    pub(super) lives: Life,
    /// Control streams.
    pub(super) streams: BTreeMap<StreamId, Stream>,
    /// Their targets' ends.
    pub(super) conversations: BTreeMap<StreamId, Conversation>,
    /// Streams so far.
    pub(super) stream_count: StreamId,
    /// Data connections.
    pub(super) wires: BTreeMap<WireId, Wire>,
    /// Where bytes are between two sockets.
    pub(super) room: Vec<u8>,
    /// Data connections so far.
    pub(super) wire_count: WireId,
    /// Which wire is which lane of whose attach.
    pub(super) lanes: BTreeMap<(Life, u64), WireId>,
    /// Nothing goes from the one node to the other before then.
    pub(super) blocked_us: BTreeMap<(usize, usize), u64>,
    /// What engines asked for, by number.
    pub(super) transfers: BTreeMap<u32, Transfer>,
    /// Numbers of those that hold memory or are not over.
    pub(super) open: BTreeSet<u32>,
    /// How sessions are run in this life.
    pub(super) policy: Policy,
    /// Calls and faults go on until then.
    pub(super) quiet_from_us: u64,
    /// Most microseconds of an ordinary delay in this life.
    pub(super) delay_us: u64,
    /// Faults in a hundred occasions.
    pub(super) fault_chance: u64,
    /// Revocations that are not settled, by ticket.
    pub(super) revokes: BTreeMap<u64, Revoke>,
    /// Ranges that a daemon keeps of each endpoint's revocations in this life.
    pub(super) revocation_limit: usize,
    /// Whether the daemons of this life have agreed on checksums: whatever the faults do, one that does not fit must
    /// never be the reason for anything.
    pub(super) checksums: bool,
    /// Probes and revocations asked for so far.
    pub(super) tickets: u64,
}

impl World {
    /// A world before anything happened.
    pub(super) fn new(seed: u64, trace: Arc<Mutex<Trace>>) -> Self {
        let mut dice = Dice::new(seed);
        let node_count = dice.within(2, 3) as usize;
        let nodes = (0..node_count).map(|_| Node { daemon: None, boots: 0, frozen_until_us: 0 }).collect();
        let place = |node| Place { node, process: None, known: BTreeMap::new(), life: None, coming: false };
        let mut places: Vec<Place> = (0..node_count).map(place).collect();
        if dice.percent(30) {
            places.push(place(0));
        }
        let policy = policy(&mut dice);
        let quiet_from_us = dice.within(2, 12) * 1_000_000;
        let delay_us = [200, 2_000, 20_000][dice.below(3)];
        let fault_chance = [0, 10, 30, 60][dice.below(4)];
        let revocation_limit = [2, 64, 64][dice.below(3)];
        let checksums = dice.percent(50);
        let mut world = Self {
            now_us: 0,
            base: Instant::now(),
            dice,
            trace,
            queue: BTreeMap::new(),
            serial: 0,
            nodes,
            places,
            lives: 0,
            streams: BTreeMap::new(),
            conversations: BTreeMap::new(),
            stream_count: 0,
            wires: BTreeMap::new(),
            room: vec![0; MOST_MOVED],
            wire_count: 0,
            lanes: BTreeMap::new(),
            blocked_us: BTreeMap::new(),
            transfers: BTreeMap::new(),
            open: BTreeSet::new(),
            policy,
            quiet_from_us,
            delay_us,
            fault_chance,
            revokes: BTreeMap::new(),
            revocation_limit,
            checksums,
            tickets: 0,
        };
        for node in 0..world.nodes.len() {
            world.after(0, Happening::Boot(node));
        }
        world.after(100_000, Happening::Call);
        world.after(150_000, Happening::Fault);
        world.after(200_000, Happening::Check);
        world
    }

    /// Virtual time as production sees it.
    pub(super) fn instant(&self) -> Instant {
        self.base + Duration::from_micros(self.now_us)
    }

    /// A moment of production's in microseconds, never before it.
    pub(super) fn micros(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.base).as_nanos().div_ceil(1000) as u64
    }

    /// Says what happens.
    pub(super) fn say(&self, what: fmt::Arguments<'_>) {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).line(self.now_us, what);
    }

    /// Counts what happened.
    pub(super) fn count(&self, what: &'static str) {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).count(what);
    }

    /// Whether calls and faults are over.
    pub(super) fn is_quiet(&self) -> bool {
        self.now_us >= self.quiet_from_us
    }

    /// Has something happen later.
    pub(super) fn after(&mut self, delay_us: u64, what: Happening) {
        self.at(self.now_us + delay_us, what);
    }

    /// Has something happen then.
    pub(super) fn at(&mut self, at_us: u64, what: Happening) {
        self.serial += 1;
        self.queue.insert((at_us.max(self.now_us), self.serial), what);
    }

    /// An ordinary delay.
    pub(super) fn delay(&mut self) -> u64 {
        match self.dice.percent(5) {
            true => self.dice.within(1, self.delay_us * 20),
            false => self.dice.within(1, self.delay_us),
        }
    }

    /// Until when nothing goes from the one node to the other.
    pub(super) fn blocked(&self, from: usize, to: usize) -> u64 {
        self.blocked_us.get(&(from, to)).copied().unwrap_or(0)
    }

    /// The node a session's attach lives on, while it does.
    pub(super) fn home(&self, life: Life) -> Option<usize> {
        let has = |node: &Node| node.daemon.as_ref().is_some_and(|daemon| daemon.engines.contains_key(&life));
        self.nodes.iter().position(has)
    }

    /// Lets happen what is due until nothing is left or that moment has come; false where nothing is left.
    pub(super) fn run_until(&mut self, end_us: u64) -> bool {
        while let Some((&(at, serial), _)) = self.queue.first_key_value() {
            if at > end_us {
                self.now_us = end_us;
                return true;
            }
            assert!(self.serial < MOST_HAPPENINGS, "it goes round in circles");
            let Some(what) = self.queue.remove(&(at, serial)) else { continue };
            self.now_us = at;
            self.happen(what);
        }
        false
    }

    /// Whose daemon must be awake for it.
    fn node_of(&self, what: &Happening) -> Option<usize> {
        match what {
            Happening::Turn(node, _)
            | Happening::Review(node, _)
            | Happening::Drive(node, _)
            | Happening::Beat(node, _)
            | Happening::Unstick(node, _) => Some(*node),
            Happening::Wake(key) | Happening::OpenTimeout(key, _) => self.home(key.life),
            Happening::Up(stream, _) | Happening::HandshakeTimeout(stream) => {
                self.streams.get(stream).map(|stream| stream.to_node)
            }
            Happening::Down(stream, _) => self.streams.get(stream).map(|stream| stream.from_node),
            Happening::LaneUp(wire) => self.wires.get(wire).map(|wire| wire.from_node),
            Happening::LaneArrives(wire) => self.wires.get(wire).map(|wire| wire.to_node),
            Happening::Attach(place) => self.places.get(*place).map(|place| place.node),
            Happening::Call
            | Happening::Fault
            | Happening::Check
            | Happening::Wire(_)
            | Happening::Boot(_) => None,
        }
    }

    fn happen(&mut self, what: Happening) {
        let node = self.node_of(&what);
        if let Some(until) = node.map(|node| self.nodes[node].frozen_until_us).filter(|at| self.now_us < *at)
        {
            return self.at(until, what);
        }
        let quiet = matches!(what, Happening::Turn(..) | Happening::Review(..));
        match what {
            Happening::Call => self.call(),
            Happening::Fault => self.fault(),
            Happening::Check => self.check(),
            Happening::Turn(node, boot) => self.turn(node, boot),
            Happening::Review(node, boot) => self.review(node, boot),
            Happening::Drive(node, boot) => self.drive(node, boot),
            Happening::Beat(node, boot) => self.beat(node, boot),
            Happening::Unstick(node, boot) => self.unstick(node, boot),
            Happening::Wake(key) => self.wake(key),
            Happening::Up(stream, message) => self.hear_up(stream, message),
            Happening::Down(stream, message) => self.hear_down(stream, message),
            Happening::OpenTimeout(key, number) => self.open_timeout(key, number),
            Happening::HandshakeTimeout(stream) => self.handshake_timeout(stream),
            Happening::LaneUp(wire) => self.lane_up(wire),
            Happening::LaneArrives(wire) => self.lane_arrives(wire),
            Happening::Wire(wire) => self.move_bytes(wire),
            Happening::Attach(place) => self.attach(place),
            Happening::Boot(node) => self.boot(node),
        }
        if let Some(node) = node {
            let heard = self.settle(node);
            if heard || !quiet {
                self.make_due(node);
            }
        }
    }

    /// The daemon of a node, if it is that run of it.
    pub(super) fn daemon(&mut self, node: usize, boot: u32) -> Option<&mut Daemon> {
        let node = self.nodes.get_mut(node).filter(|node| node.boots == boot)?;
        node.daemon.as_mut()
    }

    /// Lets a node's futures, lanes and sessions tell each other what there is to tell; whether there was any.
    pub(super) fn settle(&mut self, node: usize) -> bool {
        let mut heard = false;
        loop {
            let Some(daemon) = &self.nodes[node].daemon else { return heard };
            daemon.pump();
            let mail = daemon.mail.clone();
            if let Some((key, lane, event)) = mail.lane_event() {
                self.lane_event(key, lane, event);
            } else if let Some(answer) = mail.answer() {
                self.answer(node, answer);
            } else if !self.push_tables(node) && !self.push_revocations(node) && !self.answer_revokes(node) {
                return heard;
            }
            heard = true;
        }
    }
}

fn policy(dice: &mut Dice) -> Policy {
    let ms = Duration::from_millis;
    Policy {
        health: HealthPolicy { failure_threshold: dice.within(1, 4) as u32, probe_max: ms(1000) },
        retry: RetryPolicy {
            attempts: 3,
            backoff: ms(50),
            deadline: ms(30_000),
            progress_timeout: ms([2_000, 10_000][dice.below(2)]),
            reconnect: ms(5_000),
        },
        pin_idle: ms(600_000),
        window_parts: [1, 4, 32][dice.below(3)],
        tcp_lanes: dice.within(1, 3) as usize,
        peer_wait: ms(3_000),
        settle: ms(5_000),
    }
}

//! A whole life: trouble, healing, one more transfer each way, and the end of everything.

use std::sync::atomic::Ordering::Relaxed;

use kvferryd::{
    domain::{Failure, Op, Outcome, PeerHalf, Reason},
    session::outbound::{Event, State},
};

use super::{
    daemon::SessionKey,
    lanes::Wire,
    process::REGIONS,
    world::{SILENCE_US, World},
};

/// Healing takes no longer.
const HEALING_US: u64 = 90_000_000;
/// A transfer on a healthy session takes no longer.
const CARRYING_US: u64 = 20_000_000;
const STEP_US: u64 = 250_000;

impl World {
    /// Lives it.
    pub(super) fn live(&mut self) {
        self.run_until(self.quiet_from_us);
        self.heal();
        self.carry_again();
        self.end_all();
    }

    /// From now on nothing breaks any more, and what is broken mends.
    fn heal(&mut self) {
        self.say(format_args!("from here on all is well"));
        self.blocked_us.clear();
        for node in &mut self.nodes {
            node.frozen_until_us = node.frozen_until_us.min(self.now_us);
            if let Some(daemon) = &node.daemon {
                daemon.driver.fails_in.store(0, Relaxed);
            }
        }
        for wire in self.wires.values_mut() {
            wire.flows.iter_mut().for_each(|flow| flow.held_until_us = flow.held_until_us.min(self.now_us));
        }
        let until = self.now_us + HEALING_US;
        while self.now_us < until && !self.is_well() {
            let next = self.now_us + STEP_US;
            self.run_until(next);
            self.reset_all_mistaken();
            if self.now_us + HEALING_US / 2 > until {
                self.reset_unconfirmed();
            }
        }
        let unwell = self.unwell();
        assert!(unwell.is_empty(), "it does not heal: {unwell:?}");
    }

    fn reset_all_mistaken(&mut self) {
        let lives: Vec<u32> = self.places.iter().filter_map(|place| place.life).collect();
        for life in lives {
            self.reset_mistaken(life, false);
        }
        for node in 0..self.nodes.len() {
            self.settle(node);
            self.make_due(node);
        }
    }

    /// What nobody confirmed is out of reach when the lanes that carried it are closed.
    fn reset_unconfirmed(&mut self) {
        let ended: Vec<SessionKey> = self
            .open
            .iter()
            .map(|at| &self.transfers[at])
            .filter(|t| t.end.is_some())
            .map(|t| t.key)
            .collect();
        ended.into_iter().for_each(|key| self.feed(key, Event::Reset));
    }

    fn is_well(&mut self) -> bool {
        self.unwell().is_empty()
    }

    /// What is not as it should be.
    fn unwell(&mut self) -> Vec<String> {
        let mut unwell = Vec::new();
        for (at, place) in self.places.iter().enumerate() {
            if place.life.is_none() || !(0..REGIONS).all(|region| self.is_live(at, region)) {
                unwell.push(format!("place {at} is not attached with all its memory"));
            }
        }
        for number in &self.open {
            let transfer = &self.transfers[number];
            let lanes: Vec<String> = transfer
                .sent
                .values()
                .flatten()
                .filter_map(|id| self.wires.get(id))
                .map(Wire::describe)
                .collect();
            unwell.push(format!("transfer {number} is open: {} {:?} {lanes:?}", transfer.key, transfer.end));
        }
        unwell.extend(self.revokes.keys().map(|ticket| format!("revocation {ticket} is not settled")));
        for daemon in self.nodes.iter().filter_map(|node| node.daemon.as_ref()) {
            for (life, engine) in &daemon.engines {
                for (to, session) in &engine.sessions {
                    let state = session.core.state();
                    if session.probes > 0 {
                        unwell
                            .push(format!("{} probes of life{life}->p{to} are not answered", session.probes));
                    }
                    if state == State::Failed || (engine.gone.is_some() && !session.core.is_over()) {
                        unwell.push(format!("session life{life}->p{to} is {state:?}"));
                    }
                }
            }
        }
        unwell
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let places = 0..self.places.len();
        places
            .clone()
            .flat_map(|from| places.clone().map(move |to| (from, to)))
            .filter(|(a, b)| a != b)
            .collect()
    }

    /// Liveness: every session that there is, or may be, carries bytes both ways.
    fn carry_again(&mut self) {
        // A stream that is dead while its lanes live is found out when these are idle for a while (I9).
        self.run_until(self.now_us + 2 * SILENCE_US);
        for (place, to) in self.pairs() {
            if let Some(life) = self.places[place].life {
                self.ensure_session(SessionKey { life, to });
            }
        }
        self.reset_all_mistaken();
        // Tables are pushed; who asks before the newest one came may be told that a region changed.
        self.run_until(self.now_us + 2_000_000);
        // Who was away when memory was revoked, and given to others, learns of it by being refused once.
        for (place, to, op) in self.carry(self.trips()) {
            let again = self.carry(vec![(place, to, op)]);
            assert!(again.is_empty(), "p{place}->p{to}: {op:?} is refused again");
        }
    }

    fn trips(&self) -> Vec<(usize, usize, Op)> {
        self.pairs()
            .into_iter()
            .flat_map(|(from, to)| [Op::Write, Op::Read].map(|op| (from, to, op)))
            .collect()
    }

    /// A transfer for each, and all of them DONE; gives those that were refused as revoked.
    fn carry(&mut self, trips: Vec<(usize, usize, Op)>) -> Vec<(usize, usize, Op)> {
        let mut asked = Vec::new();
        for (place, to, op) in trips {
            let Some(life) = self.places[place].life else { continue };
            if let Some(number) = self.begin((life, place), to, op, 3, 15_000) {
                asked.push((number, (place, to, op)));
            }
        }
        assert!(!asked.is_empty(), "there is room for a transfer");
        for node in 0..self.nodes.len() {
            self.settle(node);
            self.make_due(node);
        }
        let until = self.now_us + CARRYING_US;
        while self.now_us < until && asked.iter().any(|(number, _)| self.transfers[number].end.is_none()) {
            let next = self.now_us + STEP_US;
            self.run_until(next);
        }
        let mut refused = Vec::new();
        for (number, trip) in asked {
            let transfer = &self.transfers[&number];
            if transfer.end == Some((Outcome::Failed, PeerHalf::Confirmed)) && self.is_revoked(number) {
                refused.push(trip);
                continue;
            }
            let expected = Some((Outcome::Done, PeerHalf::Confirmed));
            assert_eq!(transfer.end, expected, "all is well, but transfer {number} ({:?})", transfer.key);
        }
        refused
    }

    /// All engines leave; then nothing is left of them.
    fn end_all(&mut self) {
        for place in &self.places {
            if let Some(process) = &place.process {
                assert_eq!(process.check_all_free(), Ok(()), "I1: in the end");
            }
        }
        let lives: Vec<u32> = self.places.iter().filter_map(|place| place.life).collect();
        for place in &mut self.places {
            // Nobody comes back.
            place.coming = true;
        }
        for life in lives {
            self.leave(life, Failure::plain(Reason::Draining));
        }
        self.run_until(self.now_us + 2 * CARRYING_US);
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(daemon) = &node.daemon else { continue };
            let left: Vec<&u32> = daemon.engines.keys().collect();
            assert!(left.is_empty(), "node {at}: lives {left:?} are not released");
            assert_eq!(daemon.carriers.lanes(), 0, "node {at} has lanes left");
            assert_eq!(daemon.driver.live.load(Relaxed), 0, "node {at} has mappings left");
        }
        assert!(self.conversations.is_empty(), "conversations are left");
        for place in &self.places {
            if let Some(process) = &place.process {
                assert_eq!(process.check_all_free(), Ok(()), "I1: after the end");
            }
        }
    }
}

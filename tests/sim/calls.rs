//! What engines ask for.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use kvferryd::{
    domain::{Epoch, Failure, Incarnation, Op, Reason, Report, SliceBatch, Tag, TransferId},
    policy::RetryPolicy,
    session::outbound::Event,
    transfer::{
        log::Admission,
        plan,
        run::{Admitted, Request},
    },
};

use super::{
    book::{Half, Transfer, number_of},
    daemon::{Life, Session, SessionKey},
    process::{Holding, Order, Role},
    revoked::Arrival,
    world::{Happening, World},
};

/// Words of a part of single words: as many as a part has runs.
const PART_WORDS: usize = 1022;
/// Transfers under way at once.
const MOST_OPEN: usize = 24;
/// An answer may come so much after it is due.
const SLACK_US: u64 = 2_000_000;

/// What an engine asks for.
struct TransferOrder {
    id: TransferId,
    op: Op,
    batch: SliceBatch,
    tag: Option<Tag>,
}

impl World {
    /// Engines that can be asked for something now.
    fn callers(&self) -> Vec<(usize, Life)> {
        let awake = |node: usize| self.nodes[node].frozen_until_us <= self.now_us;
        let places = self.places.iter().enumerate().filter(|(_, place)| awake(place.node));
        places.filter_map(|(at, place)| Some((at, place.life?))).collect()
    }

    pub(super) fn call(&mut self) {
        if self.is_quiet() {
            return;
        }
        let next = self.dice.within(1_000, 120_000);
        self.after(next, Happening::Call);
        let Some((place, life)) = self.dice.pick(&self.callers()) else { return };
        match self.dice.below(100) {
            0..60 => {
                let burst = self.dice.within(1, 4);
                for _ in 0..burst {
                    self.transfer(life, place);
                }
            }
            60..70 => self.cancel(),
            70..78 => self.revoke_something(life, place),
            78..82 => {
                let region = self.dice.below(super::process::REGIONS);
                self.unregister(life, region);
            }
            82..86 => self.probe(life, place),
            86..92 => self.reset_mistaken(life, false),
            92..95 => self.reset_mistaken(life, true),
            _ => self.ask_nonsense(life, place),
        }
        let node = self.places[place].node;
        self.settle(node);
        self.make_due(node);
    }

    /// A transfer to a random neighbour.
    fn transfer(&mut self, life: Life, place: usize) {
        let others: Vec<usize> = (0..self.places.len()).filter(|at| *at != place).collect();
        let Some(to) = self.dice.pick(&others) else { return };
        let op = if self.dice.percent(50) { Op::Write } else { Op::Read };
        let deadline = [30_000, 30_000, 8_000, 700][self.dice.below(4)];
        let attempts = self.dice.within(1, 3) as u32;
        self.begin((life, place), to, op, attempts, deadline);
    }

    /// A transfer; its number, where there was room for it.
    pub(super) fn begin(
        &mut self,
        (life, place): (Life, usize),
        to: usize,
        op: Op,
        attempts: u32,
        deadline_ms: u64,
    ) -> Option<u32> {
        if self.open.len() >= MOST_OPEN {
            return None;
        }
        let number = self.transfers.len() as u32 + 1;
        let (words, block) = match self.dice.below(4) {
            0 => (self.dice.within(1, 40) as usize * 64, 0),
            1 => (self.dice.within(1, 30) as usize * 64, 64),
            _ => (self.dice.within(1, 5) as usize * PART_WORDS, 1),
        };
        let order = if block == 0 { Order::Forward } else { Order::Reversed(block) };
        let (near, far) = match op {
            Op::Write => (Role::Source, Role::Destination),
            Op::Read => (Role::Destination, Role::Source),
        };
        let local = self.give(place, (number, words), near, Order::Forward)?;
        let Some(remote) = self.give(to, (number, words), far, order) else {
            self.take_back(&local);
            return None;
        };
        let key = SessionKey { life, to };
        let tag = if !self.is_quiet() && self.dice.percent(50) { Some(self.a_tag()) } else { None };
        let known = self.known_there(key);
        let late =
            if !self.is_quiet() && self.dice.percent(10) { self.revoked_since(to, known) } else { None };
        let (mut block, mut named) = (block, remote.holding.clone());
        let barred = late.is_some() || self.is_dead(to, tag);
        if let Some(words) = late {
            // Its caller has not heard that these are somebody else's by now.
            self.count("call into memory revoked before");
            let end = words.end.min(words.start + local.holding.words.len());
            (block, named.words) = (0, words.start..end);
        }
        let who = remote.who;
        let mut near = local.holding.clone();
        near.words.end = near.words.start + named.words.len();
        let batch = slices(&near, &named, block);
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        let id = TransferId(id);
        let retry =
            RetryPolicy { attempts, deadline: Duration::from_millis(deadline_ms), ..self.policy.retry };
        let settle_us = self.policy.settle.as_micros() as u64;
        let due_us = self.now_us + deadline_ms * 1000 + settle_us + SLACK_US;
        let own_epoch = self.engine(life).map_or(Epoch(0), |engine| engine.memory.revocations().epoch());
        let arrival = Arrival {
            near: near.words,
            far: named.words,
            who,
            known: known.filter(|(met, _)| *met == who).map(|(_, epoch)| epoch),
            own_epoch,
            barred,
        };
        let remote = if barred {
            self.take_back(&remote);
            None
        } else {
            Some(remote)
        };
        let entry = Transfer {
            id,
            key,
            op,
            local: Some(local),
            remote,
            due_us,
            answered: false,
            end: None,
            orphan: false,
            sent: BTreeMap::new(),
            payload: None,
            tag,
            arrival,
            last: BTreeMap::new(),
        };
        self.transfers.insert(number, entry);
        self.open.insert(number);
        self.say(format_args!(
            "transfer {number}: {op:?} {key}, {words} words by {block}, {attempts} attempts"
        ));
        self.count(if op == Op::Write { "call WRITE" } else { "call READ" });
        let order = TransferOrder { id, op, batch, tag };
        self.submit(key, order, (known, own_epoch), retry);
        Some(number)
    }

    fn give(&mut self, place: usize, what: (u32, usize), role: Role, order: Order) -> Option<Half> {
        let process = self.places[place].process.as_mut()?;
        let who = process.incarnation;
        let holding = process.give(&mut self.dice, what, role, order);
        holding.unwrap_or_else(|wrong| panic!("I1: place {place}: {wrong}")).map(|holding| Half {
            place,
            who,
            holding,
        })
    }

    /// As `Engine::transfer` does.
    fn submit(
        &mut self,
        key: SessionKey,
        TransferOrder { id, op, batch, tag }: TransferOrder,
        (known, own_epoch): (Option<(Incarnation, Epoch)>, Epoch),
        policy: RetryPolicy,
    ) {
        let received = self.instant();
        if let Some(failure) = self.refuse_dead(key, tag) {
            return self.finish(number_of(id), Report::refused(id, failure));
        }
        let Some(engine) = self.engine(key.life) else { return };
        let local = match plan::check_local(&batch, &engine.memory.view().table) {
            Ok(local) => local,
            Err(failure) => return self.finish(number_of(id), Report::refused(id, failure)),
        };
        let teller = match engine.log.admit(id) {
            Ok(Admission::New(teller, _)) => teller,
            Ok(Admission::Known(_)) => return self.count("call joined"),
            Err(failure) => return self.finish(number_of(id), Report::refused(id, failure)),
        };
        if !self.ensure_session(key) {
            return;
        }
        let admitted = Admitted {
            teller: Some(teller),
            id,
            op,
            request: Arc::new(Request::Slices(batch)),
            local,
            failure_threshold: None,
            tag,
            policy,
            received,
            known,
            own_epoch,
        };
        self.feed(key, Event::Submit(Box::new(admitted)));
    }

    fn cancel(&mut self) {
        let open: Vec<u32> = self.open.iter().copied().collect();
        let Some(number) = self.dice.pick(&open) else { return };
        let (id, key) = (self.transfers[&number].id, self.transfers[&number].key);
        let Some(node) = self.home(key.life).filter(|node| self.nodes[*node].frozen_until_us <= self.now_us)
        else {
            return;
        };
        self.count("call cancel");
        self.feed(key, Event::End(id, Failure::plain(Reason::Cancelled)));
        self.settle(node);
        self.make_due(node);
    }

    /// Callers that meant a process which died, on sessions that never met it, think again: nothing but a pin
    /// would keep their transfers from whoever comes next.
    pub(super) fn cancel_unpinned(&mut self, place: usize, dead: Incarnation) {
        let meant =
            |known: &Transfer| known.end.is_none() && known.key.to == place && known.arrival.who == dead;
        let open: Vec<u32> =
            self.open.iter().copied().filter(|number| meant(&self.transfers[number])).collect();
        for number in open {
            let (id, key) = (self.transfers[&number].id, self.transfers[&number].key);
            let unpinned = |session: &&mut Session| session.core.summary().incarnation.is_none();
            if self.session(key).filter(unpinned).is_some() {
                self.feed(key, Event::End(id, Failure::plain(Reason::Cancelled)));
            }
        }
    }

    fn probe(&mut self, life: Life, place: usize) {
        let others: Vec<usize> = (0..self.places.len()).filter(|at| *at != place).collect();
        let Some(to) = self.dice.pick(&others) else { return };
        let key = SessionKey { life, to };
        if self.ensure_session(key) {
            let Some(session) = self.session(key) else { return };
            session.probes += 1;
            self.tickets += 1;
            self.count("call probe");
            self.feed(key, Event::Probe(self.tickets));
        }
    }

    /// Resets sessions that are pinned to an engine that is gone, or any.
    pub(super) fn reset_mistaken(&mut self, life: Life, any: bool) {
        let Some(engine) = self.engine(life) else { return };
        let pins: Vec<(usize, Option<Incarnation>)> =
            engine.sessions.iter().map(|(to, session)| (*to, session.core.summary().incarnation)).collect();
        for (to, pin) in pins {
            let there = self.places[to].process.as_ref().map(|process| process.incarnation);
            if any || (pin.is_some() && there.is_some() && pin != there) {
                self.count("call reset");
                self.feed(SessionKey { life, to }, Event::Reset);
            }
        }
    }

    /// Memory that nobody registered, at either end, and an id that was used before.
    fn ask_nonsense(&mut self, life: Life, place: usize) {
        let others: Vec<usize> = (0..self.places.len()).filter(|at| *at != place).collect();
        let Some(to) = self.dice.pick(&others) else { return };
        let key = SessionKey { life, to };
        let mine: Vec<TransferId> =
            self.transfers.values().filter(|known| known.key == key).map(|known| known.id).collect();
        let Some(id) = self.dice.pick(&mine).filter(|_| self.dice.percent(50)) else { return };
        self.count("call twice");
        let remembered = self.engine(life).is_some_and(|engine| engine.log.find(id).is_some());
        if remembered {
            let batch = SliceBatch { uniform: Some(8), ..SliceBatch::default() };
            let order = TransferOrder { id, op: Op::Write, batch, tag: None };
            self.submit(key, order, (None, Epoch(0)), self.policy.retry);
        }
    }
}

fn slices(local: &Holding, remote: &Holding, block: usize) -> SliceBatch {
    let words = local.words.len();
    if block == 0 {
        return SliceBatch {
            local: vec![local.address()],
            remote: vec![remote.address()],
            lengths: vec![],
            uniform: Some(words as u64 * 8),
        };
    }
    let blocks = words / block;
    let step = block as u64 * 8;
    SliceBatch {
        local: (0..blocks).map(|at| local.address() + at as u64 * step).collect(),
        remote: (0..blocks).map(|at| remote.address() + (blocks - 1 - at) as u64 * step).collect(),
        lengths: vec![],
        uniform: Some(step),
    }
}

//! What engines revoke: ranges and tags, in what peers do to their memory and in what they do themselves.
//!
//! The daemon's side is a likeness of `engine/revoke.rs`, `peer/revokes.rs` and what `peer/target.rs` tells; the
//! engine's side is one of the client library's book, which the next daemon is handed.
//!
//! The oracle: as soon as a revocation is SETTLED its words are somebody else's, though the transfers it hit are
//! still wanted by their callers. Callers go on asking for memory that was revoked before their daemons knew, and
//! with tags that are dead: none of that moves a word. And whoever ends REVOKED was hit.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use kvferryd::{
    domain::{AddressRange, Epoch, Failure, Incarnation, Reason, Tag, TransferId},
    policy::{RevocationLimits, RevocationList, Revocations, TagRevoked},
    session::outbound::{Event, PlanFailure},
};

use super::{
    book::Half,
    daemon::{Answer, Life, SessionKey},
    process::{Process, REGIONS},
    revoked::{Entry, What, addresses},
    stream::{Down, StreamId},
    target::Stage,
    world::World,
};

/// Tags that requests of a life carry.
const TAGS: u64 = 24;

/// A revocation that is not settled yet.
#[derive(Debug)]
pub(super) struct Revoke {
    life: Life,
    place: usize,
    who: Incarnation,
    epoch: Epoch,
    gate_is_quiet: bool,
    /// What each of the engine's sessions still has to settle; nothing before it has said.
    sessions: BTreeMap<SessionKey, Option<Vec<TransferId>>>,
    /// Transfers whose words there are free once it is settled.
    hit: Vec<u32>,
}

impl World {
    /// An engine revokes the words of some transfers, a whole region, a word in the midst of one, or a tag.
    pub(super) fn revoke_something(&mut self, life: Life, place: usize) {
        let Some(process) = &self.places[place].process else { return };
        let who = process.incarnation;
        let open = self.open.iter().map(|number| &self.transfers[number]);
        let halves = open.flat_map(|transfer| [&transfer.local, &transfer.remote]).flatten();
        let held: Vec<(usize, usize)> = halves
            .filter(|half| half.place == place && half.who == who)
            .map(|half| (half.holding.words.start, half.holding.words.end))
            .collect();
        let what = match self.dice.below(100) {
            0..30 => What::Tag(self.a_tag()),
            30..40 => What::Words(vec![Process::region_words(self.dice.below(REGIONS))]),
            kind => {
                let many = self.dice.within(1, 3);
                let picked: BTreeSet<(usize, usize)> =
                    (0..many).filter_map(|_| self.dice.pick(&held)).collect();
                let middle = |(from, to): (usize, usize)| (from + to) / 2;
                let words = picked.into_iter();
                let words: Vec<Range<usize>> = match kind {
                    40..50 => words.map(|at| middle(at)..middle(at) + 1).collect(),
                    _ => words.map(|(from, to)| from..to).collect(),
                };
                What::Words(words)
            }
        };
        if what != What::Words(vec![]) {
            self.revoke(life, place, what);
        }
    }

    pub(super) fn a_tag(&mut self) -> Tag {
        Tag([self.dice.within(1, TAGS) as u8; 16])
    }

    /// As `Engine::revoke` does.
    pub(super) fn revoke(&mut self, life: Life, place: usize, what: What) {
        let now = self.instant();
        let Some(engine) = self.engine(life).filter(|engine| engine.gone.is_none()) else { return };
        let (memory, who) = (engine.memory.clone(), engine.incarnation);
        let sessions: Vec<SessionKey> =
            engine.sessions.keys().map(|to| SessionKey { life, to: *to }).collect();
        let mut alone = RevocationList::default();
        let raised = match &what {
            What::Words(words) => {
                let ranges: Vec<AddressRange> = words.iter().map(addresses).collect();
                let raised = memory.revoke(ranges.clone());
                alone.ranges = ranges.into_iter().map(|range| (raised.epoch, range)).collect();
                raised
            }
            What::Tag(tag) => {
                let raised = memory.revoke_tag(*tag).expect("room for a tag");
                alone.tags = vec![TagRevoked { tag: *tag, epoch: raised.epoch, age: Duration::ZERO }];
                raised
            }
        };
        alone.epoch = raised.epoch;
        let hit = self.surely_hit(place, who, &what);
        self.say(format_args!("life {life} revokes {what:?}, {}, of {hit:?}", raised.epoch));
        self.count(if matches!(what, What::Tag(_)) { "call REVOKE tag" } else { "call REVOKE ranges" });
        if let Some(process) = &mut self.places[place].process {
            process.revoked.entries.push(Entry { what, epoch: raised.epoch, answered: false });
        }
        self.tickets += 1;
        let ticket = self.tickets;
        let revoke = Revoke {
            life,
            place,
            who,
            epoch: raised.epoch,
            gate_is_quiet: false,
            sessions: sessions.iter().map(|key| (*key, None)).collect(),
            hit,
        };
        self.revokes.insert(ticket, revoke);
        let limits = RevocationLimits::ranges(alone.ranges.len());
        let alone = Arc::new(Revocations::restore(limits, alone, now).expect("one revocation"));
        for key in sessions {
            self.feed(key, Event::RevokedHere(ticket, alone.clone()));
        }
        let daemon = self.home(life).and_then(|node| self.nodes[node].daemon.as_ref());
        if let Some(daemon) = daemon {
            let mail = daemon.mail.clone();
            daemon.runtime.spawn(async move {
                memory.gate().quiet(raised.version).await;
                mail.say(Answer::GateQuiet(ticket));
            });
        }
    }

    pub(super) fn hit_here(&mut self, key: SessionKey, ticket: u64, hit: Vec<TransferId>) {
        let revoke = self.revokes.get_mut(&ticket);
        if let Some(waits) = revoke.and_then(|revoke| revoke.sessions.get_mut(&key)) {
            *waits = Some(hit);
        }
    }

    pub(super) fn gate_quiet(&mut self, ticket: u64) {
        if let Some(revoke) = self.revokes.get_mut(&ticket) {
            revoke.gate_is_quiet = true;
        }
    }

    /// Answers the revocations of a node that are proven. True where there were any.
    pub(super) fn answer_revokes(&mut self, node: usize) -> bool {
        let Some(daemon) = &self.nodes[node].daemon else { return false };
        let settled = |(key, hit): (&SessionKey, &Option<Vec<TransferId>>)| {
            let session = daemon.engines.get(&key.life).and_then(|engine| engine.sessions.get(&key.to));
            let Some(session) = session else { return true };
            hit.as_ref().is_some_and(|hit| hit.iter().all(|id| session.core.is_settled_here(*id)))
        };
        let proven = |revoke: &Revoke| {
            daemon.engines.contains_key(&revoke.life)
                && revoke.gate_is_quiet
                && revoke.sessions.iter().all(settled)
        };
        let through: Vec<u64> =
            self.revokes.iter().filter(|(_, revoke)| proven(revoke)).map(|(ticket, _)| *ticket).collect();
        through.iter().for_each(|ticket| self.revoke_settled(*ticket));
        !through.is_empty()
    }

    /// SETTLED: what was revoked is used for something else at once.
    fn revoke_settled(&mut self, ticket: u64) {
        let Some(revoke) = self.revokes.remove(&ticket) else { return };
        let (place, who) = (revoke.place, revoke.who);
        self.say(format_args!("life {}: {} is settled", revoke.life, revoke.epoch));
        self.count("revocation settled");
        let process = self.places[place].process.as_mut();
        if let Some(process) = process.filter(|process| process.incarnation == who) {
            process.revoked.answered(revoke.epoch);
        }
        for number in revoke.hit {
            let Some(transfer) = self.transfers.get_mut(&number) else { continue };
            let wanted = transfer.end.is_none();
            let there = |half: &mut Half| half.place == place && half.who == who;
            let halves = [transfer.local.take_if(there), transfer.remote.take_if(there)];
            for half in halves.into_iter().flatten() {
                self.take_back(&half);
                self.count(if wanted {
                    "revoked of a transfer under way"
                } else {
                    "revoked of one that is over"
                });
            }
        }
    }

    /// Nobody will answer them.
    pub(super) fn forget_revokes(&mut self, life: Life) {
        self.revokes.retain(|_, revoke| revoke.life != life);
    }

    /// What the daemon of an engine that attaches is told.
    pub(super) fn hand_over(&mut self, place: usize) -> Revocations {
        let limits = RevocationLimits::ranges(self.revocation_limit);
        let process = self.places[place].process.as_mut();
        let list = process.map(|process| process.revoked.hand_over()).unwrap_or_default();
        // The memory's book looks at the machine's clock.
        Revocations::restore(limits, list, std::time::Instant::now()).expect("its own list")
    }

    /// What was never answered is asked for again.
    pub(super) fn revoke_again(&mut self, life: Life, place: usize) {
        let Some(process) = &mut self.places[place].process else { return };
        let epoch = process.revoked.epoch;
        let mut again = Vec::new();
        for entry in process.revoked.entries.iter_mut().filter(|entry| !entry.answered) {
            // Handed over, so that its epoch is known.
            entry.answered = true;
            assert!(entry.epoch <= epoch);
            again.push(entry.what.clone());
        }
        for what in again {
            self.count("revoked again after a restart");
            self.revoke(life, place, what);
        }
    }

    /// As the target's Accept is made; its session is told of what comes later.
    pub(super) fn accept_with(&mut self, id: StreamId) -> RevocationList {
        let Some(life) = self.conversations.get(&id).map(|known| known.life) else {
            return Default::default();
        };
        let told = self.engine(life).map(|engine| engine.memory.revocations().since(Epoch(0)));
        let told = told.unwrap_or_default();
        if let Some(conversation) = self.conversations.get_mut(&id) {
            conversation.told_epoch = told.epoch;
        }
        told
    }

    /// Tells initiators what was revoked. True where there was something to tell.
    pub(super) fn push_revocations(&mut self, node: usize) -> bool {
        let Some(daemon) = &self.nodes[node].daemon else { return false };
        let mut news = Vec::new();
        for (id, known) in self.conversations.iter_mut().filter(|(_, known)| known.stage == Stage::Serving) {
            let Some(engine) = daemon.engines.get(&known.life) else { continue };
            let book = engine.memory.revocations();
            if known.told_epoch < book.epoch() {
                let list = book.since(known.told_epoch);
                known.told_epoch = list.epoch;
                news.push((*id, list));
            }
        }
        let any = !news.is_empty();
        for (id, list) in news {
            list.by_epoch().into_iter().for_each(|list| self.send_down(id, Down::Revoked(list)));
        }
        any
    }

    /// A target's list as its initiator takes it.
    pub(super) fn told_revocations(&self, list: RevocationList) -> Revocations {
        let limits = RevocationLimits::ranges(list.ranges.len());
        Revocations::restore(limits, list, self.instant()).expect("a target's list")
    }

    /// As the initiator's driver does: a plan is held against what its engine has revoked meanwhile.
    pub(super) fn judge_plan(&mut self, key: SessionKey, event: Event) -> Event {
        let Event::Planned(transfer, boot, Ok(payload)) = event else { return event };
        let admitted = self.session(key).and_then(|session| session.core.own_epoch(transfer));
        let judged = match (admitted, self.engine(key.life)) {
            (Some(admitted), Some(engine)) => {
                let runs = payload.runs.iter().map(|run| (run.local, run.length));
                engine.memory.revocations().judge(admitted, payload.tag, runs)
            }
            _ => Ok(()),
        };
        let result = match judged {
            Ok(()) => Ok(payload),
            Err(hit) => Err(PlanFailure { failure: hit.into(), wants_newer_table: false }),
        };
        Event::Planned(transfer, boot, result)
    }

    /// What is known of a target's endpoint when a call arrives.
    pub(super) fn known_there(&mut self, key: SessionKey) -> Option<(Incarnation, Epoch)> {
        self.session(key).and_then(|session| session.core.known())
    }

    /// What `Engine::transfer` refuses at once.
    pub(super) fn refuse_dead(&mut self, key: SessionKey, tag: Option<Tag>) -> Option<Failure> {
        let engine = self.engine(key.life)?;
        let dead = tag.is_some_and(|tag| engine.memory.revocations().refuses(tag));
        dead.then(|| Failure::plain(Reason::Revoked))
    }
}

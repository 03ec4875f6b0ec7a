//! The oracle's memory of what was revoked, and what follows from it.
//!
//! A process remembers its revocations as long as it lives: the next daemon is handed them, and whoever ends
//! REVOKED, or lands, is held against them.

use std::{ops::Range, time::Duration};

use kvferryd::{
    domain::{AddressRange, Epoch, Incarnation, Reason, Tag},
    policy::{RevocationList, TagRevoked},
};

use super::{
    book::{Half, Transfer},
    process::BASE,
    world::World,
};

/// What a transfer names, and what was known when its call arrived.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    /// Words of the caller.
    pub(super) near: Range<usize>,
    /// Words at the target.
    pub(super) far: Range<usize>,
    /// Whose those are.
    pub(super) who: Incarnation,
    /// Its newest revocation that the caller's daemon knew of, if it knew it at all.
    pub(super) known: Option<Epoch>,
    /// The caller's own newest revocation.
    pub(super) own_epoch: Epoch,
    /// The target had revoked what it names before it was asked for.
    pub(super) barred: bool,
}

/// What is revoked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum What {
    /// Words of the engine.
    Words(Vec<Range<usize>>),
    /// A request.
    Tag(Tag),
}

/// One revocation of a process.
#[derive(Debug)]
pub(super) struct Entry {
    /// What.
    pub(super) what: What,
    /// The endpoint's epoch since then.
    pub(super) epoch: Epoch,
    /// The process knows the epoch.
    pub(super) answered: bool,
}

/// All revocations of a process: lives as long as it.
#[derive(Debug, Default)]
pub(super) struct Revoked {
    /// The newest epoch that was answered.
    pub(super) epoch: Epoch,
    /// Oldest first.
    pub(super) entries: Vec<Entry>,
}

impl Revoked {
    /// A call is answered.
    pub(super) fn answered(&mut self, epoch: Epoch) {
        self.epoch = self.epoch.max(epoch);
        self.entries.iter_mut().filter(|entry| entry.epoch == epoch).for_each(|entry| entry.answered = true);
    }

    /// For the next daemon: what was not answered is newer than all that the last one can have reached.
    pub(super) fn hand_over(&mut self) -> RevocationList {
        let lost = self.entries.iter().filter(|entry| !entry.answered).count() as u64;
        self.epoch.0 += lost;
        let epoch = self.epoch;
        self.entries.iter_mut().filter(|entry| !entry.answered).for_each(|entry| entry.epoch = epoch);
        let mut list = RevocationList { epoch, ..RevocationList::default() };
        for entry in &self.entries {
            match &entry.what {
                What::Words(words) => list.ranges.extend(words.iter().map(|at| (entry.epoch, addresses(at)))),
                What::Tag(tag) => list.tags.push(TagRevoked { tag: *tag, epoch, age: Duration::ZERO }),
            }
        }
        list
    }

    fn kills(&self, tag: Option<Tag>) -> bool {
        tag.is_some_and(|tag| self.entries.iter().any(|entry| entry.what == What::Tag(tag)))
    }

    /// Whether whoever was admitted under that epoch is refused these words. `all`: any words.
    fn hits(&self, admitted: Epoch, words: &Range<usize>, all: bool) -> bool {
        let hit = |revoked: &Range<usize>| all || (revoked.start < words.end && words.start < revoked.end);
        self.entries.iter().filter(|entry| entry.epoch > admitted).any(|entry| match &entry.what {
            What::Words(revoked) => revoked.iter().any(hit),
            What::Tag(_) => false,
        })
    }
}

/// Where words lie.
pub(super) fn addresses(words: &Range<usize>) -> AddressRange {
    AddressRange::new(BASE + words.start as u64 * 8, words.len() as u64 * 8).expect("words")
}

impl World {
    /// Transfers with words there, all of them revoked after it was admitted. One of which that is not certain is
    /// left out: its peer was not known when it was asked for, and nothing of it was sent.
    pub(super) fn surely_hit(&self, place: usize, who: Incarnation, what: &What) -> Vec<u32> {
        let hit = |number: &u32| {
            let transfer = &self.transfers[number];
            let there = |half: &Half| half.place == place && half.who == who;
            let local = transfer.local.as_ref().filter(|half| there(half));
            let remote = transfer.remote.as_ref().filter(|half| there(half));
            let admitted = local.is_some() || transfer.arrival.known.is_some() || transfer.payload.is_some();
            let Some(half) = local.or(remote) else { return false };
            match what {
                What::Tag(tag) => transfer.tag == Some(*tag),
                What::Words(words) => {
                    let held = &half.holding.words;
                    let covered = |at: &Range<usize>| at.start <= held.start && held.end <= at.end;
                    admitted && words.iter().any(covered)
                }
            }
        };
        self.open.iter().copied().filter(hit).collect()
    }

    /// Words that the process at a place has revoked since that epoch: what a caller asks for who has not heard.
    pub(super) fn revoked_since(
        &mut self,
        place: usize,
        known: Option<(Incarnation, Epoch)>,
    ) -> Option<Range<usize>> {
        let (who, epoch) = known?;
        let process = self.places[place].process.as_ref().filter(|process| process.incarnation == who)?;
        let newer = process.revoked.entries.iter().filter(|entry| entry.epoch > epoch);
        let words = newer.filter_map(|entry| match &entry.what {
            What::Words(words) => Some(words.iter().map(|at| (at.start, at.end))),
            What::Tag(_) => None,
        });
        let words: Vec<(usize, usize)> = words.flatten().collect();
        self.dice.pick(&words).map(|(from, to)| from..to)
    }

    /// Whether the endpoint of that place refuses the tag.
    pub(super) fn is_dead(&self, place: usize, tag: Option<Tag>) -> bool {
        self.places[place].process.as_ref().is_some_and(|process| process.revoked.kills(tag))
    }

    /// Whether a revocation, settled or not, may refuse it.
    pub(super) fn is_revoked(&self, number: u32) -> bool {
        let transfer = &self.transfers[&number];
        self.is_revoked_there(transfer) || self.is_revoked_here(transfer)
    }

    fn is_revoked_there(&self, transfer: &Transfer) -> bool {
        let (arrival, place) = (&transfer.arrival, &self.places[transfer.key.to]);
        let Some(process) = place.process.as_ref().filter(|process| process.incarnation == arrival.who)
        else {
            // It took what it revoked with it.
            return true;
        };
        let admitted = arrival.known.unwrap_or_default();
        process.revoked.kills(transfer.tag)
            || process.revoked.hits(admitted, &arrival.far, self.revocation_limit < 8)
    }

    fn is_revoked_here(&self, transfer: &Transfer) -> bool {
        let arrival = &transfer.arrival;
        let mine = self.places.iter().find(|place| place.life == Some(transfer.key.life));
        mine.and_then(|place| place.process.as_ref()).is_none_or(|process| {
            process.revoked.kills(transfer.tag)
                || process.revoked.hits(arrival.own_epoch, &arrival.near, self.revocation_limit < 8)
        })
    }

    /// Whoever ends REVOKED was hit, and whoever was hit before it came is not DONE.
    pub(super) fn check_revocations(&self, number: u32, reason: Option<Reason>, done: bool) {
        let transfer = &self.transfers[&number];
        assert!(!(done && transfer.arrival.barred), "transfer {number} is DONE in revoked memory");
        let fair = reason != Some(Reason::Revoked) || self.is_revoked(number);
        assert!(fair, "transfer {number} ends by a revocation that did not hit it");
    }
}

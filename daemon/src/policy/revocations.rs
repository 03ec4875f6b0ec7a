//! What one endpoint has revoked, and what that refuses.
//!
//! Every revocation raises the endpoint's *epoch*, and every transfer carries the epoch it was admitted under,
//! so a range refuses exactly those that were admitted before it was revoked: queued, backing off, or on their
//! way while this side's daemon restarted. A tag refuses whoever carries it, whenever it was submitted, until
//! its *tombstone* expires.
//!
//! The ranges are kept as disjoint spans, each with the newest epoch it was revoked in: a page revoked again
//! takes no more room, and a look-up costs a search. Beyond `ranges` of them the oldest are given up and the
//! *floor* rises: whoever was admitted below it is refused, hit or not. A tombstone is never given up early; a
//! full table refuses the next one (I8). Telling a peer what is new costs what is new: every session is told at
//! every revocation, under the lock that parts are judged under.
//!
//! Pure, and used at both ends: a target judges every part by it, an initiator ends what the target's list hits.

mod spans;
#[cfg(test)]
mod tests;
mod tombstones;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use spans::Spans;
use tombstones::{Tombstone, Tombstones};

use crate::domain::{AddressRange, Epoch, Failure, Reason, Tag};

/// Tombstones of one endpoint.
pub const TOMBSTONES: usize = 65_536;

/// How long a tombstone stands.
pub const TOMBSTONE_LIFE: Duration = Duration::from_secs(15 * 60);

/// Epochs that are told beyond it are nobody's: counting on from there must not wrap.
const MAX_EPOCH: Epoch = Epoch(1 << 62);

/// How much is remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RevocationLimits {
    /// Disjoint ranges (`limits.revocations`).
    pub ranges: usize,
    /// Tags.
    pub tombstones: usize,
    /// How long each tag is refused.
    pub tombstone_life: Duration,
}

impl RevocationLimits {
    /// So many ranges, and the tombstones that everyone has.
    pub fn ranges(ranges: usize) -> Self {
        Self { ranges, tombstones: TOMBSTONES, tombstone_life: TOMBSTONE_LIFE }
    }
}

/// A revoked tag as it is told to others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TagRevoked {
    /// Which.
    pub tag: Tag,
    /// In which epoch.
    pub epoch: Epoch,
    /// How long its tombstone has stood.
    pub age: Duration,
}

/// Revocations as they travel: to a peer, and from an engine that attaches again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RevocationList {
    /// The newest revocation there is, in the list or not.
    pub epoch: Epoch,
    /// Whoever was admitted below it is refused.
    pub floor: Epoch,
    /// Ranges, each with the epoch in which it was revoked.
    pub ranges: Vec<(Epoch, AddressRange)>,
    /// Tags.
    pub tags: Vec<TagRevoked>,
}

impl RevocationList {
    /// As it is told step by step: a list for each epoch, oldest first. Of the newest there always is one, though
    /// it may name nothing: where only the floor rose, whoever is not told of the epoch is refused for good.
    pub fn by_epoch(self) -> Vec<Self> {
        let mut steps: BTreeMap<Epoch, Self> = BTreeMap::new();
        if self.epoch > Epoch(0) {
            steps.entry(self.epoch).or_default();
        }
        for (epoch, range) in self.ranges {
            steps.entry(epoch).or_default().ranges.push((epoch, range));
        }
        for tag in self.tags {
            steps.entry(tag.epoch).or_default().tags.push(tag);
        }
        steps.into_iter().map(|(epoch, step)| Self { epoch, ..step }).collect()
    }
}

/// What speaks against a transfer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hit {
    /// It was admitted under an epoch that the endpoint has not reached: its peer remembers a past that was not
    /// handed over, and what was revoked in it is not known here.
    Future,
    /// It was admitted before revocations that are not remembered one by one.
    Floor,
    /// Its tag.
    Tag,
    /// This run of it touches a range revoked after it was admitted.
    Run(usize),
}

/// What a caller is told of a hit. `index` is the run at fault.
impl From<Hit> for Failure {
    fn from(hit: Hit) -> Self {
        let text = match hit {
            Hit::Future => "admitted under an epoch that the endpoint has not reached",
            Hit::Floor => "admitted before revocations that are not remembered one by one",
            Hit::Tag => "its tag was revoked",
            Hit::Run(_) => "its memory was revoked after it was admitted",
        };
        let failure = Failure::new(Reason::Revoked, text);
        match hit {
            Hit::Run(run) => failure.at(run as u64),
            Hit::Future | Hit::Floor | Hit::Tag => failure,
        }
    }
}

/// The revocations of one endpoint.
#[derive(Clone, Debug)]
pub struct Revocations {
    limits: RevocationLimits,
    epoch: Epoch,
    floor: Epoch,
    /// Of ranges alone.
    newest_range: Epoch,
    /// All newer than the floor.
    spans: Spans,
    tombstones: Tombstones,
}

impl Revocations {
    /// Nothing revoked yet.
    pub fn new(limits: RevocationLimits) -> Self {
        Self {
            limits,
            epoch: Epoch(0),
            floor: Epoch(0),
            newest_range: Epoch(0),
            spans: Spans::default(),
            tombstones: Tombstones::default(),
        }
    }

    /// What was revoked before, elsewhere. Tombstones that are past their time are left out.
    ///
    /// # Errors
    /// `BadArgument` where the list contradicts itself, `Limit` for more tombstones than there may be.
    pub fn restore(limits: RevocationLimits, list: RevocationList, now: Instant) -> Result<Self, Failure> {
        let RevocationList { epoch, floor, mut ranges, tags } = list;
        let later = ranges.iter().map(|(at, _)| *at).chain(tags.iter().map(|tag| tag.epoch)).max();
        if later.max(Some(floor)) > Some(epoch) {
            let message = format!("revocations: an entry is newer than the epoch they tell of, {epoch}");
            return Err(Failure::new(Reason::BadArgument, message));
        }
        if epoch > MAX_EPOCH {
            return Err(Failure::new(Reason::BadArgument, format!("revocations: {epoch} is no epoch")));
        }
        if tags.len() > limits.tombstones {
            let message =
                format!("revocations: {} tombstones, {} is the limit", tags.len(), limits.tombstones);
            return Err(Failure::new(Reason::Limit, message));
        }
        let mut all = Self { epoch, floor, newest_range: floor, ..Self::new(limits) };
        // Oldest first, so that of what overlaps the newest stays.
        ranges.sort_unstable_by_key(|(at, _)| *at);
        for (at, range) in ranges.into_iter().filter(|(at, _)| *at > floor) {
            all.spans.lay(range, at);
            all.newest_range = at;
        }
        all.make_room();
        for TagRevoked { tag, epoch, age } in tags {
            if age < limits.tombstone_life {
                all.tombstones.bury(tag, Tombstone { expires: now + (limits.tombstone_life - age), epoch });
            }
        }
        Ok(all)
    }

    /// Raises the epoch: from now on these ranges refuse whoever was admitted before it.
    pub fn revoke(&mut self, ranges: Vec<AddressRange>) -> Epoch {
        self.epoch.0 += 1;
        self.newest_range = self.epoch;
        let ranges = AddressRange::join(ranges);
        if ranges.len() > self.limits.ranges {
            // More than can be remembered: everyone admitted so far is refused.
            self.floor = self.epoch;
            self.spans.clear();
            return self.epoch;
        }
        for range in ranges {
            self.spans.lay(range, self.epoch);
        }
        self.make_room();
        self.epoch
    }

    /// Raises the epoch: from now on, and for the life of a tombstone, whoever carries the tag is refused.
    /// Revoked again, its time begins anew.
    ///
    /// # Errors
    /// `Limit` when the table is full: nothing is forgotten early.
    pub fn revoke_tag(&mut self, tag: Tag, now: Instant) -> Result<Epoch, Failure> {
        self.expire(now);
        if self.tombstones.len() >= self.limits.tombstones && !self.tombstones.contains(tag) {
            let first = self.tombstones.next_expiry().unwrap_or(now);
            let message = format!(
                "{} tags are revoked; the next is forgotten in {} s",
                self.tombstones.len(),
                first.saturating_duration_since(now).as_secs()
            );
            return Err(Failure::new(Reason::Limit, message));
        }
        self.epoch.0 += 1;
        self.tombstones.bury(tag, Tombstone { expires: now + self.limits.tombstone_life, epoch: self.epoch });
        Ok(self.epoch)
    }

    /// Whether a transfer admitted under this epoch, with this tag, may touch these runs (address, bytes).
    ///
    /// # Errors
    /// What speaks against it; of several runs the first.
    pub fn judge(
        &self,
        admitted: Epoch,
        tag: Option<Tag>,
        runs: impl IntoIterator<Item = (u64, u64)>,
        now: Instant,
    ) -> Result<(), Hit> {
        if admitted > self.epoch { Err(Hit::Future) } else { self.judge_known(admitted, tag, runs, now) }
    }

    /// As [`Revocations::judge`] with a peer's list: a transfer may have been admitted under a newer epoch than a
    /// message tells of.
    ///
    /// # Errors
    /// What speaks against it; of several runs the first.
    pub fn judge_known(
        &self,
        admitted: Epoch,
        tag: Option<Tag>,
        runs: impl IntoIterator<Item = (u64, u64)>,
        now: Instant,
    ) -> Result<(), Hit> {
        if admitted < self.floor {
            return Err(Hit::Floor);
        }
        if tag.is_some_and(|tag| self.refuses(tag, now)) {
            return Err(Hit::Tag);
        }
        if admitted >= self.newest_range || self.spans.is_empty() {
            return Ok(());
        }
        let hit = runs.into_iter().position(|(address, bytes)| self.spans.touches(address, bytes, admitted));
        hit.map_or(Ok(()), |run| Err(Hit::Run(run)))
    }

    /// Whether a tombstone stands for the tag.
    pub fn refuses(&self, tag: Tag, now: Instant) -> bool {
        self.tombstones.refuse(tag, now)
    }

    /// Forgets tombstones that are past their time.
    pub fn expire(&mut self, now: Instant) {
        self.tombstones.expire(now);
    }

    /// What is newer than `told`, oldest first, and the floor. Costs what it names, however much there is besides.
    pub fn since(&self, told: Epoch, now: Instant) -> RevocationList {
        let tag = |(tag, Tombstone { expires, epoch })| {
            let left = expires.saturating_duration_since(now);
            let age = self.limits.tombstone_life.saturating_sub(left);
            (!left.is_zero()).then_some(TagRevoked { tag, epoch, age })
        };
        RevocationList {
            epoch: self.epoch,
            floor: self.floor,
            ranges: self.spans.since(told).collect(),
            tags: self.tombstones.since(told).filter_map(tag).collect(),
        }
    }

    /// How often was revoked.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whoever was admitted below it is refused.
    pub fn floor(&self) -> Epoch {
        self.floor
    }

    /// The newest revocation of a range: whoever was admitted under it, or later, is refused by a tag alone.
    pub fn newest_range(&self) -> Epoch {
        self.newest_range
    }

    /// Tombstones kept, those past their time included.
    pub fn tombstones(&self) -> usize {
        self.tombstones.len()
    }

    fn make_room(&mut self) {
        if let Some(forgotten) = self.spans.shrink_to(self.limits.ranges) {
            self.floor = forgotten;
        }
    }
}

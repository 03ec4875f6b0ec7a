//! The revoked tags of one endpoint, each until its time is over.
//!
//! Kept three times, each of the same length: by tag for whoever asks, by expiry for whoever forgets, by epoch for
//! whoever tells a peer what is new.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Unbounded},
    time::Instant,
};

use crate::domain::{Epoch, Tag};

/// The last tag there is, to begin behind an epoch.
const LAST_TAG: Tag = Tag([u8::MAX; 16]);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tombstone {
    pub(super) expires: Instant,
    pub(super) epoch: Epoch,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Tombstones {
    by_tag: BTreeMap<Tag, Tombstone>,
    by_expiry: BTreeSet<(Instant, Tag)>,
    by_epoch: BTreeSet<(Epoch, Tag)>,
}

impl Tombstones {
    /// Those past their time included.
    pub(super) fn len(&self) -> usize {
        self.by_tag.len()
    }

    pub(super) fn contains(&self, tag: Tag) -> bool {
        self.by_tag.contains_key(&tag)
    }

    /// Whether one stands for the tag.
    pub(super) fn refuse(&self, tag: Tag, now: Instant) -> bool {
        self.by_tag.get(&tag).is_some_and(|tombstone| now < tombstone.expires)
    }

    /// When the next one is past its time.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.by_expiry.first().map(|(expires, _)| *expires)
    }

    /// Those newer than `told`, oldest first, those past their time included. Costs what it yields.
    pub(super) fn since(&self, told: Epoch) -> impl Iterator<Item = (Tag, Tombstone)> + '_ {
        let newer = self.by_epoch.range((Excluded((told, LAST_TAG)), Unbounded));
        newer.filter_map(|(_, tag)| Some((*tag, *self.by_tag.get(tag)?)))
    }

    /// A tag has one tombstone: the newest.
    pub(super) fn bury(&mut self, tag: Tag, tombstone: Tombstone) {
        self.remove(tag);
        self.by_tag.insert(tag, tombstone);
        self.by_expiry.insert((tombstone.expires, tag));
        self.by_epoch.insert((tombstone.epoch, tag));
    }

    /// Forgets those past their time.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some(&(expires, tag)) = self.by_expiry.first()
            && expires <= now
        {
            self.remove(tag);
        }
    }

    fn remove(&mut self, tag: Tag) {
        if let Some(earlier) = self.by_tag.remove(&tag) {
            self.by_expiry.remove(&(earlier.expires, tag));
            self.by_epoch.remove(&(earlier.epoch, tag));
        }
    }
}

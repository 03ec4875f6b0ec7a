//! What is registered, kept by this library so that it can be registered again after a daemon restart.
//!
//! A daemon numbers regions as it likes, and the next one likes otherwise. So callers hold numbers of this
//! library's own: those of the daemon that first registered the region, unless they are in use.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{Error, Failure, Reason, Region, memory::Backing};

/// The regions of an engine. Bounded by the daemon's limit. The lock is held for single steps.
#[derive(Debug, Default)]
pub(crate) struct Regions(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Which attachment the daemon's numbers are of. Answers of an earlier one come too late.
    attachment: u64,
    entries: BTreeMap<u32, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// Holds the mapping: its addresses must mean nothing else while the daemon uses them.
    backing: Backing,
    /// The daemon's number. Nothing: no daemon has it any more.
    theirs: Option<u32>,
    /// Unregistered, and not proven settled yet: not for the next daemon.
    leaving: bool,
}

impl Regions {
    /// The daemon of this attachment has registered these: gives them our numbers. False when the attachment is
    /// over: what it registered is gone with it.
    pub(crate) fn record(&self, attachment: u64, regions: &mut [Region], memory: Vec<Backing>) -> bool {
        let mut table = self.lock();
        if table.attachment != attachment {
            return false;
        }
        for (region, backing) in regions.iter_mut().zip(memory) {
            let theirs = region.id;
            region.id = table.free_number(theirs);
            table.entries.insert(region.id, Entry { backing, theirs: Some(theirs), leaving: false });
        }
        true
    }

    /// What the daemon of this attachment calls these. Those that no daemon has any more are left out.
    ///
    /// # Errors
    /// `Unregistered` for a number that means another region to the daemon than to the caller.
    pub(crate) fn theirs(&self, ours: &[u32]) -> Result<Vec<u32>, Error> {
        let table = self.lock();
        let mut theirs = Vec::with_capacity(ours.len());
        for (index, id) in ours.iter().enumerate() {
            match table.entries.get(id) {
                Some(entry) => theirs.extend(entry.theirs),
                // Not known here: the daemon says what is wrong with it.
                None if table.ours(*id).is_none() => theirs.push(*id),
                None => {
                    let failure = Failure::new(Reason::Unregistered, format!("no region {id} is registered"));
                    return Err(Error::Refused(Failure { index: Some(index as u64), ..failure }));
                }
            }
        }
        Ok(theirs)
    }

    /// What callers know the daemon's region by.
    pub(crate) fn ours(&self, theirs: u32) -> u32 {
        self.lock().ours(theirs).unwrap_or(theirs)
    }

    /// They are unregistered, and settled. False when they were registered anew meanwhile, with the next daemon.
    pub(crate) fn remove(&self, attachment: u64, ours: &[u32]) -> bool {
        let mut table = self.lock();
        let anew = |entry: &Entry| entry.theirs.is_some();
        if table.attachment != attachment && ours.iter().any(|id| table.entries.get(id).is_some_and(anew)) {
            return false;
        }
        ours.iter().for_each(|id| drop(table.entries.remove(id)));
        true
    }

    /// They are unregistered, but not proven settled.
    pub(crate) fn leave(&self, ours: &[u32]) {
        let mut table = self.lock();
        for id in ours {
            if let Some(entry) = table.entries.get_mut(id) {
                entry.leaving = true;
            }
        }
    }

    /// Begins another attachment: its number, and what is to be registered with it, by our numbers.
    pub(crate) fn begin(&self) -> (u64, Vec<(u32, Backing)>) {
        let mut table = self.lock();
        table.attachment += 1;
        table.entries.values_mut().for_each(|entry| entry.theirs = None);
        let stay = table.entries.iter().filter(|(_, entry)| !entry.leaving);
        (table.attachment, stay.map(|(id, entry)| (*id, entry.backing.clone())).collect())
    }

    /// The next daemon has registered these.
    pub(crate) fn adopt(&self, numbers: impl IntoIterator<Item = (u32, u32)>) {
        let mut table = self.lock();
        for (ours, theirs) in numbers {
            if let Some(entry) = table.entries.get_mut(&ours) {
                entry.theirs = Some(theirs);
            }
        }
    }

    /// The next daemon refuses this one, and so will those after it.
    pub(crate) fn invalidate(&self, ours: u32) {
        self.leave(&[ours]);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn ours(&self, theirs: u32) -> Option<u32> {
        self.entries.iter().find(|(_, entry)| entry.theirs == Some(theirs)).map(|(id, _)| *id)
    }

    fn free_number(&self, wanted: u32) -> u32 {
        if !self.entries.contains_key(&wanted) {
            return wanted;
        }
        // There are far fewer regions than numbers.
        let after_last = self.entries.keys().next_back().map_or(0, |last| last.wrapping_add(1));
        (0..=u32::MAX)
            .map(|step| after_last.wrapping_add(step))
            .find(|id| !self.entries.contains_key(id))
            .unwrap_or(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryKind;

    fn backing(base: u64) -> Backing {
        Backing { base, length: 1, file: None }
    }

    fn register(regions: &Regions, attachment: u64, theirs: &[u32]) -> Option<Vec<u32>> {
        let region = |&id: &u32| Region { id, generation: 1, base: 0, length: 1, kind: MemoryKind::Process };
        let mut told: Vec<Region> = theirs.iter().map(region).collect();
        let memory = theirs.iter().map(|id| backing(u64::from(*id) * 4096)).collect();
        regions.record(attachment, &mut told, memory).then(|| told.iter().map(|region| region.id).collect())
    }

    #[test]
    fn callers_keep_their_numbers_over_a_restart() {
        let regions = Regions::default();
        assert_eq!(register(&regions, 0, &[1, 2, 3]), Some(vec![1, 2, 3]));
        let (attachment, again) = regions.begin();
        assert_eq!(
            again.iter().map(|(id, backing)| (*id, backing.base)).collect::<Vec<_>>(),
            [(1, 4096), (2, 8192), (3, 12_288)]
        );
        regions.adopt([(1, 30), (2, 10), (3, 20)]);
        assert_eq!(regions.theirs(&[1, 2, 3]).unwrap(), [30, 10, 20]);
        assert_eq!((regions.ours(10), regions.ours(99)), (2, 99));
        // The next daemon's number 2 is not the caller's number 2.
        assert_eq!(register(&regions, attachment, &[2]), Some(vec![4]));
        assert_eq!(regions.theirs(&[4]).unwrap(), [2]);
    }

    #[test]
    fn a_number_of_the_daemon_alone_is_refused_where_it_means_another_region() {
        let regions = Regions::default();
        register(&regions, 0, &[1]);
        regions.begin();
        regions.adopt([(1, 7)]);
        match regions.theirs(&[1, 7]) {
            Err(Error::Refused(Failure { reason: Reason::Unregistered, index: Some(1), .. })) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(regions.theirs(&[9]).unwrap(), [9], "the daemon will say what is wrong with it");
    }

    #[test]
    fn answers_of_an_attachment_that_is_over_change_nothing() {
        let regions = Regions::default();
        register(&regions, 0, &[1]);
        let (now, _) = regions.begin();
        assert_eq!(register(&regions, 0, &[2]), None);
        regions.adopt([(1, 5)]);
        assert!(!regions.remove(0, &[1]), "registered anew: to be unregistered there");
        assert_eq!(regions.theirs(&[1]).unwrap(), [5]);
        assert!(regions.remove(now, &[1]));
        assert_eq!(regions.begin().1.len(), 0);
    }

    #[test]
    fn what_is_leaving_is_not_registered_again_and_is_settled_then() {
        let regions = Regions::default();
        register(&regions, 0, &[1, 2, 3]);
        regions.leave(&[2]);
        regions.invalidate(3);
        let (now, again) = regions.begin();
        assert_eq!(again.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1]);
        assert!(regions.theirs(&[2, 3]).unwrap().is_empty());
        assert!(regions.remove(now, &[2, 3]));
    }
}

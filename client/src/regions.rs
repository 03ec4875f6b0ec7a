//! What is registered, kept by this library so that it can be registered again after a daemon restart.
//!
//! A daemon numbers regions as it likes, and the next one likes otherwise. So callers hold numbers of this
//! library's own: those of the daemon that first registered the region, unless they are in use.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Error, Failure, Reason, Region, Settlement, lease::Lease, memory::Backing, private::Ranges};

/// The regions of an engine. Bounded by the daemon's limit. The lock is held for single steps.
#[derive(Debug, Default)]
pub(crate) struct Regions(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Which attachment the daemon's numbers are of. Answers of an earlier one come too late.
    attachment: u64,
    /// The daemon that is registering everything at this moment. Until it has answered nobody can tell which of our
    /// memory it has.
    renewing: Option<Arc<Lease>>,
    entries: BTreeMap<u32, Entry>,
    /// Private memory that a daemon is being asked to register: it looks whether it is there.
    asked: Vec<(u64, u64)>,
    /// All private memory in the table, until it changes.
    private: Option<Ranges>,
}

/// Private memory that is being registered, until this is dropped.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    regions: &'a Regions,
    ranges: Vec<(u64, u64)>,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut table = self.regions.lock();
        for range in &self.ranges {
            if let Some(at) = table.asked.iter().position(|asked| asked == range) {
                table.asked.swap_remove(at);
            }
        }
        table.private = None;
    }
}

#[derive(Debug)]
struct Entry {
    /// Holds the mapping: its addresses must mean nothing else while the daemon uses them.
    backing: Backing,
    /// The number that the daemon of the table's attachment gave it; of a daemon that is lost too, until another
    /// one has attached us. Nothing: that daemon does not have it, or has not said so yet (`renewing`).
    theirs: Option<u32>,
    /// Unregistered, and the caller was not told that it is settled: not for the next daemon.
    leaving: bool,
}

impl Regions {
    /// This is about to be registered.
    pub(crate) fn ask(&self, memory: &[Backing]) -> Asked<'_> {
        let ranges: Vec<_> = memory.iter().filter_map(Backing::private).collect();
        let mut table = self.lock();
        table.asked.extend(&ranges);
        table.private = None;
        drop(table);
        Asked { regions: self, ranges }
    }

    /// The private memory that a daemon may touch: until it is proven that it does not, and from before it does.
    pub(crate) fn private(&self) -> Ranges {
        let mut table = self.lock();
        let Table { entries, asked, private, .. } = &mut *table;
        let registered = entries.values().filter_map(|entry| entry.backing.private());
        private.get_or_insert_with(|| Ranges::of(registered.chain(asked.iter().copied()))).clone()
    }

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
        table.private = None;
        true
    }

    /// What the daemon of the latest attachment calls these. Those that no daemon has any more are left out. Where
    /// that cannot be told at this moment, they leave as soon as it can.
    ///
    /// # Errors
    /// `Unregistered` for a number that means another region to the daemon than to the caller.
    pub(crate) fn theirs(&self, ours: &[u32]) -> Result<Theirs, Error> {
        let mut table = self.lock();
        if let Some(daemon) = table.renewing.clone() {
            table.leave(ours)?;
            return Ok(Theirs::Renewing(daemon));
        }
        let mut theirs = Vec::with_capacity(ours.len());
        for (index, id) in ours.iter().enumerate() {
            match table.entries.get(id) {
                Some(entry) => theirs.extend(entry.theirs),
                // Not known here: the daemon says what is wrong with it.
                None if table.ours(*id).is_none() => theirs.push(*id),
                None => {
                    return Err(unregistered(index, *id));
                }
            }
        }
        Ok(Theirs::Known(theirs))
    }

    /// What callers know the daemon's region by.
    pub(crate) fn ours(&self, theirs: u32) -> u32 {
        self.lock().ours(theirs).unwrap_or(theirs)
    }

    /// They are unregistered with the daemon of this attachment, and settled there. Nothing when they were registered
    /// anew meanwhile, with the next daemon, which is to be asked as well.
    pub(crate) fn remove(&self, attachment: u64, ours: &[u32]) -> Option<Settlement> {
        let mut table = self.lock();
        if table.attachment != attachment {
            if table.renewing.is_some() {
                table.leave_known(ours);
                return Some(Settlement::Unsettled);
            }
            let anew = |id: &u32| table.entries.get(id).is_some_and(|entry| entry.theirs.is_some());
            if ours.iter().any(anew) {
                return None;
            }
        }
        ours.iter().for_each(|id| drop(table.entries.remove(id)));
        table.private = None;
        Some(Settlement::Settled)
    }

    /// They are unregistered, but not proven settled.
    pub(crate) fn leave(&self, ours: &[u32]) {
        self.lock().leave_known(ours);
    }

    /// Another daemon has attached us, and nobody of the attachment before touches our memory any more: gives what is
    /// to be registered, by our numbers.
    pub(crate) fn begin(&self, daemon: &Arc<Lease>) -> Vec<(u32, Backing)> {
        let mut table = self.lock();
        table.attachment = daemon.number;
        table.renewing = Some(daemon.clone());
        table.entries.values_mut().for_each(|entry| entry.theirs = None);
        let stay = table.entries.iter().filter(|(_, entry)| !entry.leaving);
        stay.map(|(id, entry)| (*id, entry.backing.clone())).collect()
    }

    /// That daemon has registered these, our numbers beside its own, and has nothing else of ours. Gives those of
    /// them that were unregistered meanwhile: it is to be told.
    pub(crate) fn adopt(&self, numbers: &[(u32, u32)]) -> Vec<u32> {
        let mut table = self.lock();
        table.renewing = None;
        let mut leaving = Vec::new();
        for (ours, theirs) in numbers {
            if let Some(entry) = table.entries.get_mut(ours) {
                entry.theirs = Some(*theirs);
                leaving.extend(entry.leaving.then_some(*ours));
            }
        }
        leaving
    }

    /// The daemon of this attachment does not have these any more; whoever unregisters them is told so.
    pub(crate) fn gone(&self, attachment: u64, ours: &[u32]) {
        let mut table = self.lock();
        if table.attachment != attachment {
            return;
        }
        for id in ours {
            if let Some(entry) = table.entries.get_mut(id) {
                entry.theirs = None;
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

/// What a daemon calls regions.
#[derive(Debug)]
pub(crate) enum Theirs {
    /// Those it has.
    Known(Vec<u32>),
    /// It is registering them at this moment.
    Renewing(Arc<Lease>),
}

fn unregistered(index: usize, id: u32) -> Error {
    let failure = Failure::new(Reason::Unregistered, format!("no region {id} is registered"));
    Error::Refused(Failure { index: Some(index as u64), ..failure })
}

impl Table {
    /// All of them or none.
    fn leave(&mut self, ours: &[u32]) -> Result<(), Error> {
        if let Some(index) = ours.iter().position(|id| !self.entries.contains_key(id)) {
            return Err(unregistered(index, ours[index]));
        }
        self.leave_known(ours);
        Ok(())
    }

    fn leave_known(&mut self, ours: &[u32]) {
        for id in ours {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.leaving = true;
            }
        }
    }

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
    use crate::{MemoryKind, lease::tests::lease};

    fn backing(base: u64) -> Backing {
        Backing { base, length: 1, file: None }
    }

    fn register(regions: &Regions, attachment: u64, theirs: &[u32]) -> Option<Vec<u32>> {
        let region = |&id: &u32| Region { id, generation: 1, base: 0, length: 1, kind: MemoryKind::Process };
        let mut told: Vec<Region> = theirs.iter().map(region).collect();
        let memory = theirs.iter().map(|id| backing(u64::from(*id) * 4096)).collect();
        regions.record(attachment, &mut told, memory).then(|| told.iter().map(|region| region.id).collect())
    }

    /// What a daemon is asked to register.
    fn begin(regions: &Regions, attachment: u64) -> Vec<u32> {
        regions.begin(&lease(attachment)).iter().map(|(id, _)| *id).collect()
    }

    fn known(regions: &Regions, ours: &[u32]) -> Vec<u32> {
        match regions.theirs(ours).unwrap() {
            Theirs::Known(theirs) => theirs,
            Theirs::Renewing(_) => panic!("it is not said yet"),
        }
    }

    #[test]
    fn callers_keep_their_numbers_over_a_restart() {
        let regions = Regions::default();
        assert_eq!(register(&regions, 0, &[1, 2, 3]), Some(vec![1, 2, 3]));
        let again = regions.begin(&lease(1));
        assert_eq!(
            again.iter().map(|(id, backing)| (*id, backing.base)).collect::<Vec<_>>(),
            [(1, 4096), (2, 8192), (3, 12_288)]
        );
        assert!(regions.adopt(&[(1, 30), (2, 10), (3, 20)]).is_empty());
        assert_eq!(known(&regions, &[1, 2, 3]), [30, 10, 20]);
        assert_eq!((regions.ours(10), regions.ours(99)), (2, 99));
        // The next daemon's number 2 is not the caller's number 2.
        assert_eq!(register(&regions, 1, &[2]), Some(vec![4]));
        assert_eq!(known(&regions, &[4]), [2]);
    }

    #[test]
    fn a_number_of_the_daemon_alone_is_refused_where_it_means_another_region() {
        let regions = Regions::default();
        register(&regions, 0, &[1]);
        begin(&regions, 1);
        regions.adopt(&[(1, 7)]);
        match regions.theirs(&[1, 7]) {
            Err(Error::Refused(Failure { reason: Reason::Unregistered, index: Some(1), .. })) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(known(&regions, &[9]), [9], "the daemon will say what is wrong with it");
    }

    #[test]
    fn answers_of_an_attachment_that_is_over_change_nothing() {
        let regions = Regions::default();
        register(&regions, 0, &[1]);
        begin(&regions, 1);
        assert_eq!(register(&regions, 0, &[2]), None);
        regions.adopt(&[(1, 5)]);
        assert_eq!(regions.remove(0, &[1]), None, "registered anew: to be unregistered there");
        assert_eq!(known(&regions, &[1]), [5]);
        assert_eq!(regions.remove(1, &[1]), Some(Settlement::Settled));
        assert!(begin(&regions, 2).is_empty());
    }

    #[test]
    fn what_is_leaving_is_not_registered_again_and_is_settled_then() {
        let regions = Regions::default();
        register(&regions, 0, &[1, 2, 3]);
        regions.leave(&[2]);
        regions.invalidate(3);
        assert_eq!(begin(&regions, 1), [1]);
        assert!(regions.adopt(&[(1, 1)]).is_empty());
        assert!(known(&regions, &[2, 3]).is_empty());
        assert_eq!(regions.remove(1, &[2, 3]), Some(Settlement::Settled));
    }

    /// While a daemon registers everything nobody can say that it does not have a region.
    #[test]
    fn what_is_unregistered_while_it_is_registered_leaves_then() {
        let regions = Regions::default();
        register(&regions, 0, &[1, 2, 3, 4]);
        assert_eq!(begin(&regions, 1), [1, 2, 3, 4]);
        assert!(matches!(regions.theirs(&[2]), Ok(Theirs::Renewing(daemon)) if daemon.number == 1));
        // The last one's answer comes late.
        assert_eq!(regions.remove(0, &[3]), Some(Settlement::Unsettled));
        match regions.theirs(&[4, 9]) {
            Err(Error::Refused(Failure { reason: Reason::Unregistered, index: Some(1), .. })) => {}
            other => panic!("{other:?}"),
        }
        // This one is lost as well, and the next one is not given them.
        assert_eq!(begin(&regions, 1), [1, 4]);
        assert!(matches!(regions.theirs(&[1]), Ok(Theirs::Renewing(_))));
        assert_eq!(regions.adopt(&[(1, 10), (4, 40)]), [1]);
        assert_eq!(known(&regions, &[1, 2, 3]), [10]);
        regions.gone(1, &[1]);
        assert!(known(&regions, &[1, 2, 3]).is_empty());
        assert_eq!(regions.remove(1, &[1, 2, 3]), Some(Settlement::Settled));
        assert_eq!(known(&regions, &[4]), [40]);
    }
}

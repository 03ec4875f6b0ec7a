//! Which ranges of an engine's address space are claimed, and by what.
//!
//! A range is claimed from the moment its registration begins until its memory is released, so that no two
//! regions ever share a byte, not even one that is coming and one that is going. Synchronous; knows neither
//! the gate nor the registrar.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::{oneshot, watch};

use super::{
    super::{Backing, RegionInfo},
    Quota, RegionRequest, Unregister,
};
use crate::domain::{Failure, Reason, RegionId};

/// Regions of one engine: a transfer names a region with 16 bits.
pub(super) const MAX_REGIONS: usize = 65_535;

/// All claims of one engine, with the numbers it gives out.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// By base address; the ranges do not overlap.
    claims: BTreeMap<u64, Claim>,
    bases: BTreeMap<RegionId, u64>,
    bytes: u64,
    pub(super) region_numbers: Numbers,
    pub(super) layout_numbers: Numbers,
}

#[derive(Debug)]
struct Claim {
    length: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Its registration is under way.
    Reserved,
    /// Registered; the receiver hears when the last lease is gone.
    Live(RegionId, oneshot::Receiver<Backing>),
    /// Unregistered; the watch turns true when its memory is released.
    Releasing(RegionId, watch::Receiver<bool>),
}

/// What an unregistration names.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Bases of live regions.
    pub(super) live: BTreeSet<u64>,
    /// Releases that were under way already.
    pub(super) pending: Vec<watch::Receiver<bool>>,
}

impl Ledger {
    /// Claims the range of each request, or none.
    pub(super) fn reserve(&mut self, requests: &[RegionRequest], quota: &Quota) -> Result<(), Failure> {
        for (at, request) in requests.iter().enumerate() {
            if let Err(failure) = self.reserve_one(request, quota) {
                self.free(requests[..at].iter().map(|request| request.base));
                let message = format!("regions[{at}]: {}", failure.message);
                return Err(Failure { message, ..failure.at(at as u64) });
            }
        }
        Ok(())
    }

    fn reserve_one(&mut self, request: &RegionRequest, quota: &Quota) -> Result<(), Failure> {
        let RegionRequest { base, length, .. } = *request;
        if length == 0 {
            return Err(Failure::new(Reason::BadArgument, "length is zero"));
        }
        let end = base
            .checked_add(length)
            .ok_or_else(|| Failure::new(Reason::OutOfBounds, "base + length wraps around"))?;
        if let Some((other, claim)) = self.claims.range(..end).next_back()
            && other + claim.length > base
        {
            return Err(Failure::new(Reason::Overlap, claim.describe(*other)));
        }
        let limit = quota.regions.min(MAX_REGIONS);
        if self.claims.len() >= limit {
            return Err(Failure::new(Reason::Limit, format!("the engine has {limit} regions already")));
        }
        let bytes = self.bytes.checked_add(length).filter(|bytes| *bytes <= quota.bytes);
        self.bytes = bytes.ok_or_else(|| {
            let (used, most) = (self.bytes, quota.bytes);
            Failure::new(Reason::Limit, format!("{length} bytes more than {used} exceed the quota of {most}"))
        })?;
        self.claims.insert(base, Claim { length, state: State::Reserved });
        Ok(())
    }

    /// Gives up claims, and the numbers of those that had one.
    pub(super) fn free(&mut self, bases: impl IntoIterator<Item = u64>) {
        for base in bases {
            let Some(claim) = self.claims.remove(&base) else { continue };
            self.bytes -= claim.length;
            if let State::Live(id, _) | State::Releasing(id, _) = claim.state {
                self.bases.remove(&id);
                self.region_numbers.give_back(id.0);
            }
        }
    }

    /// A reserved claim becomes a region.
    pub(super) fn go_live(&mut self, info: &RegionInfo, returned: oneshot::Receiver<Backing>) {
        if let Some(claim) = self.claims.get_mut(&info.base) {
            claim.state = State::Live(info.id, returned);
            self.bases.insert(info.id, info.base);
        }
    }

    /// A region goes; what is returned hears when its last lease is gone.
    pub(super) fn retire(
        &mut self,
        base: u64,
        done: &watch::Receiver<bool>,
    ) -> Option<oneshot::Receiver<Backing>> {
        let claim = self.claims.get_mut(&base)?;
        let State::Live(id, _) = claim.state else { return None };
        match std::mem::replace(&mut claim.state, State::Releasing(id, done.clone())) {
            State::Live(_, returned) => Some(returned),
            State::Reserved | State::Releasing(..) => None,
        }
    }

    /// Finds what is named by number or base. UNREGISTERED for what is not there, or is named twice.
    pub(super) fn find(&self, unregister: &Unregister) -> Result<Named, Failure> {
        let mut named = Named::default();
        let mut seen = BTreeSet::new();
        let by_id = unregister.ids.iter().map(|id| self.bases.get(id).copied()).enumerate();
        let by_base = unregister.bases.iter().map(|base| Some(*base)).enumerate();
        let columns = by_id.map(|found| ("region_ids", found)).chain(by_base.map(|found| ("bases", found)));
        for (column, (at, base)) in columns {
            let refusal = |what: &str| {
                Failure::new(Reason::Unregistered, format!("{column}[{at}] {what}")).at(at as u64)
            };
            let base = base.ok_or_else(|| refusal("names no region"))?;
            match self.claims.get(&base).map(|claim| &claim.state) {
                Some(_) if !seen.insert(base) => return Err(refusal("names a region for the second time")),
                Some(State::Live(..)) => {
                    named.live.insert(base);
                }
                Some(State::Releasing(_, done)) => named.join(done),
                Some(State::Reserved) | None => return Err(refusal("names no region")),
            }
        }
        Ok(named)
    }

    /// Everything that is registered or being released.
    pub(super) fn all(&self) -> Named {
        let mut named = Named::default();
        for (base, claim) in &self.claims {
            match &claim.state {
                State::Reserved => {}
                State::Live(..) => {
                    named.live.insert(*base);
                }
                State::Releasing(_, done) => named.join(done),
            }
        }
        named
    }
}

impl Named {
    fn join(&mut self, done: &watch::Receiver<bool>) {
        if !self.pending.iter().any(|other| other.same_channel(done)) {
            self.pending.push(done.clone());
        }
    }
}

impl Claim {
    fn describe(&self, base: u64) -> String {
        let end = base + self.length;
        match &self.state {
            State::Reserved => format!("overlaps {base:#x}..{end:#x}, which is being registered"),
            State::Live(id, _) => format!("overlaps region {id} at {base:#x}..{end:#x}"),
            State::Releasing(id, _) => {
                format!("overlaps region {id} at {base:#x}..{end:#x}, which is not released yet")
            }
        }
    }
}

/// Small numbers from 1, used again once given back. Quotas bound how many are out at a time.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    given_back: Vec<u32>,
    last: u32,
}

impl Numbers {
    pub(super) fn take(&mut self) -> u32 {
        self.given_back.pop().unwrap_or_else(|| {
            self.last += 1;
            self.last
        })
    }

    pub(super) fn give_back(&mut self, number: u32) {
        self.given_back.push(number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::Source;

    fn request(base: u64, length: u64) -> RegionRequest {
        RegionRequest { base, length, source: Source::Process }
    }

    const AMPLE: Quota = Quota { regions: 1000, bytes: u64::MAX, layouts: 0 };

    #[test]
    fn bad_ranges_are_refused_by_index_and_leave_no_claim() {
        let mut ledger = Ledger::default();
        let cases = [
            (request(0x3000, 0), Reason::BadArgument),
            (request(u64::MAX, 1), Reason::OutOfBounds),
            (request(0x1fff, 1), Reason::Overlap),
            (request(0x800, 0x1000), Reason::Overlap),
        ];
        for (bad, reason) in cases {
            let requests = [request(0x1000, 0x1000), request(0x2000, 0x1000), bad];
            let failure = ledger.reserve(&requests, &AMPLE).expect_err("a refusal");
            assert_eq!((failure.reason, failure.index), (reason, Some(2)), "{failure}");
            assert!(ledger.claims.is_empty() && ledger.bytes == 0);
        }
        let last = request(u64::MAX - 0x1000, 0x1000);
        assert_eq!(ledger.reserve(&[last], &AMPLE), Ok(()));
    }

    #[test]
    fn quotas_hold() {
        let mut ledger = Ledger::default();
        let two = Quota { regions: 2, ..AMPLE };
        let requests: Vec<_> = (0..3).map(|at| request(at * 10, 10)).collect();
        let failure = ledger.reserve(&requests, &two).expect_err("a refusal");
        assert_eq!((failure.reason, failure.index), (Reason::Limit, Some(2)));
        let bytes = Quota { bytes: 29, ..AMPLE };
        let failure = ledger.reserve(&requests, &bytes).expect_err("a refusal");
        assert_eq!((failure.reason, failure.index), (Reason::Limit, Some(2)));
        assert_eq!(ledger.reserve(&requests[1..], &bytes), Ok(()));
    }

    #[test]
    fn no_quota_lifts_the_limit_of_sixteen_bits() {
        let mut ledger = Ledger::default();
        let requests: Vec<_> = (0..=MAX_REGIONS as u64).map(|at| request(at, 1)).collect();
        let failure =
            ledger.reserve(&requests, &Quota { regions: usize::MAX, ..AMPLE }).expect_err("one more");
        assert_eq!((failure.reason, failure.index), (Reason::Limit, Some(MAX_REGIONS as u64)));
    }

    proptest! {
        /// A range is refused exactly when it shares a byte with one that was accepted before.
        #[test]
        fn overlap_agrees_with_a_bitmap(ranges in prop::collection::vec((0u64..200, 1u64..20), 1..60)) {
            let mut ledger = Ledger::default();
            let mut taken = [false; 256];
            for (base, length) in ranges {
                let bytes = &mut taken[base as usize..(base + length) as usize];
                let free = bytes.iter().all(|byte| !byte);
                let result = ledger.reserve(&[request(base, length)], &AMPLE);
                match result {
                    Ok(()) => { prop_assert!(free); bytes.fill(true) }
                    Err(failure) => { prop_assert!(!free); prop_assert_eq!(failure.reason, Reason::Overlap) }
                }
            }
        }
    }
}

//! Revocation: nothing in flight or queued touches these ranges, or serves this tag, any more.
//!
//! Two halves are proven at once. What peers do in the engine's memory is put out of reach by the engine's own
//! gate, whoever is connected and whatever they still send. What the engine itself has under way is ended by its
//! sessions, each of which says when its own half is settled.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, task::JoinSet};

use super::Engine;
use crate::{
    domain::{AddressRange, Epoch, Failure, SessionId, Tag},
    policy::{RevocationLimits, RevocationList, Revocations, TagRevoked},
    session::{Command, Known},
};

/// What is revoked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Revocation {
    /// Ranges of the engine's address space, registered or not; at least one.
    Ranges(Vec<AddressRange>),
    /// Everything that serves a request.
    Tag(Tag),
}

/// The answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Revoked {
    /// The endpoint's epoch since then.
    pub epoch: Epoch,
    /// Whether it is proven. Otherwise it is binding all the same; asking again waits on.
    pub settled: bool,
}

/// What was known when a call arrived. A transfer is judged by it, however long it waits for its turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// Who lives at the target's endpoint, and the newest revocation of theirs.
    pub(super) known: Option<Known>,
    /// The newest revocation of the engine's own.
    pub(super) own_epoch: Epoch,
}

impl Arrival {
    /// Whatever the engine brings along binds it: its transfer may have been overtaken on its way here, or have been
    /// received before, by this daemon or its predecessor. It cannot claim to know more than this daemon does.
    #[must_use]
    pub fn not_after(self, own_epoch: Option<Epoch>, known: Option<Known>) -> Self {
        let own_epoch = own_epoch.map_or(self.own_epoch, |told| told.min(self.own_epoch));
        let known = match (known, self.known) {
            (Some((who, then)), Some((here, now))) if who == here => Some((who, then.min(now))),
            (told, here) => told.or(here),
        };
        Self { known, own_epoch }
    }

    /// Who lives at the target's endpoint, and the newest revocation of theirs.
    pub fn known(&self) -> Option<Known> {
        self.known
    }
}

impl Engine {
    /// Revokes, and waits for the proof, but no longer than `settle`.
    ///
    /// # Errors
    /// `Limit` when too many tags are revoked; nothing is, then.
    pub async fn revoke(&self, what: Revocation, settle: Duration) -> Result<Revoked, Failure> {
        let metrics = &self.context.metrics;
        let raised = match &what {
            Revocation::Ranges(ranges) => {
                metrics.ranges_revoked();
                self.memory.revoke(ranges.clone())
            }
            Revocation::Tag(tag) => {
                let revoked = self.memory.revoke_tag(*tag);
                metrics.tag_revoked(revoked.is_ok());
                revoked?
            }
        };
        let alone = Arc::new(alone(raised.epoch, what)?);
        tracing::debug!(engine = %self.id, epoch = %raised.epoch, "revoked");
        let proven = async {
            let (own, ()) = tokio::join!(self.own_settled(&alone), self.memory.gate().quiet(raised.version));
            own
        };
        let settled = tokio::time::timeout(settle, proven).await.unwrap_or(false);
        Ok(Revoked { epoch: raised.epoch, settled })
    }

    /// Whether nothing of the engine's own is under way that this revokes; waits until it is so.
    async fn own_settled(&self, revoked: &Arc<Revocations>) -> bool {
        // All are told before any is waited for. A session that is made from now on judges by the memory's book.
        let mut ends = JoinSet::new();
        for handle in self.handles() {
            let revoked = revoked.clone();
            ends.spawn(async move {
                let (answer, hears) = oneshot::channel();
                match handle.send(Command::Revoke(revoked, answer)).await {
                    Ok(()) => hears.await.is_ok(),
                    // A session ends only when nothing of it touches memory any more.
                    Err(_) => true,
                }
            });
        }
        let mut settled = true;
        while let Some(ended) = ends.join_next().await {
            settled &= ended.unwrap_or(false);
        }
        settled
    }

    /// What is known as this moment, for a transfer to that endpoint.
    pub fn arrival(&self, target: &SessionId) -> Arrival {
        let known = self.sessions().by_target.get(target).and_then(|handle| handle.known());
        Arrival { known, own_epoch: self.memory.revocations().epoch() }
    }
}

/// This revocation and no other.
fn alone(epoch: Epoch, what: Revocation) -> Result<Revocations, Failure> {
    let mut list = RevocationList { epoch, ..RevocationList::default() };
    match what {
        Revocation::Ranges(ranges) => {
            list.ranges = AddressRange::join(ranges).into_iter().map(|range| (epoch, range)).collect();
        }
        Revocation::Tag(tag) => list.tags = vec![TagRevoked { tag, epoch, age: Duration::ZERO }],
    }
    let limits = RevocationLimits::ranges(list.ranges.len());
    Revocations::restore(limits, list, std::time::Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Incarnation;

    #[test]
    fn what_an_engine_brings_along_binds_it_and_gives_it_nothing() {
        let (bob, eve) = (Incarnation([1; 32]), Incarnation([2; 32]));
        let here = Arrival { known: Some((bob, Epoch(5))), own_epoch: Epoch(7) };
        assert_eq!(here.not_after(None, None), here);
        for (told, own, known) in [(3, 3, 3), (6, 6, 5), (90, 7, 5)] {
            let arrival = here.not_after(Some(Epoch(told)), Some((bob, Epoch(told))));
            assert_eq!(arrival, Arrival { known: Some((bob, Epoch(known))), own_epoch: Epoch(own) });
        }
        let meant_for = |arrival: Arrival| arrival.not_after(None, Some((eve, Epoch(2)))).known;
        assert_eq!(meant_for(here), Some((eve, Epoch(2))), "it was meant for somebody else");
        assert_eq!(meant_for(Arrival { known: None, ..here }), Some((eve, Epoch(2))));
    }
}

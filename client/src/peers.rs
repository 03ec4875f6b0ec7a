//! Whom this engine has met, and where: handed over at re-attach, so that a daemon restart does not make another
//! engine at the same `host:port` acceptable (I4).

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvferry_proto::engine::v1 as wire;

/// Peers remembered: as many as a daemon takes. The one that changed longest ago is forgotten first.
const MOST: usize = 1024;

/// The lock is held for single steps.
#[derive(Debug, Default)]
pub(crate) struct Peers(Mutex<Vec<(String, Vec<u8>)>>);

impl Peers {
    /// The daemon says whom the session is pinned to; empty: to nobody.
    pub(crate) fn met(&self, session: &str, incarnation: Vec<u8>) {
        let mut peers = self.lock();
        peers.retain(|(known, _)| known != session);
        if incarnation.is_empty() {
            return;
        }
        if peers.len() == MOST {
            peers.remove(0);
        }
        peers.push((session.to_owned(), incarnation));
    }

    /// The engine accepts whoever is there.
    pub(crate) fn forget(&self, session: &str) {
        self.met(session, Vec::new());
    }

    pub(crate) fn to_wire(&self) -> Vec<wire::KnownPeer> {
        let known = |(session_id, incarnation): &(String, Vec<u8>)| wire::KnownPeer {
            session_id: session_id.clone(),
            incarnation: incarnation.clone(),
        };
        self.lock().iter().map(known).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Vec<u8>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_a_peer_counts_and_a_reset_forgets_it() {
        let peers = Peers::default();
        peers.met("a:1", vec![1; 32]);
        peers.met("b:1", vec![2; 32]);
        peers.met("a:1", vec![3; 32]);
        let known = |peers: &Peers| -> Vec<_> {
            peers.to_wire().into_iter().map(|peer| (peer.session_id, peer.incarnation[0])).collect()
        };
        assert_eq!(known(&peers), [("b:1".to_owned(), 2), ("a:1".to_owned(), 3)]);
        peers.forget("b:1");
        peers.met("a:1", Vec::new());
        assert!(known(&peers).is_empty());
    }

    #[test]
    fn there_is_a_limit() {
        let peers = Peers::default();
        (0..=MOST).for_each(|port| peers.met(&format!("a:{port}"), vec![1; 32]));
        let known = peers.to_wire();
        assert_eq!((known.len(), known[0].session_id.as_str()), (MOST, "a:1"));
    }
}

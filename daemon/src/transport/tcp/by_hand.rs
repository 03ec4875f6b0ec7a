//! A carrier that somebody else drives: no thread, no waiting, no clock.
//!
//! Everything below the turn is what runs in production: the lanes, their fences, what they say on the wire.
//! The simulation decides when a lane has its turn, and what its socket's other end gives and takes.

use super::carrier::{Carrier, Farewell};

/// Gives lanes their turns. Dropped, it takes its lanes with it, as the end of a process would.
pub struct HandCarrier {
    carrier: Carrier,
    _farewell: Farewell,
}

impl HandCarrier {
    pub(super) fn new(carrier: Carrier, farewell: Farewell) -> Self {
        Self { carrier, _farewell: farewell }
    }

    /// Carries out what lanes were told, and gives every lane whose socket is ready one turn. Tells whether any
    /// was: then there may be more to do.
    pub fn round(&mut self) -> std::io::Result<bool> {
        self.carrier.round()
    }

    /// What a thread does every 50 ms: lanes that hold leases look at the rules.
    pub fn review(&mut self) {
        self.carrier.look_after_the_stuck();
    }
}

impl std::fmt::Debug for HandCarrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandCarrier").finish_non_exhaustive()
    }
}

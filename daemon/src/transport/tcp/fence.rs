//! A lane's seat at the gate of the engine whose memory it touches, and what it last saw of the rules.

use std::sync::Arc;

use crate::{
    domain::{Failure, Reason},
    memory::{EngineMemory, Inside, Seat, Version, View},
};

/// Entered for each call that touches engine memory, never held while waiting.
#[derive(Debug)]
pub(super) struct Fence {
    engine: Arc<EngineMemory>,
    seat: Seat,
    seen: Option<Version>,
}

impl Fence {
    /// Outside, and no rules seen yet.
    pub(super) fn new(engine: Arc<EngineMemory>) -> Self {
        let seat = engine.gate().seat();
        Self { engine, seat, seen: None }
    }

    /// Goes inside. Where the rules have changed since the last visit the caller gets them, and must look at
    /// what it has under way before it touches anything.
    pub(super) fn enter(&mut self) -> Result<(Inside<'_>, Option<Arc<View>>), Failure> {
        let inside = self.seat.enter();
        if self.seen == Some(inside.version()) {
            return Ok((inside, None));
        }
        let view = self.engine.view();
        if view.closed {
            return Err(Failure::plain(Reason::EngineGone));
        }
        self.seen = Some(inside.version());
        Ok((inside, Some(view)))
    }

    /// For a lane on which nothing moves: where the rules have changed, `look` lets go of what they speak against.
    pub(super) fn review(&mut self, look: impl FnOnce(&View)) -> Result<(), Failure> {
        if self.seen != Some(self.seat.version()) {
            let (_inside, news) = self.enter()?;
            if let Some(view) = news {
                look(&view);
            }
        }
        Ok(())
    }
}

//! Whether the daemon at the other end of a stream lives (I9). Both ends judge alike.

use std::time::{Duration, Instant};

use super::context::Timing;
use crate::{
    domain::{Failure, Reason},
    policy::{Beat, Judgement, judge},
    transport::tcp::Pulse,
};

/// A timer this late is a timer; later, the process did not run.
const TIMER_SLACK: Duration = Duration::from_millis(50);

/// What is known of the peer's life.
#[derive(Debug)]
pub(super) struct Life {
    last: Instant,
    /// A verdict that was put off is not asked for again before this.
    not_before: Instant,
}

impl Life {
    /// Alive now.
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { last: now, not_before: now }
    }

    /// A message came.
    pub(super) fn heard_now(&mut self) {
        self.last = Instant::now();
    }

    /// When the peer will have been silent for too long, unless it is heard before.
    pub(super) fn judge_at(&self, timing: &Timing) -> Instant {
        (self.last + timing.silence).max(self.not_before)
    }

    /// How much later than planned something happens, where that means that this process did not run.
    pub(super) fn overslept(planned: Instant) -> Duration {
        let late = planned.elapsed();
        if late > TIMER_SLACK { late } else { Duration::ZERO }
    }

    /// An error ends the session. `pulse` tells of bytes on its lanes.
    pub(super) fn judge(
        &mut self,
        pulse: &Pulse,
        overslept: Duration,
        timing: &Timing,
    ) -> Result<(), Failure> {
        let now = Instant::now();
        self.last = pulse.last().map_or(self.last, |heard| heard.max(self.last));
        let beat =
            Beat { now, last_life: self.last, overslept, silence: timing.silence, period: timing.heartbeat };
        let message = match judge(&beat) {
            Judgement::Alive | Judgement::Defer => {
                if now >= self.last + timing.silence {
                    // Put off: everything that came meanwhile is processed before the next look.
                    self.not_before = now + timing.heartbeat;
                }
                return Ok(());
            }
            Judgement::PeerSilent => format!("no sign of life for {} ms", timing.silence.as_millis()),
            Judgement::OverSlept => {
                format!("this daemon slept {} ms; its peers have buried it", overslept.as_millis())
            }
        };
        Err(Failure::new(Reason::PeerSilent, message))
    }
}

//! One reconnect cycle of a session, shared by all transfers that wait for it.
//!
//! The first open after a loss is tried at once and asks nobody; the cycle begins when it fails. A transfer with
//! a single attempt does not wait for it ([`super::RetryPolicy::outlives_failed_open`]).

use std::time::{Duration, Instant};

use super::{RetryPolicy, jitter::spread};

/// Longest wait between two opens of a cycle.
pub const MAX_SPACING: Duration = Duration::from_secs(1);

/// What follows from a failed open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReconnectStep {
    /// Open again.
    TryAt(Instant),
    /// The cycle is over: give up what waits for it, and end the outage.
    GiveUp,
}

/// A cycle in progress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reconnect {
    ends: Instant,
    backoff: Duration,
    failures: u32,
}

impl Reconnect {
    /// A cycle that begins with the failure seen now.
    pub fn begin(policy: &RetryPolicy, now: Instant) -> Self {
        Self { ends: now + policy.reconnect, backoff: policy.backoff, failures: 0 }
    }

    /// When the cycle is over, whatever an open in progress may still bring.
    pub fn ends(&self) -> Instant {
        self.ends
    }

    /// An open failed, the first one too. `draw` in `[0, 1)` keeps sessions that failed together apart.
    ///
    /// Gives up at once when the next open would begin after the end: nothing could come of the wait.
    pub fn failed(&mut self, now: Instant, draw: f64) -> ReconnectStep {
        self.failures = self.failures.saturating_add(1);
        let wait = self.backoff.saturating_mul(self.failures).min(MAX_SPACING);
        let next = now + spread(wait, draw);
        if next < self.ends { ReconnectStep::TryAt(next) } else { ReconnectStep::GiveUp }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn policy(backoff: u64, reconnect: u64) -> RetryPolicy {
        RetryPolicy {
            attempts: 3,
            backoff: ms(backoff),
            deadline: ms(30_000),
            progress_timeout: ms(10_000),
            reconnect: ms(reconnect),
        }
    }

    fn start() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
        Instant::now()
    }

    #[test]
    fn opens_are_spaced_further_and_further_apart() {
        let begin = start();
        let mut cycle = Reconnect::begin(&policy(50, 700), begin);
        let mut now = begin;
        let mut tried = Vec::new();
        while let ReconnectStep::TryAt(at) = cycle.failed(now, 1.0) {
            tried.push((at - begin).as_millis());
            now = at;
        }
        assert_eq!(tried, [50, 150, 300, 500]);
        assert_eq!(cycle.ends(), begin + ms(700));
    }

    #[test]
    fn a_slow_open_uses_the_time_of_the_cycle() {
        let begin = start();
        let mut cycle = Reconnect::begin(&policy(50, 5000), begin);
        assert_eq!(cycle.failed(begin + ms(4960), 1.0), ReconnectStep::GiveUp);
    }

    proptest! {
        /// No open begins at or after the end, none is more than the cap away, and the cycle ends.
        #[test]
        fn a_cycle_is_bounded(
            backoff in 1u64..3000,
            reconnect in 0u64..60_000,
            took in prop::collection::vec((0u64..500, 0.0..1.0f64), 2000),
        ) {
            let begin = start();
            let mut cycle = Reconnect::begin(&policy(backoff, reconnect), begin);
            let mut now = begin;
            let mut ended = false;
            for (took, draw) in took {
                match cycle.failed(now + ms(took), draw) {
                    ReconnectStep::TryAt(at) => {
                        prop_assert!(at < begin + ms(reconnect));
                        prop_assert!(at <= now + ms(took) + MAX_SPACING);
                        now = at;
                    }
                    ReconnectStep::GiveUp => {
                        ended = true;
                        break;
                    }
                }
            }
            prop_assert!(ended);
        }
    }
}

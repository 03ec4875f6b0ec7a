//! How often a transfer may lose something before it is given up.
//!
//! A *loss* is charged to a transfer when a lane dies and the transfer's part was the first unacknowledged on
//! it; what else was lost with the lane goes back to its queue for free, and nobody asks here. Opening a
//! session again is bounded by time, not by losses: see [`super::Reconnect`].

use std::time::Duration;

/// The limits a transfer runs under: those of the transfer, else of its engine, else of the daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryPolicy {
    /// Losses in a row that end a transfer; 1 = no retry at all.
    pub attempts: u32,
    /// The n-th loss in a row waits n times this.
    pub backoff: Duration,
    /// Longest life of a transfer, from its receipt to the decision that it must end.
    pub deadline: Duration,
    /// Longest time without a byte moved on any lane that carries the transfer's parts.
    pub progress_timeout: Duration,
    /// Longest time for opening the session again.
    pub reconnect: Duration,
}

impl RetryPolicy {
    /// Whether a transfer may wait for a session that could not be opened: with a single attempt, a failed
    /// open ends it as a lost part does.
    pub fn outlives_failed_open(&self) -> bool {
        self.attempts > 1
    }
}

/// What follows from a loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Send again what was not acknowledged, no sooner than after this wait.
    Retry {
        /// From now.
        after: Duration,
    },
    /// The attempts are used up.
    GiveUp,
}

/// One transfer's losses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attempts {
    in_a_row: u32,
    total: u32,
}

impl Attempts {
    /// Charges a loss.
    pub fn on_loss(&mut self, policy: &RetryPolicy) -> Verdict {
        self.in_a_row = self.in_a_row.saturating_add(1);
        if self.in_a_row >= policy.attempts {
            return Verdict::GiveUp;
        }
        self.total = self.total.saturating_add(1);
        Verdict::Retry { after: policy.backoff.saturating_mul(self.in_a_row) }
    }

    /// A part of the transfer was acknowledged: the path works, the row of losses is broken.
    pub fn on_progress(&mut self) {
        self.in_a_row = 0;
    }

    /// Attempts for the report: the first, and one for each loss after which there was another.
    pub fn count(&self) -> u32 {
        self.total.saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(attempts: u32) -> RetryPolicy {
        RetryPolicy {
            attempts,
            backoff: Duration::from_millis(50),
            deadline: Duration::from_secs(30),
            progress_timeout: Duration::from_secs(10),
            reconnect: Duration::from_secs(5),
        }
    }

    fn retry_after(ms: u64) -> Verdict {
        Verdict::Retry { after: Duration::from_millis(ms) }
    }

    #[test]
    fn the_wait_grows_with_each_loss_in_a_row() {
        let mut attempts = Attempts::default();
        let policy = policy(3);
        assert_eq!(attempts.count(), 1);
        assert_eq!(attempts.on_loss(&policy), retry_after(50));
        assert_eq!(attempts.on_loss(&policy), retry_after(100));
        assert_eq!(attempts.on_loss(&policy), Verdict::GiveUp);
        assert_eq!(attempts.count(), 3);
    }

    #[test]
    fn progress_breaks_the_row_but_is_not_forgotten_in_the_report() {
        let mut attempts = Attempts::default();
        let policy = policy(3);
        for _ in 0..5 {
            assert_eq!(attempts.on_loss(&policy), retry_after(50));
            attempts.on_progress();
        }
        assert_eq!(attempts.count(), 6);
    }

    #[test]
    fn one_attempt_is_no_retry() {
        assert_eq!(Attempts::default().on_loss(&policy(1)), Verdict::GiveUp);
        assert!(!policy(1).outlives_failed_open());
        assert!(policy(2).outlives_failed_open());
    }

    proptest! {
        /// However losses and progress are mixed: given up exactly when `attempts` losses came in a row.
        #[test]
        fn given_up_exactly_after_that_many_losses_in_a_row(
            limit in 1u32..8,
            losses in prop::collection::vec(any::<bool>(), 0..64),
        ) {
            let policy = policy(limit);
            let mut attempts = Attempts::default();
            let mut row = 0;
            for loss in losses {
                if !loss {
                    attempts.on_progress();
                    row = 0;
                    continue;
                }
                row += 1;
                let verdict = attempts.on_loss(&policy);
                if row >= limit {
                    prop_assert_eq!(verdict, Verdict::GiveUp);
                } else {
                    prop_assert_eq!(verdict, retry_after(50 * u64::from(row)));
                }
            }
        }
    }
}

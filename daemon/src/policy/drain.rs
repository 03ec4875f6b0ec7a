//! Leaving in an orderly way: what is still admitted, and when the daemon may go.

use std::time::{Duration, Instant};

use crate::domain::{Failure, Reason};

/// What to do when told to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopRequest {
    /// Begin to drain: tell engines and peers.
    Drain,
    /// Told twice: exit now.
    ExitNow,
}

/// How far the drain is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DrainStatus {
    /// Nobody asked for one.
    NotDraining,
    /// Transfers are in flight and there is time.
    Waiting {
        /// When the time is up.
        until: Instant,
    },
    /// Nothing is in flight.
    Finished,
    /// The time is up: fence what is left.
    TimedOut {
        /// Transfers still in flight.
        left: usize,
    },
}

/// The drain of one daemon. It ends with the process, never by going back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drain {
    timeout: Duration,
    until: Option<Instant>,
}

impl Drain {
    /// Not draining; `timeout` is what transfers in flight get when it comes to it.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, until: None }
    }

    /// Told to stop (SIGTERM).
    pub fn stop(&mut self, now: Instant) -> StopRequest {
        if self.until.is_some() {
            return StopRequest::ExitNow;
        }
        self.until = Some(now + self.timeout);
        StopRequest::Drain
    }

    /// Whether something new may begin: an attach, a session or a transfer.
    pub fn admit(&self) -> Result<(), Failure> {
        match self.until {
            None => Ok(()),
            Some(_) => Err(Failure::plain(Reason::Draining)),
        }
    }

    /// How far it is, with this many transfers of both directions in flight.
    pub fn status(&self, in_flight: usize, now: Instant) -> DrainStatus {
        match self.until {
            None => DrainStatus::NotDraining,
            Some(_) if in_flight == 0 => DrainStatus::Finished,
            Some(until) if now < until => DrainStatus::Waiting { until },
            Some(_) => DrainStatus::TimedOut { left: in_flight },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_ends_when_nothing_flies_or_the_time_is_up() {
        #[expect(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
        let now = Instant::now();
        let timeout = Duration::from_secs(30);
        let mut drain = Drain::new(timeout);
        assert_eq!(drain.admit(), Ok(()));
        assert_eq!(drain.status(0, now), DrainStatus::NotDraining);
        assert_eq!(drain.status(5, now + timeout * 2), DrainStatus::NotDraining);

        assert_eq!(drain.stop(now), StopRequest::Drain);
        assert_eq!(drain.admit().map_err(|failure| failure.reason), Err(Reason::Draining));
        let until = now + timeout;
        assert_eq!(drain.status(5, now), DrainStatus::Waiting { until });
        assert_eq!(drain.status(0, now), DrainStatus::Finished);
        assert_eq!(drain.status(1, until), DrainStatus::TimedOut { left: 1 });
        assert_eq!(drain.status(0, until), DrainStatus::Finished);
    }

    #[test]
    fn being_told_twice_means_now() {
        #[expect(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
        let now = Instant::now();
        let mut drain = Drain::new(Duration::from_secs(30));
        assert_eq!(drain.stop(now), StopRequest::Drain);
        assert_eq!(drain.stop(now), StopRequest::ExitNow);
        assert_eq!(drain.stop(now), StopRequest::ExitNow);
    }
}

//! Whether a session deserves transfers.
//!
//! ```text
//!                 threshold outages in a row, each with a transfer given up
//!      +---------+ ------------------------------------------------> +--------+
//!      | Healthy |                                                   | Failed |<-----+
//!      +---------+ <-------------------+       due, or asked for +-- +--------+      |
//!                    probe ok or reset |                         v                   | probe failed:
//!                                      +---------------------- +---------+ ----------+ wait doubles
//!                                                              | Probing |
//!                                                              +---------+
//! ```
//!
//! One hiccup is not a death: an *outage* (from the first lane death, stream end or failed open until the
//! session is fully open again or its reconnect cycle gave up) counts once, however many transfers it took
//! with it. WRITE and READ use lanes of their own, so each has its own count, and a success resets only its own.
//!
//! Not here: what a probe does, and whether a failure speaks against the session ([`super::disposition()`]).

use std::time::{Duration, Instant};

use super::jitter::spread;
use crate::domain::Op;

/// Wait before the first probe of a failed session.
pub const FIRST_PROBE: Duration = Duration::from_millis(100);

/// Limits of the health machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthPolicy {
    /// Outages in a row, with a transfer given up, that fail the session; 1 = fail fast. A transfer may bring a
    /// threshold of its own.
    pub failure_threshold: u32,
    /// Longest wait between probes.
    pub probe_max: Duration,
}

/// The state of a session's health.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HealthState {
    /// Transfers are taken.
    Healthy,
    /// Transfers are refused with SESSION_FAILED.
    Failed {
        /// When it will be looked at again.
        next_probe: Instant,
    },
    /// Still refused; a probe is under way.
    Probing,
}

/// What an event changed, for the driver to act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HealthChange {
    /// Now FAILED: tell the engine, and call [`Health::probe_due`] at this time.
    Failed {
        /// When.
        next_probe: Instant,
    },
    /// Run a probe now, and tell how it went.
    StartProbe,
    /// Still FAILED: call [`Health::probe_due`] at this time.
    ProbeAgain {
        /// When.
        next_probe: Instant,
    },
    /// HEALTHY again: tell the engine.
    Recovered,
}

/// The health of one session.
#[derive(Clone, Debug)]
pub struct Health {
    policy: HealthPolicy,
    state: HealthState,
    /// Outages in a row in which a transfer of this direction was given up.
    counts: [u32; 2],
    in_outage: bool,
    /// The present outage, or the last one, may still be counted for this direction. A transfer may learn that
    /// it is given up a moment after the outage ended; it belongs to that outage then.
    countable: [bool; 2],
    /// Wait before the next probe, before jitter.
    interval: Duration,
}

impl Health {
    /// A session of which nothing bad is known.
    pub fn new(policy: HealthPolicy) -> Self {
        Self {
            policy,
            state: HealthState::Healthy,
            counts: [0; 2],
            in_outage: false,
            countable: [false; 2],
            interval: Duration::ZERO,
        }
    }

    /// The state now.
    pub fn state(&self) -> HealthState {
        self.state
    }

    /// Whether transfers are refused.
    pub fn is_failed(&self) -> bool {
        self.state != HealthState::Healthy
    }

    /// Outages counted in a row for this direction.
    pub fn count(&self, op: Op) -> u32 {
        self.counts[index(op)]
    }

    /// A lane died, the stream ended or an open failed. More of it belongs to the same outage.
    pub fn outage_began(&mut self) {
        if !self.in_outage {
            self.in_outage = true;
            self.countable = [true; 2];
        }
    }

    /// The session is fully open again, or its reconnect cycle gave up.
    pub fn outage_ended(&mut self) {
        self.in_outage = false;
    }

    /// A transfer was given up for a reason that counts. Where it has a threshold of its own the session is held
    /// to that: of several transfers that one outage took, the strictest decides, counted first or not.
    pub fn given_up(
        &mut self,
        op: Op,
        own_threshold: Option<u32>,
        now: Instant,
        draw: f64,
    ) -> Option<HealthChange> {
        let op = index(op);
        if self.is_failed() {
            return None;
        }
        if self.countable[op] {
            self.countable[op] = false;
            self.counts[op] = self.counts[op].saturating_add(1);
        }
        let threshold = own_threshold.unwrap_or(self.policy.failure_threshold).max(1);
        if self.counts[op] < threshold {
            return None;
        }
        self.interval = FIRST_PROBE.min(self.policy.probe_max);
        let next_probe = self.schedule(now, draw);
        Some(HealthChange::Failed { next_probe })
    }

    /// A transfer of this direction is done.
    pub fn success(&mut self, op: Op) {
        self.counts[index(op)] = 0;
    }

    /// The time of a probe has come. Nothing happens when it has not, or when there is nothing to probe: timers
    /// may be late, early or of an earlier failure.
    pub fn probe_due(&mut self, now: Instant) -> Option<HealthChange> {
        match self.state {
            HealthState::Failed { next_probe } if now >= next_probe => self.start_probe(),
            _ => None,
        }
    }

    /// The engine asks for a probe: a failed session is probed at once.
    pub fn probe_asked(&mut self) -> Option<HealthChange> {
        match self.state {
            HealthState::Failed { .. } => self.start_probe(),
            HealthState::Healthy | HealthState::Probing => None,
        }
    }

    /// The probe that was started came through, both ways.
    pub fn probe_ok(&mut self) -> Option<HealthChange> {
        match self.state {
            HealthState::Probing => self.recover(),
            HealthState::Healthy | HealthState::Failed { .. } => None,
        }
    }

    /// The probe that was started did not come through.
    pub fn probe_failed(&mut self, now: Instant, draw: f64) -> Option<HealthChange> {
        match self.state {
            HealthState::Probing => {
                self.interval = self.interval.saturating_mul(2).min(self.policy.probe_max);
                let next_probe = self.schedule(now, draw);
                Some(HealthChange::ProbeAgain { next_probe })
            }
            HealthState::Healthy | HealthState::Failed { .. } => None,
        }
    }

    /// The engine resets the session: all is forgotten.
    pub fn reset(&mut self) -> Option<HealthChange> {
        self.recover()
    }

    fn start_probe(&mut self) -> Option<HealthChange> {
        self.state = HealthState::Probing;
        Some(HealthChange::StartProbe)
    }

    fn schedule(&mut self, now: Instant, draw: f64) -> Instant {
        let next_probe = now + spread(self.interval, draw);
        self.state = HealthState::Failed { next_probe };
        next_probe
    }

    fn recover(&mut self) -> Option<HealthChange> {
        let was_failed = self.is_failed();
        *self = Self::new(self.policy);
        was_failed.then_some(HealthChange::Recovered)
    }
}

fn index(op: Op) -> usize {
    match op {
        Op::Write => 0,
        Op::Read => 1,
    }
}

#[cfg(test)]
mod tests;

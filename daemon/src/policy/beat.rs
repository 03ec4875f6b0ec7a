//! Whether the peer's daemon is alive, and whether this one may judge (I9).
//!
//! A beat looks at every session once per period, after everything received has been processed. Two daemons may
//! disagree about who slept: one that slept past the silence limit has been buried by its peers and must not use
//! what they fenced; one that slept less has beats of its peers waiting unread and must not judge yet.

use std::time::{Duration, Instant};

/// What a beat knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beat {
    /// Now.
    pub now: Instant,
    /// When any byte written by the peer daemon was last received, on any connection of the session.
    pub last_life: Instant,
    /// How much later than planned this daemon's beat came.
    pub overslept: Duration,
    /// Longest silence of a living peer.
    pub silence: Duration,
    /// Planned time between beats.
    pub period: Duration,
}

/// What follows from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// Carry on.
    Alive,
    /// The peer's daemon is dead, stopped or unreachable: end the session.
    PeerSilent,
    /// This daemon slept past the silence limit: fence all its own sessions, judge nobody.
    OverSlept,
    /// Not awake for a whole period yet: judge at the next beat.
    Defer,
}

/// Judges one session at one beat.
pub fn judge(beat: &Beat) -> Judgement {
    if beat.overslept >= beat.silence {
        return Judgement::OverSlept;
    }
    if beat.overslept >= beat.period {
        return Judgement::Defer;
    }
    // A shorter sleep is taken off the peer's silence: nobody was there to hear it. Deferring for every little
    // lateness instead would let a busy daemon never judge at all.
    let silent_for = beat.now.saturating_duration_since(beat.last_life).saturating_sub(beat.overslept);
    if silent_for >= beat.silence { Judgement::PeerSilent } else { Judgement::Alive }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn beats() {
        #[expect(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
        let last_life = Instant::now();
        let table = [
            // silent for, overslept by, judgement
            (0, 0, Judgement::Alive),
            (2999, 0, Judgement::Alive),
            (3000, 0, Judgement::PeerSilent),
            (60_000, 0, Judgement::PeerSilent),
            // Asleep for less than a period: that much is forgiven.
            (3000, 1, Judgement::Alive),
            (3400, 400, Judgement::PeerSilent),
            (3498, 499, Judgement::Alive),
            // Asleep for a period or more: nobody is judged, not even the long silent.
            (60_000, 500, Judgement::Defer),
            (60_000, 2999, Judgement::Defer),
            (0, 2999, Judgement::Defer),
            // Asleep past the limit: this daemon is the dead one.
            (0, 3000, Judgement::OverSlept),
            (60_000, 60_000, Judgement::OverSlept),
        ];
        for (silent, overslept, expected) in table {
            let beat = Beat {
                now: last_life + ms(silent),
                last_life,
                overslept: ms(overslept),
                silence: ms(3000),
                period: ms(500),
            };
            assert_eq!(judge(&beat), expected, "silent for {silent} ms, overslept by {overslept} ms");
        }
    }

    #[test]
    fn life_heard_while_judging_is_no_silence() {
        #[expect(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
        let now = Instant::now();
        let beat = Beat { now, last_life: now + ms(5), overslept: ms(0), silence: ms(3000), period: ms(500) };
        assert_eq!(judge(&beat), Judgement::Alive);
    }
}

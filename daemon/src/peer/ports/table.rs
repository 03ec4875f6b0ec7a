//! Which port belongs to which incarnation, and for how long: decisions, without sockets, files or clocks (I4).
//!
//! A port in use, or resting, belongs to the incarnation that had it. The same incarnation gets it back at any
//! time; another one only when the rest is over.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use crate::domain::Incarnation;

/// The ports of a range. Bounded by the range.
#[derive(Debug)]
pub(super) struct Table {
    range: RangeInclusive<u16>,
    quarantine: Duration,
    next: u16,
    owned: BTreeMap<u16, Owned>,
}

#[derive(Clone, Copy, Debug)]
struct Owned {
    who: Incarnation,
    /// Nothing: in use.
    rests_until: Option<Instant>,
}

/// Where a port that belongs to somebody stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// An engine is attached with it.
    InUse,
    /// Nobody else gets it for so long.
    Rests(Duration),
}

/// One port that belongs to somebody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) port: u16,
    pub(super) who: Incarnation,
    pub(super) standing: Standing,
}

impl Table {
    /// All free; turns begin at `next`, or at the first port where that lies outside of the range.
    pub(super) fn new(range: RangeInclusive<u16>, quarantine: Duration, next: u16) -> Self {
        let next = if range.contains(&next) { next } else { *range.start() };
        Self { range, quarantine, next, owned: BTreeMap::new() }
    }

    /// Takes over what an earlier run of the daemon left. What was in use then is held for `grace`, so that its
    /// engine finds the way back, and rests after that as if it had been given back now. No rest is longer than
    /// that: a clock that was set back must not keep a port for ever.
    pub(super) fn restore(&mut self, left: impl IntoIterator<Item = Entry>, grace: Duration, now: Instant) {
        let longest = grace + self.quarantine;
        for Entry { port, who, standing } in left {
            let rest = match standing {
                Standing::InUse => longest,
                Standing::Rests(rest) => rest.min(longest),
            };
            if self.range.contains(&port) && !rest.is_zero() {
                self.owned.insert(port, Owned { who, rests_until: Some(now + rest) });
            }
        }
    }

    /// Whether this incarnation may listen there now.
    pub(super) fn may_have(&self, port: u16, who: &Incarnation, now: Instant) -> bool {
        self.range.contains(&port)
            && self.owned.get(&port).is_none_or(|owned| match owned.rests_until {
                Some(until) => owned.who == *who || until <= now,
                None => false,
            })
    }

    /// The next port in turn; after the last comes the first.
    pub(super) fn turn(&mut self) -> u16 {
        let port = self.next;
        self.next = if port == *self.range.end() { *self.range.start() } else { port + 1 };
        port
    }

    /// Where the next turn begins.
    pub(super) fn next(&self) -> u16 {
        self.next
    }

    /// How many ports there are.
    pub(super) fn len(&self) -> usize {
        self.range.len()
    }

    /// An engine listens there from now on. Returns whether it comes back to a port of its own.
    pub(super) fn take(&mut self, port: u16, who: Incarnation, now: Instant) -> bool {
        self.owned.retain(|_, owned| owned.rests_until.is_none_or(|until| until > now));
        let before = self.owned.insert(port, Owned { who, rests_until: None });
        before.is_some_and(|before| before.who == who)
    }

    /// Its engine is gone: the quarantine begins.
    pub(super) fn give_back(&mut self, port: u16, now: Instant) {
        if let Some(owned) = self.owned.get_mut(&port) {
            owned.rests_until = Some(now + self.quarantine);
        }
    }

    /// Until the first of the resting ports is anybody's.
    pub(super) fn shortest_rest(&self, now: Instant) -> Duration {
        let ends = self.owned.values().filter_map(|owned| owned.rests_until);
        ends.min().map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// All that belongs to somebody.
    pub(super) fn entries(&self, now: Instant) -> impl Iterator<Item = Entry> + '_ {
        self.owned.iter().filter_map(move |(&port, owned)| {
            let standing = match owned.rests_until {
                None => Standing::InUse,
                Some(until) => Standing::Rests(until.checked_duration_since(now).filter(|d| !d.is_zero())?),
            };
            Some(Entry { port, who: owned.who, standing })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: u16 = 20_000;
    const PORTS: u16 = 4;
    const QUARANTINE: Duration = Duration::from_secs(900);
    const GRACE: Duration = Duration::from_secs(10);

    fn who(number: u8) -> Incarnation {
        Incarnation([number; 32])
    }

    fn table() -> Table {
        Table::new(FIRST..=FIRST + PORTS - 1, QUARANTINE, FIRST)
    }

    #[test]
    fn a_port_goes_back_to_its_own_at_once_and_to_others_after_the_rest() {
        let (mut table, start) = (table(), Instant::now());
        table.take(FIRST, who(1), start);
        assert!(!table.may_have(FIRST, &who(1), start), "in use is in use");
        table.give_back(FIRST, start);
        let last = start + QUARANTINE - Duration::from_nanos(1);
        assert!(table.may_have(FIRST, &who(1), start) && !table.may_have(FIRST, &who(2), last));
        assert!(table.may_have(FIRST, &who(2), start + QUARANTINE));
        assert_eq!(table.shortest_rest(last), Duration::from_nanos(1));
    }

    #[test]
    fn what_was_in_use_at_a_restart_is_held_for_the_grace_and_then_rests() {
        let (mut table, start) = (table(), Instant::now());
        table.restore([Entry { port: FIRST, who: who(1), standing: Standing::InUse }], GRACE, start);
        assert!(table.may_have(FIRST, &who(1), start));
        assert!(!table.may_have(FIRST, &who(2), start + QUARANTINE));
        assert!(table.take(FIRST, who(1), start), "it comes back");
        table.give_back(FIRST, start + GRACE);
        assert!(!table.take(FIRST + 1, who(1), start), "to a port of its own");
        assert!(table.may_have(FIRST, &who(2), start + GRACE + QUARANTINE));
    }

    /// H2: a clock that was set back by an hour, or a record that lies.
    #[test]
    fn a_recorded_rest_is_never_longer_than_a_full_one() {
        let (mut table, start) = (table(), Instant::now());
        let forever = Standing::Rests(Duration::from_secs(u64::MAX / 4));
        let outside = Entry { port: FIRST + PORTS, who: who(1), standing: Standing::InUse };
        table.restore([Entry { port: FIRST, who: who(1), standing: forever }, outside], GRACE, start);
        assert_eq!(table.entries(start).count(), 1, "what is out of range is nobody's");
        assert!(table.may_have(FIRST, &who(2), start + GRACE + QUARANTINE));
    }

    #[test]
    fn turns_go_round_the_whole_range() {
        let mut table = Table::new(FIRST..=FIRST + PORTS - 1, QUARANTINE, FIRST + PORTS - 1);
        let turns: Vec<u16> = (0..table.len() + 1).map(|_| table.turn()).collect();
        assert_eq!(turns, [FIRST + 3, FIRST, FIRST + 1, FIRST + 2, FIRST + 3]);
        assert_eq!(Table::new(FIRST..=FIRST, QUARANTINE, 1).turn(), FIRST);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u16, u8),
        GiveBack(u16),
        Wait(u64),
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        let port = FIRST..FIRST + PORTS;
        prop_oneof![
            4 => (port.clone(), 0..3u8).prop_map(|(port, number)| Step::Take(port, number)),
            3 => port.prop_map(Step::GiveBack),
            2 => (0..QUARANTINE.as_secs() + 60).prop_map(Step::Wait),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        /// I4: within the quarantine a port never goes to another incarnation, restarts in between or not.
        #[test]
        fn i4_a_port_never_changes_hands_within_the_quarantine(steps in proptest::collection::vec(step(), 1..80)) {
            let (mut table, mut now) = (table(), Instant::now());
            // Whose each port was last, and when it was last known to be in use.
            let mut last: BTreeMap<u16, (u8, Instant, bool)> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Take(port, number) => {
                        let may = table.may_have(port, &who(number), now);
                        if let Some((owner, seen, in_use)) = last.get(&port) {
                            prop_assert!(!(may && *in_use), "{port} is in use");
                            let rested = now.duration_since(*seen) >= QUARANTINE;
                            prop_assert!(!may || *owner == number || rested, "{port} changed hands");
                            prop_assert!(may || *in_use || *owner != number, "{port} was kept from its own");
                        }
                        if may {
                            table.take(port, who(number), now);
                            last.insert(port, (number, now, true));
                        }
                    }
                    Step::GiveBack(port) => {
                        if let Some(entry) = last.get_mut(&port).filter(|entry| entry.2) {
                            *entry = (entry.0, now, false);
                            table.give_back(port, now);
                        }
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                    Step::Restart => {
                        let left: Vec<_> = table.entries(now).collect();
                        table = Table::new(FIRST..=FIRST + PORTS - 1, QUARANTINE, table.next());
                        table.restore(left, GRACE, now);
                        last.values_mut().filter(|entry| entry.2).for_each(|entry| *entry = (entry.0, now, false));
                    }
                }
            }
        }
    }
}

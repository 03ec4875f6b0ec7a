//! What the indexes say, against a look at every transfer, and what it costs to keep them.

use super::{super::tests::words::*, *};
use crate::{
    domain::{Failure, Op, Reason},
    transfer::run::Ending,
};

impl Runs {
    /// The same questions, asked of every transfer.
    pub(in super::super) fn check(&self) {
        let wakes = self.by_id.iter().filter_map(|(id, run)| Some((self.patience.wake(run)?, *id)));
        assert_eq!(self.wakes, wakes.collect(), "who wakes when");
        assert_eq!(self.live, self.by_id.values().filter(|run| !run.is_ending()).count(), "who lives");
        assert_eq!(self.places.len(), self.by_id.len(), "who is there");
        assert!(self.touched.is_empty(), "all is up to date");
    }
}

/// So many waiting transfers, each due a second after the one before it.
fn waiting(count: u8, now: Instant) -> Runs {
    let mut runs = Runs::new(Patience { peer_wait: ms(3000), settle: ms(5000) });
    for number in 0..count {
        let received = now + Duration::from_secs(number.into());
        let admitted = admitted(id(number), Op::Write, 1, policy().retry, received);
        runs.insert(id(number), Run::new(admitted, None, None));
    }
    assert_eq!(runs.catch_up(), usize::from(count));
    runs.check();
    runs
}

/// However many there are: one that is changed, or gone, is one that is looked at, and a question is none.
#[test]
fn an_event_costs_what_it_touches() {
    let now = Instant::now();
    let mut runs = waiting(200, now);
    let second = runs.next_wake();
    if let Some(run) = runs.get_mut(&id(7)) {
        run.not_before = Some(now + ms(50));
    }
    assert_eq!(runs.catch_up(), 1);
    runs.check();
    assert_eq!(runs.due(now + ms(50)), [id(7)]);
    assert!(runs.remove(&id(7)).is_some() && runs.remove(&id(7)).is_none());
    assert_eq!(runs.catch_up(), 1);
    runs.check();
    assert_eq!(runs.next_wake(), second);
    assert!(runs.due(now).is_empty() && runs.any_live());
    assert_eq!(runs.catch_up(), 0);
}

/// Who left in a step in which all were taken in hand leaves the indexes too.
#[test]
fn who_is_gone_is_in_no_index() {
    let now = Instant::now();
    let mut runs = waiting(3, now);
    runs.remove(&id(1));
    assert_eq!(runs.values_mut().count(), 2);
    runs.catch_up();
    runs.check();
}

/// Between two looks it may be changed, removed and put back: the last counts.
#[test]
fn the_last_change_of_a_step_counts() {
    let now = Instant::now();
    let mut runs = waiting(1, now);
    let run = runs.remove(&id(0)).expect("it is there");
    runs.insert(id(0), run);
    let cancelled = || Ending::decided(Failure::plain(Reason::Cancelled), now);
    runs.values_mut().for_each(|run| run.end(cancelled()));
    assert!(!runs.any_live());
    runs.check();
    assert_eq!(runs.next_wake(), Some(now + ms(5000)), "until UNSETTLED");
    if let Some(run) = runs.get_mut(&id(0)) {
        run.end(Ending { own_settled: true, ..cancelled() });
    }
    runs.catch_up();
    assert_eq!(runs.next_wake(), Some(now + ms(3000)), "for the peer's word");
}

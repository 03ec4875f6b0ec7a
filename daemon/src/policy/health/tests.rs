//! States x events, and what must hold whatever happens.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Event {
    OutageBegan,
    OutageEnded,
    GivenUp(Op),
    Success(Op),
    ProbeDue,
    ProbeAsked,
    ProbeOk,
    ProbeFailed,
    Reset,
}

const EVENTS: [Event; 11] = [
    Event::OutageBegan,
    Event::OutageEnded,
    Event::GivenUp(Op::Write),
    Event::GivenUp(Op::Read),
    Event::Success(Op::Write),
    Event::Success(Op::Read),
    Event::ProbeDue,
    Event::ProbeAsked,
    Event::ProbeOk,
    Event::ProbeFailed,
    Event::Reset,
];

fn apply(health: &mut Health, event: Event, now: Instant, draw: f64) -> Option<HealthChange> {
    match event {
        Event::OutageBegan => health.outage_began(),
        Event::OutageEnded => health.outage_ended(),
        Event::GivenUp(op) => return health.given_up(op, None, now, draw),
        Event::Success(op) => health.success(op),
        Event::ProbeDue => return health.probe_due(now),
        Event::ProbeAsked => return health.probe_asked(),
        Event::ProbeOk => return health.probe_ok(),
        Event::ProbeFailed => return health.probe_failed(now, draw),
        Event::Reset => return health.reset(),
    }
    None
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn policy(failure_threshold: u32) -> HealthPolicy {
    HealthPolicy { failure_threshold, probe_max: ms(1000) }
}

/// Any instant will do: only differences count.
fn start() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "a test needs one instant to count from")]
    Instant::now()
}

/// A draw of one leaves waits as they are.
const NO_JITTER: f64 = 1.0;

fn failed(now: Instant) -> Health {
    let mut health = Health::new(policy(1));
    health.outage_began();
    assert!(health.given_up(Op::Write, None, now, NO_JITTER).is_some());
    health
}

/// Every state meets every event.
#[test]
fn states_by_events() {
    use HealthChange::*;
    let now = start();
    let first = now + FIRST_PROBE;
    let (healthy, failed_until_first) = (HealthState::Healthy, HealthState::Failed { next_probe: first });
    let doubled = HealthState::Failed { next_probe: first + ms(200) };
    let again = Some(ProbeAgain { next_probe: first + ms(200) });

    let mut in_outage = Health::new(policy(1));
    in_outage.outage_began();
    let failed_now = failed(now);
    let mut probing = failed_now.clone();
    assert_eq!(probing.probe_due(first), Some(StartProbe));

    // Columns: a quiet healthy session, one in an outage, a failed one whose probe is due, one being probed.
    type Cell = (HealthState, Option<HealthChange>);
    let probe: Cell = (HealthState::Probing, Some(StartProbe));
    let h: Cell = (healthy, None);
    let f: Cell = (failed_until_first, None);
    let p: Cell = (HealthState::Probing, None);
    let late_fail = first + FIRST_PROBE;
    let fails: Cell = (HealthState::Failed { next_probe: late_fail }, Some(Failed { next_probe: late_fail }));
    let recovered: Cell = (healthy, Some(Recovered));
    let table: [(Event, [Cell; 4]); EVENTS.len()] = [
        (EVENTS[0], [h, h, f, p]),
        (EVENTS[1], [h, h, f, p]),
        (EVENTS[2], [h, fails, f, p]),
        (EVENTS[3], [h, fails, f, p]),
        (EVENTS[4], [h, h, f, p]),
        (EVENTS[5], [h, h, f, p]),
        (EVENTS[6], [h, h, probe, p]),
        (EVENTS[7], [h, h, probe, p]),
        (EVENTS[8], [h, h, f, recovered]),
        (EVENTS[9], [h, h, f, (doubled, again)]),
        (EVENTS[10], [h, h, recovered, recovered]),
    ];
    for (event, cells) in table {
        let columns = [Health::new(policy(1)), in_outage.clone(), failed_now.clone(), probing.clone()];
        for (mut health, (state, change)) in columns.into_iter().zip(cells) {
            let before = health.state();
            let got = apply(&mut health, event, first, NO_JITTER);
            assert_eq!((health.state(), got), (state, change), "{event:?} in {before:?}");
        }
    }
}

#[test]
fn an_outage_counts_once_however_many_transfers_it_took() {
    let now = start();
    let mut health = Health::new(policy(3));
    for outage in 1..=2 {
        health.outage_began();
        for _ in 0..100 {
            assert_eq!(health.given_up(Op::Write, None, now, 0.5), None);
            health.outage_began();
        }
        health.outage_ended();
        assert_eq!(health.given_up(Op::Write, None, now, 0.5), None, "told late, but of the same outage");
        assert_eq!(health.count(Op::Write), outage);
    }
    health.outage_began();
    assert!(matches!(health.given_up(Op::Write, None, now, 0.5), Some(HealthChange::Failed { .. })));
}

#[test]
fn a_transfer_told_late_counts_for_the_outage_that_just_ended() {
    let now = start();
    let mut health = Health::new(policy(2));
    assert_eq!(health.given_up(Op::Read, None, now, 0.5), None);
    assert_eq!(health.count(Op::Read), 0, "no outage, nothing to count");
    health.outage_began();
    health.outage_ended();
    assert_eq!(health.given_up(Op::Read, None, now, 0.5), None);
    assert_eq!(health.count(Op::Read), 1);
}

/// Precedence: transfer, then engine, then configuration.
#[test]
fn a_transfer_may_bring_its_own_threshold() {
    let now = start();
    let given_up = |health: &mut Health, own| health.given_up(Op::Write, own, now, 0.5).is_some();
    let mut health = Health::new(policy(2));
    assert!(!given_up(&mut health, Some(1)), "no outage, nothing to count");
    health.outage_began();
    assert!(!given_up(&mut health, None));
    assert!(given_up(&mut health, Some(1)), "the strictest of one outage decides, counted or not");
    let mut health = Health::new(policy(2));
    for outage in 1..=4 {
        health.outage_began();
        assert!(!given_up(&mut health, Some(9)), "outage {outage}: it is patient");
        health.outage_ended();
    }
    assert_eq!(health.count(Op::Write), 4);
    assert!(given_up(&mut health, None), "others are not");
}

#[test]
fn directions_are_counted_apart() {
    let now = start();
    let mut health = Health::new(policy(2));
    health.outage_began();
    assert_eq!(health.given_up(Op::Write, None, now, 0.5), None);
    assert_eq!(health.given_up(Op::Read, None, now, 0.5), None);
    health.outage_ended();
    health.success(Op::Write);
    assert_eq!((health.count(Op::Write), health.count(Op::Read)), (0, 1));
    health.outage_began();
    assert_eq!(health.given_up(Op::Write, None, now, 0.5), None);
    assert!(health.given_up(Op::Read, None, now, 0.5).is_some());
}

#[test]
fn probes_start_at_100_ms_and_double_up_to_the_cap() {
    let mut now = start();
    let mut health = failed(now);
    let mut waits = Vec::new();
    for _ in 0..6 {
        let HealthState::Failed { next_probe } = health.state() else { panic!("{:?}", health.state()) };
        assert_eq!(health.probe_due(next_probe - ms(1)), None, "too early");
        waits.push((next_probe - now).as_millis());
        now = next_probe;
        assert_eq!(health.probe_due(now), Some(HealthChange::StartProbe));
        assert!(health.probe_failed(now, NO_JITTER).is_some());
    }
    assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
}

#[test]
fn a_healed_session_starts_from_zero() {
    let now = start();
    let mut health = Health::new(policy(2));
    for _ in 0..2 {
        health.outage_began();
        health.given_up(Op::Write, None, now, 0.5);
        health.outage_ended();
    }
    assert!(health.is_failed());
    assert_eq!(health.probe_asked(), Some(HealthChange::StartProbe));
    assert_eq!(health.probe_ok(), Some(HealthChange::Recovered));
    assert_eq!(health.count(Op::Write), 0);
    health.outage_began();
    assert_eq!(health.given_up(Op::Write, None, now, 0.5), None);
}

fn events() -> impl Strategy<Value = Vec<(Event, u64, f64)>> {
    prop::collection::vec((prop::sample::select(EVENTS.as_slice()), 0u64..2000, 0.0..1.0f64), 0..200)
}

proptest! {
    /// A plain recount, by direction, of outages with a transfer given up since the last success: the machine
    /// fails exactly when it reaches the threshold, never below it, and counts an outage once.
    #[test]
    fn fails_exactly_at_the_threshold(threshold in 1u32..5, events in events()) {
        let mut now = start();
        let mut health = Health::new(policy(threshold));
        let (mut open, mut outage) = (false, 0u32);
        let mut counted_in = [0u32; 2];
        let mut counts = [0u32; 2];
        for (event, step, draw) in events {
            now += ms(step);
            let was_failed = health.is_failed();
            let change = apply(&mut health, event, now, draw);
            match event {
                Event::OutageBegan if !open => (open, outage) = (true, outage + 1),
                Event::OutageEnded => open = false,
                Event::Success(op) => counts[index(op)] = 0,
                Event::GivenUp(op) if !was_failed && counted_in[index(op)] < outage => {
                    counted_in[index(op)] = outage;
                    counts[index(op)] += 1;
                    let expected = counts[index(op)] >= threshold;
                    prop_assert_eq!(matches!(change, Some(HealthChange::Failed { .. })), expected);
                }
                _ => prop_assert!(was_failed || !health.is_failed(), "{:?} failed the session", event),
            }
            let healed = matches!(event, Event::Reset) || change == Some(HealthChange::Recovered);
            if healed {
                (open, counts, counted_in) = (false, [0; 2], [outage; 2]);
            }
            prop_assert_eq!([health.count(Op::Write), health.count(Op::Read)], counts);
        }
    }

    /// Waits for probes never pass the cap and never shrink before they reach it.
    #[test]
    fn probe_waits_are_bounded_and_grow(
        cap in 1u64..5000,
        draws in prop::collection::vec(0.0..1.0f64, 1..20),
    ) {
        let mut now = start();
        let cap = ms(cap);
        let mut health = Health::new(HealthPolicy { failure_threshold: 1, probe_max: cap });
        health.outage_began();
        health.given_up(Op::Write, None, now, draws[0]);
        let mut last = Duration::ZERO;
        for draw in draws {
            let HealthState::Failed { next_probe } = health.state() else { panic!("not failed") };
            let wait = next_probe - now;
            prop_assert!(wait <= cap);
            prop_assert!(wait >= last.min(cap.mul_f64(0.75)), "{:?} after {:?}", wait, last);
            last = wait;
            now = next_probe;
            prop_assert!(health.probe_due(now).is_some());
            prop_assert!(health.probe_failed(now, draw).is_some());
        }
    }
}

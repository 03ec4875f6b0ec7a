//! The judgement against a model that remembers everything, and a table of what each state refuses.

#![allow(clippy::disallowed_methods, reason = "a test begins somewhere")]

use proptest::prelude::*;

use super::*;

const LIMITS: RevocationLimits =
    RevocationLimits { ranges: 4, tombstones: 3, tombstone_life: Duration::from_secs(900) };

fn range(base: u64, end: u64) -> AddressRange {
    AddressRange::new(base, end - base).expect("a range")
}

fn tag(number: u8) -> Tag {
    Tag([number; 16])
}

fn ample() -> RevocationLimits {
    RevocationLimits { ranges: 10_000, ..LIMITS }
}

/// What a transfer of one run, [100, 200), meets, by the epoch it was admitted under.
fn judged(revoked: &Revocations, now: Instant) -> Vec<Result<(), Hit>> {
    (0..=revoked.epoch().0 + 1).map(|at| revoked.judge(Epoch(at), Some(tag(1)), [(100, 100)], now)).collect()
}

/// States x epochs of admission.
#[test]
fn each_state_refuses_what_it_must() {
    let now = Instant::now();
    let (hit, future) = (Err(Hit::Run(0)), Err(Hit::Future));
    let mut revoked = Revocations::new(LIMITS);
    assert_eq!(judged(&revoked, now), [Ok(()), future]);
    revoked.revoke(vec![range(0, 100), range(200, 300)]);
    assert_eq!(judged(&revoked, now), [Ok(()), Ok(()), future], "its neighbours");
    revoked.revoke(vec![range(199, 200)]);
    assert_eq!(judged(&revoked, now), [hit, hit, Ok(()), future], "its last byte");
    revoked.revoke(vec![range(400, 500)]);
    assert_eq!(judged(&revoked, now), [hit, hit, Ok(()), Ok(()), future], "something else");
    revoked.revoke_tag(tag(2), now).expect("room");
    assert_eq!(judged(&revoked, now)[2..], [Ok(()), Ok(()), Ok(()), future], "another tag");
    revoked.revoke_tag(tag(1), now).expect("room");
    let tombstone = Err(Hit::Tag);
    assert_eq!(judged(&revoked, now), [[tombstone; 6].as_slice(), &[future]].concat(), "its tag, always");
    let later = now + LIMITS.tombstone_life;
    assert_eq!(judged(&revoked, later)[..3], [hit, hit, Ok(())], "the tag is forgotten, the range is not");
    // The fifth range: the first epoch's go, and with them whoever was admitted before it.
    revoked.revoke(vec![range(600, 700)]);
    assert_eq!(revoked.floor(), Epoch(1));
    assert_eq!(judged(&revoked, later)[..3], [Err(Hit::Floor), hit, Ok(())]);
}

#[test]
fn a_revocation_of_more_ranges_than_can_be_kept_refuses_everybody_admitted_so_far() {
    let now = Instant::now();
    let mut revoked = Revocations::new(LIMITS);
    revoked.revoke((0..5).map(|at| range(1000 + 2 * at, 1001 + 2 * at)).collect());
    assert_eq!((revoked.floor(), revoked.epoch()), (Epoch(1), Epoch(1)));
    assert_eq!(judged(&revoked, now)[..2], [Err(Hit::Floor), Ok(())]);
}

/// A pool's pages are revoked again and again: what is covered is forgotten, and the floor stays.
#[test]
fn revoking_again_takes_no_more_room() {
    let mut revoked = Revocations::new(LIMITS);
    for _ in 0..1000 {
        revoked.revoke(vec![range(0, 10), range(20, 30), range(40, 50)]);
    }
    assert_eq!((revoked.floor(), revoked.spans.len()), (Epoch(0), 3));
}

#[test]
fn a_full_table_of_tombstones_refuses_and_forgets_nobody() {
    let now = Instant::now();
    let mut revoked = Revocations::new(LIMITS);
    for number in 1..=3 {
        revoked.revoke_tag(tag(number), now + Duration::from_secs(number.into())).expect("room");
    }
    let full = now + Duration::from_secs(10);
    let refusal = revoked.revoke_tag(tag(4), full).expect_err("a full table");
    assert_eq!((refusal.reason, revoked.epoch()), (Reason::Limit, Epoch(3)));
    assert!((1..=3).all(|number| revoked.refuses(tag(number), full)));
    assert!(!revoked.refuses(tag(4), full));
    // Revoked again, a tag needs no room and stands longer.
    revoked.revoke_tag(tag(1), full).expect("its own room");
    let later = now + LIMITS.tombstone_life + Duration::from_secs(3);
    revoked.revoke_tag(tag(4), later).expect("two are past their time");
    assert_eq!(revoked.tombstones(), 2);
    assert!(revoked.refuses(tag(1), later) && revoked.refuses(tag(4), later));
}

#[test]
fn a_list_that_contradicts_itself_is_refused() {
    let now = Instant::now();
    let reason = |list| Revocations::restore(LIMITS, list, now).err().map(|failure| failure.reason);
    let list = RevocationList { epoch: Epoch(5), ..RevocationList::default() };
    assert_eq!(reason(list.clone()), None);
    assert_eq!(reason(RevocationList { floor: Epoch(6), ..list.clone() }), Some(Reason::BadArgument));
    let ranges = vec![(Epoch(6), range(0, 1))];
    assert_eq!(reason(RevocationList { ranges, ..list.clone() }), Some(Reason::BadArgument));
    let dead = |number| TagRevoked { tag: tag(number), epoch: Epoch(1), age: Duration::ZERO };
    let tags = vec![TagRevoked { epoch: Epoch(6), ..dead(1) }];
    assert_eq!(reason(RevocationList { tags, ..list.clone() }), Some(Reason::BadArgument));
    let tags = (1..=4).map(dead).collect();
    assert_eq!(reason(RevocationList { tags, ..list.clone() }), Some(Reason::Limit));
    assert_eq!(reason(RevocationList { epoch: Epoch(u64::MAX), ..list }), Some(Reason::BadArgument));
}

#[test]
fn a_tombstone_keeps_its_age_wherever_it_is_handed() {
    let now = Instant::now();
    let mut revoked = Revocations::new(LIMITS);
    revoked.revoke_tag(tag(1), now).expect("room");
    let (aged, old) = (now + Duration::from_secs(600), now + Duration::from_secs(900));
    let list = revoked.since(Epoch(0), aged);
    assert_eq!(list.tags[0].age, Duration::from_secs(600));
    // The next run of the daemon has a clock of its own.
    let other = Instant::now() + Duration::from_secs(10_000);
    let restored = Revocations::restore(LIMITS, list, other).expect("a good list");
    assert!(restored.refuses(tag(1), other + Duration::from_secs(299)));
    assert!(!restored.refuses(tag(1), other + Duration::from_secs(300)));
    assert!(revoked.since(Epoch(0), old).tags.is_empty(), "what is past its time is not told");
}

/// What happens to an endpoint.
#[derive(Clone, Debug)]
enum Step {
    Ranges(Vec<AddressRange>),
    Tag(u8),
    /// So many seconds pass.
    Pass(u64),
    /// A daemon that restarts is handed what the last one knew.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => ranges().prop_map(Step::Ranges),
        3 => (0u8..6).prop_map(Step::Tag),
        2 => (1u64..500).prop_map(Step::Pass),
        1 => Just(Step::Restart),
    ]
}

/// What there is to tell, byte by byte and tag by tag: all of it is looked at for every peer.
#[derive(Default)]
struct Untold {
    bytes: BTreeMap<u64, Epoch>,
    tags: BTreeMap<Tag, (Epoch, Instant)>,
}

impl Untold {
    fn since(&self, told: Epoch, floor: Epoch) -> BTreeMap<u64, Epoch> {
        let newer = self.bytes.iter().filter(|(_, epoch)| **epoch > told && **epoch > floor);
        newer.map(|(byte, epoch)| (*byte, *epoch)).collect()
    }

    fn tags_since(&self, told: Epoch, now: Instant) -> Vec<TagRevoked> {
        let age = |since: Instant| now.saturating_duration_since(since);
        let stands = |(_, (epoch, since)): &(&Tag, &(Epoch, Instant))| {
            *epoch > told && age(*since) < LIMITS.tombstone_life
        };
        let tell = |(tag, (epoch, since)): (&Tag, &(Epoch, Instant))| TagRevoked {
            tag: *tag,
            epoch: *epoch,
            age: age(*since),
        };
        let mut tags: Vec<_> = self.tags.iter().filter(stands).map(tell).collect();
        tags.sort_by_key(|tag| tag.epoch);
        tags
    }
}

/// Everything that was ever revoked.
#[derive(Default)]
struct Model {
    epoch: u64,
    ranges: Vec<(u64, AddressRange)>,
}

impl Model {
    fn revoke(&mut self, ranges: &[AddressRange]) {
        self.epoch += 1;
        self.ranges.extend(ranges.iter().map(|range| (self.epoch, *range)));
    }

    fn judge(&self, admitted: u64, runs: &[(u64, u64)]) -> Result<(), Hit> {
        let touched = |&(address, bytes): &(u64, u64)| {
            self.ranges.iter().any(|(epoch, range)| {
                *epoch > admitted && address < range.end() && range.base() < address + bytes
            })
        };
        runs.iter().position(touched).map_or(Ok(()), |run| Err(Hit::Run(run)))
    }
}

fn ranges() -> impl Strategy<Value = Vec<AddressRange>> {
    prop::collection::vec((0u64..120, 1u64..20).prop_map(|(base, length)| range(base, base + length)), 1..4)
}

fn runs() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0u64..140, 1u64..6), 1..4)
}

proptest! {
    /// With room for everything the judgement is the model's, also after a hand-over.
    #[test]
    fn nothing_is_forgotten_while_there_is_room(
        steps in prop::collection::vec(ranges(), 0..25), probes in prop::collection::vec((0u64..26, runs()), 1..40),
    ) {
        let now = Instant::now();
        let (mut revoked, mut model) = (Revocations::new(ample()), Model::default());
        for ranges in steps {
            model.revoke(&ranges);
            revoked.revoke(ranges);
        }
        let restored = Revocations::restore(ample(), revoked.since(Epoch(0), now), now).expect("a good list");
        for (admitted, runs) in probes {
            let admitted = admitted.min(model.epoch);
            let expected = model.judge(admitted, &runs);
            prop_assert_eq!(revoked.judge(Epoch(admitted), None, runs.clone(), now), expected);
            prop_assert_eq!(restored.judge(Epoch(admitted), None, runs, now), expected);
        }
    }

    /// Whatever a peer has been told so far, the rest is what a look at everything would find.
    #[test]
    fn a_peer_is_told_all_that_is_new_and_nothing_else(steps in prop::collection::vec(step(), 0..40)) {
        let mut now = Instant::now();
        let (mut revoked, mut model) = (Revocations::new(LIMITS), Untold::default());
        for step in steps {
            match step {
                Step::Ranges(ranges) => {
                    let epoch = revoked.revoke(ranges.clone());
                    model.bytes.extend(ranges.iter().flat_map(|range| range.base()..range.end()).map(|at| (at, epoch)));
                }
                Step::Tag(number) => {
                    if let Ok(epoch) = revoked.revoke_tag(tag(number), now) {
                        model.tags.insert(tag(number), (epoch, now));
                    }
                }
                Step::Pass(seconds) => now += Duration::from_secs(seconds),
                Step::Restart => {
                    revoked = Revocations::restore(LIMITS, revoked.since(Epoch(0), now), now).expect("its own list");
                }
            }
            for told in (0..=revoked.epoch().0 + 1).map(Epoch) {
                let news = revoked.since(told, now);
                prop_assert_eq!((news.epoch, news.floor), (revoked.epoch(), revoked.floor()));
                prop_assert!(news.ranges.is_sorted());
                let named = news.ranges.iter().flat_map(|(at, range)| (range.base()..range.end()).map(|byte| (byte, *at)));
                prop_assert_eq!(named.collect::<BTreeMap<_, _>>(), model.since(told, news.floor));
                prop_assert_eq!(news.tags, model.tags_since(told, now));
            }
        }
    }

    /// Without room nothing that is revoked gets through, and nobody is refused for nothing but the floor. What
    /// is told in steps is what is told at once.
    #[test]
    fn the_floor_errs_on_the_safe_side(
        steps in prop::collection::vec(ranges(), 0..25), probes in prop::collection::vec((0u64..26, runs()), 1..40),
    ) {
        let now = Instant::now();
        let (mut revoked, mut model) = (Revocations::new(LIMITS), Model::default());
        let mut floor = Epoch(0);
        for ranges in steps {
            model.revoke(&ranges);
            revoked.revoke(ranges.clone());
            prop_assert!(revoked.spans.len() <= LIMITS.ranges);
            prop_assert!(floor <= revoked.floor() && revoked.floor() <= revoked.epoch());
            floor = revoked.floor();
            let news = revoked.since(Epoch(model.epoch - 1), now);
            if revoked.floor() < revoked.epoch() {
                let told: Vec<_> = news.ranges.into_iter().map(|(_, range)| range).collect();
                prop_assert_eq!(told, AddressRange::join(ranges));
            }
        }
        for (admitted, runs) in probes {
            let admitted = admitted.min(model.epoch);
            let judged = revoked.judge(Epoch(admitted), None, runs.clone(), now);
            match model.judge(admitted, &runs) {
                Err(_) => prop_assert!(judged.is_err()),
                Ok(()) => prop_assert!(judged == Ok(()) || (judged == Err(Hit::Floor) && Epoch(admitted) < floor)),
            }
        }
    }
}

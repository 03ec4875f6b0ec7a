//! A path on which no connection lasts: every lane is cut after a few MiB, in the middle of a part. Progress is what
//! counts, so everything gets through, hardly anything twice, and nobody above notices but by the clock.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ops::Range,
    sync::{
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Duration,
};

use harness::{
    batch::{self, Move},
    dice::Dice,
    eventually,
    oracle::Kind,
    proxy::{Cut, Proxy, Storm},
    scene::{Nodes, Peer, SOURCE, TARGET, assert_reason, done, failed, once, request},
};
use kvferry_client::{Event, Op, Path, Reason, Report, SessionState, Transfer};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const CALLERS: u64 = 12;
const LIMIT: Duration = Duration::from_secs(15);
const FAIL_FAST: &str = "[session]\nfailure_threshold = 1\n";

/// How long and how rough.
struct Weather {
    transfers: u64,
    largest: u64,
    /// The higher, the fewer are large.
    skew: i32,
    cut_after: Range<u64>,
    least_cuts: u64,
}

impl Weather {
    fn of_now() -> Self {
        if harness::long() {
            Self {
                transfers: 10_000,
                largest: 64 * MIB,
                skew: 6,
                cut_after: 2 * MIB..32 * MIB,
                least_cuts: 500,
            }
        } else {
            Self { transfers: 300, largest: 8 * MIB, skew: 2, cut_after: 2 * MIB..16 * MIB, least_cuts: 8 }
        }
    }

    /// Mostly small, some large: between 64 KiB and the largest.
    fn size(&self, dice: &mut Dice) -> u64 {
        let octaves = ((self.largest / (64 * KIB)) as f64).log2();
        let size = 64.0 * KIB as f64 * (octaves * dice.unit().powi(self.skew)).exp2();
        (size as u64).min(self.largest)
    }
}

struct Sea {
    initiator: Peer,
    target: Peer,
    proxy: Proxy,
    nodes: Nodes,
    weather: Weather,
}

impl Sea {
    fn new() -> Self {
        Self::with_config("")
    }

    fn with_config(config: &str) -> Self {
        let weather = Weather::of_now();
        let nodes = Nodes::start(Path::Tcp, config).unwrap();
        // All read the same bytes; each writes to a place of its own.
        let initiator = Peer::attach(nodes.initiator(), Kind::Shared, weather.largest, SOURCE).unwrap();
        let length = CALLERS * weather.largest;
        let target = Peer::attach(nodes.target(), Kind::Shared, length, TARGET).unwrap();
        let proxy = Proxy::start(target.engine.session_id()).unwrap();
        Self { initiator, target, proxy, nodes, weather }
    }

    fn write(&self, moves: &[Move]) -> Transfer {
        let session = self.proxy.address();
        request(Op::Write, &session, moves, &self.initiator.pool, &self.target.pool)
    }

    fn state(&self) -> SessionState {
        let sessions = self.nodes.initiator().node().unwrap().sessions().unwrap();
        let ours = sessions.iter().find(|session| session.session_id == self.proxy.address());
        ours.map_or(SessionState::Unspecified, |ours| ours.state())
    }
}

/// Whether the engine was told of a failed session.
fn has_failed(told: &mpsc::Receiver<Event>) -> bool {
    let failed = |event| matches!(event, Event::SessionChanged { state: SessionState::Failed, .. });
    told.try_iter().any(failed)
}

/// What a caller has done: its last transfer is what its place must hold in the end.
struct Done {
    bytes: u64,
    last: Vec<Move>,
}

fn call(sea: &Sea, number: u64, mut dice: Dice, left: &AtomicU64) -> Done {
    let place = number * sea.weather.largest;
    let mut so_far = Done { bytes: 0, last: Vec::new() };
    while left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
        let size = sea.weather.size(&mut dice);
        let from = dice.within(0..sea.weather.largest - size + 1);
        let moves = vec![Move { from, to: place, length: size }];
        let mut transfer = sea.write(&moves);
        transfer.deadline = Some(Duration::from_secs(60));
        done(sea.initiator.engine.transfer(transfer), &moves);
        so_far.bytes += size;
        so_far.last.push(moves[0]);
    }
    so_far
}

/// I2 and I3 through hundreds of cuts.
#[test]
fn i2_everything_gets_through_a_storm_and_hardly_anything_twice() {
    let mut sea = Sea::new();
    let seed = Dice::seed().unwrap();
    println!("seed {seed}");
    let dice = Dice::new(seed);
    let told = sea.initiator.engine.events();
    // What passed before a FIN does arrive, so each lane brings something. Of a reset's lane the network throws away what
    // the target has not read: three such in a row can bring nothing, and then `attempts` is used up, as it must be.
    sea.proxy.storm(Some(Storm { seed, bytes: sea.weather.cut_after.clone(), how: Cut::Fin }));
    let left = AtomicU64::new(sea.weather.transfers);
    let callers: Vec<Done> = thread::scope(|scope| {
        let (sea, left) = (&sea, &left);
        let callers: Vec<_> = (0..CALLERS)
            .map(|number| {
                let dice = dice.fork(number);
                scope.spawn(move || call(sea, number, dice, left))
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    sea.proxy.drain(LIMIT);
    let payload: u64 = callers.iter().map(|caller| caller.bytes).sum();
    let arrived: u64 = sea.proxy.data().iter().map(|passed| passed.to_target).sum();
    let (cuts, factor) = (sea.proxy.struck(), arrived as f64 / payload as f64);
    let count = callers.iter().map(|caller| caller.last.len()).sum::<usize>() as u64;
    println!(
        "{count} transfers, {payload} bytes, {cuts} cuts, {factor:.3} of the payload reached the target"
    );
    for caller in &callers {
        sea.target.pool.expect(&sea.initiator.pool, &caller.last);
    }
    sea.target.pool.verify().assert_clean("after the storm");
    sea.initiator.pool.verify().assert_clean("the source, after the storm");
    assert_eq!(count, sea.weather.transfers);
    assert!(cuts >= sea.weather.least_cuts, "{cuts} cuts are no storm");
    assert!(factor < 1.3, "{factor:.3} times the payload was sent");
    // The last one may have been cut at the end of the last transfer.
    eventually("the session is well", LIMIT, || sea.state() == SessionState::Healthy);
    assert!(!has_failed(&told), "a session failed");
    assert_eq!(sea.initiator.engine.events_lost(), 0, "who knows what was in them");
}

/// With the knobs at one there is no tolerance left: the first cut fails the transfer and its session.
#[test]
fn threshold_1_and_attempts_1_are_the_old_behaviour() {
    let sea = Sea::with_config(FAIL_FAST);
    let told = sea.initiator.engine.events();
    sea.proxy.storm(Some(Storm { seed: 1, bytes: MIB..2 * MIB, how: Cut::Reset }));
    let moves = [Move { from: 0, to: 0, length: 8 * MIB }];
    let lost =
        |sea: &Sea| failed(sea.initiator.engine.transfer(Transfer { policy: once(), ..sea.write(&moves) }));
    let (report, failure): (Report, _) = lost(&sea);
    assert_reason(&failure, &[Reason::ConnectionLost]);
    assert_eq!(report.attempts, 1);
    // The probe may have healed it since: then it fails in the same way again, and not as a whole.
    let (_, failure) = lost(&sea);
    assert_reason(&failure, &[Reason::SessionFailed, Reason::ConnectionLost]);
    // Events come on a way of their own, behind the reply or before it.
    eventually("the session has failed", LIMIT, || has_failed(&told));
}

/// How long a session stays FAILED once there is no reason for it any more.
#[test]
fn a_failed_session_is_healthy_within_a_second_of_its_path() {
    let mut sea = Sea::with_config(FAIL_FAST);
    let moves = [Move { from: 0, to: 0, length: MIB }];
    sea.proxy.refuse(true);
    let (_, failure) =
        failed(sea.initiator.engine.transfer(Transfer { policy: once(), ..sea.write(&moves) }));
    // Or lost, where the proxy had not stopped listening yet.
    assert_reason(&failure, &[Reason::ConnectRefused, Reason::ConnectionLost]);
    eventually("the session is FAILED", LIMIT, || sea.state() == SessionState::Failed);
    // Long enough for the probes to be as rare as they get.
    thread::sleep(Duration::from_secs(3));
    assert_eq!(sea.state(), SessionState::Failed);
    sea.proxy.refuse(false);
    // A probe is at most a second away; the rest is for what a probe takes on a busy machine.
    let took = eventually("the session is healthy again", Duration::from_millis(1500), || {
        sea.state() == SessionState::Healthy
    });
    println!("healthy {took:?} after the path");
    done(sea.initiator.engine.transfer(sea.write(&moves)), &moves);
    sea.target.pool.expect(&sea.initiator.pool, &moves);
    sea.target.pool.verify().assert_clean("healed");
    assert_eq!(batch::bytes(&moves), MIB);
}

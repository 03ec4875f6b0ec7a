//! Memory that was taken back stays taken back: whatever is in flight, queued, on its way or not yet submitted,
//! nothing of it lands after the answer, and nobody else notices.
//!
//! Each page is given to another owner the moment the answer is there; the oracle counts what comes late.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod restart;

use std::time::{Duration, Instant};

use harness::{
    batch::{self, Arrangement, Move},
    daemon::Daemon,
    eventually, long,
    oracle::Pool,
    pattern::Stamp,
    proxy::{Cut, Proxy},
    scene::{Scene, assert_reason, done, failed, refused, request},
};
use kvferry_client::{
    Engine, Error, Failure, Op, Outcome, Path, Pending, Range, Reason, Report, Settlement, Transfer, tag,
};
use kvferry_proto::engine::v1 as wire;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(15);
/// The target proves its half alone.
const ANSWER: Duration = Duration::from_millis(500);
/// Small windows, so that a revocation finds parts queued as well as flying.
const CONFIG: &str = "[tcp]\nlanes = 1\nwindow_parts = 8\n";

struct Revoking {
    scene: Scene,
    proxy: Proxy,
}

impl Revoking {
    fn new(length: u64) -> Self {
        let scene = Scene::with_config(Path::Tcp, length, CONFIG).unwrap();
        let proxy = Proxy::start(scene.session()).unwrap();
        Self { scene, proxy }
    }

    fn request(&self, op: Op, moves: &[Move]) -> Transfer {
        request(op, &self.proxy.address(), moves, &self.scene.initiator.pool, &self.scene.target.pool)
    }

    fn submit(&self, transfer: Transfer) -> Pending {
        self.scene.initiator.engine.submit(transfer).unwrap()
    }

    fn works(&mut self, moves: &[Move]) -> Report {
        let session = self.proxy.address();
        self.scene.write_and_verify(&session, moves)
    }

    /// Submits at this speed, and waits until so much payload has passed.
    fn begin(&self, transfer: Transfer, bytes_per_second: u64, landed: u64) -> Pending {
        self.proxy.throttle(Some(bytes_per_second));
        let before = self.proxy.data_bytes();
        let pending = self.submit(transfer);
        eventually("payload flows", LIMIT, || self.proxy.data_bytes() >= before + landed);
        pending
    }

    /// The target takes pages back and gives them away at once. Whatever the link does, the answer is quick.
    fn reuse(&mut self, range: std::ops::Range<u64>) {
        let target = &mut self.scene.target;
        let begun = Instant::now();
        assert_eq!(revoke(&target.engine, &target.pool, range.clone()), Settlement::Settled);
        let took = begun.elapsed();
        target.pool.hand_over(range, Stamp { owner: 4, transfer: 1 });
        assert!(took < ANSWER, "the answer took {took:?}");
    }

    fn lanes_lost(&self) -> usize {
        self.proxy.data().iter().filter(|passed| passed.ended).count()
    }

    /// Whatever is still on its way arrives; then every byte is looked at.
    fn verify(&self, what: &str) {
        self.proxy.throttle(None);
        self.proxy.drain(LIMIT);
        self.scene.verify(what);
    }
}

fn revoke(engine: &Engine, pool: &Pool, range: std::ops::Range<u64>) -> Settlement {
    engine
        .revoke(&[Range { address: pool.address() + range.start, length: range.end - range.start }])
        .unwrap()
}

/// Waits until the daemon has received the engine's transfer: what arrives after a revocation is none of its.
fn arrived(daemon: &Daemon, engine: &Engine) {
    let node = daemon.node().unwrap();
    eventually("the transfer has arrived", LIMIT, || {
        let engines = node.engines().unwrap();
        engines.iter().any(|each| each.session_id == engine.session_id() && each.transfers_active > 0)
    });
}

fn megabytes(count: u64) -> Vec<Move> {
    Arrangement::Adjacent.moves(count, MIB)
}

fn shifted(moves: &[Move], by: u64) -> Vec<Move> {
    moves.iter().map(|each| Move { from: each.from + by, to: each.to + by, ..*each }).collect()
}

fn is_revoked(report: Result<Report, Error>) -> Report {
    let (report, failure) = failed(report);
    assert_reason(&failure, &[Reason::Revoked]);
    report
}

/// A1: revoked in mid-flight by the target, which gives the pages away the moment it is answered.
fn revoked_in_flight(op: Op) {
    let mut it = Revoking::new(40 * MIB);
    let victim = it.begin(it.request(op, &megabytes(32)), 4 * MIB, 2 * MIB);
    it.reuse(0..36 * MIB);
    let report = is_revoked(victim.wait());
    assert!(report.peer_confirmed, "the target was there to say so: {report:?}");
    assert!(report.bytes_done < report.bytes, "it was revoked in flight");
    // FAILED is settled here too.
    it.scene.initiator.pool.hand_over(0..36 * MIB, Stamp { owner: 3, transfer: 1 });
    it.verify("after a revocation in flight");
    assert_eq!(it.lanes_lost(), 0, "the lane lives on");
    it.works(&[Move { from: 0, to: 0, length: 4 * MIB }]);
}

#[test]
fn a1_a_revoked_write_lands_nowhere() {
    revoked_in_flight(Op::Write);
}

#[test]
fn a1_a_revoked_read_gives_nothing_that_came_later() {
    revoked_in_flight(Op::Read);
}

/// A11: one of twelve on the session.
#[test]
fn a11_the_other_eleven_do_not_notice() {
    let mut it = Revoking::new(64 * MIB);
    it.proxy.throttle(Some(16 * MIB));
    let batches: Vec<Vec<Move>> = (0..12).map(|number| shifted(&megabytes(4), number * 5 * MIB)).collect();
    let pending: Vec<Pending> = batches.iter().map(|moves| it.submit(it.request(Op::Write, moves))).collect();
    eventually("payload flows", LIMIT, || it.proxy.data_bytes() > 8 * MIB);
    let victim = 7;
    let destination = batch::destination(&batches[victim]);
    it.reuse(destination);
    for (number, (pending, moves)) in pending.into_iter().zip(&batches).enumerate() {
        if number == victim {
            is_revoked(pending.wait());
            continue;
        }
        let report = done(pending.wait(), moves);
        assert_eq!((report.attempts, report.bytes_resent), (1, 0), "another's revocation cost it something");
        it.scene.target.pool.expect(&it.scene.initiator.pool, moves);
    }
    it.verify("after one of twelve was revoked");
    assert_eq!(it.lanes_lost(), 0, "no lane was cut");
}

/// A8: queued while there is no way to the target, and revoked meanwhile.
#[test]
fn a8_what_was_queued_before_a_revocation_does_not_land_after_it() {
    let mut it = Revoking::new(16 * MIB);
    it.works(&megabytes(1));
    it.proxy.refuse(true);
    it.proxy.cut_all(Cut::Reset);
    let queued = it.submit(it.request(Op::Write, &megabytes(8)));
    arrived(it.scene.nodes.initiator(), &it.scene.initiator.engine);
    it.reuse(0..9 * MIB);
    it.proxy.refuse(false);
    let report = is_revoked(queued.wait());
    assert_eq!(report.bytes_done, 0);
    it.verify("after a queued transfer was revoked");
    it.works(&megabytes(2));
}

/// A8: a black hole between the two. The target proves its half alone and at once, and what the hole held back
/// lands nowhere.
#[test]
fn a8_a_revocation_is_answered_behind_a_partition() {
    let mut it = Revoking::new(40 * MIB);
    let victim = it.begin(it.request(Op::Write, &megabytes(32)), 4 * MIB, 2 * MIB);
    it.proxy.hold(true);
    it.reuse(0..36 * MIB);
    it.proxy.hold(false);
    is_revoked(victim.wait());
    it.verify("after the hole opened");
}

/// A4: the initiator takes its memory back. Its own half is proven, and answered, whatever the peer says and when;
/// the report waits for the peer's word, and without it says so.
#[test]
fn a4_a_cancel_waits_for_nobody_elses_word() {
    for op in [Op::Write, Op::Read] {
        let mut it = Revoking::new(40 * MIB);
        let victim = it.begin(it.request(op, &megabytes(32)), 4 * MIB, 2 * MIB);
        it.proxy.hold(true);
        let begun = Instant::now();
        assert_eq!(it.scene.initiator.engine.cancel(victim.id()).unwrap(), Settlement::Settled);
        let took = begun.elapsed();
        it.scene.initiator.pool.hand_over(0..36 * MIB, Stamp { owner: 3, transfer: 1 });
        assert!(took < ANSWER, "the answer took {took:?}");
        let report = victim.wait().unwrap();
        assert_eq!((report.outcome, report.peer_confirmed), (Outcome::Cancelled, false), "{report:?}");
        assert!(begun.elapsed() > ANSWER, "the peer's word was waited for");
        it.proxy.hold(false);
        it.scene.target.pool.forget(0..36 * MIB);
        it.verify("after a cancel behind a partition");
    }
}

/// A8: a chunk that is sent later, by a peer that has not heard of the abort.
fn tag_refuses(path: Path) {
    let mut scene = Scene::with_config(path, 16 * MIB, CONFIG).unwrap();
    let session = scene.session().to_owned();
    let tagged = |name: &str, scene: &Scene| Transfer {
        tag: Some(tag(name)),
        ..scene.write_to(&session, &megabytes(4))
    };
    let first = tagged("request 17", &scene);
    done(scene.initiator.engine.transfer(first), &megabytes(4));
    let target = &mut scene.target;
    assert_eq!(target.engine.revoke_tag(tag("request 17")).unwrap(), Settlement::Settled);
    target.pool.hand_over(0..16 * MIB, Stamp { owner: 4, transfer: 1 });
    for _ in 0..3 {
        let report = is_revoked(scene.initiator.engine.transfer(tagged("request 17", &scene)));
        assert_eq!(report.bytes_done, 0);
    }
    scene.verify("after a tagged chunk came late");
    assert_eq!(scene.target.engine.revoke_tag(tag("request 17")).unwrap(), Settlement::Settled, "again");
    done(scene.initiator.engine.transfer(tagged("request 18", &scene)), &megabytes(4));
    scene.target.pool.expect(&scene.initiator.pool, &megabytes(4));
    scene.write_and_verify(&session, &megabytes(5));
}

#[test]
fn a8_a_tagged_later_chunk_is_refused_over_tcp() {
    tag_refuses(Path::Tcp);
}

#[test]
fn a8_a_tagged_later_chunk_is_refused_within_a_node() {
    tag_refuses(Path::Local);
}

/// A tag stops what flies, too.
#[test]
fn a8_a_revoked_tag_stops_what_is_in_flight() {
    let mut it = Revoking::new(40 * MIB);
    let transfer = Transfer { tag: Some(tag("one")), ..it.request(Op::Write, &megabytes(32)) };
    let victim = it.begin(transfer, 4 * MIB, 2 * MIB);
    assert_eq!(it.scene.target.engine.revoke_tag(tag("one")).unwrap(), Settlement::Settled);
    it.scene.target.pool.hand_over(0..36 * MIB, Stamp { owner: 4, transfer: 1 });
    is_revoked(victim.wait());
    it.verify("after a tag was revoked in flight");
    assert_eq!(it.lanes_lost(), 0);
}

/// The revoking engine's own transfers: its memory is its own again with the answer, as source and as destination,
/// and its own tag binds itself.
#[test]
fn a8_an_engine_revokes_what_it_has_under_way_itself() {
    for op in [Op::Write, Op::Read] {
        let mut it = Revoking::new(40 * MIB);
        let victim = it.begin(it.request(op, &megabytes(32)), 4 * MIB, 2 * MIB);
        let initiator = &mut it.scene.initiator;
        assert_eq!(revoke(&initiator.engine, &initiator.pool, 0..36 * MIB), Settlement::Settled);
        initiator.pool.hand_over(0..36 * MIB, Stamp { owner: 3, transfer: 1 });
        is_revoked(victim.wait());
        it.scene.target.pool.forget(0..36 * MIB);
        it.verify("after an engine revoked its own memory");
        assert_eq!(it.lanes_lost(), 0);

        let (engine, name) = (&it.scene.initiator.engine, Some(tag("own")));
        assert_eq!(engine.revoke_tag(tag("own")).unwrap(), Settlement::Settled);
        let tagged = Transfer { tag: name, ..it.request(op, &megabytes(1)) };
        assert_reason(&refused(engine.transfer(tagged)), &[Reason::Revoked]);
        it.scene.target.pool.hand_over(0..36 * MIB, Stamp { owner: 4, transfer: 1 });
        it.works(&megabytes(2));
    }
}

/// Submitted, and taken back at once: the revocation goes its own way to the daemon, and may be there first.
#[test]
fn a8_a_read_that_its_own_revocation_overtakes_lands_nowhere() {
    let mut scene = Scene::new(Path::Local, 8 * MIB).unwrap();
    let session = scene.session().to_owned();
    let moves = megabytes(4);
    scene.write_and_verify(&session, &moves);
    let mut hit = 0;
    for round in 0..50u32 {
        let read = request(Op::Read, &session, &moves, &scene.initiator.pool, &scene.target.pool);
        let pending = scene.initiator.engine.submit(read).unwrap();
        let initiator = &mut scene.initiator;
        assert_eq!(revoke(&initiator.engine, &initiator.pool, 0..8 * MIB), Settlement::Settled);
        initiator.pool.hand_over(0..8 * MIB, Stamp { owner: 3, transfer: round });
        let report = pending.wait().unwrap();
        if let Some(failure) = &report.failure {
            assert_reason(failure, &[Reason::Revoked]);
            hit += 1;
        }
        scene.verify("after an engine took back what it was about to read into");
    }
    println!("{hit} of 50 were hit");
}

/// Within a node copies are quick; sooner or later a revocation meets them in every state.
#[test]
fn a1_within_a_node_nothing_lands_after_the_answer() {
    let mut scene = Scene::new(Path::Local, 96 * MIB).unwrap();
    let session = scene.session().to_owned();
    let moves = megabytes(90);
    // Whoever has met the target admits under what it knew then.
    scene.write_and_verify(&session, &moves[..1]);
    let node = scene.nodes.initiator().node().unwrap();
    let mut hit = 0;
    for round in 0..12u32 {
        let pending = scene.initiator.engine.submit(scene.write_to(&session, &moves)).unwrap();
        let (told, over) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            let report = pending.wait();
            let _ = told.send(());
            report
        });
        let own = scene.initiator.engine.session_id();
        eventually("the transfer runs or has run", LIMIT, || {
            let engines = node.engines().unwrap();
            let active = |each: &wire::EngineInfo| each.session_id == own && each.transfers_active > 0;
            engines.iter().any(active) || over.try_recv().is_ok()
        });
        let target = &mut scene.target;
        assert_eq!(revoke(&target.engine, &target.pool, 0..96 * MIB), Settlement::Settled);
        target.pool.hand_over(0..96 * MIB, Stamp { owner: 4, transfer: round });
        match waiter.join().unwrap() {
            Ok(report) if report.failure.is_none() => {}
            report => {
                is_revoked(report);
                hit += 1;
            }
        }
        scene.verify("after a revocation within a node");
    }
    println!("{hit} of 12 were hit");
}

/// A slow link and much to come: the answer waits for none of it.
fn answered_at_once(total: u64, landed: u64) {
    let mut it = Revoking::new((total + 2) * MIB);
    let victim = it.begin(it.request(Op::Write, &megabytes(total)), 10_000_000, landed * MIB);
    it.reuse(0..(total + 2) * MIB);
    let report = is_revoked(victim.wait());
    assert!(report.bytes_done * 5 < report.bytes, "{report:?}");
    it.verify("after a revocation over a slow link");
    it.works(&megabytes(1));
}

#[test]
fn a1_a_revocation_over_a_slow_link_is_answered_at_once() {
    answered_at_once(96, 4);
    if long() {
        answered_at_once(1024, 16);
    }
}

#[test]
fn what_is_no_range_is_refused_by_its_index() {
    let scene = Scene::new(Path::Tcp, MIB).unwrap();
    let engine = &scene.target.engine;
    let refusal = |ranges: &[Range]| match engine.revoke(ranges) {
        Err(Error::Refused(failure)) => (failure.reason, failure.index),
        other => panic!("not refused: {other:?}"),
    };
    let range = |address, length| Range { address, length };
    assert_eq!(refusal(&[]), (Reason::BadArgument, None));
    assert_eq!(refusal(&[range(1, 1), range(2, 0)]), (Reason::BadArgument, Some(1)));
    assert_eq!(refusal(&[range(1, 1), range(1, 1), range(u64::MAX, 2)]), (Reason::OutOfBounds, Some(2)));
    let Err(Error::Refused(Failure { reason, .. })) = engine.revoke_tag([0; 16]) else { panic!("taken") };
    assert_eq!(reason, Reason::BadArgument);
    // Nothing of it was registered, and nothing of it was in use.
    assert_eq!(engine.revoke(&[range(1, 1)]).unwrap(), Settlement::Settled);
    let epoch = scene.nodes.target().node().unwrap().engines().unwrap();
    let of = |session: &str| epoch.iter().find(|engine| engine.session_id == session).unwrap().epoch;
    assert_eq!(of(scene.session()), 1, "what was refused is no revocation");
}

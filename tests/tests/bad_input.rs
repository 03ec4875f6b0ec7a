//! Bad input: each refused with a typed reason that names what is wrong, without one byte moved and without harm
//! to the daemon, which then serves the next good transfer.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};

use harness::{
    batch::{Arrangement, MARGIN, Move},
    oracle::{Kind, Pool},
    pattern::Stamp,
    scene::{Peer, Scene, assert_reason, done, failed, once, refused, request},
};
use kvferry_client::{Error, Failure, Lengths, Memory, Op, Path, Reason, Transfer, TransferId};
use socket2::{Domain, Socket, Type};

const LENGTH: u64 = 1 << 20;
/// Far from any mapping of this process.
const NOWHERE: u64 = 0x1000;

fn scene() -> Scene {
    Scene::new(Path::Tcp, LENGTH).unwrap()
}

fn good_moves() -> Vec<Move> {
    Arrangement::Adjacent.moves(10, 4096)
}

/// The daemon is unharmed: the same engines move the same batch, and nothing else has changed anywhere.
fn serves_on(scene: &mut Scene) {
    scene.verify("after a refusal");
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &good_moves());
}

/// A batch that is good but for what `spoil` does to it is refused, and nothing moved.
fn spoilt(op: Op, spoil: impl FnOnce(&mut Transfer, &Scene)) -> Failure {
    let mut scene = scene();
    let (local, remote) = (&scene.initiator.pool, &scene.target.pool);
    let mut transfer = request(op, scene.session(), &good_moves(), local, remote);
    spoil(&mut transfer, &scene);
    let failure = refused(scene.initiator.engine.transfer(transfer));
    serves_on(&mut scene);
    failure
}

/// Both directions: what is local to one is the source, to the other the destination.
fn spoilt_slice(spoil: impl Fn(&mut Transfer, &Scene) + Copy, reason: Reason) {
    for op in [Op::Write, Op::Read] {
        let failure = spoilt(op, spoil);
        assert_reason(&failure, &[reason]);
        assert_eq!(failure.index, Some(7), "the slice at fault is named: {failure:?}");
        assert!(!failure.retryable, "{failure:?}");
    }
}

#[test]
fn b2_an_unregistered_local_slice() {
    spoilt_slice(|transfer, _| transfer.slices.local[7] = NOWHERE, Reason::Unregistered);
}

#[test]
fn b2_an_unregistered_remote_slice() {
    spoilt_slice(|transfer, _| transfer.slices.remote[7] = NOWHERE, Reason::Unregistered);
}

#[test]
fn b2_a_local_slice_that_leaves_its_region() {
    let spoil = |transfer: &mut Transfer, scene: &Scene| {
        transfer.slices.local[7] = scene.initiator.pool.address() + LENGTH - 4095;
    };
    spoilt_slice(spoil, Reason::OutOfBounds);
}

#[test]
fn b2_a_remote_slice_that_leaves_its_region() {
    let spoil = |transfer: &mut Transfer, scene: &Scene| {
        transfer.slices.remote[7] = scene.target.pool.address() + LENGTH - 4095;
    };
    spoilt_slice(spoil, Reason::OutOfBounds);
}

#[test]
fn b2_a_local_slice_that_wraps() {
    let spoil = |transfer: &mut Transfer, _: &Scene| transfer.slices.local[7] = u64::MAX - 100;
    spoilt_slice(spoil, Reason::OutOfBounds);
}

#[test]
fn b2_a_remote_slice_that_wraps() {
    let spoil = |transfer: &mut Transfer, _: &Scene| transfer.slices.remote[7] = u64::MAX - 100;
    spoilt_slice(spoil, Reason::OutOfBounds);
}

#[test]
fn b2_a_length_that_wraps() {
    let spoil = |transfer: &mut Transfer, _: &Scene| {
        let mut lengths = vec![4096; 10];
        lengths[7] = u64::MAX;
        transfer.slices.lengths = Lengths::Each(lengths);
    };
    spoilt_slice(spoil, Reason::OutOfBounds);
}

#[test]
fn b2_memory_of_another_engine_is_not_local() {
    // Both engines live in one process and one daemon: only the registration tells whose the memory is.
    let mut scene = Scene::new(Path::Local, LENGTH).unwrap();
    let mut transfer = scene.write_to(scene.session(), &good_moves());
    transfer.slices.local[3] = scene.target.pool.address();
    let failure = refused(scene.initiator.engine.transfer(transfer));
    assert_reason(&failure, &[Reason::Unregistered, Reason::NotYours]);
    assert_eq!(failure.index, Some(3));
    serves_on(&mut scene);
}

#[test]
fn a_session_id_that_is_none() {
    for nonsense in ["", "nonsense", "127.0.0.1", "127.0.0.1:70000", ":1", "a b:1"] {
        let failure = spoilt(Op::Write, |transfer, _| nonsense.clone_into(&mut transfer.session));
        assert_reason(&failure, &[Reason::BadArgument, Reason::UnknownSession]);
    }
}

#[test]
fn d1_a_session_id_at_which_nobody_listens() {
    // Bound and not listening: refuses, and nobody else gets the port.
    let mute = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    mute.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let address = mute.local_addr().unwrap().as_socket().unwrap();
    let mut scene = scene();
    let mut transfer = scene.write_to(&address.to_string(), &good_moves());
    transfer.policy = once();
    let (report, failure) = failed(scene.initiator.engine.transfer(transfer));
    assert_reason(&failure, &[Reason::ConnectRefused]);
    assert_eq!(report.bytes_done, 0);
    assert!(report.peer_confirmed, "no part was started: {report:?}");
    serves_on(&mut scene);
}

#[test]
fn the_endpoint_of_a_dead_engine() {
    for path in [Path::Tcp, Path::Local] {
        let mut scene = Scene::new(path, LENGTH).unwrap();
        let dead = Peer::attach(scene.nodes.target(), Kind::Shared, LENGTH, Stamp::of(4)).unwrap();
        let session = dead.engine.session_id().to_owned();
        let moves = good_moves();
        let mut transfer = request(Op::Write, &session, &moves, &scene.initiator.pool, &dead.pool);
        transfer.policy = once();
        let Peer { engine, pool } = dead;
        drop(engine);
        let limit = std::time::Duration::from_secs(1);
        harness::eventually("the dead engine is no longer listed", limit, || {
            !scene.nodes.target().lists(&session).unwrap()
        });
        let (report, failure) = failed(scene.initiator.engine.transfer(transfer));
        assert_reason(&failure, &[Reason::ConnectRefused, Reason::UnknownSession]);
        assert_eq!(report.bytes_done, 0, "{path:?}");
        pool.verify().assert_clean("the dead engine's memory");
        serves_on(&mut scene);
    }
}

#[test]
fn an_empty_region() {
    let mut scene = scene();
    let good = Pool::new(Kind::Process, LENGTH, Stamp::of(6)).unwrap();
    let Memory::Process { address, .. } = good.memory() else { panic!("process memory") };
    let empty = Memory::Process { address, length: 0 };
    let failure = refused_call(scene.initiator.engine.register(&[good.memory(), empty]));
    assert_reason(&failure, &[Reason::BadArgument]);
    assert_eq!(failure.index, Some(1), "{failure:?}");
    // All or nothing: the good one of the same call is not registered either.
    scene.initiator.engine.register(&[good.memory()]).unwrap();
    serves_on(&mut scene);
}

#[test]
fn g4_regions_that_overlap() {
    let mut scene = scene();
    let pool = Pool::new(Kind::Process, LENGTH, Stamp::of(6)).unwrap();
    let address = pool.address();
    let half = |begin: u64| Memory::Process { address: address + begin, length: LENGTH / 2 };
    let within_the_call = scene.initiator.engine.register(&[half(0), half(LENGTH / 2 - 1)]);
    let failure = refused_call(within_the_call);
    assert_reason(&failure, &[Reason::Overlap]);
    assert_eq!(failure.index, Some(1), "{failure:?}");

    scene.initiator.engine.register(&[half(0)]).unwrap();
    let with_a_live_one = scene.initiator.engine.register(&[half(LENGTH / 2), half(1)]);
    let failure = refused_call(with_a_live_one);
    assert_reason(&failure, &[Reason::Overlap]);
    assert_eq!(failure.index, Some(1), "{failure:?}");
    serves_on(&mut scene);
}

#[test]
fn b2_a_region_that_wraps() {
    let mut scene = scene();
    let wrapping = Memory::Process { address: u64::MAX - 4095, length: 8192 };
    let failure = refused_call(scene.initiator.engine.register(&[wrapping]));
    assert_reason(&failure, &[Reason::BadArgument, Reason::OutOfBounds]);
    assert_eq!(failure.index, Some(0), "{failure:?}");
    serves_on(&mut scene);
}

#[test]
fn g4_unregistering_twice() {
    let mut scene = scene();
    let pool = Pool::new(Kind::Shared, LENGTH, Stamp::of(6)).unwrap();
    let region = scene.initiator.engine.register(&[pool.memory()]).unwrap()[0];
    scene.initiator.engine.unregister(&[region.id]).unwrap();
    let failure = refused_call(scene.initiator.engine.unregister(&[region.id]));
    assert_reason(&failure, &[Reason::Unregistered]);
    assert_eq!(failure.index, Some(0), "{failure:?}");
    // Registered again it is another region, even under the same number.
    let again = scene.initiator.engine.register(&[pool.memory()]).unwrap()[0];
    assert_ne!((again.id, again.generation), (region.id, region.generation));
    serves_on(&mut scene);
}

#[test]
fn k1_another_engines_region() {
    let mut scene = Scene::new(Path::Local, LENGTH).unwrap();
    let pools: Vec<_> = (0..3).map(|_| Pool::new(Kind::Shared, LENGTH, Stamp::of(6)).unwrap()).collect();
    let memory: Vec<_> = pools.iter().map(Pool::memory).collect();
    // Numbers may count per engine: the last of four is one that the other engine does not have.
    let region = scene.target.engine.register(&memory).unwrap()[2];
    let failure = refused_call(scene.initiator.engine.unregister(&[region.id]));
    assert_reason(&failure, &[Reason::Unregistered, Reason::NotYours]);
    scene.target.engine.unregister(&[region.id]).unwrap();
    serves_on(&mut scene);
}

#[test]
fn a_transfer_id_is_used_once() {
    let mut scene = scene();
    let session = scene.session().to_owned();
    let id = Some(TransferId([7; 16]));
    let moves = good_moves();
    let first =
        done(scene.initiator.engine.transfer(Transfer { id, ..scene.write_to(&session, &moves) }), &moves);
    scene.target.pool.hand_over(0..LENGTH, Stamp::of(4));
    let again = scene.initiator.engine.transfer(Transfer { id, ..scene.write_to(&session, &moves) }).unwrap();
    assert_eq!((again.id, again.outcome), (first.id, first.outcome));
    assert_eq!((again.bytes_done, again.attempts), (first.bytes_done, first.attempts));
    // The answer was given again; the bytes were not.
    scene.target.pool.verify().assert_clean("after the same id again");
    serves_on(&mut scene);
}

#[test]
fn k1_another_engines_transfer_id() {
    let mut scene = scene();
    let session = scene.session().to_owned();
    let moves = good_moves();
    let report = scene.write_and_verify(&session, &moves);
    let stranger = scene.nodes.initiator().attach("stranger").unwrap();
    let failure = refused_call(stranger.cancel(report.id));
    assert_reason(&failure, &[Reason::NotYours, Reason::BadArgument]);
    if let Ok(told) = stranger.wait(report.id, std::time::Duration::from_secs(2)) {
        assert_ne!(told.outcome, report.outcome, "a stranger learnt of a transfer: {told:?}");
    }
    serves_on(&mut scene);
}

/// The typed failure of a call that was refused.
fn refused_call<T: std::fmt::Debug>(result: Result<T, Error>) -> Failure {
    match result {
        Err(Error::Refused(failure)) => failure,
        other => panic!("not a typed refusal: {other:?}"),
    }
}

/// A margin is what the batches here rely on to show strays.
const _: () = assert!(MARGIN + 10 * 4096 < LENGTH);

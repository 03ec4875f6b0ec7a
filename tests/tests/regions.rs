//! Regions against transfers: what is asked of bad ones, of ones that go, and of ones whose file is tampered with.
//!
//! Named after the rows of the fault list: A7, G4, G5.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use harness::{
    batch::{self, Arrangement, Move},
    daemon::Daemon,
    faulty::{CONFIG, megabytes},
    handover,
    oracle::{Kind, Pool},
    pattern::Stamp,
    proxy::Proxy,
    scene::{Peer, SOURCE, Scene, TARGET, assert_reason, done, failed, refused, request},
};
use kvferry_client::{
    Engine, Error, Lengths, Memory, Op, Outcome, Path, Reason, Region, Settlement, SharedBuffer,
};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

const MIB: u64 = 1 << 20;
const LIMIT: std::time::Duration = std::time::Duration::from_secs(15);

/// A7. 256 MiB of good slices and a bad one behind them, on either side and in either direction: bounds are checked
/// before a byte moves, however many there are.
#[test]
fn a7_one_bad_slice_behind_256_mib_of_good_ones_moves_nothing() {
    let length = 4 * MIB;
    let mut scene = Scene::new(Path::Tcp, length).unwrap();
    let proxy = Proxy::start(scene.session()).unwrap();
    let moves = Arrangement::Adjacent.moves(2, MIB);
    for op in [Op::Write, Op::Read] {
        for (local_is_bad, outside) in [(true, length - 4095), (false, length - 4095), (true, 1 << 40)] {
            let (local, remote) = (&scene.initiator.pool, &scene.target.pool);
            let mut transfer = request(op, &proxy.address(), &moves, local, remote);
            let columns = &mut transfer.slices;
            (columns.local, columns.remote) = (columns.local.repeat(128), columns.remote.repeat(128));
            columns.local.push(local.address() + if local_is_bad { outside } else { 0 });
            columns.remote.push(remote.address() + if local_is_bad { 0 } else { outside });
            let mut lengths = vec![MIB; 256];
            lengths.push(4096);
            columns.lengths = Lengths::Each(lengths);
            let failure = refused(scene.initiator.engine.transfer(transfer));
            let reason = if outside < length { Reason::OutOfBounds } else { Reason::Unregistered };
            assert_reason(&failure, &[reason]);
            assert_eq!(failure.index, Some(256), "the slice at fault is named: {failure:?}");
            assert_eq!(proxy.data_bytes(), 0, "a byte moved");
        }
    }
    scene.verify("after the refusals");
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &moves);
}

/// Two engines, and the target's region by its number.
struct Named {
    initiator: (Peer, Region),
    target: (Peer, Region),
    proxy: Proxy,
    /// Dropped last.
    _daemons: [Daemon; 2],
}

impl Named {
    fn new(length: u64) -> Self {
        let daemons = [(); 2].map(|()| Daemon::with_config(CONFIG).unwrap());
        let peer = |daemon: &Daemon, stamp| {
            let (engine, pool) =
                (daemon.attach("named").unwrap(), Pool::new(Kind::Shared, length, stamp).unwrap());
            let region = engine.register(&[pool.memory()]).unwrap()[0];
            (Peer { engine, pool }, region)
        };
        let (initiator, target) = (peer(&daemons[0], SOURCE), peer(&daemons[1], TARGET));
        let proxy = Proxy::start(target.0.engine.session_id()).unwrap();
        Self { initiator, target, proxy, _daemons: daemons }
    }

    fn request(&self, moves: &[Move]) -> kvferry_client::Transfer {
        request(Op::Write, &self.proxy.address(), moves, &self.initiator.0.pool, &self.target.0.pool)
    }
}

/// G4. A region is unregistered while a transfer is in it: the answer comes when nobody touches it any more, the
/// transfer ends, and what is registered in its place is another region.
fn unregistered_in_mid_transfer(of_target: bool) {
    let mut named = Named::new(40 * MIB);
    let moves = megabytes(32);
    named.proxy.throttle(Some(4 * MIB));
    let pending = named.initiator.0.engine.submit(named.request(&moves)).unwrap();
    harness::eventually("payload flows", LIMIT, || named.proxy.data_bytes() > MIB);
    let (peer, region) = if of_target { &mut named.target } else { &mut named.initiator };
    assert_eq!(peer.engine.unregister(&[region.id]).unwrap(), Settlement::Settled);
    // The memory is the engine's own again: it gives it away at once.
    peer.pool.hand_over(0..40 * MIB, Stamp::of(if of_target { 4 } else { 3 }));
    // Twice is no harm, and no success.
    match peer.engine.unregister(&[region.id]) {
        Err(Error::Refused(failure)) => assert_reason(&failure, &[Reason::Unregistered]),
        other => panic!("unregistered twice: {other:?}"),
    }
    let (report, failure) = failed(pending.wait());
    // A target's table may say it first.
    assert_reason(&failure, &[Reason::RegionChanged, Reason::Unregistered]);
    assert!(report.bytes_done < report.bytes, "{report:?}");
    named.proxy.throttle(None);
    named.proxy.drain(LIMIT);
    let (peer, region) = if of_target { &mut named.target } else { &mut named.initiator };
    peer.pool.verify().assert_clean("after the region was unregistered");
    let again = peer.engine.register(&[peer.pool.memory()]).unwrap()[0];
    assert_ne!((again.id, again.generation), (region.id, region.generation));
    let overlapping = Memory::Process { address: peer.pool.address() + MIB, length: 4096 };
    match peer.engine.register(&[overlapping]) {
        Err(Error::Refused(failure)) => assert_reason(&failure, &[Reason::Overlap]),
        other => panic!("registered over a live region: {other:?}"),
    }
    if !of_target {
        // What the failed transfer left there is undefined.
        named.target.0.pool.forget(batch::destination(&moves));
    }
    done(named.initiator.0.engine.transfer(named.request(&moves)), &moves);
    named.target.0.pool.expect(&named.initiator.0.pool, &moves);
    named.target.0.pool.verify().assert_clean("over the new region");
}

#[test]
fn g4_a_target_unregisters_in_mid_transfer() {
    unregistered_in_mid_transfer(true);
}

#[test]
fn g4_a_source_unregisters_in_mid_transfer() {
    unregistered_in_mid_transfer(false);
}

/// G5. The engine keeps its descriptor: it punches holes into what it registered, and tries to cut it short, while the
/// daemon reads and writes there. The first is its own loss, the second the seal forbids; the daemon gets no SIGBUS.
#[test]
fn g5_holes_punched_and_truncation_tried_while_bytes_move() {
    let length = 8 * MIB;
    let mut scene = Scene::new(Path::Tcp, length).unwrap();
    let mut buffer = SharedBuffer::new(length as usize).unwrap();
    buffer.as_mut_slice().fill(7);
    let engine: &Engine = &scene.initiator.engine;
    engine.register(&[Memory::Shared(&buffer)]).unwrap();
    let moves: Vec<Move> =
        (0..6).map(|i| Move { from: (i + 1) * MIB, to: (i + 1) * MIB, length: MIB }).collect();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let transfer = |op| {
        let mut transfer = request(op, scene.session(), &moves, &scene.initiator.pool, &scene.target.pool);
        transfer.slices.local = moves.iter().map(|each| buffer.address() + each.from).collect();
        transfer
    };
    for op in [Op::Write, Op::Read].repeat(10) {
        let pending = engine.submit(transfer(op)).unwrap();
        rustix::fs::fallocate(&buffer, punch, 0, length).unwrap();
        assert_eq!(rustix::fs::ftruncate(&buffer, 4096), Err(rustix::io::Errno::PERM));
        assert_eq!(pending.wait().unwrap().outcome, Outcome::Done);
    }
    // And into a hole, at rest: the kernel makes new pages.
    rustix::fs::fallocate(&buffer, punch, 0, length).unwrap();
    done(engine.transfer(transfer(Op::Write)), &moves);
    scene.target.pool.forget(batch::destination(&moves));
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &[Move { from: 0, to: 0, length: 4096 }]);
}

/// G5. What is handed over already cut short, or with holes in it, on the way to its registration.
#[test]
fn g5_a_file_cut_short_before_it_is_registered() {
    let daemon = Daemon::start().unwrap();
    let engine = harness::raw::RawEngine::attach(daemon.socket()).unwrap();
    let token = engine.attached().token.clone();
    let fd = handover::memfd(MIB, MemfdFlags::empty(), SealFlags::empty()).unwrap();
    rustix::fs::ftruncate(&fd, 4096).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    use std::os::fd::AsFd;
    assert_eq!(handover::send(&daemon.fd_socket(), &token, 1, fd.as_fd()).unwrap(), None);
    use kvferry_proto::engine::v1::{RegionSpec, RegisterRegionsRequest, SharedFd, region_spec::Backing};
    let backing = Some(Backing::SharedFd(SharedFd { handle: 1, offset: 0 }));
    let regions = vec![RegionSpec { base: 1 << 40, length: MIB, backing, cuda_ipc: None }];
    let request = RegisterRegionsRequest { regions, layouts: Vec::new() };
    let answer =
        engine.call(|mut client, token| async move { client.register_regions(token.request(request)).await });
    let (reason, message) = harness::raw::refusal(answer, |reply| reply.failure.clone()).unwrap();
    assert_eq!(reason, kvferry_proto::types::v1::Reason::OutOfBounds, "{message}");
}

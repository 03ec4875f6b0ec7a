//! One suite for every path: what a transfer means does not depend on how its bytes travel.
//!
//! A pairwise table over direction, kinds of memory, slice counts, slice sizes and arrangements; after each row
//! the whole destination pool is read (I3), and at the end every pool.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use harness::{
    batch::{self, Arrangement, MARGIN, Move},
    daemon::Daemon,
    oracle::{Kind, Pool},
    pairwise,
    pattern::Stamp,
    scene::{Nodes, Scene, done, request},
};
use kvferry_client::{Engine, Op, Path};

const OPS: [Op; 2] = [Op::Write, Op::Read];
const COUNTS: [u64; 7] = [0, 1, 2, 1023, 1024, 1025, 100_000];
const SIZES: [u64; 6] = [1, 7, 4096, 65_537, 1 << 20, 16 << 20];
/// Payload of a row.
const ROW_BYTES: u64 = 80 << 20;
/// An interleaved batch takes twice its payload at the destination.
const POOL_BYTES: u64 = 2 * ROW_BYTES + 2 * MARGIN;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
struct Case {
    op: Op,
    local: Kind,
    remote: Kind,
    count: u64,
    size: u64,
    arrangement: Arrangement,
}

impl Case {
    const LEVELS: [usize; 6] = [2, 2, 2, COUNTS.len(), SIZES.len(), 4];

    fn of(row: &[usize]) -> Self {
        Self {
            op: OPS[row[0]],
            local: Kind::ALL[row[1]],
            remote: Kind::ALL[row[2]],
            count: COUNTS[row[3]],
            size: SIZES[row[4]],
            arrangement: Arrangement::ALL[row[5]],
        }
    }

    fn is_affordable(&self) -> bool {
        self.count * self.size <= ROW_BYTES
    }
}

/// An engine with a pool of each kind.
struct Side {
    engine: Engine,
    shared: Pool,
    process: Pool,
}

impl Side {
    fn attach(daemon: &Daemon, owner: u32) -> anyhow::Result<Self> {
        let engine = daemon.attach(&format!("owner-{owner}"))?;
        let shared = Pool::new(Kind::Shared, POOL_BYTES, Stamp { owner, transfer: 1 })?;
        let process = Pool::new(Kind::Process, POOL_BYTES, Stamp { owner, transfer: 2 })?;
        engine.register(&[shared.memory(), process.memory()])?;
        Ok(Self { engine, shared, process })
    }

    fn pool(&self, kind: Kind) -> &Pool {
        match kind {
            Kind::Shared => &self.shared,
            Kind::Process => &self.process,
        }
    }

    fn pool_mut(&mut self, kind: Kind) -> &mut Pool {
        match kind {
            Kind::Shared => &mut self.shared,
            Kind::Process => &mut self.process,
        }
    }
}

/// How the daemons of a table reach private memory: the initiator's and the target's.
type Modes = [&'static str; 2];

const DIRECT: Modes = ["direct"; 2];
const ASSISTED: Modes = ["assisted"; 2];

fn nodes(path: Path, modes: Modes) -> Nodes {
    let [initiator, target] = modes.map(|mode| format!("[process]\nmode = \"{mode}\"\n"));
    match path {
        Path::Local => Nodes::start(path, &initiator).unwrap(),
        _ => Nodes::unlike(&initiator, &target).unwrap(),
    }
}

fn table(path: Path) {
    table_with(path, DIRECT);
}

fn table_with(path: Path, modes: Modes) {
    let nodes = nodes(path, modes);
    let mut initiator = Side::attach(nodes.initiator(), 1).unwrap();
    let mut target = Side::attach(nodes.target(), 2).unwrap();
    let rows = pairwise::table(&Case::LEVELS, |row| Case::of(row).is_affordable());
    for (number, row) in rows.iter().enumerate() {
        let case = Case::of(row);
        let what = format!("{path:?}, {modes:?}, row {number}: {case:?}");
        let moves = case.arrangement.moves(case.count, case.size);
        let (local, remote) = (initiator.pool(case.local), target.pool(case.remote));
        let transfer = request(case.op, target.engine.session_id(), &moves, local, remote);
        let report = done(initiator.engine.transfer(transfer), &moves);
        // Nothing moved over nothing: an empty batch takes no path.
        if case.count > 0 {
            assert_eq!(report.path, Some(path), "{what}");
        }
        let (source, destination) = match case.op {
            Op::Read => (target.pool(case.remote), initiator.pool_mut(case.local)),
            _ => (initiator.pool(case.local), target.pool_mut(case.remote)),
        };
        check(source, destination, &moves, &what);
        // The next row must bring its own bytes. The owner stays, so do not the bytes.
        let owner = if case.op == Op::Read { 1 } else { 2 };
        let stamp = Stamp { owner, transfer: 100 + number as u32 };
        destination.overwrite(batch::destination(&moves), stamp);
    }
    for side in [&initiator, &target] {
        for kind in Kind::ALL {
            side.pool(kind).verify().assert_clean(&format!("{path:?}: {kind:?} after all rows"));
        }
    }
    assert!(rows.len() > 20, "a table of {} rows checks little", rows.len());
}

fn check(source: &Pool, destination: &mut Pool, moves: &[Move], what: &str) {
    destination.expect(source, moves);
    let verdict = destination.verify();
    verdict.assert_clean(what);
    assert_eq!(verdict.moved, batch::bytes(moves), "{what}: the oracle looked at something else");
}

fn one_large_slice(path: Path) {
    const LENGTH: u64 = 256 << 20;
    let mut scene = Scene::new(path, LENGTH + 2 * MARGIN).unwrap();
    let moves = Arrangement::Adjacent.moves(1, LENGTH);
    let session = scene.session().to_owned();
    let report = scene.write_and_verify(&session, &moves);
    assert_eq!(report.path, Some(path));
    assert_eq!((report.attempts, report.bytes_resent), (1, 0));
}

/// Slices of all lengths in one batch: lengths come as a column, and zero-length ones among them move nothing.
fn mixed_lengths(path: Path) {
    let mut scene = Scene::new(path, 16 << 20).unwrap();
    let mut at = MARGIN;
    let moves: Vec<_> = (0..2000u64)
        .map(|index| {
            let length = (index * 37) % 4099;
            let each = Move { from: at, to: at + index, length };
            at += length;
            each
        })
        .collect();
    assert!(moves.iter().any(|each| each.length == 0));
    let session = scene.session().to_owned();
    scene.write_and_verify(&session, &moves);
}

/// The receiver becomes the sender: sessions of both directions stand side by side.
fn there_and_back(path: Path) {
    let mut scene = Scene::new(path, 4 << 20).unwrap();
    let session = scene.session().to_owned();
    let moves = Arrangement::Reversed.moves(100, 4096);
    scene.write_and_verify(&session, &moves);
    let back: Vec<_> = moves
        .iter()
        .map(|each| Move { from: each.to, to: each.from + (2 << 20), length: each.length })
        .collect();
    let home = scene.initiator.engine.session_id().to_owned();
    let transfer = request(Op::Write, &home, &back, &scene.target.pool, &scene.initiator.pool);
    done(scene.target.engine.transfer(transfer), &back);
    check(&scene.target.pool, &mut scene.initiator.pool, &back, "there and back");
}

macro_rules! for_both_paths {
    ($($case:ident),* $(,)?) => {
        mod tcp {
            $(#[test] fn $case() { super::$case(super::Path::Tcp); })*
        }
        mod local {
            $(#[test] fn $case() { super::$case(super::Path::Local); })*
        }
    };
}

for_both_paths!(table, one_large_slice, mixed_lengths, there_and_back);

/// The same table where engines copy for their daemons: both, or only one of them.
mod assisted {
    use super::{ASSISTED, Path, table_with};

    #[test]
    fn table_over_tcp() {
        table_with(Path::Tcp, ASSISTED);
    }

    #[test]
    fn table_over_tcp_at_the_initiator_alone() {
        table_with(Path::Tcp, ["assisted", "direct"]);
    }

    #[test]
    fn table_over_tcp_at_the_target_alone() {
        table_with(Path::Tcp, ["direct", "assisted"]);
    }

    #[test]
    fn table_within_a_node() {
        table_with(Path::Local, ASSISTED);
    }
}

//! The scene of the fault suites: two daemons, and a proxy between them that fails on command.

use std::time::Duration;

use kvferry_client::{Error, Op, Path, Pending, Report, Transfer};

use crate::{
    batch::{Arrangement, Move},
    eventually,
    proxy::Proxy,
    scene::{Scene, request},
};

const MIB: u64 = 1 << 20;
/// What must happen does within this time.
pub const LIMIT: Duration = Duration::from_secs(15);

/// A small window, so that what a cut can cost is far from the whole.
pub const WINDOW: u64 = 8 * MIB;
/// Of [`Faulty::new`].
pub const CONFIG: &str = "[tcp]\nlanes = 1\nwindow_parts = 8\n";

/// A scene over tcp with a proxy in its middle.
#[derive(Debug)]
pub struct Faulty {
    /// Two daemons, two engines of this process.
    pub scene: Scene,
    /// What the initiator takes for the target.
    pub proxy: Proxy,
}

impl Faulty {
    /// Pools of `length` bytes, and [`CONFIG`].
    pub fn new(length: u64) -> Self {
        Self::with_config(length, CONFIG)
    }

    /// The same with another configuration of both daemons.
    pub fn with_config(length: u64, config: &str) -> Self {
        let scene = Scene::with_config(Path::Tcp, length, config).unwrap();
        let proxy = Proxy::start(scene.session()).unwrap();
        Self { scene, proxy }
    }

    /// A transfer over the proxy.
    pub fn request(&self, op: Op, moves: &[Move]) -> Transfer {
        let (local, remote) = (&self.scene.initiator.pool, &self.scene.target.pool);
        request(op, &self.proxy.address(), moves, local, remote)
    }

    /// Starts a transfer.
    pub fn submit(&self, transfer: Transfer) -> Pending {
        self.scene.initiator.engine.submit(transfer).unwrap()
    }

    /// Runs a transfer to its end.
    pub fn transfer(&self, transfer: Transfer) -> Result<Report, Error> {
        self.scene.initiator.engine.transfer(transfer)
    }

    /// Expects the moves where the direction brings them.
    pub fn expect(&mut self, op: Op, moves: &[Move]) {
        let Scene { initiator, target, .. } = &mut self.scene;
        match op {
            Op::Read => initiator.pool.expect(&target.pool, moves),
            _ => target.pool.expect(&initiator.pool, moves),
        }
    }

    /// A good transfer over the proxy, checked: it also follows on the lane whatever came before it.
    pub fn works(&mut self, moves: &[Move]) -> Report {
        let session = self.proxy.address();
        self.scene.write_and_verify(&session, moves)
    }

    /// Data connections that are over.
    pub fn lanes_lost(&self) -> usize {
        self.proxy.data().iter().filter(|passed| passed.ended).count()
    }

    /// Submits, and waits until payload flows, slowly.
    pub fn begin(&self, transfer: Transfer) -> Pending {
        self.proxy.throttle(Some(4 * MIB));
        let before = self.proxy.data_bytes();
        let pending = self.submit(transfer);
        eventually("payload flows", LIMIT, || self.proxy.data_bytes() > before + MIB);
        pending
    }
}

/// A batch of so many adjacent slices of 1 MiB.
pub fn megabytes(count: u64) -> Vec<Move> {
    Arrangement::Adjacent.moves(count, MIB)
}

//! The usual scene: two engines of this process with one pool each, across two daemons or within one.

use std::time::Duration;

use kvferry_client::{Engine, Error, Failure, Op, Outcome, Path, Policy, Reason, Report, Transfer};

use crate::{
    batch::{self, Move},
    daemon::Daemon,
    oracle::{Kind, Pool},
    pattern::Stamp,
};

/// The initiator's pools are odd owners, the target's even: no byte of one passes for the other's.
pub const SOURCE: Stamp = Stamp { owner: 1, transfer: 0 };
/// See [`SOURCE`].
pub const TARGET: Stamp = Stamp { owner: 2, transfer: 0 };

/// The daemons of a scene.
#[derive(Debug)]
pub struct Nodes {
    initiator: Daemon,
    target: Option<Daemon>,
}

impl Nodes {
    /// As many daemons as the path needs: two for tcp, one for local.
    pub fn start(path: Path, config: &str) -> anyhow::Result<Self> {
        let initiator = Daemon::with_config(config)?;
        let target = match path {
            Path::Local => None,
            _ => Some(Daemon::with_config(config)?),
        };
        Ok(Self { initiator, target })
    }

    /// Two daemons with a configuration each: over tcp.
    pub fn unlike(initiator: &str, target: &str) -> anyhow::Result<Self> {
        let (initiator, target) = (Daemon::with_config(initiator)?, Daemon::with_config(target)?);
        Ok(Self { initiator, target: Some(target) })
    }

    /// The initiator's daemon.
    pub fn initiator(&self) -> &Daemon {
        &self.initiator
    }

    /// The target's daemon.
    pub fn target(&self) -> &Daemon {
        self.target.as_ref().unwrap_or(&self.initiator)
    }

    /// The initiator's daemon, to wait for its end.
    pub fn initiator_mut(&mut self) -> &mut Daemon {
        &mut self.initiator
    }

    /// The target's daemon, to wait for its end.
    pub fn target_mut(&mut self) -> &mut Daemon {
        self.target.as_mut().unwrap_or(&mut self.initiator)
    }
}

/// An engine of this process with a registered pool.
///
/// The engine is dropped first: it detaches while its memory is still there.
#[derive(Debug)]
pub struct Peer {
    /// Attached.
    pub engine: Engine,
    /// Registered.
    pub pool: Pool,
}

impl Peer {
    /// Attaches an engine and registers its pool.
    pub fn attach(daemon: &Daemon, kind: Kind, length: u64, stamp: Stamp) -> anyhow::Result<Self> {
        let engine = daemon.attach(&format!("owner-{}", stamp.owner))?;
        let pool = Pool::new(kind, length, stamp)?;
        engine.register(&[pool.memory()])?;
        Ok(Self { engine, pool })
    }
}

/// Two peers and their daemons.
#[derive(Debug)]
pub struct Scene {
    /// Who asks for transfers.
    pub initiator: Peer,
    /// Whose memory is at the other end.
    pub target: Peer,
    /// Dropped last.
    pub nodes: Nodes,
}

impl Scene {
    /// A scene with shared memory on both sides.
    pub fn new(path: Path, length: u64) -> anyhow::Result<Self> {
        Self::with_config(path, length, "")
    }

    /// The same, with this configuration of the daemons.
    pub fn with_config(path: Path, length: u64, config: &str) -> anyhow::Result<Self> {
        let nodes = Nodes::start(path, config)?;
        let initiator = Peer::attach(nodes.initiator(), Kind::Shared, length, SOURCE)?;
        let target = Peer::attach(nodes.target(), Kind::Shared, length, TARGET)?;
        Ok(Self { initiator, target, nodes })
    }

    /// The target's own session id; a proxy has another.
    pub fn session(&self) -> &str {
        self.target.engine.session_id()
    }

    /// A WRITE of the moves to the target at `session`.
    pub fn write_to(&self, session: &str, moves: &[Move]) -> Transfer {
        request(Op::Write, session, moves, &self.initiator.pool, &self.target.pool)
    }

    /// Writes the moves, expects them at the target, and checks both pools.
    ///
    /// # Panics
    /// When the transfer is not DONE or a byte is not right.
    pub fn write_and_verify(&mut self, session: &str, moves: &[Move]) -> Report {
        let report = self.initiator.engine.transfer(self.write_to(session, moves));
        let report = done(report, moves);
        self.target.pool.expect(&self.initiator.pool, moves);
        self.verify("after a WRITE");
        report
    }

    /// # Panics
    /// When a byte of either pool is not what it must be.
    pub fn verify(&self, what: &str) {
        self.target.pool.verify().assert_clean(what);
        self.initiator.pool.verify().assert_clean(&format!("the source, {what}"));
    }
}

/// A transfer of the moves between two pools of this process.
pub fn request(op: Op, session: &str, moves: &[Move], local: &Pool, remote: &Pool) -> Transfer {
    Transfer {
        session: session.to_owned(),
        op,
        slices: batch::slices(op, moves, local.address(), remote.address()),
        tag: None,
        deadline: Some(Duration::from_secs(30)),
        policy: Policy::default(),
        id: None,
    }
}

/// A policy without retries.
pub fn once() -> Policy {
    Policy { attempts: Some(1), ..Policy::default() }
}

/// # Panics
/// Unless the transfer is DONE, wholly, with the peer's half confirmed (I3).
pub fn done(report: Result<Report, Error>, moves: &[Move]) -> Report {
    let report = report.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    assert!(report.peer_confirmed, "DONE implies CONFIRMED: {report:?}");
    assert_eq!(report.failure, None, "{report:?}");
    let all = (moves.len() as u64, batch::bytes(moves));
    assert_eq!((report.slices, report.bytes), all, "{report:?}");
    assert_eq!((report.slices_done, report.bytes_done), all, "{report:?}");
    report
}

/// # Panics
/// Unless the transfer is FAILED; otherwise why.
pub fn failed(report: Result<Report, Error>) -> (Report, Failure) {
    let report = report.unwrap();
    assert_eq!(report.outcome, Outcome::Failed, "{report:?}");
    let failure = report.failure.clone();
    (report.clone(), failure.unwrap_or_else(|| panic!("FAILED without a reason: {report:?}")))
}

/// Why a transfer was refused before a byte of it moved. It may be a refused call or a report that says FAILED: both
/// carry the same typed failure.
///
/// # Panics
/// When it was not refused, or bytes had moved.
pub fn refused(report: Result<Report, Error>) -> Failure {
    match report {
        Err(Error::Refused(failure)) => failure,
        Ok(_) => {
            let (report, failure) = failed(report);
            assert_eq!((report.bytes_done, report.slices_done), (0, 0), "{report:?}");
            assert!(report.peer_confirmed, "no part was started: {report:?}");
            failure
        }
        Err(other) => panic!("not a typed refusal: {other:?}"),
    }
}

/// # Panics
/// When the failure's reason is not among these.
pub fn assert_reason(failure: &Failure, among: &[Reason]) {
    assert!(among.contains(&failure.reason), "{failure:?} is none of {among:?}");
}

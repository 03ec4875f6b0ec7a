//! One run of a daemon: production memory, sessions and lanes, with their threads and driver calls in our hands.
//!
//! Futures of production code run on a runtime that has no clock and no sockets, polled until nothing moves; what
//! they say comes out as [`Answer`]s.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    os::fd::BorrowedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use kvferryd::{
    domain::{BootId, Failure, Incarnation, LaneId, Reason, RegionId, TransferId},
    memory::{
        EngineMemory, HandRegistrar, Mapping, ProcessAccess, ProcessMemory, Quota, RegionDriver, Registrar,
        RevocationBook, SystemDriver,
    },
    policy::Revocations,
    session::{
        inbound::{Inbound, InboundSession},
        outbound::Outbound,
    },
    transfer::log::{LogLimits, TransferLog},
    transport::{
        LaneEvent, LaneKind, LaneRecord, LaneSink,
        tcp::{Carriers, HandCarrier, Lane, Pulse},
    },
};

use super::{
    faults::Stuck,
    stream::{Fenced, StreamId},
};

/// Which attach of an engine; never used twice in a life of the world.
pub(super) type Life = u32;

/// A session: whose it is, and the place it leads to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct SessionKey {
    /// The initiator's attach.
    pub(super) life: Life,
    /// The target's place.
    pub(super) to: usize,
}

impl fmt::Display for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "life{}->p{}", self.life, self.to)
    }
}

/// A confirmed session, and what it took over.
pub(super) type Confirmation = (Arc<InboundSession>, Fenced);

/// What production futures came to.
#[derive(Debug)]
pub(super) enum Answer {
    /// A handshake's Confirm.
    Confirmed(StreamId, Result<Confirmation, Failure>),
    /// A lane asked to be fenced.
    Fenced(StreamId, LaneId, LaneRecord),
    /// A transfer asked to be stopped.
    Stopped(StreamId, TransferId),
    /// Another session took this one's place.
    Superseded(StreamId),
    /// All lanes of an ended session are closed.
    FencedAll(StreamId, Failure),
    /// The own half of a transfer is proven.
    Quiet(SessionKey, TransferId),
    /// The target's gate was quiet for a revocation.
    GateQuiet(u64),
    /// A registration ended.
    Registered(Life, Option<usize>, Result<RegionId, Failure>),
    /// An unregistration is settled.
    Released(Life, usize),
    /// Everything of an engine that went was given back.
    Closed(Life),
}

/// Where answers and lane events wait for the loop.
#[derive(Debug, Default)]
pub(super) struct Mail {
    /// From futures.
    pub(super) answers: Mutex<VecDeque<Answer>>,
    /// From lanes.
    pub(super) lanes: Mutex<VecDeque<(SessionKey, LaneId, LaneEvent)>>,
}

impl Mail {
    /// Something is over.
    pub(super) fn say(&self, answer: Answer) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push_back(answer);
    }

    /// The oldest answer.
    pub(super) fn answer(&self) -> Option<Answer> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// The oldest lane event.
    pub(super) fn lane_event(&self) -> Option<(SessionKey, LaneId, LaneEvent)> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// A session's sink for what its lanes tell.
#[derive(Debug)]
pub(super) struct Sink(pub(super) SessionKey, pub(super) Arc<Mail>);

impl LaneSink for Sink {
    fn lane_event(&self, lane: LaneId, event: LaneEvent) {
        self.1.lanes.lock().unwrap_or_else(PoisonError::into_inner).push_back((self.0, lane, event));
    }
}

/// The kernel's driver, made to fail on some call.
#[derive(Debug, Default)]
pub(super) struct FailingDriver {
    system: SystemDriver,
    /// Calls until one fails; nothing where it is not positive.
    pub(super) fails_in: AtomicI64,
    /// Mappings made and not released.
    pub(super) live: AtomicU64,
}

impl RegionDriver for FailingDriver {
    fn map(&self, fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Mapping, Failure> {
        if self.fails_in.fetch_sub(1, Relaxed) == 1 {
            return Err(Failure::new(Reason::Driver, "made to fail"));
        }
        let mapping = self.system.map(fd, offset, length)?;
        self.live.fetch_add(1, Relaxed);
        Ok(mapping)
    }

    fn probe_process(&self, memory: &ProcessMemory, base: u64, length: u64) -> Result<(), Failure> {
        self.system.probe_process(memory, base, length)
    }

    fn unmap(&self, mapping: Mapping) {
        self.live.fetch_sub(1, Relaxed);
        self.system.unmap(mapping);
    }
}

/// The control stream as its initiator sees it.
#[derive(Debug)]
pub(super) struct Link {
    /// Which.
    pub(super) stream: StreamId,
    /// Bytes heard on its lanes.
    pub(super) pulse: Arc<Pulse>,
    /// What of it was seen.
    pub(super) heard: u64,
    /// Last sign of life.
    pub(super) last_life_us: u64,
}

/// The driver of one outbound session, its core included.
pub(super) struct Session {
    /// Production.
    pub(super) core: Outbound,
    /// The stream, while it is up.
    pub(super) link: Option<Link>,
    /// Tells a stream from those before it.
    pub(super) link_number: u64,
    /// Open lanes.
    pub(super) lanes: BTreeMap<LaneId, Lane>,
    /// Lanes asked for.
    pub(super) awaiting: BTreeMap<LaneId, LaneKind>,
    /// When the core is to be woken.
    pub(super) wake_at_us: Option<u64>,
    /// Probes asked for and not answered.
    pub(super) probes: u64,
}

/// An attached engine.
pub(super) struct Engine {
    /// Within this run of its daemon: lanes are numbered by it, and numbers return after a restart.
    pub(super) number: u64,
    /// Its place.
    pub(super) place: usize,
    /// Who it is.
    pub(super) incarnation: Incarnation,
    /// Its memory.
    pub(super) memory: Arc<EngineMemory>,
    /// Who came to its endpoint.
    pub(super) inbound: Arc<Inbound>,
    /// Its transfers.
    pub(super) log: Arc<TransferLog>,
    /// Its sessions, by place.
    pub(super) sessions: BTreeMap<usize, Session>,
    /// The next session's lanes.
    pub(super) next_session: u64,
    /// The version of the view that sessions were told of.
    pub(super) told_version: u64,
    /// Set when its lease has ended.
    pub(super) gone: Option<Failure>,
    /// Its memory is given back.
    pub(super) released: bool,
    /// It listens.
    pub(super) listens: bool,
}

/// One run of a daemon.
pub(super) struct Daemon {
    /// Which.
    pub(super) boot: BootId,
    /// Runs production futures.
    pub(super) runtime: tokio::runtime::Runtime,
    /// The registrar.
    pub(super) registrar: Arc<Registrar>,
    /// Its calls.
    pub(super) calls: HandRegistrar,
    /// What they end in.
    pub(super) driver: Arc<FailingDriver>,
    /// The lanes' owner.
    pub(super) carriers: Arc<Carriers>,
    /// Its turns.
    pub(super) turns: HandCarrier,
    /// What comes out.
    pub(super) mail: Arc<Mail>,
    /// Attaches so far.
    attached: u64,
    /// Attached engines.
    pub(super) engines: BTreeMap<Life, Engine>,
    /// A turn is due.
    pub(super) turn_due: bool,
    /// A driver call is due.
    pub(super) call_due: bool,
    /// The lanes' thread is inside a call.
    pub(super) stuck: Option<Stuck>,
    /// When the beat is due.
    pub(super) beat_at_us: u64,
}

impl Daemon {
    /// Starts.
    pub(super) fn start(boot: BootId) -> Self {
        let driver = Arc::new(FailingDriver::default());
        let (registrar, calls) = Registrar::by_hand(driver.clone(), 64);
        let (carriers, turns) = Carriers::by_hand().expect("an epoll");
        Self {
            boot,
            runtime: tokio::runtime::Builder::new_current_thread().build().expect("a runtime"),
            registrar,
            calls,
            driver,
            carriers: Arc::new(carriers),
            turns,
            mail: Arc::default(),
            attached: 0,
            engines: BTreeMap::new(),
            turn_due: false,
            call_due: false,
            stuck: None,
            beat_at_us: 0,
        }
    }

    /// Takes an engine in; its regions are another matter.
    pub(super) fn attach(
        &mut self,
        life: Life,
        (place, incarnation): (usize, Incarnation),
        revoked: Revocations,
    ) {
        let quota = Quota { regions: 16, bytes: 1 << 30, layouts: 1 };
        let book = RevocationBook::new(revoked, Default::default());
        let memory =
            EngineMemory::with_revocations(self.registrar.clone(), quota, ProcessAccess::OutOfReach, book);
        self.attached += 1;
        let engine = Engine {
            number: self.attached,
            place,
            incarnation,
            inbound: Inbound::new(memory.clone(), self.carriers.clone(), 16),
            memory,
            log: TransferLog::new(LogLimits { active: 256, finished: 64 }),
            sessions: BTreeMap::new(),
            next_session: 0,
            told_version: 0,
            gone: None,
            released: false,
            listens: false,
        };
        self.engines.insert(life, engine);
    }

    /// Lets futures run until none can go on.
    pub(super) fn pump(&self) {
        self.runtime.block_on(async {
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        });
    }
}

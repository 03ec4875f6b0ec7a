//! What an outbound session hears, what it has done, and how it describes itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    domain::{BootId, Epoch, Failure, Incarnation, LaneId, PathKind, Report, TransferId},
    policy::{HealthPolicy, RetryPolicy, Revocations},
    session::PeerTable,
    transfer::{
        plan::Order,
        run::{Admitted, Request, Run},
    },
    transport::{LaneEvent, LaneKind, LaneRecord, Payload, SequencedPart},
};

/// What the session is run by.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Consecutive outages with transfers given up, and probing.
    pub health: HealthPolicy,
    /// Re-opening, and how long a lane with parts in doubt may stand still.
    pub retry: RetryPolicy,
    /// How long after an open another incarnation is still refused.
    pub pin_idle: Duration,
    /// Parts in doubt per lane.
    pub window_parts: usize,
    /// TCP lanes per direction.
    pub tcp_lanes: usize,
    /// How long the peer's word on its half is waited for.
    pub peer_wait: Duration,
    /// After this long without proof the answer is UNSETTLED.
    pub settle: Duration,
}

/// What a handshake brought.
#[derive(Debug)]
pub struct Opened {
    /// Who is there.
    pub incarnation: Incarnation,
    /// The run of the daemon it is attached to.
    pub boot: BootId,
    /// The way payload will take.
    pub path: PathKind,
    /// What the endpoint has revoked.
    pub revocations: Revocations,
    /// The target's tables.
    pub table: PeerTable,
    /// Lanes of earlier sessions, all fenced now. One that is not named was fenced with nothing processed.
    pub fenced: Vec<(LaneId, LaneRecord)>,
}

/// What the session hears.
#[derive(Debug)]
pub enum Event {
    /// An admitted transfer.
    Submit(Box<Admitted>),
    /// The caller wants it over.
    End(TransferId, Failure),
    /// The own engine is gone, or the daemon stops: everything ends, nothing is opened any more.
    Shutdown(Failure),
    /// The answer to [`Action::Plan`], with the boot whose tables were used.
    Planned(TransferId, BootId, Result<Payload, PlanFailure>),
    /// The own engine unregistered regions: transfers that lease them end.
    LocalRegionsRetired,
    /// The own engine revoked; answered with [`Action::HitHere`] and this number.
    RevokedHere(u64, Arc<Revocations>),
    /// The answer to [`Action::StopLocal`]: nobody on this node touches memory for the transfer any more.
    LocalQuiet(TransferId),

    /// The control stream is up.
    Opened(Box<Opened>),
    /// It could not be opened.
    OpenFailed(Failure),
    /// It ended.
    ControlEnded(Failure),
    /// A table came, as a push (nonce 0) or as the answer to a request.
    Table(PeerTable, u64),
    /// The endpoint revoked.
    Revoked(Box<Revocations>),
    /// The target says: out of the transfer's reach.
    Stopped(TransferId),
    /// The target says: that lane's owner has closed it.
    LaneFenced(LaneId, LaneRecord),

    /// The lane asked for is there.
    LaneOpened(LaneId),
    /// It could not be had.
    LaneOpenFailed(LaneId, Failure),
    /// Word from a lane's owner.
    Lane(LaneId, LaneEvent),
    /// Payload bytes moved on a lane so far.
    Moved(LaneId, u64),

    /// An engine, or an operator, asks whether the peer is there.
    Probe(u64),
    /// The engine accepts whoever is there now.
    Reset,
    /// Time passed.
    Tick,
}

/// Why planning failed, and whether a newer table may help.
#[derive(Debug)]
pub struct PlanFailure {
    /// Told to the caller.
    pub failure: Failure,
    /// The look-up missed in the target's table.
    pub wants_newer_table: bool,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum Action {
    /// Open the control stream and shake hands, expecting this incarnation if one is given.
    Connect(Option<Incarnation>),
    /// End the control stream.
    Disconnect(Failure),
    /// Resolve the transfer's bytes against this table.
    Plan(PlanOrder),
    /// Ask the target for its newest table.
    RequestTable(u64),
    /// Get a lane.
    OpenLane(LaneId, LaneKind, PathKind),
    /// Have the lane's owner close it.
    CloseLane(LaneId, Failure),
    /// Ask the target to fence the lane and say how far it came.
    FenceLane(LaneId),
    /// Hand parts to a lane.
    Submit(LaneId, Vec<SequencedPart>),
    /// Put the payload out of reach on this node and prove it.
    StopLocal(Arc<Payload>),
    /// Have the target put the transfer out of reach; after these sequences no part of it will come.
    StopPeer(TransferId, Vec<(LaneId, u64)>),
    /// Tell the target that what it revoked up to here is acted on.
    RevocationsSeen(Epoch),
    /// These transfers were hit by what the own engine revoked: it is proven once all of them are settled here.
    HitHere(u64, Vec<TransferId>),
    /// Tell that the transfer is not proven over yet.
    Unsettled(TransferId, Report),
    /// Tell that it is over.
    Finish(Box<Run>, Report),
    /// The answer to a probe.
    Probed(u64, Result<(), Failure>),
    /// The session changed its state, or whom it is pinned to.
    State(State, Option<Incarnation>, Option<Failure>),
}

impl Event {
    /// For traces: its kind, without what it carries.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Submit(..) => "Submit",
            Self::End(..) => "End",
            Self::Shutdown(..) => "Shutdown",
            Self::Planned(..) => "Planned",
            Self::LocalRegionsRetired => "LocalRegionsRetired",
            Self::LocalQuiet(..) => "LocalQuiet",
            Self::Opened(..) => "Opened",
            Self::OpenFailed(..) => "OpenFailed",
            Self::ControlEnded(..) => "ControlEnded",
            Self::Table(..) => "Table",
            Self::Revoked(..) => "Revoked",
            Self::RevokedHere(..) => "RevokedHere",
            Self::Stopped(..) => "Stopped",
            Self::LaneFenced(..) => "LaneFenced",
            Self::LaneOpened(..) => "LaneOpened",
            Self::LaneOpenFailed(..) => "LaneOpenFailed",
            Self::Lane(..) => "Lane",
            Self::Moved(..) => "Moved",
            Self::Probe(..) => "Probe",
            Self::Reset => "Reset",
            Self::Tick => "Tick",
        }
    }
}

impl Action {
    /// For traces: its kind, without what it carries.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connect(..) => "Connect",
            Self::Disconnect(..) => "Disconnect",
            Self::Plan(..) => "Plan",
            Self::RequestTable(..) => "RequestTable",
            Self::OpenLane(..) => "OpenLane",
            Self::CloseLane(..) => "CloseLane",
            Self::FenceLane(..) => "FenceLane",
            Self::Submit(..) => "Submit",
            Self::StopLocal(..) => "StopLocal",
            Self::StopPeer(..) => "StopPeer",
            Self::RevocationsSeen(..) => "RevocationsSeen",
            Self::HitHere(..) => "HitHere",
            Self::Unsettled(..) => "Unsettled",
            Self::Finish(..) => "Finish",
            Self::Probed(..) => "Probed",
            Self::State(..) => "State",
        }
    }
}

/// What is needed to plan.
#[derive(Debug)]
pub struct PlanOrder {
    /// For whom.
    pub order: Order,
    /// Whose tables these are.
    pub boot: BootId,
    /// The bytes.
    pub request: Arc<Request>,
    /// The target's tables.
    pub table: Arc<PeerTable>,
}

/// The session as others see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Nothing is open and nothing wants it to be.
    Idle,
    /// Being opened for the first time since it was idle.
    Opening,
    /// Up.
    Healthy,
    /// Down, and being opened again.
    Recovering,
    /// Given up; probes run.
    Failed,
}

/// What a session has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Transfers that ended DONE.
    pub done: u64,
    /// Transfers that ended otherwise.
    pub failed: u64,
    /// Payload bytes acknowledged.
    pub bytes: u64,
    /// Losses counted against transfers.
    pub retries: u64,
}

/// A session in a table.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How it stands.
    pub state: State,
    /// The way payload takes, while it is up.
    pub path: Option<PathKind>,
    /// Open lanes.
    pub lanes: usize,
    /// Transfers under way.
    pub active: usize,
    /// What it has done.
    pub counts: Counts,
    /// Outages in a row in which a transfer was given up.
    pub consecutive_failures: u32,
    /// Why it was last in trouble.
    pub last_failure: Option<Failure>,
    /// When a failed session is probed next.
    pub next_probe: Option<Instant>,
    /// Who it is pinned to.
    pub incarnation: Option<Incarnation>,
}

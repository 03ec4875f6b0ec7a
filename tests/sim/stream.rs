//! Control streams: what is said on them, and how it travels.
//!
//! Messages of one direction arrive in order, each after a random delay; a direction that is cut delivers
//! nothing more, or what was under way and then its end, or nothing at all, as a black hole does.

use kvferryd::{
    domain::{BootId, Failure, Incarnation, LaneId, TransferId},
    policy::RevocationList,
    session::{PeerTable, inbound::Token},
    transport::{LaneKind, LaneRecord},
};

use super::daemon::SessionKey;

/// Which stream.
pub(super) type StreamId = u32;

/// Lanes of earlier sessions, and how far they came.
pub(super) type Fenced = Vec<(LaneId, LaneRecord)>;

/// To the target.
#[derive(Debug)]
pub(super) enum Up {
    /// Opens, expecting somebody or anybody.
    Open(Incarnation, Option<Incarnation>),
    /// Signed for.
    Confirm,
    /// Has heard Accept.
    Ready,
    /// Alive.
    Beat,
    /// Wants a lane.
    LaneRequest(LaneId, LaneKind),
    /// Wants a lane fenced.
    FenceLane(LaneId),
    /// Wants a transfer out of reach.
    Stop(TransferId, Vec<(LaneId, u64)>),
    /// Wants the newest table.
    TableRequest(u64),
    /// Says why it goes.
    Bye(Failure),
    /// The stream's end.
    End,
}

/// To the initiator.
#[derive(Debug)]
pub(super) enum Down {
    /// Who is there.
    Challenge(Incarnation, BootId),
    /// Earlier lanes are fenced, and what was revoked.
    Accept(Fenced, RevocationList),
    /// The table.
    Welcome(PeerTable),
    /// Alive.
    Beat,
    /// A token, or why not.
    Grant(LaneId, Result<Token, Failure>),
    /// A lane is fenced.
    LaneFenced(LaneId, LaneRecord),
    /// A transfer is out of reach.
    Stopped(TransferId),
    /// A table, for a request or by itself.
    Table(PeerTable, u64),
    /// Revocations of one epoch.
    Revoked(RevocationList),
    /// No session, or no more.
    Bye(Failure),
    /// The stream's end.
    End,
}

/// A stream between two daemons.
#[derive(Debug)]
pub(super) struct Stream {
    /// Whose.
    pub(super) from: SessionKey,
    /// Its node.
    pub(super) from_node: usize,
    /// That node's boot.
    pub(super) from_boot: u32,
    /// Which of the session's streams.
    pub(super) number: u64,
    /// The target's node.
    pub(super) to_node: usize,
    /// When the last message of each direction arrives.
    pub(super) arrives_us: [u64; 2],
    /// Nothing of that direction arrives any more.
    pub(super) lost: [bool; 2],
    /// That side has said its end.
    pub(super) ended: [bool; 2],
    /// Its initiator has what it dialled for, or waits no more.
    pub(super) dialled: bool,
    /// What the handshake brought so far, at the initiator.
    pub(super) met: Option<(Incarnation, BootId, Fenced, RevocationList)>,
}

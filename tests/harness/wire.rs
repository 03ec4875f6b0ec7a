//! What a suite says to an engine process and hears from it: one JSON value a line, one answer a command.

use std::{ops::Range, path::PathBuf};

use kvferry_client::{Error, Failure, Op, Outcome, Path, Reason, Report};
use serde::{Deserialize, Serialize};

use crate::{
    batch::Move,
    canvas::{Census, Shade},
    oracle::{Kind, Verdict},
    pattern::Stamp,
};

/// Something to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// Attach to the daemon at this socket.
    Attach {
        /// Where.
        socket: PathBuf,
        /// As what.
        name: String,
    },
    /// Allocate the pool, filled with the stamp, and register it.
    Pool {
        /// What it is made of.
        kind: Kind,
        /// Bytes.
        length: u64,
        /// Its first contents.
        stamp: Stamp,
    },
    /// Register so many buffers, each from a thread of its own, all at the same moment.
    RegisterAtOnce {
        /// What they are made of.
        kind: Kind,
        /// How many.
        buffers: usize,
        /// Bytes of each.
        length: u64,
    },
    /// Transfer between the pool and a peer's memory.
    Transfer {
        /// The peer's session id.
        session: String,
        /// True: WRITE; false: READ.
        write: bool,
        /// Where the peer's pool begins in its address space.
        remote: u64,
        /// What goes where.
        moves: Vec<Move>,
    },
    /// The pool will hold what a peer, whose pool is this stamp, sends.
    Expect {
        /// The peer's stamp.
        source: Stamp,
        /// What goes where.
        moves: Vec<Move>,
    },
    /// Read the whole pool.
    Verify,
    /// The range goes to another owner, who overwrites it at once.
    HandOver {
        /// In the pool.
        range: Range<u64>,
        /// Of the new owner.
        stamp: Stamp,
    },
    /// Nobody knows what is in the range.
    Forget {
        /// In the pool.
        range: Range<u64>,
    },
    /// Register a [canvas](crate::canvas).
    Canvas {
        /// How it is registered.
        kind: Kind,
        /// Bytes that are painted and judged.
        length: u64,
        /// Bytes behind them.
        margin: u64,
    },
    /// Give the canvas a shade.
    Paint {
        /// Which.
        shade: Shade,
    },
    /// Begin a transfer between the canvas and a peer's memory.
    Begin(Begin),
    /// Cancel it, until that is settled.
    Cancel,
    /// Wait for its end.
    Outcome,
    /// Take the canvas back, until that is settled, and paint it at once.
    Unregister {
        /// Where no transfer of this engine says another.
        shade: Shade,
    },
    /// Register the canvas again.
    Register,
    /// Fork a child that holds every descriptor and does nothing, for at most a minute.
    Fork,
    /// Become another program, without a further word.
    Exec,
}

/// A transfer of slices of one length between the canvas and a peer's memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// The peer's session id.
    pub session: String,
    /// True: WRITE; false: READ.
    pub write: bool,
    /// Offsets in the canvas.
    pub local: Vec<u64>,
    /// Addresses in the peer's address space.
    pub remote: Vec<u64>,
    /// Bytes of each.
    pub length: u64,
    /// No retry.
    pub once: bool,
    /// What the canvas is painted with at the terminal answer.
    pub shade: Option<Shade>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Answer {
    /// To `Attach`.
    Attached {
        /// What peers call this engine.
        session: String,
    },
    /// To `Pool`.
    Pool {
        /// Where it begins in the process's address space.
        address: u64,
    },
    /// To `RegisterAtOnce`: each was registered.
    Registered {
        /// How many.
        regions: usize,
    },
    /// To `Transfer`.
    Report(Ended),
    /// To `Expect`, and whatever else has no more to say.
    Noted,
    /// To `Canvas`.
    Canvas {
        /// Where it begins in the process's address space.
        address: u64,
        /// The process's descriptor of it.
        descriptor: i32,
    },
    /// To `Paint`: what was there until then.
    Painted(Census),
    /// To `Verify`.
    Verdict(Verdict),
    /// To `Fork`.
    Child {
        /// The child's process id.
        pid: u32,
    },
    /// It could not be done.
    Error {
        /// The reason's number, where the daemon gave one.
        reason: Option<i32>,
        /// For people.
        message: String,
    },
}

/// How a transfer ended, as far as the suites ask an engine process for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ended {
    /// Every byte was applied.
    pub done: bool,
    /// The reason's number where it was not.
    pub reason: Option<i32>,
    /// The path's number.
    pub path: Option<i32>,
    /// Slices of the batch.
    pub slices: u64,
    /// Bytes applied.
    pub bytes_done: u64,
    /// The peer's half is proven too.
    pub confirmed: bool,
    /// DONE, FAILED or CANCELLED; REFUSED where the call was.
    pub word: String,
    /// Everything the client library said, for messages.
    pub text: String,
}

impl Ended {
    /// A call that was not carried out: nothing was begun.
    pub fn refused(failure: &Failure) -> Self {
        Self {
            done: false,
            reason: Some(number(failure)),
            path: None,
            slices: 0,
            bytes_done: 0,
            confirmed: true,
            word: "REFUSED".to_owned(),
            text: failure.to_string(),
        }
    }

    /// The typed reason.
    pub fn reason(&self) -> Option<Reason> {
        self.reason.and_then(|number| Reason::try_from(number).ok())
    }

    /// The path taken.
    pub fn path(&self) -> Option<Path> {
        self.path.and_then(|number| Path::try_from(number).ok())
    }
}

impl From<&Report> for Ended {
    fn from(report: &Report) -> Self {
        Self {
            done: report.outcome == Outcome::Done,
            reason: report.failure.as_ref().map(number),
            path: report.path.map(|path| path as i32),
            slices: report.slices,
            bytes_done: report.bytes_done,
            confirmed: report.peer_confirmed,
            word: format!("{:?}", report.outcome).to_uppercase(),
            text: format!("{report:?}"),
        }
    }
}

impl From<&Error> for Answer {
    fn from(error: &Error) -> Self {
        let reason = match error {
            Error::Refused(failure) => Some(number(failure)),
            _ => None,
        };
        Self::Error { reason, message: error.to_string() }
    }
}

/// The direction of a [`Command::Transfer`].
pub fn op(write: bool) -> Op {
    if write { Op::Write } else { Op::Read }
}

fn number(failure: &Failure) -> i32 {
    failure.reason as i32
}

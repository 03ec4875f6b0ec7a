//! What a parent and an engine process say to each other: one JSON object per line, one reply per command.
//!
//! Commands name workloads, never slice lists: both ends make the same plan from (workload, seed), so a line
//! stays short however many slices it stands for.

use std::path::PathBuf;

use kvferry_client::{Outcome, Path, Reason, Report};
use serde::{Deserialize, Serialize};

/// Which way a transfer goes, seen from the engine that asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    Write,
    Read,
}

/// Which half of a plan an engine holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    Source,
    Sink,
}

/// An error planted in a receiver, to show that the check finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sabotage {
    /// One bit of one slice.
    Flip,
    /// One byte outside every slice.
    Stray,
    /// One slice that never arrived.
    Skip,
    /// One slice that arrived twice, the second time over another.
    Dup,
}

/// One replay of the pool's plan against a peer that holds the other half.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) session: String,
    pub(crate) direction: Direction,
    /// Base addresses of the peer's buffers, in its address space.
    pub(crate) remote: Vec<u64>,
    /// None: the daemon's retry policy.
    pub(crate) attempts: Option<u32>,
    /// How often the plan is replayed, at least once.
    pub(crate) repeat: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Command {
    /// `tcp_only` refuses the local path even to an engine of the same daemon.
    Attach {
        socket: PathBuf,
        name: String,
        tcp_only: bool,
    },
    /// Allocates one half of a plan's buffers, touches and registers them. There is one pool at a time.
    Pool {
        workload: String,
        seed: u64,
        side: Side,
    },
    /// Unregisters and frees the pool.
    Release,
    /// Source: every slice gets the content of this transfer, whatever was there.
    Fill {
        transfer: u64,
    },
    /// Sink: everything gets the background.
    Clear,
    /// Sink: plants an error.
    Sabotage {
        how: Sabotage,
        transfer: u64,
    },
    /// Sink: every slice must hold the transfer's bytes, everything else the background.
    Verify {
        transfer: u64,
    },
    /// Sink: which bytes have arrived of a transfer that may have stopped anywhere, and of `later`, the
    /// content that the source was given after the stop.
    Tally {
        transfer: u64,
        later: u64,
    },
    /// Replays the plan and answers when it is over.
    Transfer {
        order: Order,
    },
    /// Starts the plan's first call in the background; `Cancel` and `Wait` mean it.
    Start {
        order: Order,
    },
    Cancel,
    Wait,
    /// Becomes the receiving end of the raw socket limit for messages of this size.
    RawSink {
        bytes: u64,
    },
    Quit,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(crate) enum Reply {
    Done,
    Attached { session: String },
    Pool { bases: Vec<u64> },
    Verdict(Verdict),
    Tally(Tally),
    Moved(Moved),
    Cancelled { settled: bool },
    Listening { port: u16 },
    Failed { message: String },
}

/// What a receiver found in its pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) slices: u64,
    pub(crate) wrong_slices: u64,
    /// Bytes of expected slices that hold what they should.
    pub(crate) verified: u64,
    /// Bytes of expected slices that do not.
    pub(crate) wrong: u64,
    /// Bytes outside every expected slice that are not background.
    pub(crate) stray: u64,
    /// The first thing wrong, in words.
    pub(crate) first: Option<String>,
}

impl Verdict {
    pub(crate) fn is_clean(&self) -> bool {
        self.wrong_slices == 0 && self.stray == 0
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} slices wrong ({} bytes), {} stray bytes",
            self.wrong_slices, self.slices, self.wrong, self.stray
        )?;
        self.first.as_ref().map_or(Ok(()), |first| write!(f, "; first: {first}"))
    }
}

/// How far a stopped transfer came, byte by byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Hold what the transfer carried.
    pub(crate) arrived: u64,
    /// Still hold the background.
    pub(crate) untouched: u64,
    /// Hold what the source held only after the transfer was over: corruption.
    pub(crate) later: u64,
    /// Hold anything else; a stopped transfer's destination is undefined, so this is no error.
    pub(crate) other: u64,
    /// Outside every slice and not background.
    pub(crate) stray: u64,
    /// Of the whole pool: equal digests mean that nothing was written in between.
    pub(crate) digest: u64,
}

/// How a replay ended, summed over its calls and repetitions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moved {
    pub(crate) end: End,
    pub(crate) slices: u64,
    pub(crate) bytes: u64,
    pub(crate) bytes_resent: u64,
    /// The most any one call needed.
    pub(crate) attempts: u32,
    /// The receiving memory, too, is proven out of reach.
    pub(crate) peer_confirmed: bool,
    pub(crate) path: Way,
    /// Wall time of each repetition as the engine saw it, ns.
    pub(crate) ns: Vec<u64>,
}

/// The outcome of a transfer; a failure keeps its reason's number, because nothing is decided by text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    Done,
    Failed { reason: i32, message: String },
    Cancelled,
    Unsettled { reason: i32, message: String },
}

impl End {
    pub(crate) fn of(report: &Report) -> Self {
        let (reason, message) = report
            .failure
            .as_ref()
            .map_or((Reason::Unspecified as i32, String::new()), |f| (f.reason as i32, f.message.clone()));
        match report.outcome {
            Outcome::Done => Self::Done,
            Outcome::Failed => Self::Failed { reason, message },
            Outcome::Cancelled => Self::Cancelled,
            Outcome::Unsettled => Self::Unsettled { reason, message },
        }
    }

    /// Unspecified where there is none.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Failed { reason, .. } | Self::Unsettled { reason, .. } => {
                Reason::try_from(*reason).unwrap_or(Reason::Unspecified)
            }
            Self::Done | Self::Cancelled => Reason::Unspecified,
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reason = self.reason().as_str_name().trim_start_matches("REASON_");
        match self {
            Self::Done => f.write_str("DONE"),
            Self::Cancelled => f.write_str("CANCELLED"),
            Self::Failed { message, .. } => write!(f, "FAILED({reason}) {message}"),
            Self::Unsettled { message, .. } => write!(f, "UNSETTLED({reason}) {message}"),
        }
    }
}

/// The path a transfer took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    Local,
    Tcp,
    #[value(skip)]
    Rdma,
    /// Nothing moved.
    #[value(skip)]
    None,
}

impl From<Option<Path>> for Way {
    fn from(path: Option<Path>) -> Self {
        match path {
            Some(Path::Local) => Self::Local,
            Some(Path::Tcp) => Self::Tcp,
            Some(Path::Rdma) => Self::Rdma,
            Some(Path::Unspecified) | None => Self::None,
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::None => "-",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_line_and_comes_back_whole() {
        let order = Order {
            session: "127.0.0.1:20000".into(),
            direction: Direction::Write,
            remote: vec![u64::MAX, 0],
            attempts: Some(1),
            repeat: 3,
        };
        let line = serde_json::to_string(&Command::Transfer { order }).unwrap();
        assert!(!line.contains('\n'));
        let Command::Transfer { order } = serde_json::from_str(&line).unwrap() else { panic!("{line}") };
        assert_eq!((order.remote, order.repeat), (vec![u64::MAX, 0], 3));
    }

    #[test]
    fn replies_with_content_survive_the_tag() {
        let verdict = Verdict { slices: 2, stray: 1, first: Some("here".into()), ..Verdict::default() };
        for reply in [
            Reply::Done,
            Reply::Verdict(verdict),
            Reply::Moved(Moved {
                end: End::Failed { reason: Reason::PeerSilent as i32, message: "quiet".into() },
                slices: 1,
                bytes: 2,
                bytes_resent: 0,
                attempts: 1,
                peer_confirmed: false,
                path: Way::Tcp,
                ns: vec![5],
            }),
        ] {
            let line = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
        }
    }

    #[test]
    fn an_end_keeps_its_reason_by_number() {
        let end = End::Unsettled { reason: 4, message: "no life".into() };
        assert_eq!(end.reason(), Reason::PeerSilent);
        assert_eq!(end.to_string(), "UNSETTLED(PEER_SILENT) no life");
        assert_eq!(End::Failed { reason: 9999, message: String::new() }.reason(), Reason::Unspecified);
    }
}

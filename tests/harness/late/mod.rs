//! The late-write probes: each ends a transfer in mid-flight in its own way, overwrites the memory the moment the
//! answer is there, and counts what comes after (I1, I6).
//!
//! Written as a user would: engine processes that know nothing but the client library, of which the judge reads
//! the memory from outside, also while a process is stopped. What an answer promises is what is held against it:
//!
//! - DONE, FAILED, CANCELLED: the caller's half. Whatever of a source's *later* content reaches the target is
//!   late; so is any change of a destination after the answer to its owner.
//! - `peer_confirmed`: the peer's half. Its pages go to another owner at once, and any change is late.
//! - UNSETTLED is no end. It is waited on.
//!
//! A probe that acts too late proves nothing, so each run also says whether bytes were in flight: over tcp by the
//! log of the proxy in between, within a node by the last byte, which was not there yet.

mod run;
mod stage;

use std::{fmt, time::Duration};

use kvferry_client::Path;

use run::Run;
use stage::Stage;

/// What the engines' memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// Memfds that the daemons map.
    Shared,
    /// Private to the engines, which copy for the daemons.
    Assisted,
}

/// What happens to a transfer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Probe {
    /// One bad slice among good ones: refused before a byte moves.
    BadSlice,
    /// The target's daemon is stopped, and goes on after the answer.
    PeerDaemonStopped,
    /// The initiator's own daemon is stopped for longer than its peers tolerate, and goes on.
    OwnDaemonStopped,
    /// The target engine is stopped, and goes on after the answer.
    EngineStopped,
    /// A WRITE is cancelled.
    CancelWrite,
    /// A READ is cancelled: the caller's memory is what is written.
    CancelRead,
    /// The source takes its memory back.
    UnregisterSource,
    /// The target takes its memory back.
    UnregisterTarget,
}

impl Probe {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::BadSlice,
        Self::PeerDaemonStopped,
        Self::OwnDaemonStopped,
        Self::EngineStopped,
        Self::CancelWrite,
        Self::CancelRead,
        Self::UnregisterSource,
        Self::UnregisterTarget,
    ];

    /// Within a node the peer's daemon is the own one. A stopped engine that copies for itself may hold a copy for as
    /// long as it is stopped, and the transfer with it: `tests/assisted.rs` has that.
    fn applies_to(self, path: Path, memory: Memory) -> bool {
        (path != Path::Local || self != Self::PeerDaemonStopped)
            && (memory != Memory::Assisted || self != Self::EngineStopped)
    }

    fn name(self) -> &'static str {
        match self {
            Self::BadSlice => "one bad slice",
            Self::PeerDaemonStopped => "peer daemon stopped",
            Self::OwnDaemonStopped => "own daemon stopped",
            Self::EngineStopped => "target engine stopped",
            Self::CancelWrite => "cancel WRITE",
            Self::CancelRead => "cancel READ",
            Self::UnregisterSource => "unregister source",
            Self::UnregisterTarget => "unregister target",
        }
    }
}

/// What the runs of one probe over one path showed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// Which.
    pub probe: Probe,
    /// Where.
    pub path: Path,
    /// How often.
    pub runs: u32,
    /// In how many of them bytes were under way at the moment of the act.
    pub in_flight: u32,
    /// Bytes that came after an answer which excludes them.
    pub late: u64,
    /// From the act (or from the submission, for what is refused) until the terminal answer was there and the
    /// caller's memory overwritten.
    pub worst: Duration,
    /// How the transfers ended, with counts.
    pub ended: Vec<(String, u32)>,
}

impl Row {
    fn new(probe: Probe, path: Path) -> Self {
        Self { probe, path, runs: 0, in_flight: 0, late: 0, worst: Duration::ZERO, ended: Vec::new() }
    }

    fn add(&mut self, run: &Run) {
        self.runs += 1;
        self.in_flight += u32::from(run.in_flight);
        self.late += run.late;
        self.worst = self.worst.max(run.answered);
        match self.ended.iter_mut().find(|(word, _)| *word == run.word) {
            Some((_, count)) => *count += 1,
            None => self.ended.push((run.word.clone(), 1)),
        }
    }

    /// Whether it has struck in flight in at least 95 of 100 runs. What is refused never flies.
    pub fn proves_something(&self) -> bool {
        self.probe == Probe::BadSlice || self.in_flight * 100 >= self.runs * 95
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = format!("{:?}", self.path).to_lowercase();
        let in_flight = match self.probe {
            Probe::BadSlice => "-".to_owned(),
            _ => self.in_flight.to_string(),
        };
        let ended: Vec<_> = self.ended.iter().map(|(word, count)| format!("{count} {word}")).collect();
        let (probe, worst) = (self.probe.name(), self.worst.as_secs_f64() * 1e3);
        let Self { runs, late, .. } = self;
        write!(f, "{probe:<22} {path:<6} {runs:>5} {in_flight:>10} {late:>11} {worst:>11.1} ms  ")?;
        f.write_str(&ended.join(", "))
    }
}

/// The line above the rows.
pub fn heading() -> String {
    let (probe, path, runs, flight, late) = ("probe", "path", "runs", "in flight", "late bytes");
    format!("{probe:<22} {path:<6} {runs:>5} {flight:>10} {late:>11} {:>14}  ended", "worst answer")
}

/// The control: bytes that are late for an engine that overwrites its source in mid-flight without an answer. The
/// probes see nothing if they do not see these.
///
/// # Errors
/// Where something else went wrong.
pub fn impatient() -> anyhow::Result<u64> {
    run::impatient(&mut Stage::new(Path::Tcp, Memory::Shared)?)
}

/// All probes over a path, so many runs each; every row is shown as soon as it is there.
///
/// # Errors
/// Where something else than what is probed went wrong.
pub fn run(path: Path, memory: Memory, runs: u32, mut show: impl FnMut(&Row)) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for probe in Probe::ALL.into_iter().filter(|probe| probe.applies_to(path, memory)) {
        let mut stage = Stage::new(path, memory)?;
        let mut row = Row::new(probe, path);
        for number in 0..runs {
            row.add(&run::run(&mut stage, probe, number)?);
        }
        show(&row);
        rows.push(row);
    }
    Ok(rows)
}

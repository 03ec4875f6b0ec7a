//! One run of a probe.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;

use super::{
    Probe,
    stage::{BURIED, Side, Stage},
};
use crate::{
    canvas::{AFTER, BEFORE, BLANK, Census, OWNED},
    process::Signal,
    wire::{Answer, Command, Ended},
};

const LIMIT: Duration = Duration::from_secs(15);

/// What it showed.
#[derive(Debug)]
pub(super) struct Run {
    pub in_flight: bool,
    pub late: u64,
    pub answered: Duration,
    pub word: String,
}

/// The act, as the proxy's log and the destination saw it.
#[derive(Debug)]
struct Act {
    at: Instant,
    /// Over lanes, since the transfer began.
    passed: u64,
    /// The last byte of the destination had not come.
    unfinished: bool,
}

/// Which run it is decides when it strikes: anywhere in the first third.
pub(super) fn run(stage: &mut Stage, probe: Probe, number: u32) -> anyhow::Result<Run> {
    let write = probe != Probe::CancelRead;
    let (here, there) = if write { (BEFORE, BLANK) } else { (BLANK, BEFORE) };
    stage.initiator.paint(here)?;
    stage.target.paint(there)?;
    let already = stage.passed();
    if probe == Probe::BadSlice {
        return bad_slice(stage);
    }
    let once = matches!(probe, Probe::PeerDaemonStopped | Probe::OwnDaemonStopped);
    let begin = stage.whole(write, once, if write { AFTER } else { OWNED });
    stage.slow(true);
    stage.initiator.noted(&Command::Begin(begin))?;
    wait_for_flow(stage, write, already, number)?;
    let act = act(stage, probe, already)?;
    if probe == Probe::UnregisterTarget {
        // Its answer is the target's own: its memory is another's from here on, whatever the initiator hears.
        stage.target.noted(&Command::Unregister { shade: OWNED })?;
    }
    let ended = stage.initiator.outcome()?;
    let answered = act.at.elapsed();
    let owned = hand_over(stage, probe, &ended)?;
    resume(stage, probe)?;
    let passed = stage.drain() - already;
    let in_flight = match stage.proxy {
        Some(_) => 0 < act.passed && act.passed < stage.payload && act.passed < passed,
        None => act.unfinished,
    };
    stage.is_well()?;
    let census = destination(stage, write).judge.census()?;
    let late = match owned {
        Some(found) => found.after + census.not_owned(),
        None => census.after,
    };
    Ok(Run { in_flight, late, answered, word: ended.word })
}

/// What an engine does that overwrites its source without waiting for the answer: how many bytes of the later
/// content arrived. None would mean that the probes are blind.
pub(super) fn impatient(stage: &mut Stage) -> anyhow::Result<u64> {
    stage.initiator.paint(BEFORE)?;
    stage.target.paint(BLANK)?;
    let already = stage.passed();
    stage.slow(true);
    stage.initiator.noted(&Command::Begin(stage.whole(true, false, AFTER)))?;
    wait_for_flow(stage, true, already, 0)?;
    stage.initiator.paint(AFTER)?;
    stage.slow(false);
    stage.initiator.outcome()?;
    Ok(stage.target.judge.census()?.after)
}

/// Bounds are checked before a byte moves, so this is refused at once and nothing has arrived, then or later.
fn bad_slice(stage: &mut Stage) -> anyhow::Result<Run> {
    let mut begin = stage.whole(true, false, AFTER);
    // The last one, so that whoever checks as he goes has moved everything else.
    if let Some(last) = begin.remote.last_mut() {
        *last += 1 << 40;
    }
    let begun = Instant::now();
    stage.initiator.noted(&Command::Begin(begin))?;
    let ended = stage.initiator.outcome()?;
    let answered = begun.elapsed();
    ensure!(!ended.done, "a batch with a bad slice is DONE");
    stage.drain();
    stage.is_well()?;
    let late = stage.payload - stage.target.judge.census()?.blank;
    Ok(Run { in_flight: false, late, answered, word: ended.word })
}

fn destination(stage: &Stage, write: bool) -> &Side {
    if write { &stage.target } else { &stage.initiator }
}

fn wait_for_flow(stage: &Stage, write: bool, already: u64, number: u32) -> anyhow::Result<()> {
    // A golden-ratio walk: spread evenly however many runs there are.
    let share = f64::from(number) * 0.618_034 % 1.0;
    let strike = (stage.payload as f64 * (0.02 + 0.3 * share)) as u64;
    let begun = Instant::now();
    loop {
        let flows = match stage.proxy {
            Some(_) => stage.passed() - already > strike,
            None => destination(stage, write).judge.shade(strike)? == BEFORE,
        };
        if flows {
            return Ok(());
        }
        ensure!(begun.elapsed() < LIMIT, "nothing flows");
        if stage.proxy.is_some() {
            thread::sleep(Duration::from_micros(200));
        }
    }
}

fn act(stage: &mut Stage, probe: Probe, already: u64) -> anyhow::Result<Act> {
    let at = Instant::now();
    match probe {
        Probe::PeerDaemonStopped => stage.nodes.target().process().signal(Signal::STOP)?,
        Probe::OwnDaemonStopped => stage.nodes.initiator().process().signal(Signal::STOP)?,
        Probe::EngineStopped => stage.target.engine.process().signal(Signal::STOP)?,
        Probe::CancelWrite | Probe::CancelRead => stage.initiator.engine.send(&Command::Cancel)?,
        Probe::UnregisterSource => stage.initiator.engine.send(&Command::Unregister { shade: AFTER })?,
        Probe::UnregisterTarget | Probe::BadSlice => {}
    }
    let passed = stage.passed() - already;
    let write = probe != Probe::CancelRead;
    let unfinished = destination(stage, write).judge.shade(stage.payload - 1)? != BEFORE;
    match probe {
        Probe::OwnDaemonStopped => {
            thread::sleep(BURIED);
            stage.nodes.initiator().process().signal(Signal::CONT)?;
        }
        Probe::CancelWrite | Probe::CancelRead | Probe::UnregisterSource => {
            let answer = stage.initiator.engine.receive()?;
            ensure!(matches!(answer, Answer::Noted), "{probe:?}: {answer:?}");
        }
        _ => {}
    }
    // What was throttled to be struck need not be so for its answer.
    stage.slow(false);
    Ok(Act { at, passed, unfinished })
}

/// The moment of the answer: if the destination's half is settled it goes to its next owner at once. What was found
/// there, or none: then nothing but the source's later content is late.
fn hand_over(stage: &mut Stage, probe: Probe, ended: &Ended) -> anyhow::Result<Option<Census>> {
    match probe {
        // Painted by their owner when the answer came to it.
        Probe::CancelRead | Probe::UnregisterTarget => Ok(Some(Census::default())),
        // Who is stopped cannot hand over anything.
        Probe::EngineStopped => Ok(None),
        _ if ended.confirmed => stage.target.paint(OWNED).map(Some),
        _ => Ok(None),
    }
}

fn resume(stage: &mut Stage, probe: Probe) -> anyhow::Result<()> {
    match probe {
        Probe::PeerDaemonStopped => stage.nodes.target().process().signal(Signal::CONT)?,
        Probe::EngineStopped => stage.target.engine.process().signal(Signal::CONT)?,
        Probe::UnregisterSource => stage.initiator.noted(&Command::Register)?,
        Probe::UnregisterTarget => stage.target.noted(&Command::Register)?,
        _ => {}
    }
    Ok(())
}

//! One decode pool of a soak, what befalls it, and what came of it.

use std::{
    fmt,
    ops::{Add, Range},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use kvferry_client::{Engine, Error, Op, Outcome, Policy, Report, Transfer};

use crate::{
    batch::{self, Move},
    dice::Dice,
    engine::EngineProcess,
    oracle::{self, Kind, Pool},
    pattern::Stamp,
    proxy::{Cut, Proxy, Storm},
    scene::Nodes,
    wire::{Answer, Command},
};

const MIB: u64 = 1 << 20;
/// Of each pool.
const LENGTH: u64 = 24 * MIB;
/// What pages are given out in.
const PAGE: u64 = 64 << 10;
/// A session that is not well by then is lost for good.
const RECOVERY: Duration = Duration::from_secs(15);
/// Transfers between two looks at the whole pool.
const LOOK_EVERY: u64 = 16;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Transfers that brought every byte.
    pub done: u64,
    /// That were asked to stop, and did.
    pub cancelled: u64,
    /// That failed: their engine was killed, or their path.
    pub failed: u64,
    /// Losses that a transfer got over.
    pub retries: u64,
    /// Lanes cut in mid-payload.
    pub cuts: u64,
    /// All connections of a session cut at once.
    pub partitions: u64,
    /// Engines killed and replaced.
    pub restarts: u64,
    /// Sessions that were well again after a partition or a restart.
    pub recoveries: u64,
    /// Payload of transfers that were DONE.
    pub bytes: u64,
    /// Sessions that were not.
    pub lost_sessions: u64,
    /// Bytes that are not what was sent, or lie where nothing was sent.
    pub wrong: u64,
    /// Bytes written after their page had changed hands.
    pub late: u64,
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            done: self.done + other.done,
            cancelled: self.cancelled + other.cancelled,
            failed: self.failed + other.failed,
            retries: self.retries + other.retries,
            cuts: self.cuts + other.cuts,
            partitions: self.partitions + other.partitions,
            restarts: self.restarts + other.restarts,
            recoveries: self.recoveries + other.recoveries,
            bytes: self.bytes + other.bytes,
            lost_sessions: self.lost_sessions + other.lost_sessions,
            wrong: self.wrong + other.wrong,
            late: self.late + other.late,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { done, cancelled, failed, retries, cuts, partitions, .. } = self;
        let Self { restarts, recoveries, bytes, lost_sessions, wrong, late, .. } = self;
        writeln!(f, "transfers: {done} done ({bytes} bytes), {cancelled} cancelled, {failed} failed")?;
        writeln!(f, "faults: {cuts} lanes cut, {partitions} sessions cut, {restarts} engines killed")?;
        writeln!(f, "{retries} retries, {recoveries} recoveries")?;
        write!(f, "{lost_sessions} sessions lost for good, {wrong} wrong bytes, {late} late bytes")
    }
}

/// A decode engine, the pages the prefill engine sends it, and the path between them.
pub(super) struct Decode<'a> {
    nodes: &'a Nodes,
    dice: Dice,
    prefill: Engine,
    source: Pool,
    /// Stamps are never used twice; parity tells source from target.
    number: u32,
    stamps: u32,
    proxy: Proxy,
    engine: EngineProcess,
    remote: u64,
    tally: Tally,
}

impl<'a> Decode<'a> {
    pub(super) fn new(number: u32, nodes: &'a Nodes, prefill: Engine, dice: Dice) -> anyhow::Result<Self> {
        let source = Pool::new(Kind::Shared, LENGTH, Stamp { owner: 2 * number + 1, transfer: 0 })?;
        prefill.register(&[source.memory()])?;
        let (engine, remote) = decode(nodes, number, 0)?;
        let proxy = Proxy::start(engine.session())?;
        let tally = Tally::default();
        let mut decode =
            Self { nodes, dice, prefill, source, number, stamps: 0, proxy, engine, remote, tally };
        decode.begin_storm();
        Ok(decode)
    }

    pub(super) fn tally(&self) -> Tally {
        Tally { cuts: self.proxy.struck(), ..self.tally }
    }

    /// Until it is time; then the weather clears, and everything must be well.
    pub(super) fn work(&mut self, until: Instant) -> anyhow::Result<()> {
        let mut count = 0u64;
        while Instant::now() < until {
            count += 1;
            match self.dice.within(0..40) {
                0 => self.restart()?,
                1 => self.partition()?,
                // Here belongs a Revoke by the decode engine, answered like a cancel from the other end: its pages
                // change hands at its own answer, whatever the prefill engine hears.
                2..=7 => self.transfer(Fate::Cancel)?,
                _ => self.transfer(Fate::Live)?,
            }
            if count.is_multiple_of(LOOK_EVERY) {
                self.look()?;
            }
        }
        self.proxy.storm(None);
        self.recovers()?;
        self.look()
    }

    fn begin_storm(&mut self) {
        let seed = self.dice.next_u64();
        self.proxy.storm(Some(Storm { seed, bytes: 2 * MIB..48 * MIB, how: Cut::Reset }));
    }

    fn stamp(&mut self, owner: u32) -> Stamp {
        self.stamps += 1;
        Stamp { owner, transfer: self.stamps }
    }

    fn transfer(&mut self, fate: Fate) -> anyhow::Result<()> {
        let range = self.pages();
        // The content is this transfer's own: of any earlier or later one not a page agrees.
        let (source, target) = (2 * self.number + 1, 2 * self.number + 2);
        let content = self.stamp(source);
        self.source.overwrite(range.clone(), content);
        // To another place than it comes from.
        let moves = shuffled(&range, &mut self.dice);
        let report = self.submit(&moves, fate)?;
        // The caller's half is settled: its pages have a new owner at once.
        let next = self.stamp(source);
        self.source.overwrite(range.clone(), next);
        self.tally.retries += u64::from(report.attempts.saturating_sub(1));
        match report.outcome {
            Outcome::Done => {
                self.tally.done += 1;
                self.tally.bytes += report.bytes;
                self.engine.expect(content, moves)
            }
            _ if report.peer_confirmed => {
                self.count(&report);
                let stamp = self.stamp(target);
                self.told(&Command::HandOver { range, stamp })
            }
            // Not proven, so nobody may have the pages, and nobody knows what is in them. Whoever dies takes them
            // with him; everybody else's are given out again once a transfer over them was DONE.
            _ => {
                self.count(&report);
                self.told(&Command::Forget { range })
            }
        }
    }

    fn count(&mut self, report: &Report) {
        match report.outcome {
            Outcome::Cancelled => self.tally.cancelled += 1,
            _ => self.tally.failed += 1,
        }
    }

    fn submit(&mut self, moves: &[Move], fate: Fate) -> anyhow::Result<Report> {
        let transfer = self.request(moves);
        let pending = self.prefill.submit(transfer)?;
        let id = pending.id();
        if fate == Fate::Cancel {
            thread::sleep(Duration::from_micros(self.dice.within(0..8000)));
            match self.prefill.cancel(id) {
                Ok(_) | Err(Error::Refused(_)) => {}
                Err(other) => return Err(other.into()),
            }
        }
        let mut report = pending.wait()?;
        while report.outcome == Outcome::Unsettled {
            report = self.prefill.wait(id, Duration::MAX)?;
        }
        Ok(report)
    }

    fn request(&self, moves: &[Move]) -> Transfer {
        Transfer {
            session: self.proxy.address(),
            op: Op::Write,
            slices: batch::slices(Op::Write, moves, self.source.address(), self.remote),
            tag: None,
            deadline: Some(Duration::from_secs(20)),
            policy: Policy::default(),
            id: None,
        }
    }

    /// Some consecutive pages, mostly few.
    fn pages(&mut self) -> Range<u64> {
        let all = LENGTH / PAGE;
        let count = 1 + (self.dice.unit().powi(3) * (all - 1) as f64) as u64;
        let first = self.dice.within(0..all - count + 1);
        first * PAGE..(first + count) * PAGE
    }

    /// The engine dies with a transfer under way to it, and another takes its place, address and all.
    fn restart(&mut self) -> anyhow::Result<()> {
        let moves = shuffled(&(0..LENGTH), &mut self.dice);
        let pending = self.prefill.submit(self.request(&moves))?;
        thread::sleep(Duration::from_micros(self.dice.within(0..8000)));
        // The dead one's memory is judged too, as long as it is there.
        self.engine.kill()?;
        let id = pending.id();
        let mut report = pending.wait();
        while matches!(&report, Ok(report) if report.outcome == Outcome::Unsettled) {
            report = self.prefill.wait(id, Duration::MAX);
        }
        match report {
            Ok(report) if report.outcome == Outcome::Done => self.tally.done += 1,
            Ok(_) | Err(Error::Refused(_)) => self.tally.failed += 1,
            Err(other) => return Err(other.into()),
        }
        let stamp = self.stamp(2 * self.number + 1);
        self.source.overwrite(0..LENGTH, stamp);
        self.stamps += 1;
        let (engine, remote) = decode(self.nodes, self.number, self.stamps)?;
        (self.engine, self.remote) = (engine, remote);
        self.proxy.retarget(self.engine.session())?;
        self.proxy.cut_all(Cut::Reset);
        self.prefill.reset_session(&self.proxy.address())?;
        self.tally.restarts += 1;
        self.recovers()
    }

    fn partition(&mut self) -> anyhow::Result<()> {
        self.proxy.cut_all(Cut::Reset);
        self.tally.partitions += 1;
        self.recovers()
    }

    /// A small transfer gets through.
    fn recovers(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        let done = self.tally.done;
        while begun.elapsed() < RECOVERY {
            self.transfer(Fate::Live)?;
            if self.tally.done > done {
                self.tally.recoveries += 1;
                return Ok(());
            }
        }
        self.tally.lost_sessions += 1;
        Ok(())
    }

    fn look(&mut self) -> anyhow::Result<()> {
        let verdict = self.engine.verify()?;
        self.note(verdict, "target");
        self.note(self.source.verify(), "source");
        Ok(())
    }

    fn note(&mut self, verdict: oracle::Verdict, whose: &str) {
        if !verdict.is_clean() {
            println!("pool {}, {whose}: {verdict}", self.number);
        }
        self.tally.wrong += verdict.wrong + verdict.stray;
        self.tally.late += verdict.late;
    }

    fn told(&mut self, command: &Command) -> anyhow::Result<()> {
        match self.engine.ask(command)? {
            Answer::Noted => Ok(()),
            other => bail!("{command:?}: {other:?}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Live,
    Cancel,
}

fn decode(nodes: &Nodes, number: u32, stamp: u32) -> anyhow::Result<(EngineProcess, u64)> {
    let mut engine = EngineProcess::attach(nodes.target().socket(), &format!("decode-{number}"))?;
    let stamp = Stamp { owner: 2 * number + 2, transfer: stamp };
    let remote = engine.pool(Kind::Shared, LENGTH, stamp).context("a decode pool")?;
    Ok((engine, remote))
}

/// The range onto itself, pages rotated: no page lands at the offset it came from.
fn shuffled(range: &Range<u64>, dice: &mut Dice) -> Vec<Move> {
    let count = (range.end - range.start) / PAGE;
    let by = if count > 1 { dice.within(1..count) } else { 0 };
    let place = |page: u64| range.start + page * PAGE;
    (0..count).map(|page| Move { from: place(page), to: place((page + by) % count), length: PAGE }).collect()
}

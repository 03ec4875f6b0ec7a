//! How a bench run is told: a table for people, JSON (`schema` 1) for programs.

use std::path::Path;

use anyhow::Context;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::stats::{Comparison, Spread};
use crate::{
    worker::protocol::{Direction, Way},
    workloads,
};

const SCHEMA: u32 = 1;

/// What the project promises for a cell.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// At least this share of the raw limit's speed.
    ShareAtLeast(f64),
    /// At most this many nanoseconds more than the raw limit, p50.
    ExtraAtMost(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Judgement {
    Met,
    Missed,
    /// The limit itself varied too much to say anything.
    Noisy,
    /// Nothing is promised for this cell.
    None,
}

/// One workload over one path.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) workload: String,
    pub(crate) slices: usize,
    pub(crate) calls: usize,
    pub(crate) bytes: u64,
    pub(crate) pairs: usize,
    pub(crate) repeat: u32,
    #[serde(flatten)]
    pub(crate) comparison: Comparison,
    pub(crate) target: Option<Target>,
    pub(crate) judgement: Judgement,
    /// Checked before and after the timed runs, with every byte around them.
    pub(crate) verified_bytes: u64,
    /// One-minute load average when the cell was done.
    pub(crate) load: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct BenchReport {
    schema: u32,
    version: &'static str,
    path: Way,
    op: Direction,
    cpus: usize,
    /// One-minute load average when the run began.
    load_before: f64,
    pub(crate) cells: Vec<Cell>,
    /// Workloads that were not run, and why.
    pub(crate) skipped: Vec<String>,
}

impl BenchReport {
    pub(crate) fn new(path: Way, op: Direction) -> Self {
        Self {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            path,
            op,
            cpus: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            load_before: load(),
            cells: Vec::new(),
            skipped: Vec::new(),
        }
    }

    pub(crate) fn write_json(&self, file: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(file, text + "\n").with_context(|| format!("{} cannot be written", file.display()))
    }

    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY);
        let limit = if self.path == Way::Local { "memcpy" } else { "raw socket" };
        table.set_header([
            "workload".to_owned(),
            "slices".into(),
            "bytes".into(),
            format!("{limit} p50 (p10-p90)"),
            "kvferry p50 (p10-p90)".into(),
            "GB/s".into(),
            "share".into(),
            "extra p50".into(),
            "load".into(),
            "verdict".into(),
        ]);
        for cell in &self.cells {
            table.add_row(cell.row());
        }
        table
    }
}

impl Cell {
    fn row(&self) -> [String; 10] {
        let found = &self.comparison;
        [
            workloads::short(&self.workload).to_owned(),
            self.slices.to_string(),
            self.bytes.to_string(),
            times(found.limit_ns),
            times(found.kvferry_ns),
            // Bytes per nanosecond are GB per second.
            format!("{:.2}", self.bytes as f64 / found.kvferry_ns.p50),
            format!("{:.2}", found.share.p50),
            time(found.extra_ns.p50),
            format!("{:.2}", self.load),
            self.verdict(),
        ]
    }

    fn verdict(&self) -> String {
        let target = match self.target {
            Some(Target::ShareAtLeast(share)) => format!("share >= {share}"),
            Some(Target::ExtraAtMost(ns)) => format!("extra <= {}", time(ns)),
            None => String::new(),
        };
        match self.judgement {
            Judgement::Met => format!("met: {target}"),
            Judgement::Missed => format!("missed: {target}"),
            Judgement::Noisy => "noisy: no verdict".to_owned(),
            Judgement::None => "-".to_owned(),
        }
    }
}

/// What is promised, from the issue that this bench accepts.
pub(crate) fn target(path: Way, workload: &str) -> Option<Target> {
    match (path, workloads::short(workload)) {
        (Way::Local | Way::Tcp, "256MiB") => Some(Target::ShareAtLeast(0.85)),
        (Way::Tcp, "W2") => Some(Target::ShareAtLeast(0.7)),
        (Way::Tcp, "4KiB") => Some(Target::ExtraAtMost(80_000.0)),
        _ => None,
    }
}

pub(crate) fn judge(target: Option<Target>, found: &Comparison) -> Judgement {
    let met = match target {
        None => return Judgement::None,
        Some(_) if found.noisy => return Judgement::Noisy,
        Some(Target::ShareAtLeast(share)) => found.share.p50 >= share,
        Some(Target::ExtraAtMost(ns)) => found.extra_ns.p50 <= ns,
    };
    if met { Judgement::Met } else { Judgement::Missed }
}

/// One-minute load average; 0 where the kernel does not tell.
pub(crate) fn load() -> f64 {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(0.0)
}

fn times(spread: Spread) -> String {
    format!("{} ({}-{})", time(spread.p50), time(spread.p10), time(spread.p90))
}

fn time(ns: f64) -> String {
    match ns.abs() {
        ..1e3 => format!("{ns:.0} ns"),
        1e3..1e6 => format!("{:.1} us", ns / 1e3),
        _ => format!("{:.1} ms", ns / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Pairing;

    fn found(limit: f64, kvferry: f64) -> Comparison {
        Comparison::of(&[Pairing { limit, kvferry }; 3]).unwrap()
    }

    #[test]
    fn judgement_follows_target_and_noise() {
        let share = Some(Target::ShareAtLeast(0.85));
        let extra = Some(Target::ExtraAtMost(80_000.0));
        assert_eq!(judge(share, &found(90.0, 100.0)), Judgement::Met);
        assert_eq!(judge(share, &found(80.0, 100.0)), Judgement::Missed);
        assert_eq!(judge(extra, &found(20_000.0, 100_000.0)), Judgement::Met);
        assert_eq!(judge(extra, &found(20_000.0, 100_001.0)), Judgement::Missed);
        assert_eq!(judge(None, &found(1.0, 100.0)), Judgement::None);
        let noisy = Comparison { noisy: true, ..found(90.0, 100.0) };
        assert_eq!(judge(share, &noisy), Judgement::Noisy);
    }

    #[test]
    fn promises_are_found_by_full_and_short_name() {
        assert_eq!(target(Way::Tcp, "W2"), target(Way::Tcp, "llama3-70b_tp8_page64_8k_scatter"));
        assert!(target(Way::Tcp, "W2").is_some() && target(Way::Local, "W2").is_none());
    }

    #[test]
    fn json_has_the_schema_and_flat_cells() {
        let mut report = BenchReport::new(Way::Tcp, Direction::Write);
        report.cells.push(Cell {
            workload: "4KiB".into(),
            slices: 1,
            calls: 1,
            bytes: 4096,
            pairs: 3,
            repeat: 1,
            comparison: found(1.0, 2.0),
            target: target(Way::Tcp, "4KiB"),
            judgement: Judgement::Met,
            verified_bytes: 4096,
            load: 0.5,
        });
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], 1);
        assert_eq!((&json["path"], &json["op"]), (&"tcp".into(), &"write".into()));
        assert_eq!(json["cells"][0]["share"]["p50"], 0.5);
        assert!(report.table().to_string().contains("met: extra <= 80.0 us"));
    }
}

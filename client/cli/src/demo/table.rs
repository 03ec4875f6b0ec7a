//! What the demo shows: steps while it runs, one table at the end.

use std::{io::IsTerminal, time::Duration};

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use crate::worker::protocol::{Moved, Verdict, Way};

/// A bar on a terminal, plain lines otherwise.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new(steps: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let bar = ProgressBar::new(steps);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar: Some(bar) }
    }

    /// What is going on now.
    pub(crate) fn step(&self, what: &str) {
        match &self.bar {
            Some(bar) => {
                bar.inc(1);
                bar.set_message(what.to_owned());
            }
            None => println!("{what}"),
        }
    }

    /// A result that stays on the screen.
    pub(crate) fn tell(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// One workload over one path.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) workload: &'static str,
    pub(crate) path: Way,
    /// The way of a byte: sender, its daemon, the other daemon if there is one, receiver.
    pub(crate) pids: Vec<i32>,
    pub(crate) slices: u64,
    pub(crate) bytes: u64,
    /// Median time of a replay.
    pub(crate) ns: f64,
    /// Median time of the raw limit.
    pub(crate) limit_ns: f64,
    pub(crate) verdict: Verdict,
}

impl Row {
    fn cells(&self) -> [String; 10] {
        let pids: Vec<_> = self.pids.iter().map(i32::to_string).collect();
        [
            self.workload.to_owned(),
            self.path.to_string(),
            pids.join(">"),
            self.slices.to_string(),
            self.bytes.to_string(),
            format!("{:.3}", self.ns / 1e6),
            // Bytes per nanosecond are GB per second.
            format!("{:.3}", self.bytes as f64 / self.ns),
            format!("{:.2}", self.limit_ns / self.ns),
            self.verdict.verified.to_string(),
            self.verdict.stray.to_string(),
        ]
    }
}

const HEADER: [&str; 10] =
    ["workload", "path", "pids", "slices", "bytes", "ms", "GB/s", "share of raw limit", "verified", "stray"];

pub(crate) fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(HEADER);
    for row in rows {
        table.add_row(row.cells());
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Megabytes for a sentence.
pub(crate) fn mb(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Slices and bytes of a single replay out of `repeat` of them.
pub(crate) fn per_replay(moved: &Moved) -> (u64, u64) {
    let repeats = (moved.ns.len() as u64).max(1);
    (moved.slices / repeats, moved.bytes / repeats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_speed_share_and_what_was_verified() {
        let row = Row {
            workload: "W2",
            path: Way::Tcp,
            pids: vec![1, 2, 3, 4],
            slices: 20_480,
            bytes: 335_544_320,
            ns: 200e6,
            limit_ns: 150e6,
            verdict: Verdict { verified: 335_544_320, ..Verdict::default() },
        };
        assert_eq!(
            row.cells(),
            ["W2", "tcp", "1>2>3>4", "20480", "335544320", "200.000", "1.678", "0.75", "335544320", "0"]
        );
        let shown = table(&[row]).to_string();
        assert!(HEADER.iter().all(|word| shown.contains(word)), "{shown}");
    }
}

//! What the daemons use over time: a leak is a slope.

use std::{fmt, time::Instant};

use crate::{daemon::Daemon, process::Process};

/// How fast something grows, by least squares over all looks after the first quarter: what grows while everything
/// begins is no leak.
#[derive(Clone, PartialEq, Debug)]
pub struct Slope {
    /// Whose and what.
    pub of: String,
    /// At the last look.
    pub last: f64,
    /// A minute.
    pub per_minute: f64,
}

impl fmt::Display for Slope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<34} {:>10.1} at the end, {:>+9.2} a minute", self.of, self.last, self.per_minute)
    }
}

/// Looks at daemons.
#[derive(Debug)]
pub(super) struct Watch {
    begun: Instant,
    daemons: Vec<(String, Process)>,
    /// Seconds; then RSS in MiB, descriptors and threads of each daemon.
    looks: Vec<(f64, Vec<[f64; 3]>)>,
}

const WHAT: [&str; 3] = ["RSS (MiB)", "descriptors", "threads"];

impl Watch {
    pub(super) fn new(daemons: &[(&str, &Daemon)]) -> Self {
        let daemons = daemons.iter().map(|(name, daemon)| ((*name).to_owned(), daemon.process())).collect();
        Self { begun: Instant::now(), daemons, looks: Vec::new() }
    }

    pub(super) fn look(&mut self) -> anyhow::Result<()> {
        let used = |(_, process): &(String, Process)| {
            let resident = process.resident()? as f64 / f64::from(1 << 20);
            anyhow::Ok([resident, process.descriptors()? as f64, process.threads()? as f64])
        };
        let used = self.daemons.iter().map(used).collect::<Result<_, _>>()?;
        self.looks.push((self.begun.elapsed().as_secs_f64(), used));
        Ok(())
    }

    pub(super) fn slopes(&self) -> Vec<Slope> {
        let settled = &self.looks[self.looks.len() / 4..];
        let mut slopes = Vec::new();
        for (number, (name, _)) in self.daemons.iter().enumerate() {
            for (index, what) in WHAT.iter().enumerate() {
                let points: Vec<_> = settled.iter().map(|(at, used)| (*at, used[number][index])).collect();
                let last = points.last().map_or(0.0, |(_, value)| *value);
                slopes.push(Slope { of: format!("{name}, {what}"), last, per_minute: 60.0 * slope(&points) });
            }
        }
        slopes
    }
}

/// Least squares; 0 where there is nothing to tell it by.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (middle, height) = (mean(|point| point.0), mean(|point| point.1));
    let (up, along) = points.iter().fold((0.0, 0.0), |(up, along), (x, y)| {
        (up + (x - middle) * (y - height), along + (x - middle).powi(2))
    });
    if along > 0.0 { up / along } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_slope() {
        let line: Vec<_> = (0..20).map(|x| (f64::from(x), 3.0 + 0.5 * f64::from(x))).collect();
        assert!((slope(&line) - 0.5).abs() < 1e-9);
        assert!(slope(&[(1.0, 7.0)]).abs() < 1e-9 && slope(&[]).abs() < 1e-9);
    }
}

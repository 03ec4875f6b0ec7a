//! Load for minutes on paths that keep failing: one prefill engine, four decode pools, and all the while lanes are cut,
//! transfers cancelled, decode engines killed and replaced.
//!
//! The byte oracle is on throughout, and pages change hands the moment they may: the source's right after each terminal
//! answer, the target's as soon as the answer says that its half is proven too. What must be zero in the end:
//! sessions that did not come back, wrong bytes, late bytes.

mod census;
mod lane;

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

pub use census::Slope;
use census::Watch;
use lane::{Decode, Tally};

use kvferry_client::Path;

use crate::{dice::Dice, scene::Nodes};

/// Decode pools.
const DECODES: u32 = 4;
/// Between two looks at what the daemons use.
const LOOK: Duration = Duration::from_millis(500);
/// An engine dies every few seconds: its port must not be missing for the rest of the run.
const CONFIG: &str = "[endpoint]\nport_quarantine_s = 5\n";

/// What a soak showed.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// For another run like it.
    pub seed: u64,
    /// How long.
    pub lasted: Duration,
    /// Everything that happened, over all pools.
    pub tally: Tally,
    /// What the daemons used over time.
    pub slopes: Vec<Slope>,
}

impl Verdict {
    /// Whether what must be zero is zero, and something happened at all.
    pub fn is_good(&self) -> bool {
        let Tally { done, lost_sessions, wrong, late, .. } = self.tally;
        done > 0 && lost_sessions == 0 && wrong == 0 && late == 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, {:.0} s", self.seed, self.lasted.as_secs_f64())?;
        write!(f, "{}", self.tally)?;
        self.slopes.iter().try_for_each(|slope| write!(f, "\n{slope}"))
    }
}

/// Runs for so long.
///
/// # Errors
/// Where the scene itself could not be set up or an engine process did not do as it was told.
pub fn run(seed: u64, lasts: Duration) -> anyhow::Result<Verdict> {
    let nodes = Nodes::start(Path::Tcp, CONFIG)?;
    let prefill = nodes.initiator().attach("prefill")?;
    let begun = Instant::now();
    let until = begun + lasts;
    let dice = Dice::new(seed);
    let mut decodes: Vec<Decode> = (0..DECODES)
        .map(|number| Decode::new(number, &nodes, prefill.clone(), dice.fork(number.into())))
        .collect::<Result<_, _>>()?;
    let mut watch =
        Watch::new(&[("prefill's daemon", nodes.initiator()), ("decodes' daemon", nodes.target())]);
    thread::scope(|scope| {
        let working: Vec<_> = decodes.iter_mut().map(|decode| scope.spawn(|| decode.work(until))).collect();
        while working.iter().any(|decode| !decode.is_finished()) {
            watch.look()?;
            thread::sleep(LOOK);
        }
        for decode in working {
            decode.join().map_err(|_| anyhow::anyhow!("a decode's thread panicked"))??;
        }
        anyhow::Ok(())
    })?;
    let tally = decodes.iter().fold(Tally::default(), |sum, decode| sum + decode.tally());
    Ok(Verdict { seed, lasted: begun.elapsed(), tally, slopes: watch.slopes() })
}

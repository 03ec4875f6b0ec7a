//! The deterministic simulation: whole lives of a few daemons and engines, from one seed each.
//!
//! What runs is production: the cores of `session`, `transfer` and `policy`, all of `memory`, the target's table,
//! and the tcp lanes with every byte they say. Replaced are the clock, the threads, the network between the
//! daemons' sockets, and the driver's calls. Everything that is chosen comes from the seed, so a life can be
//! lived again, and its [`Outcome::hash`] says whether it was the same.
//!
//! What the oracle watches, at every step and at the end:
//!
//! - I1, every word of every engine's memory: nothing is read or written for a transfer after its terminal
//!   answer; where the peer's half is confirmed, not there either ([`process`]);
//! - I2, at every part that is sent: wherever it was sent before, both ends of that lane are gone ([`book`]);
//! - I3, DONE: every word is right at that moment;
//! - I4, I6: whatever comes for another registration, incarnation or run of a daemon changes no word;
//! - what is revoked is somebody else's as soon as that is SETTLED, whoever still wants it, over restarts too; and
//!   nobody else's transfer ends by it ([`revoking`]);
//! - one end for each transfer, an answer for each call in time, nothing left behind;
//! - when the faults stop, all of it heals and carries bytes again.
//!
//! Not here: the gRPC on control streams, the drivers that `peer` and `engine` put around the cores (their small
//! likenesses are [`initiator`] and [`target`]), signatures, and the local path.

mod book;
mod calls;
mod daemon;
mod dial;
mod dice;
mod end;
mod faults;
mod initiator;
mod lanes;
mod life;
mod process;
mod revoked;
mod revoking;
mod stream;
mod target;
mod trace;
mod turns;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

pub use trace::Tally;
use trace::Trace;
use world::World;

/// What came of a life.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of everything that was said in it.
    pub hash: u64,
    /// How much that was.
    pub lines: u64,
    /// What happened how often.
    pub tally: Tally,
}

/// A life in which a rule was broken.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Which life.
    pub seed: u64,
    /// What the oracle said.
    pub why: String,
    /// The last things that happened.
    pub last: Vec<String>,
}

/// Lives one life. Aloud, it prints what happens.
///
/// # Errors
/// Where a rule was broken, by the code or by what it simulates.
pub fn live(seed: u64, aloud: bool) -> Result<Outcome, Box<Broken>> {
    let trace = Arc::new(Mutex::new(Trace::new(aloud)));
    let heard = trace.clone();
    let lived = catch_unwind(AssertUnwindSafe(move || {
        let mut world = World::new(seed, heard);
        world.live();
    }));
    let trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
    match lived {
        Ok(()) => {
            Ok(Outcome { hash: trace.hash(), lines: trace.count_lines(), tally: trace.tally().clone() })
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let why = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let why = why.unwrap_or_else(|| "a panic without words".to_owned());
            Err(Box::new(Broken { seed, why, last: trace.last().map(str::to_owned).collect() }))
        }
    }
}

//! An engine's side of a probe: it overwrites its memory the very moment a reply says that it may.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context;
use kvferry_client::{
    Engine, Error, Lengths, Outcome, Pending, Policy, Settlement, Slices, Transfer, TransferId,
};

use crate::{
    canvas::{Canvas, Shade},
    scene,
    wire::{self, Begin, Ended},
};

/// Between two questions whether it is over, where the answer is UNSETTLED at once.
const AGAIN: Duration = Duration::from_millis(20);

/// An attached engine with one canvas.
#[derive(Debug)]
pub struct Painter {
    engine: Engine,
    canvas: Arc<Canvas>,
    region: u32,
    begun: Option<Begun>,
}

/// A transfer under way and who waits for it.
#[derive(Debug)]
struct Begun {
    transfer: TransferId,
    paint: Arc<OncePaint>,
    waiting: JoinHandle<anyhow::Result<Ended>>,
}

/// What is done at the first terminal answer, whichever call brings it, and never again: a second coat would
/// hide what came between.
#[derive(Debug)]
struct OncePaint {
    canvas: Arc<Canvas>,
    shade: Option<Shade>,
    done: AtomicBool,
}

impl OncePaint {
    fn now(&self) -> anyhow::Result<()> {
        if let Some(shade) = self.shade.filter(|_| !self.done.swap(true, SeqCst)) {
            self.canvas.paint(shade)?;
        }
        Ok(())
    }
}

impl Painter {
    /// Registers the canvas.
    pub fn new(engine: Engine, canvas: Canvas) -> anyhow::Result<Self> {
        let region = register(&engine, &canvas)?;
        Ok(Self { engine, canvas: Arc::new(canvas), region, begun: None })
    }

    /// The memory.
    pub fn canvas(&self) -> &Canvas {
        &self.canvas
    }

    /// Submits a transfer. At its terminal answer the canvas gets its new shade.
    pub fn begin(&mut self, begin: Begin) -> anyhow::Result<()> {
        let paint = Arc::new(OncePaint {
            canvas: self.canvas.clone(),
            shade: begin.shade,
            done: AtomicBool::new(false),
        });
        let pending = self.engine.submit(self.transfer(begin))?;
        let id = pending.id();
        let (engine, first) = (self.engine.clone(), paint.clone());
        let waiting = thread::spawn(move || {
            let ended = terminal(&engine, pending)?;
            first.now()?;
            Ok(ended)
        });
        self.begun = Some(Begun { transfer: id, paint, waiting });
        Ok(())
    }

    fn transfer(&self, begin: Begin) -> Transfer {
        let base = self.canvas.address();
        Transfer {
            session: begin.session,
            op: wire::op(begin.write),
            slices: Slices {
                local: begin.local.iter().map(|offset| base + offset).collect(),
                remote: begin.remote,
                lengths: Lengths::Uniform(begin.length),
            },
            tag: None,
            deadline: None,
            policy: if begin.once { scene::once() } else { Policy::default() },
            id: None,
        }
    }

    /// Cancels it, until the answer is that it is settled.
    pub fn cancel(&self) -> anyhow::Result<()> {
        let begun = self.begun.as_ref().context("no transfer")?;
        while self.engine.cancel(begun.transfer)? == Settlement::Unsettled {
            thread::sleep(AGAIN);
        }
        begun.paint.now()
    }

    /// Takes the canvas back and paints it as soon as it may, then registers it again.
    pub fn unregister(&mut self, shade: Shade) -> anyhow::Result<()> {
        while self.engine.unregister(&[self.region])? == Settlement::Unsettled {
            thread::sleep(AGAIN);
        }
        match &self.begun {
            // Its own transfer's answer may have come before.
            Some(begun) => begun.paint.now()?,
            None => drop(self.canvas.paint(shade)?),
        }
        Ok(())
    }

    /// Registers the canvas again.
    pub fn register(&mut self) -> anyhow::Result<()> {
        self.region = register(&self.engine, &self.canvas)?;
        Ok(())
    }

    /// Waits for the transfer's end; the canvas has its shade then.
    pub fn outcome(&mut self) -> anyhow::Result<Ended> {
        let begun = self.begun.take().context("no transfer")?;
        begun.waiting.join().map_err(|_| anyhow::anyhow!("the waiting thread panicked"))?
    }
}

fn register(engine: &Engine, canvas: &Canvas) -> anyhow::Result<u32> {
    let regions = engine.register(&[canvas.memory()])?;
    Ok(regions.first().context("registered, but no region came back")?.id)
}

/// UNSETTLED is no end: it is asked again until there is one.
fn terminal(engine: &Engine, pending: Pending) -> anyhow::Result<Ended> {
    let id = pending.id();
    let mut answer = pending.wait();
    loop {
        match answer {
            Ok(report) if report.outcome == Outcome::Unsettled => {
                thread::sleep(AGAIN);
                answer = engine.wait(id, Duration::MAX);
            }
            Ok(report) => return Ok(Ended::from(&report)),
            Err(Error::Refused(failure)) => return Ok(Ended::refused(&failure)),
            Err(other) => return Err(other.into()),
        }
    }
}

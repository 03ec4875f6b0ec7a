//! An engine as a process of its own, driven line by line over stdin and stdout (see `harness::wire`). Ends when
//! its input does, so that nothing outlives a suite that was killed.
#![allow(unsafe_code, reason = "fork, which is what one of the tests is about")]

use std::{
    io::{self, BufRead, Write},
    os::unix::process::CommandExt,
    sync::Barrier,
    thread,
};

use anyhow::Context;
use harness::{
    batch,
    canvas::Canvas,
    oracle::{Kind, Pool},
    painter::Painter,
    wire::{self, Answer, Command, Ended},
};
use kvferry_client::{Engine, EngineOptions, Error, Memory, Policy, SharedBuffer, Transfer};

fn main() -> anyhow::Result<()> {
    let mut peer = Peer::default();
    let mut output = io::stdout();
    for line in io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?)?;
        let answer = peer.carry_out(command).unwrap_or_else(|error| match error.downcast_ref::<Error>() {
            Some(error) => error.into(),
            None => Answer::Error { reason: None, message: format!("{error:#}") },
        });
        serde_json::to_writer(&mut output, &answer)?;
        writeln!(output)?;
        output.flush()?;
    }
    Ok(())
}

#[derive(Default)]
struct Peer {
    engine: Option<Engine>,
    pool: Option<Pool>,
    painter: Option<Painter>,
    /// Kept until the end: registered.
    buffers: Vec<SharedBuffer>,
}

impl Peer {
    fn carry_out(&mut self, command: Command) -> anyhow::Result<Answer> {
        match command {
            Command::Attach { socket, name } => {
                let engine = Engine::attach(EngineOptions { socket, name, ..EngineOptions::default() })?;
                let session = engine.session_id().to_owned();
                self.engine = Some(engine);
                Ok(Answer::Attached { session })
            }
            Command::Pool { kind, length, stamp } => {
                let pool = self.pool.insert(Pool::new(kind, length, stamp)?);
                let engine = self.engine.as_ref().context("not attached")?;
                engine.register(&[pool.memory()])?;
                Ok(Answer::Pool { address: pool.address() })
            }
            Command::RegisterAtOnce { kind, buffers, length } => self.register_at_once(kind, buffers, length),
            Command::Transfer { session, write, remote, moves } => {
                let engine = self.engine.as_ref().context("not attached")?;
                let pool = self.pool.as_ref().context("no pool")?;
                let op = wire::op(write);
                let slices = batch::slices(op, &moves, pool.address(), remote);
                let policy = Policy::default();
                let transfer = Transfer { session, op, slices, tag: None, deadline: None, policy, id: None };
                Ok(Answer::Report(Ended::from(&engine.transfer(transfer)?)))
            }
            Command::Expect { source, moves } => {
                self.pool.as_mut().context("no pool")?.expect_stamp(source, &moves);
                Ok(Answer::Noted)
            }
            Command::Verify => Ok(Answer::Verdict(self.pool.as_ref().context("no pool")?.verify())),
            Command::HandOver { range, stamp } => {
                self.pool.as_mut().context("no pool")?.hand_over(range, stamp);
                Ok(Answer::Noted)
            }
            Command::Forget { range } => {
                self.pool.as_mut().context("no pool")?.forget(range);
                Ok(Answer::Noted)
            }
            Command::Canvas { kind, length, margin } => {
                let engine = self.engine.clone().context("not attached")?;
                let painter = self.painter.insert(Painter::new(engine, Canvas::new(kind, length, margin)?)?);
                let canvas = painter.canvas();
                Ok(Answer::Canvas { address: canvas.address(), descriptor: canvas.descriptor() })
            }
            Command::Paint { shade } => Ok(Answer::Painted(self.painter()?.canvas().paint(shade)?)),
            Command::Begin(begin) => self.painter()?.begin(begin).map(|()| Answer::Noted),
            Command::Cancel => self.painter()?.cancel().map(|()| Answer::Noted),
            Command::Outcome => self.painter()?.outcome().map(Answer::Report),
            Command::Unregister { shade } => self.painter()?.unregister(shade).map(|()| Answer::Noted),
            Command::Register => self.painter()?.register().map(|()| Answer::Noted),
            Command::Fork => fork(),
            Command::Exec => {
                let error = std::process::Command::new("sleep").arg("60").exec();
                Err(error).context("exec")
            }
        }
    }

    fn painter(&mut self) -> anyhow::Result<&mut Painter> {
        self.painter.as_mut().context("no canvas")
    }

    fn register_at_once(&mut self, kind: Kind, buffers: usize, length: u64) -> anyhow::Result<Answer> {
        let engine = self.engine.as_ref().context("not attached")?;
        let bytes = usize::try_from(length)?;
        self.buffers = (0..buffers).map(|_| SharedBuffer::new(bytes)).collect::<Result<_, _>>()?;
        let start = Barrier::new(buffers);
        let register = |buffer: &SharedBuffer| {
            start.wait();
            match kind {
                Kind::Shared => engine.register(&[Memory::Shared(buffer)]),
                Kind::Process => engine.register(&[Memory::Process { address: buffer.address(), length }]),
            }
        };
        let register = &register;
        let regions = thread::scope(|scope| {
            let threads: Vec<_> =
                self.buffers.iter().map(|buffer| scope.spawn(move || register(buffer))).collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .map_err(|_| anyhow::anyhow!("a thread panicked"))?
                        .map_err(anyhow::Error::from)
                })
                .collect::<anyhow::Result<Vec<_>>>()
        })?;
        Ok(Answer::Registered { regions: regions.len() })
    }
}

fn fork() -> anyhow::Result<Answer> {
    // SAFETY: the child of a process with threads may make only async-signal-safe calls. It makes nothing but
    // `alarm` and `pause`, and never returns to Rust code that allocates, locks or unwinds.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => {
            // SAFETY: takes no pointer. It ends the child should nobody else.
            unsafe { libc::alarm(60) };
            loop {
                // SAFETY: takes no pointer.
                unsafe { libc::pause() };
            }
        }
        -1 => Err(io::Error::last_os_error()).context("fork"),
        pid => Ok(Answer::Child { pid: u32::try_from(pid)? }),
    }
}

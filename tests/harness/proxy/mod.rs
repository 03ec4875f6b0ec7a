//! A TCP proxy on 127.0.0.1 that fails on command.
//!
//! It stands between two daemons (an engine's session id names the proxy instead of the endpoint) and tells
//! control from data by the first byte, as the endpoint itself does. Faults are either scripted, to strike
//! at an exact byte of a connection ([`Proxy::script`]), or switched while bytes flow. What it does to bytes
//! is exact and counted; nothing is left to timing.
//!
//! It does not understand the protocol, so it cannot do what no network could: only what passed through it
//! can be repeated, held, changed or cut.

mod connection;
mod server;

use std::{
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use tokio::sync::watch;

use connection::Record;

/// What a connection carries, by its first byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// HTTP/2, clear or TLS.
    Control,
    /// A data lane.
    Data,
    /// Something else.
    Other,
}

impl Kind {
    fn of(first: u8) -> Self {
        match first {
            b'P' | 0x16 => Self::Control,
            b'K' => Self::Data,
            _ => Self::Other,
        }
    }
}

/// Direction, seen from the proxy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Toward {
    /// To the endpoint.
    Target,
    /// Back to whoever connected.
    Client,
}

/// How a connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// As a process that closed its socket.
    Fin,
    /// As a host that lost the connection.
    Reset,
}

/// What happens to a connection. Byte counts are of the connection's own stream, from 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Lets this many bytes pass, then ends the connection both ways.
    CutAfter {
        /// In which direction the bytes are counted.
        toward: Toward,
        /// How many pass.
        bytes: u64,
        /// How it ends.
        how: Cut,
    },
    /// Inverts one byte on its way to the target.
    Flip {
        /// Which one.
        at: u64,
    },
    /// Lets bytes vanish on their way to the target, while the connection lives.
    Drop {
        /// The first of them.
        at: u64,
        /// How many.
        bytes: u64,
    },
}

/// A fault for connections of a kind. A connection that ends before the fault's byte is spared and does not count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Which connections.
    pub kind: Kind,
    /// What happens to them.
    pub fault: Fault,
    /// How often.
    pub times: u32,
}

/// Every data connection that begins from now on is cut on its way to the target, each after another number of bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Storm {
    /// Of the draws: the n-th connection of a proxy has the same fate with the same seed.
    pub seed: u64,
    /// Bytes that pass.
    pub bytes: Range<u64>,
    /// How it ends.
    pub how: Cut,
}

/// What has passed over one connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Passed {
    /// None before its first byte.
    pub kind: Option<Kind>,
    /// Bytes handed to the target.
    pub to_target: u64,
    /// Bytes handed back.
    pub to_client: u64,
    /// Bytes read and not handed on yet, both ways.
    pub held: u64,
    /// It is over.
    pub ended: bool,
}

/// What holds for all connections now.
#[derive(Clone, Debug)]
struct Controls {
    target: SocketAddr,
    refuse: bool,
    /// Toward the target, toward the client.
    hold: [bool; 2],
    /// In the same order.
    delay: [Duration; 2],
    /// Bytes a second, each data connection, each direction.
    throttle: Option<u64>,
    storm: Option<Storm>,
    /// Rises with each cut; connections older than it end.
    cut: (u64, Cut),
    stop: bool,
}

/// State that the proxy's thread shares with its handle. Locked for pushes and copies only.
#[derive(Debug, Default)]
struct Shared {
    rules: Mutex<Vec<Rule>>,
    records: Mutex<Vec<Arc<Record>>>,
    /// Connections that a storm has cut.
    struck: AtomicU64,
}

impl Shared {
    fn rules(&self) -> std::sync::MutexGuard<'_, Vec<Rule>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn records(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Record>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The faults that strike a connection of this kind now; each is used up by one.
    fn strikes(&self, kind: Kind, hits: impl Fn(Fault) -> bool) -> Vec<Fault> {
        let mut rules = self.rules();
        let due = |rule: &&mut Rule| rule.kind == kind && rule.times > 0 && hits(rule.fault);
        rules
            .iter_mut()
            .filter(due)
            .map(|rule| {
                rule.times -= 1;
                rule.fault
            })
            .collect()
    }
}

/// A running proxy; ends all its connections when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    controls: watch::Sender<Controls>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a port of its own for connections to `target` (`host:port`).
    pub fn start(target: &str) -> anyhow::Result<Self> {
        let target = target.parse().with_context(|| format!("{target} is no address"))?;
        let controls = Controls {
            target,
            refuse: false,
            hold: [false; 2],
            delay: [Duration::ZERO; 2],
            throttle: None,
            storm: None,
            cut: (0, Cut::Fin),
            stop: false,
        };
        let (controls, seen) = watch::channel(controls);
        let shared = Arc::<Shared>::default();
        let (started, address) = mpsc::sync_channel(1);
        let server = server::Server::new(seen, shared.clone());
        let thread =
            std::thread::Builder::new().name("proxy".to_owned()).spawn(move || server.run(&started))?;
        let address = address.recv().context("the proxy's thread ended")??;
        Ok(Self { address, controls, shared, thread: Some(thread) })
    }

    /// `host:port`, to be used as a session id.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Adds a rule. It strikes where a connection passes its byte, so not those that have passed it already.
    pub fn script(&self, rule: Rule) {
        self.shared.rules().push(rule);
    }

    /// Ends every connection there is now.
    pub fn cut_all(&self, how: Cut) {
        self.controls.send_modify(|controls| controls.cut = (controls.cut.0 + 1, how));
    }

    /// Refuses new connections, as a host does on whose port nobody listens.
    pub fn refuse(&self, on: bool) {
        self.controls.send_modify(|controls| controls.refuse = on);
    }

    /// Lets nothing pass in either direction and says nothing: a black hole.
    pub fn hold(&self, on: bool) {
        self.controls.send_modify(|controls| controls.hold = [on; 2]);
    }

    /// A black hole in one direction only.
    pub fn hold_toward(&self, toward: Toward, on: bool) {
        self.controls.send_modify(|controls| controls.hold[toward as usize] = on);
    }

    /// Hands on what goes in this direction so much later. What is on its way fills the path: no more than 64 KiB a
    /// connection pass in one delay.
    pub fn delay(&self, toward: Toward, by: Duration) {
        self.controls.send_modify(|controls| controls.delay[toward as usize] = by);
    }

    /// A black hole for the n-th data connection alone, from 0 in the order of [`Proxy::data`]: a rail that hangs.
    ///
    /// # Panics
    /// When there is no such connection.
    pub fn hold_data(&self, nth: usize, on: bool) {
        let records = self.shared.records();
        let mut data = records.iter().filter(|record| record.kind() == Some(Kind::Data));
        data.nth(nth).expect("so many data connections").hold(on);
        // The pumps look at the record when the controls change.
        self.controls.send_modify(|_| ());
    }

    /// Limits each data connection to so many bytes a second in each direction.
    pub fn throttle(&self, bytes_per_second: Option<u64>) {
        self.controls.send_modify(|controls| controls.throttle = bytes_per_second);
    }

    /// Begins a storm, or ends it for connections that are yet to come.
    pub fn storm(&self, storm: Option<Storm>) {
        self.controls.send_modify(|controls| controls.storm = storm);
    }

    /// How many connections storms have cut.
    pub fn struck(&self) -> u64 {
        self.shared.struck.load(SeqCst)
    }

    /// Sends new connections elsewhere: another engine at a known address.
    pub fn retarget(&self, target: &str) -> anyhow::Result<()> {
        let target = target.parse().with_context(|| format!("{target} is no address"))?;
        self.controls.send_modify(|controls| controls.target = target);
        Ok(())
    }

    /// Sends bytes of the newest data connection to the target once more, from `begin` to the end of what has
    /// passed.
    ///
    /// # Errors
    /// Where there is no such connection, or the first of these bytes is no longer kept (8 MiB are).
    pub fn replay_data(&self, begin: u64) -> anyhow::Result<u64> {
        let records = self.shared.records();
        let newest = records.iter().rev().find(|record| record.kind() == Some(Kind::Data));
        newest.context("no data connection")?.replay(begin)
    }

    /// What the newest connection of a kind began with, toward the target: at most its first 64 KiB. For a stranger to
    /// say once more.
    pub fn head(&self, kind: Kind) -> Option<Vec<u8>> {
        let records = self.shared.records();
        records.iter().rev().find(|record| record.kind() == Some(kind)).map(|record| record.head())
    }

    /// What has passed, by connection in the order they came; the newest 4096 of them.
    pub fn stats(&self) -> Vec<Passed> {
        self.shared.records().iter().map(|record| record.passed()).collect()
    }

    /// What has passed over data connections, in the order they came.
    pub fn data(&self) -> Vec<Passed> {
        self.stats().into_iter().filter(|passed| passed.kind == Some(Kind::Data)).collect()
    }

    /// Bytes that have passed over all data connections together, both ways.
    pub fn data_bytes(&self) -> u64 {
        self.data().iter().map(|passed| passed.to_target + passed.to_client).sum()
    }

    /// Waits until nothing is left inside: whatever was read has been handed on or died with its connection.
    pub fn drain(&self, limit: Duration) {
        crate::eventually("the proxy has handed everything on", limit, || {
            self.stats().iter().all(|passed| passed.ended || passed.held == 0)
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.controls.send_modify(|controls| controls.stop = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the proxy's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests;

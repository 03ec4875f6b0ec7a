//! Endpoint ports: taken in turn from a range, so that a port is not met again soon (I4).
//!
//! A port that an engine gave back rests for the quarantine, and the turn goes round the whole range first, so
//! that a peer that still queues transfers for the dead engine's `host:port` does not reach another one. The
//! same engine, by its incarnation, gets its port back at any time. All of it outlives the daemon: `table`
//! decides, `record` is the file's text, `keeper` writes it.

mod keeper;
mod record;
mod table;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    path::PathBuf,
    time::{Duration, Instant},
};

use keeper::Keeper;
use prometheus_client::metrics::counter::Counter;
use record::Clocks;
use socket2::{Domain, Protocol, Socket, Type};
use table::Table;

use crate::domain::{Failure, Incarnation, Reason};

/// Connections the kernel may hold for an endpoint before they are accepted.
const BACKLOG: i32 = 1024;

/// How ports are given out.
#[derive(Clone, Debug)]
pub struct PortSettings {
    /// Where endpoints listen.
    pub bind: IpAddr,
    /// Which ports they may have.
    pub range: RangeInclusive<u16>,
    /// Rest of a port before another incarnation may have it.
    pub quarantine: Duration,
    /// How long, on top of the quarantine, ports of an earlier run's engines are held for them.
    pub grace: Duration,
    /// Where it is recorded; nothing: it is forgotten with the daemon.
    pub record: Option<PathBuf>,
}

/// A port of an engine.
#[derive(Debug)]
pub struct Listening {
    /// Bound, and listening: the kernel takes connections from now on.
    pub listener: TcpListener,
    /// The engine had it before, under this run of the daemon or an earlier one: its peers know it, and try.
    pub returns: bool,
}

/// The ports of one daemon.
#[derive(Debug)]
pub struct Ports {
    bind: IpAddr,
    range: RangeInclusive<u16>,
    keeper: Keeper,
}

impl Ports {
    /// Takes over what an earlier run recorded. Without a record it starts at a random place of the range.
    /// `failures` counts writes of the record that did not work out; none of them is fatal.
    ///
    /// # Errors
    /// When the thread that records cannot be had. A spoilt record is no error: it is logged.
    pub fn open(settings: PortSettings, failures: Counter) -> io::Result<Self> {
        let PortSettings { bind, range, quarantine, grace, record } = settings;
        let left = record.as_deref().map(read).unwrap_or_default();
        let next = left.next.unwrap_or_else(|| anywhere(&range));
        let mut table = Table::new(range.clone(), quarantine, next);
        table.restore(left.entries, grace, Instant::now());
        Ok(Self { bind, range, keeper: Keeper::start(table, record, failures)? })
    }

    /// Listens on the preferred port if it is given, free and not another's, else on the next one in turn. It is
    /// the engine's until [given back](Self::give_back).
    ///
    /// # Errors
    /// PORT_UNAVAILABLE, with the time until the next rest ends.
    pub fn listen(&self, preferred: Option<u16>, who: Incarnation) -> Result<Listening, Failure> {
        let now = Instant::now();
        let mut refused = None;
        let listening = self.keeper.change(|table| {
            let turns = table.len();
            // Nothing is bound that the configuration does not allow.
            for at in 0..=turns {
                let Some(port) = (if at == 0 { preferred } else { Some(table.turn()) }) else { continue };
                if !table.may_have(port, &who, now) {
                    continue;
                }
                match self.bind(port) {
                    Ok(listener) => {
                        let returns = table.take(port, who, now);
                        return Some(Listening { listener, returns });
                    }
                    Err(error) => refused = Some(error),
                }
            }
            None
        });
        listening.ok_or_else(|| self.exhausted(refused))
    }

    /// The engine on this port is gone.
    pub fn give_back(&self, port: u16) {
        self.keeper.change(|table| table.give_back(port, Instant::now()));
    }

    /// Waits until the record says how it is now. Returns whether it does.
    pub fn flush(&self, limit: Duration) -> bool {
        self.keeper.flush(limit)
    }

    fn bind(&self, port: u16) -> io::Result<TcpListener> {
        let address = SocketAddr::new(self.bind, port);
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // Connections of a former owner in TIME_WAIT must not keep the port from its next one; a listener does.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    }

    fn exhausted(&self, last: Option<io::Error>) -> Failure {
        let rest = self.keeper.read(|table| table.shortest_rest(Instant::now())).as_secs().saturating_add(1);
        let message = format!(
            "no port of {}-{} is free on {}; the next one ends its quarantine in {rest} s",
            self.range.start(),
            self.range.end(),
            self.bind
        );
        let code = last.and_then(|error| error.raw_os_error()).unwrap_or(0);
        Failure { code, ..Failure::new(Reason::PortUnavailable, message) }
    }
}

/// What an earlier run left; nothing where there is no record.
fn read(file: &std::path::Path) -> record::Record {
    let text = match std::fs::read(file) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return record::Record::default(),
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "the record of ports cannot be read");
            return record::Record::default();
        }
    };
    let left = record::parse(&text, &Clocks::now());
    if left.spoilt > 0 {
        tracing::warn!(file = %file.display(), lines = left.spoilt, "the record of ports is spoilt in places");
    }
    left
}

fn anywhere(range: &RangeInclusive<u16>) -> u16 {
    let [low, high, ..] = crate::domain::BootId::random().0;
    let offset = usize::from(u16::from_le_bytes([low, high])) % range.len().max(1);
    range.start().saturating_add(offset as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Incarnation = Incarnation([1; 32]);
    const OTHER: Incarnation = Incarnation([2; 32]);
    const LIMIT: Duration = Duration::from_secs(10);

    fn port(listening: &Listening) -> u16 {
        listening.listener.local_addr().expect("bound").port()
    }

    /// Three ports in a row that were free a moment ago. Tests of one process look in places of their own.
    fn free_range(begin: u16) -> RangeInclusive<u16> {
        (begin..begin + 200)
            .step_by(3)
            .find(|first| {
                let held: Vec<_> =
                    (*first..first + 3).map(|port| TcpListener::bind(("127.0.0.1", port))).collect();
                held.iter().all(Result::is_ok)
            })
            .map(|first| first..=first + 2)
            .expect("three free ports")
    }

    fn settings(range: RangeInclusive<u16>, record: Option<PathBuf>) -> PortSettings {
        let bind = "127.0.0.1".parse().expect("an address");
        let (quarantine, grace) = (Duration::from_secs(900), Duration::from_secs(10));
        PortSettings { bind, range, quarantine, grace, record }
    }

    fn open(settings: PortSettings) -> Ports {
        Ports::open(settings, Counter::default()).expect("a thread")
    }

    #[test]
    fn a_port_given_back_rests_while_others_take_turns_and_its_own_engine_returns() {
        let ports = open(settings(free_range(28_100), None));
        let listeners: Vec<_> = (0..3).map(|_| ports.listen(None, ME).expect("a free port")).collect();
        let mut taken: Vec<u16> = listeners.iter().map(port).collect();
        let first = taken[0];
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 3);
        assert_eq!(ports.listen(None, OTHER).expect_err("all are taken").reason, Reason::PortUnavailable);
        drop(listeners);
        ports.give_back(first);
        assert!(ports.listen(Some(first), OTHER).is_err(), "it rests, and the others are in use");
        let again = ports.listen(Some(first), ME).expect("its own");
        assert_eq!((port(&again), again.returns), (first, true));
    }

    #[test]
    fn ports_in_use_and_at_rest_outlive_the_daemon() {
        let directory = tempfile::tempdir().expect("a directory");
        let record = directory.path().join("ports");
        let range = free_range(28_400);
        let ports = open(settings(range.clone(), Some(record.clone())));
        let (used, rests) = (ports.listen(None, ME).expect("free"), ports.listen(None, OTHER).expect("free"));
        ports.give_back(port(&rests));
        assert!(ports.flush(LIMIT));
        // As after SIGKILL: nothing was given back.
        std::mem::forget(ports);
        let (in_use, at_rest) = (port(&used), port(&rests));
        drop((used, rests));

        let next = open(settings(range, Some(record)));
        let stranger = Incarnation([3; 32]);
        let free = next.listen(Some(in_use), stranger).expect("the third one");
        assert!(![in_use, at_rest].contains(&port(&free)));
        assert!(next.listen(Some(at_rest), stranger).is_err());
        for (number, who) in [(in_use, ME), (at_rest, OTHER)] {
            let again = next.listen(Some(number), who).expect("its own");
            assert_eq!((port(&again), again.returns), (number, true));
        }
        assert!(!free.returns);
    }

    #[test]
    fn a_record_that_cannot_be_written_or_read_stops_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let record = directory.path().join("ports");
        std::fs::create_dir(&record).expect("in the way");
        let failures = Counter::default();
        let ports =
            Ports::open(settings(free_range(28_700), Some(record)), failures.clone()).expect("a thread");
        let _listener = ports.listen(None, ME).expect("a free port");
        assert!(!ports.flush(Duration::from_millis(200)));
        assert!(failures.get() > 0);
    }

    #[test]
    fn the_last_change_is_recorded_before_the_daemon_ends() {
        let directory = tempfile::tempdir().expect("a directory");
        let record = directory.path().join("ports");
        let ports = open(settings(free_range(29_000), Some(record.clone())));
        let taken = port(&ports.listen(None, ME).expect("free"));
        drop(ports);
        let text = std::fs::read_to_string(record).expect("recorded");
        assert!(text.contains(&format!("in-use {taken} ")), "{text}");
    }
}

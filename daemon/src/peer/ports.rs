//! Endpoint ports: taken in turn from a range, so that a port is not met again soon (I4).
//!
//! A port that an engine gave back rests for the quarantine, and the turn goes round the whole range first, so
//! that a peer that still queues transfers for the dead engine's `host:port` does not reach another one.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::domain::{Failure, Reason};

/// Connections the kernel may hold for an endpoint before they are accepted.
const BACKLOG: i32 = 1024;

/// The ports of one daemon.
#[derive(Debug)]
pub struct Ports {
    bind: IpAddr,
    range: RangeInclusive<u16>,
    quarantine: Duration,
    turn: Mutex<Turn>,
}

#[derive(Debug)]
struct Turn {
    next: u16,
    resting: VecDeque<(u16, Instant)>,
}

impl Ports {
    /// Starts at a random place of the range, so that a restarted daemon does not begin where it began before.
    pub fn new(bind: IpAddr, range: RangeInclusive<u16>, quarantine: Duration) -> Self {
        let [low, high, ..] = crate::domain::BootId::random().0;
        let span = u32::from(*range.end() - *range.start()) + 1;
        let offset = u32::from(u16::from_le_bytes([low, high])) % span;
        let next = *range.start() + offset as u16;
        let turn = Mutex::new(Turn { next, resting: VecDeque::new() });
        Self { bind, range, quarantine, turn }
    }

    /// Listens on the preferred port if it is given and free, else on the next one in turn.
    pub fn listen(&self, preferred: Option<u16>) -> Result<TcpListener, Failure> {
        // Nothing is bound that the configuration does not allow.
        if let Some(port) = preferred.filter(|port| self.range.contains(port))
            && !self.rests(port)
            && let Ok(listener) = self.bind(port)
        {
            return Ok(listener);
        }
        let count = u32::from(*self.range.end() - *self.range.start()) + 1;
        let mut last = None;
        for _ in 0..count {
            let port = self.advance();
            if self.rests(port) {
                continue;
            }
            match self.bind(port) {
                Ok(listener) => return Ok(listener),
                Err(error) => last = Some(error),
            }
        }
        Err(self.exhausted(last))
    }

    /// The engine on this port is gone.
    pub fn give_back(&self, port: u16) {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        turn.resting.push_back((port, Instant::now() + self.quarantine));
    }

    fn advance(&self) -> u16 {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let port = turn.next;
        turn.next = if port == *self.range.end() { *self.range.start() } else { port + 1 };
        port
    }

    fn rests(&self, port: u16) -> bool {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        while turn.resting.front().is_some_and(|(_, until)| *until <= now) {
            turn.resting.pop_front();
        }
        turn.resting.iter().any(|(resting, _)| *resting == port)
    }

    fn bind(&self, port: u16) -> std::io::Result<TcpListener> {
        let address = SocketAddr::new(self.bind, port);
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // Connections of a former owner in TIME_WAIT must not keep the port from its next one; a listener does.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    }

    fn exhausted(&self, last: Option<std::io::Error>) -> Failure {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = turn.resting.front().map_or(0, |(_, until)| {
            until.saturating_duration_since(Instant::now()).as_secs().saturating_add(1)
        });
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

#[cfg(test)]
mod tests {
    use super::*;

    fn port(listener: &TcpListener) -> u16 {
        listener.local_addr().expect("bound").port()
    }

    /// Three ports in a row that were free a moment ago.
    fn free_range() -> RangeInclusive<u16> {
        (28_100..28_900u16)
            .step_by(3)
            .find(|first| {
                let held: Vec<_> =
                    (*first..first + 3).map(|port| TcpListener::bind(("127.0.0.1", port))).collect();
                held.iter().all(Result::is_ok)
            })
            .map(|first| first..=first + 2)
            .expect("three free ports")
    }

    #[test]
    fn a_port_given_back_rests_while_others_take_turns() {
        let ports =
            Ports::new("127.0.0.1".parse().expect("an address"), free_range(), Duration::from_secs(900));
        let listeners: Vec<_> = (0..3).map(|_| ports.listen(None).expect("a free port")).collect();
        let mut taken: Vec<u16> = listeners.iter().map(port).collect();
        let first = taken[0];
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 3);
        assert_eq!(ports.listen(None).expect_err("all are taken").reason, Reason::PortUnavailable);
        drop(listeners);
        ports.give_back(first);
        let again: Vec<u16> = (0..2).map(|_| ports.listen(None).map(|l| port(&l)).expect("free")).collect();
        assert!(!again.contains(&first));
        assert_ne!(ports.listen(Some(first)).map(|l| port(&l)).ok(), Some(first));
    }
}

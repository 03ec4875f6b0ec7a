//! The thread that owns lanes: waits for their sockets and for its inbox, and gives each lane its turn.
//!
//! A lane belongs to one thread for life, so nothing on the way of a byte takes a lock. Turns are bounded
//! ([`role::TURN_BYTES`]) and events level-triggered, so a lane with endless work delays the others by a turn
//! and is asked again. A lane that is stuck in the middle of a part while the rules change is not woken by its
//! socket; the thread looks after such lanes every [`REVIEW_EVERY`], so that they let go of their leases (I6).

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::{Shutdown, TcpStream},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use rustix::event::{Timespec, epoll};

use super::{
    inbox::{Command, Inbox, NewLane},
    role::{Ended, Interest, Ready, Role},
    wire::Violation,
};
use crate::{
    domain::{Failure, Reason},
    transport::{ending::Ending, spin::Spin},
};

/// How often lanes that hold leases look at the rules although their sockets do not move.
const REVIEW_EVERY: Duration = Duration::from_millis(50);

/// For summing mapped memory.
const ROOM_BYTES: usize = super::io::SUM_STEP_BYTES;

const EVENTS_AT_ONCE: usize = 64;

/// The inbox among the epoll keys; lanes are numbered from 1.
const INBOX_KEY: u64 = 0;

/// A lane that is served. Dropped from top to bottom: its end is told when all else is gone.
struct Served {
    socket: TcpStream,
    role: Box<dyn Role>,
    interest: Interest,
    ending: Ending,
}

pub(super) struct Carrier {
    epoll: OwnedFd,
    inbox: Arc<Inbox>,
    /// Ordered, so that the same events always have lanes looked after in the same order.
    lanes: BTreeMap<u64, Served>,
    commands: VecDeque<Command>,
    room: Box<[u8]>,
    reviewed: Instant,
    spin: Spin,
    /// Parts whose payload arrived changed.
    damaged: Counter,
}

/// Tells the process when the thread is gone, by whatever way.
pub(super) struct Farewell {
    pub(super) inbox: Arc<Inbox>,
    pub(super) alive: Arc<AtomicBool>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        self.alive.store(false, SeqCst);
        self.inbox.shut();
        if std::thread::panicking() {
            tracing::error!("a lane thread panicked; its lanes are closed");
        }
    }
}

impl Carrier {
    pub(super) fn new(inbox: Arc<Inbox>, most_spin: Duration, damaged: Counter) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, inbox.bell(), epoll::EventData::new_u64(INBOX_KEY), flags)?;
        Ok(Self {
            epoll,
            inbox,
            lanes: BTreeMap::new(),
            commands: VecDeque::new(),
            room: vec![0; ROOM_BYTES].into_boxed_slice(),
            reviewed: Instant::now(),
            spin: Spin::new(most_spin),
            damaged,
        })
    }

    /// Serves until it is told to shut down.
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        while self.obey() {
            let anxious = self.lanes.values().any(|lane| lane.role.holds_leases());
            if let Err(error) = self.wait(&mut events, anxious.then_some(REVIEW_EVERY)) {
                tracing::error!(%error, "a lane thread cannot wait for its sockets; its lanes are closed");
                return;
            }
            self.turns(&mut events);
            if self.reviewed.elapsed() >= REVIEW_EVERY {
                self.reviewed = Instant::now();
                self.look_after_the_stuck();
            }
        }
        self.end();
    }

    /// One round of [`Carrier::run`] that does not wait: tells whether anything was ready.
    pub(super) fn round(&mut self) -> io::Result<bool> {
        if !self.obey() {
            self.end();
            return Ok(false);
        }
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        self.poll(&mut events, Some(Duration::ZERO))?;
        let ready = events.iter().any(|event| event.data.u64() != INBOX_KEY);
        self.turns(&mut events);
        Ok(ready)
    }

    fn turns(&mut self, events: &mut Vec<epoll::Event>) {
        for event in events.drain(..) {
            self.turn(event.data.u64(), ready(event.flags));
        }
    }

    fn end(&mut self) {
        let keys: Vec<u64> = self.lanes.keys().copied().collect();
        keys.into_iter().for_each(|key| self.close(key, Failure::plain(Reason::Draining)));
    }

    /// Carries out what the inbox holds, until nothing has come meanwhile: a thread that goes to sleep is rung.
    /// That ends, because sessions submit no more than their windows before they hear from a socket. False
    /// when all is to end.
    fn obey(&mut self) -> bool {
        let mut commands = std::mem::take(&mut self.commands);
        let mut go_on = true;
        loop {
            self.inbox.take(&mut commands);
            if commands.is_empty() || !go_on {
                break;
            }
            for command in commands.drain(..) {
                go_on &= self.carry_out(command);
            }
        }
        self.commands = commands;
        go_on
    }

    fn carry_out(&mut self, command: Command) -> bool {
        match command {
            Command::Add(lane) => self.add(*lane),
            Command::Submit(key, parts) => {
                if let Some(lane) = self.lanes.get_mut(&key) {
                    match lane.role.submit(parts) {
                        Ok(()) => self.turn(key, Ready { readable: false, writable: false }),
                        Err(failure) => self.close(key, failure),
                    }
                }
            }
            Command::Close(key, cause) => self.close(key, cause),
            Command::Shutdown => return false,
        }
        true
    }

    /// Until a socket is ready or the inbox holds something, for `limit` at most: looks a while, then sleeps.
    fn wait(&mut self, events: &mut Vec<epoll::Event>, limit: Option<Duration>) -> io::Result<()> {
        let idle = Instant::now();
        if self.watch(events, idle)? || !self.inbox.doze() {
            return Ok(());
        }
        self.poll(events, limit)?;
        self.inbox.awake();
        // Without an event it was woken to look at the rules, which is no work.
        if !events.is_empty() {
            self.spin.slept(idle.elapsed());
        }
        Ok(())
    }

    /// Looks for as long as [`Spin`] says and lets other threads run between two looks. True when there is
    /// something to do.
    fn watch(&self, events: &mut Vec<epoll::Event>, since: Instant) -> io::Result<bool> {
        let window = self.spin.window();
        while since.elapsed() < window {
            self.poll(events, Some(Duration::ZERO))?;
            if !events.is_empty() || !self.inbox.is_empty() {
                return Ok(true);
            }
            rustix::thread::sched_yield();
        }
        Ok(false)
    }

    /// For so long, which is less than a second, or for as long as it takes.
    fn poll(&self, events: &mut Vec<epoll::Event>, limit: Option<Duration>) -> io::Result<()> {
        let timeout = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() });
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn add(&mut self, lane: NewLane) {
        let NewLane { key, socket, role, ending } = lane;
        let interest = Interest { read: true, write: false };
        let (data, flags) = (epoll::EventData::new_u64(key), flags(interest));
        let added = epoll::add(&self.epoll, &socket, data, flags);
        self.lanes.insert(key, Served { socket, role, interest, ending });
        if let Err(error) = added {
            self.close(
                key,
                Failure::io(Reason::ConnectionLost, "take over the lane's socket", &error.into()),
            );
        }
    }

    /// Gives a lane its turn. One that is gone meanwhile is passed over.
    fn turn(&mut self, key: u64, ready: Ready) {
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        let interest = match lane.role.turn(lane.socket.as_fd(), ready, &mut self.room) {
            Ok(interest) => interest,
            Err(failure) => return self.close(key, failure),
        };
        if interest == lane.interest {
            return;
        }
        lane.interest = interest;
        let data = epoll::EventData::new_u64(key);
        if let Err(error) = epoll::modify(&self.epoll, &lane.socket, data, flags(interest)) {
            self.close(key, Failure::io(Reason::ConnectionLost, "wait for the lane's socket", &error.into()));
        }
    }

    /// Lanes that hold leases look at the rules, whether their sockets move or not.
    pub(super) fn look_after_the_stuck(&mut self) {
        let review = |(key, lane): (&u64, &mut Served)| match lane.role.holds_leases() {
            true => lane.role.review().err().map(|failure| (*key, failure)),
            false => None,
        };
        let failed: Vec<_> = self.lanes.iter_mut().filter_map(review).collect();
        failed.into_iter().for_each(|(key, failure)| self.close(key, failure));
    }

    /// Ends a lane: first the connection, then the seat and the leases, then the word.
    fn close(&mut self, key: u64, cause: impl Into<Ended>) {
        let Some(mut lane) = self.lanes.remove(&key) else { return };
        let cause = match cause.into() {
            Ended::Failed(failure) => failure,
            Ended::Broken(violation) => {
                if let Violation::Payload { .. } | Violation::Table { .. } = violation {
                    self.damaged.inc();
                }
                tracing::warn!(lane = %lane.ending.lane(), %violation, "what came over a lane is not what its peer may send");
                violation.into()
            }
        };
        // An error means that the connection is gone already.
        let _ = lane.socket.shutdown(Shutdown::Both);
        lane.ending.set_record(lane.role.record());
        lane.ending.cause = Some(cause);
    }
}

/// Hang-ups and errors show in the calls themselves, so they count as both.
fn ready(flags: epoll::EventFlags) -> Ready {
    let broken = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
    Ready {
        readable: broken || flags.contains(epoll::EventFlags::IN),
        writable: broken || flags.contains(epoll::EventFlags::OUT),
    }
}

fn flags(interest: Interest) -> epoll::EventFlags {
    let mut flags = epoll::EventFlags::empty();
    flags.set(epoll::EventFlags::IN, interest.read);
    flags.set(epoll::EventFlags::OUT, interest.write);
    flags
}

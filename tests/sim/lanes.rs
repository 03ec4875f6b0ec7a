//! Data connections: real sockets at both ends, and between them a wire of our own.
//!
//! A lane's end is a production lane on a socket; the socket's other end is here. Bytes move from one to the
//! other in pieces, late, or never; they stay on the wire when their sender is gone, as they do in a receiver's
//! kernel.

use std::{
    collections::{BTreeSet, VecDeque},
    net::TcpStream,
    os::fd::OwnedFd,
};

use kvferryd::{
    domain::LaneId,
    transport::{LaneKind, tcp::Preface},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, socketpair},
};

use super::daemon::SessionKey;

/// Which wire.
pub(super) type WireId = usize;

/// Bytes of one direction that wait on the wire.
const HOLDS: usize = 256 << 10;

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Flow {
    bytes: VecDeque<u8>,
    /// Its sender has hung up.
    over: bool,
    /// The receiver was told so.
    told: bool,
    /// Nothing is delivered before then.
    pub(super) held_until_us: u64,
    /// Nothing is delivered ever.
    pub(super) black: bool,
}

/// A data connection.
#[derive(Debug)]
pub(super) struct Wire {
    /// Which lane.
    pub(super) lane: LaneId,
    /// Its kind.
    pub(super) kind: LaneKind,
    /// Whose.
    pub(super) from: SessionKey,
    /// The initiator's node.
    pub(super) from_node: usize,
    /// The target's node.
    pub(super) to_node: usize,
    /// What it says first.
    pub(super) preface: Preface,
    /// The ends not handed over yet.
    pub(super) ours: Option<TcpStream>,
    /// The target's.
    pub(super) theirs: Option<TcpStream>,
    /// Our ends of both sockets: initiator's, target's.
    near: Option<OwnedFd>,
    far: Option<OwnedFd>,
    /// To the target and back.
    pub(super) flows: [Flow; 2],
    /// A tick is due.
    pub(super) due: bool,
    /// The target took it.
    pub(super) attached: bool,
    /// Somebody relied on its never being taken.
    pub(super) doomed: bool,
    /// The last part that the initiator's session heard to be processed.
    pub(super) told: u64,
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a pair of sockets")
}

fn hung_up(end: Option<&OwnedFd>) -> bool {
    let Some(end) = end else { return true };
    let mut fds = [PollFd::new(end, PollFlags::empty())];
    let asked = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    asked.is_ok() && fds[0].revents().intersects(PollFlags::HUP)
}

/// Only our direction: whether the other side has hung up too can still be asked.
fn hang_up(end: &OwnedFd) {
    // An error means that the other end is gone already.
    let _ = rustix::net::shutdown(end, Shutdown::Write);
}

impl Wire {
    /// A connection that was dialled and reached nobody yet.
    pub(super) fn new(preface: Preface, from: SessionKey, from_node: usize, to_node: usize) -> Self {
        let (ours, near) = pair();
        let (theirs, far) = pair();
        Self {
            lane: preface.lane,
            kind: preface.kind,
            from,
            from_node,
            to_node,
            preface,
            ours: Some(ours.into()),
            theirs: Some(theirs.into()),
            near: Some(near),
            far: Some(far),
            flows: Default::default(),
            due: false,
            attached: false,
            doomed: false,
            told: 0,
        }
    }

    /// The initiator's lane is closed.
    pub(super) fn initiator_is_gone(&self) -> bool {
        self.ours.is_none() && hung_up(self.near.as_ref())
    }

    /// The target's lane is closed, or was refused.
    pub(super) fn target_is_gone(&self) -> bool {
        self.theirs.is_none() && hung_up(self.far.as_ref())
    }

    /// Something on it could be delivered.
    fn is_loaded(&self) -> bool {
        self.flows.iter().any(|flow| !flow.black && (!flow.bytes.is_empty() || (flow.over && !flow.told)))
    }

    /// For messages.
    pub(super) fn describe(&self) -> String {
        format!(
            "lane {:x?}, attached: {}, gone here: {}, there: {}",
            self.lane,
            self.attached,
            self.initiator_is_gone(),
            self.target_is_gone()
        )
    }

    /// Both sides hear of it at once, and nothing on the wire arrives. What is in the sockets already does.
    pub(super) fn reset(&mut self) {
        (self.ours, self.theirs) = (None, None);
        self.flows.fill_with(Flow::finished);
        self.near.iter().chain(&self.far).for_each(hang_up);
    }

    /// The initiator hears that it is gone; what it sent arrives all the same.
    pub(super) fn cut_near(&mut self) {
        self.flows[0].over = true;
        self.flows[1] = Flow::finished();
        self.near.iter().for_each(hang_up);
    }

    /// Whether anything is left to be done here.
    pub(super) fn is_over(&self) -> bool {
        self.near.is_none() && self.far.is_none()
    }

    /// Moves as many bytes as there is `room` for onto the wire and off it, each way; tells whether anything moved, and how long
    /// until something may, where it is known.
    pub(super) fn tick(&mut self, now_us: u64, blocked_us: [u64; 2], room: &mut [u8]) -> (bool, Option<u64>) {
        let mut moved = false;
        let mut wait = None;
        for (way, blocked_us) in blocked_us.into_iter().enumerate() {
            let (from, to) = if way == 0 { (&self.near, &self.far) } else { (&self.far, &self.near) };
            let flow = &mut self.flows[way];
            moved |= flow.load(from.as_ref(), room);
            let until = flow.held_until_us.max(blocked_us);
            if now_us < until {
                wait = Some(wait.map_or(until, |other: u64| other.min(until)));
            } else if !flow.black && (way == 1 || self.theirs.is_none()) {
                moved |= flow.unload(to.as_ref(), room.len());
            }
        }
        if self.ours.is_none()
            && self.theirs.is_none()
            && hung_up(self.near.as_ref())
            && hung_up(self.far.as_ref())
        {
            (self.near, self.far) = (None, None);
        }
        (moved, wait)
    }
}

/// Which of these wires have anything to be picked up or delivered.
pub(super) fn ready<'a>(wires: impl Iterator<Item = (WireId, &'a Wire)> + Clone) -> Vec<WireId> {
    let loaded: BTreeSet<WireId> =
        wires.clone().filter(|(_, wire)| wire.is_loaded()).map(|(id, _)| id).collect();
    let ends = wires.flat_map(|(id, wire)| wire.near.iter().chain(&wire.far).map(move |end| (id, end)));
    let (ids, mut fds): (Vec<WireId>, Vec<PollFd<'a>>) =
        ends.map(|(id, end)| (id, PollFd::new(end, PollFlags::IN))).unzip();
    if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() {
        return ids;
    }
    let mut ready: BTreeSet<WireId> =
        ids.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty()).map(|(id, _)| id).collect();
    ready.extend(loaded);
    ready.into_iter().collect()
}

impl Flow {
    fn finished() -> Self {
        Self { over: true, told: true, ..Self::default() }
    }

    fn load(&mut self, from: Option<&OwnedFd>, room: &mut [u8]) -> bool {
        let Some(from) = from.filter(|_| !self.over && self.bytes.len() < HOLDS) else { return false };
        match rustix::net::recv(from, &mut *room, RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => {
                self.over = true;
                true
            }
            Ok((bytes, _)) => {
                self.bytes.extend(&room[..bytes]);
                true
            }
            Err(_) => false,
        }
    }

    fn unload(&mut self, to: Option<&OwnedFd>, most: usize) -> bool {
        let Some(to) = to else {
            self.bytes.clear();
            return false;
        };
        let mut moved = false;
        if !self.bytes.is_empty() {
            let (front, _) = self.bytes.as_slices();
            let offered = &front[..front.len().min(most)];
            match rustix::net::send(to, offered, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(bytes) => {
                    self.bytes.drain(..bytes);
                    moved = true;
                }
                Err(rustix::io::Errno::AGAIN) => {}
                Err(_) => self.bytes.clear(),
            }
        }
        if self.bytes.is_empty() && self.over && !self.told {
            self.told = true;
            hang_up(to);
            moved = true;
        }
        moved
    }
}

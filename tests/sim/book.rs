//! The oracle's book: what becomes of each transfer, and of the memory it was given.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use kvferryd::{
    domain::{Incarnation, LaneId, Op, Outcome, PeerHalf, Report, Tag, TransferId},
    transfer::run::Run,
    transport::{Payload, SequencedPart},
};

use super::{
    daemon::{Life, SessionKey},
    lanes::WireId,
    process::{Holding, Process, Registration},
    revoked::Arrival,
    world::{Happening, World},
};

/// Words of somebody's memory, as long as that process lives and its region is registered.
#[derive(Clone, Debug)]
pub(super) struct Half {
    /// Where.
    pub(super) place: usize,
    /// Whose.
    pub(super) who: Incarnation,
    /// What.
    pub(super) holding: Holding,
}

/// A transfer as its caller and the oracle know it.
#[derive(Debug)]
pub(super) struct Transfer {
    /// Its name.
    pub(super) id: TransferId,
    /// Whose session carries it.
    pub(super) key: SessionKey,
    /// Which way.
    pub(super) op: Op,
    /// The caller's memory; nothing once it is somebody else's.
    pub(super) local: Option<Half>,
    /// The peer's.
    pub(super) remote: Option<Half>,
    /// By when there must be an answer.
    pub(super) due_us: u64,
    /// There was one, at least UNSETTLED.
    pub(super) answered: bool,
    /// How it ended.
    pub(super) end: Option<(Outcome, PeerHalf)>,
    /// Its daemon died with it.
    pub(super) orphan: bool,
    /// Which parts went where, in order.
    pub(super) sent: BTreeMap<u32, Vec<WireId>>,
    /// Its parts.
    pub(super) payload: Option<Arc<Payload>>,
    /// The request it serves.
    pub(super) tag: Option<Tag>,
    /// What revocations are held against.
    pub(super) arrival: Arrival,
    /// The last place of a part on each wire.
    pub(super) last: BTreeMap<WireId, Vec<(u64, u32)>>,
}

impl World {
    /// I2, at every part that is handed to a lane.
    pub(super) fn note_submission(&mut self, key: SessionKey, lane: LaneId, parts: &[SequencedPart]) {
        let Some(wire) = self.wire_of(key.life, lane) else { panic!("{key}: parts for lane {lane:x?}") };
        for part in parts {
            let payload = &part.part.payload;
            let number = number_of(payload.transfer);
            let index = part.part.index;
            let Some(transfer) = self.transfers.get_mut(&number).filter(|known| known.id == payload.transfer)
            else {
                continue;
            };
            assert!(transfer.end.is_none(), "I1: a part of transfer {number} is sent after its end");
            transfer.payload = Some(payload.clone());
            transfer.last.entry(wire).or_default().push((part.sequence, index));
            let before = transfer.sent.entry(index).or_default();
            let earlier: Vec<WireId> = before.iter().copied().filter(|other| *other != wire).collect();
            assert!(!before.contains(&wire) || !earlier.is_empty() || before.len() == 1, "twice on one lane");
            before.push(wire);
            if !earlier.is_empty() {
                self.count("part sent again");
            }
            for other in earlier {
                let Some(old) = self.wires.get_mut(&other) else { continue };
                let taken = old.theirs.is_none();
                old.doomed = true;
                assert!(
                    old.initiator_is_gone() && (!taken || old.target_is_gone()),
                    "I2: part {index} of transfer {number} goes to lane {lane:x?} while lane {:x?} lives",
                    old.lane
                );
            }
        }
    }

    pub(super) fn note_unsettled(&mut self, _: SessionKey, report: &Report) {
        self.count("outcome UNSETTLED");
        if let Some(transfer) = self.transfers.get_mut(&number_of(report.transfer)) {
            transfer.answered = true;
        }
    }

    pub(super) fn note_end(&mut self, _: SessionKey, run: Run, report: Report) {
        let id = run.admitted.id;
        if let Some(teller) = run.admitted.teller {
            teller.end(report.clone());
        }
        self.finish(number_of(id), report);
    }

    /// A terminal answer: the caller uses its memory for something else at once, and where the peer's half is
    /// proven so does the peer.
    pub(super) fn finish(&mut self, number: u32, report: Report) {
        let reason = report.failure.as_ref().map(|failure| failure.reason);
        self.say(format_args!("transfer {number}: {:?} {:?} {reason:?}", report.outcome, report.peer_half));
        self.count(outcome(&report));
        let Some(transfer) = self.transfers.get_mut(&number) else { panic!("{number} was never asked for") };
        assert!(transfer.end.is_none(), "transfer {number} ends twice");
        assert_ne!(report.outcome, Outcome::Unsettled);
        transfer.end = Some((report.outcome, report.peer_half));
        transfer.answered = true;
        let done = report.outcome == Outcome::Done;
        self.check_revocations(number, reason, done);
        let Some(transfer) = self.transfers.get_mut(&number) else { return };
        assert!(!done || report.peer_half == PeerHalf::Confirmed, "DONE implies CONFIRMED");
        let (local, remote) = (transfer.local.take(), transfer.remote.clone());
        if done {
            let destination = if transfer.op == Op::Write { &remote } else { &local };
            if let Some(wrong) = destination.as_ref().and_then(|half| self.wrong(half, true)) {
                panic!("I3: transfer {number} is DONE, but {wrong}");
            }
        }
        if let Some(local) = local {
            self.take_back(&local);
        }
        if report.peer_half == PeerHalf::Confirmed {
            if let Some(remote) = remote {
                self.take_back(&remote);
            }
            self.close_book(number);
        }
    }

    fn close_book(&mut self, number: u32) {
        if let Some(transfer) = self.transfers.get_mut(&number) {
            (transfer.remote, transfer.payload) = (None, None);
        }
        self.open.remove(&number);
    }

    fn process_of(&mut self, half: &Half) -> Option<&mut Process> {
        self.places[half.place].process.as_mut().filter(|process| process.incarnation == half.who)
    }

    fn wrong(&mut self, half: &Half, whole: bool) -> Option<String> {
        self.process_of(half)?.check(&half.holding, whole).err()
    }

    pub(super) fn take_back(&mut self, half: &Half) {
        let place = half.place;
        if let Some(process) = self.process_of(half)
            && let Err(wrong) = process.take_back(&half.holding)
        {
            panic!("I1: place {place}: {wrong}");
        }
    }

    /// A process, or a region of it, is gone: whatever it held is nobody's. Gives what is still wanted there: a
    /// peer's transfer of which nothing was sent goes to whatever is registered at its addresses by then, which
    /// only Revoke could stop.
    pub(super) fn forget_holdings(
        &mut self,
        place: usize,
        who: Incarnation,
        region: Option<usize>,
    ) -> Vec<Holding> {
        let mut wanted = Vec::new();
        let there = |half: &Half| {
            let in_region =
                region.is_none_or(|region| Process::region_of(half.holding.words.start) == region);
            half.place == place && half.who == who && in_region
        };
        let mut wrong = None;
        for &number in &self.open {
            let Some(transfer) = self.transfers.get_mut(&number) else { continue };
            let unsent = region.is_some() && transfer.sent.is_empty() && transfer.end.is_none();
            if let Some(remote) = transfer.remote.as_ref().filter(|half| unsent && there(half)) {
                wanted.push(remote.holding.clone());
                continue;
            }
            for half in [&mut transfer.local, &mut transfer.remote] {
                let Some(gone) = half.take_if(|half| there(half)) else { continue };
                let process = self.places[place].process.as_ref().filter(|_| region.is_some());
                if let Some(Err(found)) = process.map(|process| process.check(&gone.holding, false)) {
                    wrong = Some(found);
                }
            }
        }
        if let Some(wrong) = wrong {
            panic!("I6: place {place}, on release: {wrong}");
        }
        wanted
    }

    /// A daemon died, and with it what it carried: its engines' memory is out of its reach.
    pub(super) fn orphan(&mut self, lives: &[Life]) {
        let open: Vec<u32> = self.open.iter().copied().collect();
        for number in open {
            let Some(transfer) = self.transfers.get_mut(&number) else { continue };
            if !lives.contains(&transfer.key.life) || transfer.end.is_some() {
                continue;
            }
            transfer.orphan = true;
            transfer.end = Some((Outcome::Failed, PeerHalf::Unconfirmed));
            let local = transfer.local.take();
            self.count("outcome lost with its daemon");
            if let Some(local) = local {
                self.take_back(&local);
            }
        }
    }

    /// What is due is answered; what nobody could confirm is given back when no lane can reach it any more.
    pub(super) fn check(&mut self) {
        self.after(200_000, Happening::Check);
        let open: Vec<u32> = self.open.iter().copied().collect();
        for number in open {
            let transfer = &self.transfers[&number];
            let late = !transfer.answered && !transfer.orphan && self.now_us > transfer.due_us;
            assert!(!late, "I9: transfer {number} has no answer in time: {:?}", transfer.key);
            if transfer.end.is_none() {
                continue;
            }
            let wires: BTreeSet<WireId> = transfer.sent.values().flatten().copied().collect();
            let quiet = |id: &WireId| {
                self.wires.get(id).is_none_or(|wire| wire.initiator_is_gone() && wire.target_is_gone())
            };
            if wires.iter().all(quiet) {
                if let Some(remote) = transfer.remote.clone() {
                    self.take_back(&remote);
                }
                self.close_book(number);
            }
        }
        self.wires.retain(|_, wire| !wire.is_over() || wire.due);
    }

    /// Whether a region of that process is registered.
    pub(super) fn is_live(&self, place: usize, region: usize) -> bool {
        let live = |process: &Process| matches!(process.regions[region], Registration::Live(_));
        self.places[place].process.as_ref().is_some_and(live)
    }
}

/// The number of a transfer that the world asked for.
pub(super) fn number_of(id: TransferId) -> u32 {
    u32::from_be_bytes([id.0[0], id.0[1], id.0[2], id.0[3]])
}

fn outcome(report: &Report) -> &'static str {
    match (report.outcome, report.peer_half) {
        (Outcome::Done, _) => "outcome DONE",
        (Outcome::Failed, PeerHalf::Confirmed) => "outcome FAILED, confirmed",
        (Outcome::Failed, PeerHalf::Unconfirmed) => "outcome FAILED, unconfirmed",
        (Outcome::Cancelled, PeerHalf::Confirmed) => "outcome CANCELLED, confirmed",
        (Outcome::Cancelled, PeerHalf::Unconfirmed) => "outcome CANCELLED, unconfirmed",
        (Outcome::Unsettled, _) => "outcome UNSETTLED",
    }
}

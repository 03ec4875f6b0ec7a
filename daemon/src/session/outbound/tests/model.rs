//! Random lives: whatever the peer, the network and time do, the rules hold, and all is well in the end.

use std::collections::{HashMap, HashSet};

use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{
    rig::*,
    world::{World, pick},
};
use crate::{
    domain::{BootId, Outcome, PeerHalf},
    session::outbound::{Event, State},
};

/// One move of the world. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Move {
    Submit {
        read: bool,
        parts: u64,
        attempts: u32,
        deadline: u64,
        late: bool,
    },
    Cancel(u8),
    /// The target gives a transfer's memory away, or the own engine does.
    Revoke(u8),
    RevokeHere(u8),
    /// One of the questions that wait is answered.
    Answer(u8),
    /// The open, or the lane, that was asked for cannot be had.
    Fail(u8),
    /// The target goes on on a lane, and tells, or does not.
    Apply {
        lane: u8,
        parts: u64,
        tell: bool,
    },
    Refuse(u8),
    /// The connection of a lane is gone.
    Cut(u8),
    End(u8),
    RestartDaemon,
    ReplaceEngine,
    Reset,
    Probe,
    Wake,
    Pass(u64),
}

fn moves() -> impl Strategy<Value = Move> {
    let submit = (any::<bool>(), 0u64..9, 1u32..4, 1u64..20_000, any::<bool>()).prop_map(
        |(read, parts, attempts, deadline, late)| Move::Submit { read, parts, attempts, deadline, late },
    );
    let apply = (any::<u8>(), 1u64..5, any::<bool>()).prop_map(|(lane, parts, tell)| Move::Apply {
        lane,
        parts,
        tell,
    });
    prop_oneof![
        4 => submit,
        3 => any::<u8>().prop_map(Move::Cancel),
        1 => any::<u8>().prop_map(Move::Revoke),
        1 => any::<u8>().prop_map(Move::RevokeHere),
        20 => any::<u8>().prop_map(Move::Answer),
        2 => any::<u8>().prop_map(Move::Fail),
        12 => apply,
        1 => any::<u8>().prop_map(Move::Refuse),
        3 => any::<u8>().prop_map(Move::Cut),
        1 => any::<u8>().prop_map(Move::End),
        1 => Just(Move::RestartDaemon),
        1 => Just(Move::ReplaceEngine),
        1 => Just(Move::Reset),
        1 => Just(Move::Probe),
        5 => Just(Move::Wake),
        2 => (1u64..4000).prop_map(Move::Pass),
    ]
}

impl World {
    fn play(&mut self, step: Move) {
        match step {
            Move::Submit { read, parts, attempts, deadline, late } => {
                self.submit(read, parts, attempts, deadline, late);
            }
            Move::Revoke(which) => {
                if let Some(&(transfer, _, parts)) = pick(&self.submitted, which) {
                    self.revoke(transfer, parts);
                }
            }
            Move::RevokeHere(which) => {
                if let Some(&(transfer, _, parts)) = pick(&self.submitted, which) {
                    self.revoke_here(transfer, parts);
                }
            }
            Move::Cancel(which) => {
                if let Some(&(transfer, ..)) = pick(&self.submitted, which) {
                    self.feed(Event::End(transfer, cancelled()));
                }
            }
            Move::Answer(which) => self.answer(which),
            Move::Fail(which) => self.fail(which),
            Move::Apply { lane, parts, tell } => {
                if let Some(lane) = self.pick_lane(lane) {
                    self.apply(lane, parts, tell);
                }
            }
            Move::Refuse(which) => {
                if let Some(lane) = self.pick_lane(which) {
                    self.refuse(lane);
                }
            }
            Move::Cut(which) => {
                if let Some(lane) = self.pick_lane(which) {
                    self.close(lane);
                }
            }
            Move::End(which) => self.end_control(which),
            Move::RestartDaemon => {
                self.boot = BootId(self.boot.0.map(|byte| byte.wrapping_add(1)));
                self.peer_goes();
            }
            Move::ReplaceEngine => {
                self.replace_engine();
            }
            Move::Reset => self.feed(Event::Reset),
            Move::Probe => {
                self.tickets += 1;
                self.feed(Event::Probe(self.tickets));
            }
            Move::Wake => self.wake(),
            Move::Pass(time) => {
                self.rig.now += ms(time);
                self.feed(Event::Tick);
            }
        }
    }
}

/// A whole life: the moves, then healing, then one more transfer on a session that is as good as new.
fn live(moves: Vec<Move>) -> World {
    let mut world = World::new();
    for step in moves {
        world.play(step);
    }
    world.heal();
    assert!(world.rig.is_empty());
    assert_eq!(world.ended.len(), world.submitted.len());
    assert_eq!(world.rig.probed.len() as u64, world.tickets);
    assert!(world.rig.core.rotation.iter().all(|rotation| rotation.len() <= 64));
    assert_ne!(world.rig.state(), State::Failed);
    world.submit(false, 3, 1, 10_000, false);
    world.heal();
    let last = world.submitted[world.submitted.len() - 1].0;
    assert_eq!(world.ended[&last], (Outcome::Done, PeerHalf::Confirmed));
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    /// I1, I2, I3, I8, and that everything ends exactly once.
    #[test]
    fn whatever_happens_the_rules_hold_and_everything_ends(moves in prop::collection::vec(moves(), 1..250)) {
        live(moves);
    }
}

/// The lives above are worth something only if all kinds of ends happen in them.
#[test]
fn random_lives_see_every_kind_of_end() {
    let mut runner = TestRunner::deterministic();
    let lives = prop::collection::vec(moves(), 250);
    let mut seen: HashMap<(Outcome, PeerHalf), usize> = HashMap::new();
    let (mut resent, mut unsettled, mut hits) = (0, 0, 0);
    for _ in 0..300 {
        let world = live(lives.new_tree(&mut runner).expect("moves").current());
        for end in world.ended.values() {
            *seen.entry(*end).or_default() += 1;
        }
        let parts: HashSet<_> = world.lanes.values().flat_map(|lane| &lane.parts).map(Sent::name).collect();
        resent += world.lanes.values().map(|lane| lane.parts.len()).sum::<usize>() - parts.len();
        unsettled += world.rig.unsettled.len();
        hits += world.hits;
    }
    let outcomes = [Outcome::Done, Outcome::Failed, Outcome::Cancelled];
    let halves = [PeerHalf::Confirmed, PeerHalf::Unconfirmed];
    for end in outcomes.into_iter().flat_map(|outcome| halves.map(|half| (outcome, half))) {
        let often = seen.get(&end).copied().unwrap_or(0);
        match end {
            (Outcome::Done, PeerHalf::Unconfirmed) => assert_eq!(often, 0, "DONE implies CONFIRMED"),
            _ => assert!(often >= 20, "{end:?} was seen {often} times"),
        }
    }
    assert!(resent > 100 && unsettled > 20, "{resent} parts were sent again, {unsettled} UNSETTLED told");
    assert!(hits > 20, "{hits} parts hit a revocation");
}

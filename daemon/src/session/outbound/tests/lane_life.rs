//! What is sent on which lane, and what a lane's death means for it (I2).

use std::mem::take;

use super::rig::*;
use crate::{
    domain::{Failure, Op, Outcome, Reason},
    policy::RetryPolicy,
    session::outbound::{Event, Opened, Policy, State},
    transport::{LaneKind, LaneRecord},
};

/// I3: every part, whatever the order of their acknowledgements, and each counts once.
#[test]
fn i3_done_only_when_every_part_was_processed() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 3);
    assert_eq!(rig.parts(), [(1, 0), (1, 1), (1, 2)]);
    rig.processed(lane, 4, 4);
    rig.processed(lane, 3, 4);
    rig.processed(lane, 3, 4);
    assert!(rig.finished.is_empty());
    rig.processed(lane, 2, 2);
    let report = &rig.finished[0];
    assert_eq!((report.bytes_done, report.bytes_resent, report.slices_done), (3 << 20, 0, 1));
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

/// I8: a lane never has more in doubt than its window.
#[test]
fn i8_the_window_is_respected() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 10);
    assert_eq!(rig.sent.len(), 4);
    // Out of order: the lane's place is not free before the first is processed.
    rig.processed(lane, 3, 3);
    assert_eq!(rig.sent.len(), 4);
    rig.processed(lane, 2, 2);
    assert_eq!(rig.sent.len(), 6);
}

#[test]
fn transfers_take_turns() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 6);
    rig.write(2, 2);
    rig.write(3, 2);
    rig.parts();
    rig.processed(lane, 2, 5);
    assert_eq!(rig.parts(), [(1, 4), (2, 0), (3, 0), (1, 5)]);
    rig.processed(lane, 6, 9);
    assert_eq!(rig.parts(), [(2, 1), (3, 1)]);
}

/// One that ended while it waited for its turn does not cost the next one his.
#[test]
fn who_ended_in_the_rotation_holds_up_nobody() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 4);
    rig.write(2, 1);
    rig.write(3, 6);
    rig.parts();
    // 3 is under way and waits again when it is cancelled: it ends in the rotation, before 4.
    rig.processed(lane, 2, 5);
    assert_eq!(rig.parts(), [(2, 0), (3, 0), (3, 1), (3, 2)]);
    rig.write(4, 1);
    rig.cancel(3);
    rig.processed(lane, 6, 9);
    assert_eq!(rig.parts(), [(4, 0)]);
}

/// I8: ended transfers do not pile up behind a full window.
#[test]
fn i8_the_rotation_is_bounded() {
    let (mut rig, _) = Rig::with_lane();
    rig.write(1, 5);
    for number in 2..200 {
        rig.write(number, 1);
        rig.cancel(number);
    }
    assert_eq!(rig.finished().len(), 198);
    assert!(rig.core.rotation[0].len() < 100, "{} wait", rig.core.rotation[0].len());
}

#[test]
fn parts_go_to_the_lane_with_the_fewest_in_doubt() {
    let mut rig = Rig::up_with(Policy { tcp_lanes: 2, ..policy() });
    rig.write(1, 10);
    let lanes: Vec<_> = take(&mut rig.opens).into_iter().map(|(lane, _)| lane).collect();
    rig.feed(Event::LaneOpened(lanes[0]));
    assert_eq!(rig.parts().len(), 4);
    rig.processed(lanes[0], 1, 3);
    rig.parts();
    rig.feed(Event::LaneOpened(lanes[1]));
    let on: Vec<_> = rig.sent.iter().map(|sent| sent.lane).collect();
    assert_eq!(on, [lanes[1], lanes[1], lanes[1]]);
}

/// I2, the usual order: this side's owner, then the target.
#[test]
fn i2_nothing_is_sent_again_before_the_target_confirmed() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 5);
    assert_eq!(rig.parts(), [(1, 0), (1, 1), (1, 2), (1, 3)]);
    rig.closed(lane, lost());
    assert_eq!(take(&mut rig.fences), [lane]);
    let next = rig.open_lane();
    rig.pass(ms(1000));
    assert_eq!(rig.parts(), [(1, 4)], "only what was never sent");
    // The target had applied one that was never acknowledged: the lane's second.
    rig.feed(Event::LaneFenced(lane, record(2)));
    assert_eq!(rig.parts(), [(1, 1), (1, 2), (1, 3)]);
    rig.processed(next, 1, 4);
    assert_eq!(rig.finished[0].bytes_resent, 3 << 20);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
}

/// I2, the other order: the target first.
#[test]
fn i2_nothing_is_sent_again_before_this_side_said_closed() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 5);
    rig.parts();
    rig.feed(Event::LaneFenced(lane, record(2)));
    assert_eq!(take(&mut rig.closes), [lane]);
    rig.open_lane();
    rig.pass(ms(1000));
    assert_eq!(rig.parts(), [(1, 4)], "only what was never sent");
    rig.closed(lane, lost());
    rig.wake();
    assert_eq!(rig.parts(), [(1, 1), (1, 2), (1, 3)]);
    assert!(rig.fences.is_empty(), "it was told already");
}

/// I2: after a lost stream the Accept of the next one is the confirmation, of lanes it does not name too.
#[test]
fn i2_accept_confirms_the_lanes_of_the_stream_before() {
    for names_it in [true, false] {
        let (mut rig, lane) = Rig::with_lane();
        rig.write(1, 3);
        rig.parts();
        rig.control_ends(Reason::ConnectionLost);
        assert_eq!(take(&mut rig.closes), [lane]);
        rig.closed(lane, lost());
        assert!(rig.fences.is_empty(), "nobody to ask");
        rig.pass(ms(50));
        let fenced = if names_it { vec![(lane, record(3))] } else { vec![] };
        rig.open(Opened { fenced, ..opened() });
        rig.open_lane();
        let expected = if names_it { vec![(1, 2)] } else { vec![(1, 0), (1, 1), (1, 2)] };
        assert_eq!(rig.parts(), expected);
    }
}

#[test]
fn i2_accept_does_not_stand_in_for_the_own_end() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.parts();
    rig.control_ends(Reason::ConnectionLost);
    rig.open(opened());
    rig.pass(ms(1000));
    assert!(rig.sent.is_empty() && rig.opens.is_empty());
    rig.closed(lane, lost());
    rig.wake();
    rig.open_lane();
    assert_eq!(rig.parts(), [(1, 0)]);
}

/// E2: a part that never completes costs its lane; what keeps a lane is that bytes move on it.
#[test]
fn e2_a_part_that_never_completes_retires_its_lane_once() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    rig.parts();
    rig.pass(ms(9000));
    rig.feed(Event::Moved(lane, 1 << 20));
    rig.pass(ms(9000));
    assert!(rig.closes.is_empty(), "bytes moved meanwhile");
    rig.pass(ms(1000));
    assert_eq!(take(&mut rig.closes), [lane]);
    rig.pass(ms(5000));
    assert!(rig.closes.is_empty() && rig.finished.is_empty(), "its owner has not spoken");
    rig.dies(lane, record(1));
    rig.wake();
    rig.open_lane();
    assert_eq!(rig.parts(), [(1, 0), (1, 1)]);
}

/// E2: nobody but the timeout is named as the cause.
#[test]
fn e2_without_a_retry_the_timeout_is_what_the_transfer_ends_with() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write_once(1, 1);
    rig.pass(ms(10_000));
    assert_eq!(take(&mut rig.closes), [lane]);
    rig.closed(lane, Failure::plain(Reason::ProgressTimeout));
    rig.feed(Event::LaneFenced(lane, record(1)));
    rig.quiet();
    assert_eq!(rig.failures(), [(1, Reason::ProgressTimeout)]);
}

/// I3: what a READ's target sent is not what arrived here.
#[test]
fn i3_a_targets_record_of_a_read_lane_counts_for_nothing() {
    let mut rig = Rig::up();
    rig.read(1, 2);
    let lane = rig.open_lane();
    rig.processed(lane, 1, 1);
    rig.parts();
    rig.dies(lane, record(2));
    rig.wake();
    rig.open_lane();
    assert_eq!(rig.parts(), [(1, 1)]);
    assert!(rig.finished.is_empty());
}

#[test]
fn a_refusal_that_only_the_record_tells_of_ends_the_transfer() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    let refused = vec![(3, Failure::plain(Reason::Revoked))];
    rig.dies(lane, LaneRecord { processed: 3, refused });
    rig.quiet();
    assert_eq!(rig.failures(), [(1, Reason::Revoked)]);
}

/// Whose part was first in doubt pays for the lane; the others go free and wait for nothing.
#[test]
fn the_first_in_doubt_pays_and_the_others_go_free() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 2);
    rig.write(2, 1);
    rig.parts();
    rig.dies(lane, record(1));
    let lane = rig.open_lane();
    assert_eq!(rig.parts(), [(2, 0)], "1 backs off");
    rig.pass(ms(49));
    assert!(rig.sent.is_empty(), "for 50 ms");
    rig.pass(ms(1));
    assert_eq!(rig.parts(), [(1, 0), (1, 1)]);
    rig.processed(lane, 1, 3);
    let attempts: Vec<_> = rig.finished.iter().map(|r| (r.transfer.0[0], r.attempts)).collect();
    assert_eq!(attempts, [(2, 1), (1, 2)]);
    assert_eq!(rig.core.summary().counts.retries, 1);
}

#[test]
fn the_wait_grows_with_every_loss_in_a_row() {
    let (mut rig, mut lane) = Rig::with_lane();
    rig.write(1, 1);
    for wait in [50, 100] {
        assert_eq!(rig.parts(), [(1, 0)]);
        rig.dies(lane, record(0));
        lane = rig.open_lane();
        rig.pass(ms(wait - 1));
        assert!(rig.sent.is_empty());
        rig.pass(ms(1));
    }
    rig.dies(lane, record(0));
    rig.quiet();
    assert_eq!(rig.finished[0].attempts, 3);
    assert_eq!(rig.failures(), [(1, Reason::ConnectionLost)]);
}

#[test]
fn any_acknowledgement_resets_the_count() {
    let (mut rig, mut lane) = Rig::with_lane();
    let mut first = 2;
    rig.write(1, 12);
    for _ in 0..10 {
        rig.processed(lane, first, first);
        first = 1;
        rig.dies(lane, record(0));
        rig.pass(ms(50));
        lane = rig.open_lane();
    }
    assert!(rig.finished.is_empty(), "never two losses in a row");
}

/// `attempts` 1 is no retry at all, whoever was first in doubt.
#[test]
fn one_attempt_means_that_any_lost_part_is_the_end() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.write_once(2, 1);
    rig.closed(lane, lost());
    rig.quiet();
    assert!(rig.finished.is_empty(), "the peer's half is asked for");
    rig.feed(Event::LaneFenced(lane, record(1)));
    assert_eq!(rig.failures(), [(2, Reason::ConnectionLost)]);
}

/// A lane that some other event ended (a reset, a drain) costs nobody an attempt.
#[test]
fn an_end_that_is_no_fault_of_the_path_is_not_charged() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.parts();
    rig.closed(lane, cancelled());
    rig.feed(Event::LaneFenced(lane, record(0)));
    rig.open_lane();
    assert_eq!(rig.parts(), [(1, 0)]);
    assert_eq!(rig.core.summary().counts.retries, 0);
}

#[test]
fn a_lane_that_closes_twice_is_charged_once() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.closed(lane, lost());
    rig.closed(lane, lost());
    rig.feed(Event::LaneOpenFailed(lane, lost()));
    assert!(rig.core.lanes.contains_key(&lane), "it waits for its fence");
    rig.feed(Event::LaneFenced(lane, record(0)));
    assert_eq!(rig.core.summary().counts.retries, 1);
}

/// What was applied and only not acknowledged is progress: it breaks the row of losses.
#[test]
fn a_transfer_that_every_lane_moves_on_is_not_given_up() {
    let (mut rig, mut lane) = Rig::with_lane();
    rig.write(1, 6);
    // The first lane has carried one part of another transfer before.
    for applied in [2, 1, 1, 1, 1] {
        rig.parts();
        rig.closed(lane, lost());
        rig.feed(Event::LaneFenced(lane, record(applied)));
        assert!(rig.finished.is_empty());
        lane = rig.open_lane();
        rig.pass(ms(1000));
    }
    assert_eq!(rig.parts(), [(1, 5)]);
    rig.processed(lane, 1, 1);
    assert_eq!(rig.finished(), [(1, Outcome::Done)]);
    assert_eq!(rig.core.summary().counts.retries, 5);
}

#[test]
fn a_lane_on_which_nothing_moves_is_given_up() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 1);
    rig.pass(ms(6000));
    rig.feed(Event::Moved(lane, 1000));
    rig.pass(ms(6000));
    rig.feed(Event::Moved(lane, 1000));
    assert!(rig.closes.is_empty(), "it moved 6 s ago");
    rig.pass(ms(4000));
    assert_eq!(take(&mut rig.closes), [lane]);
    assert_eq!(rig.opens.len(), 0, "nothing else waits");
    rig.pass(ms(20_000));
    assert!(rig.closes.is_empty(), "asked once");
}

#[test]
fn an_idle_lane_may_stand_still_for_ever() {
    let (mut rig, lane) = Rig::with_lane();
    assert_eq!(rig.core.next_wake(), None);
    assert_eq!(rig.core.busy_lanes().count(), 0);
    rig.pass(ms(3_600_000));
    rig.write(1, 1);
    assert_eq!(rig.core.busy_lanes().collect::<Vec<_>>(), [lane]);
    rig.pass(ms(9999));
    assert!(rig.closes.is_empty(), "its time began with the part");
}

/// Where another lane of the kind works, one that cannot be had costs nobody anything.
#[test]
fn half_a_path_is_a_path() {
    let mut rig = Rig::up_with(Policy { tcp_lanes: 2, ..policy() });
    rig.write_once(1, 40);
    let lanes: Vec<_> = take(&mut rig.opens).into_iter().map(|(lane, _)| lane).collect();
    rig.feed(Event::LaneOpened(lanes[0]));
    rig.feed(Event::LaneOpenFailed(lanes[1], lost()));
    let mut tries = 0;
    for part in 1..=36 {
        rig.pass(ms(500));
        rig.processed(lanes[0], part, part);
        for (lane, _) in take(&mut rig.opens) {
            tries += 1;
            let reason = if part % 2 == 0 { Reason::ConnectRefused } else { Reason::Limit };
            rig.feed(Event::LaneOpenFailed(lane, crate::domain::Failure::plain(reason)));
        }
    }
    assert!(rig.finished.is_empty());
    assert!((10..36).contains(&tries), "{tries} tries in 18 s");
}

#[test]
fn a_lane_that_cannot_be_had_gives_up_its_own_direction_only() {
    let (mut rig, lane) = Rig::with_lane();
    rig.write(1, 40);
    rig.read(2, 1);
    for part in 1..40 {
        rig.pass(ms(200));
        rig.processed(lane, part + 1, part + 1);
        for (read_lane, kind) in take(&mut rig.opens) {
            assert_eq!(kind, LaneKind::Read);
            rig.feed(Event::LaneOpenFailed(read_lane, lost()));
        }
    }
    assert_eq!(rig.failures(), [(2, Reason::ConnectionLost)]);
}

/// What was granted and did not come must not fill the target's table of lanes.
#[test]
fn a_lane_that_did_not_come_is_given_back() {
    let mut rig = Rig::up();
    rig.write(1, 1);
    let (lane, _) = rig.opens[0];
    rig.feed(Event::LaneOpenFailed(lane, lost()));
    assert_eq!(rig.fences, [lane]);
    rig.feed(Event::LaneFenced(lane, record(0)));
    assert!(rig.core.lanes.is_empty());
}

#[test]
fn a_lane_that_comes_after_its_session_is_closed_at_once() {
    let mut rig = Rig::up();
    rig.write(1, 1);
    let (lane, _) = rig.opens[0];
    rig.control_ends(Reason::ConnectionLost);
    rig.feed(Event::LaneOpened(lane));
    assert_eq!(rig.closes, [lane]);
    rig.closed(lane, lost());
    assert!(rig.core.lanes.is_empty() && rig.fences.is_empty());
}

/// I8: lanes whose fence is never confirmed are bounded; in the end the session is opened anew, which fences all.
#[test]
fn i8_a_target_that_confirms_no_fence_is_left() {
    let (mut rig, mut lane) = Rig::with_lane();
    let forgiving = RetryPolicy { attempts: 1000, backoff: ms(0), ..policy().retry };
    rig.submit(1, Op::Write, 1000, forgiving);
    let mut deaths = 0;
    while rig.disconnects == 0 {
        rig.closed(lane, lost());
        deaths += 1;
        assert!(rig.core.lanes.len() <= 66, "{} lanes", rig.core.lanes.len());
        if rig.disconnects == 0 {
            lane = rig.open_lane();
        }
    }
    assert_eq!(deaths, 64);
    assert_eq!(rig.state(), State::Recovering);
    rig.pass(ms(10));
    rig.open(opened());
    assert_eq!(rig.core.lanes.len(), 1, "all are fenced, one is new");
    rig.open_lane();
    assert_eq!(rig.parts().len() % 4, 0);
}

//! Damage on the wire that TCP did not see: B3.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use harness::{
    batch::{Arrangement, Move},
    eventually,
    faulty::{CONFIG, Faulty, LIMIT, WINDOW, megabytes},
    metrics::counted,
    proxy::{Fault, Kind, Rule},
    scene::{assert_reason, done, failed, once},
};
use kvferry_client::{Op, Reason, Transfer};

const MIB: u64 = 1 << 20;
/// Far from the beginning and the end of a part, whatever stands between the parts.
const IN_PAYLOAD: u64 = 20 * MIB + MIB / 2;

/// The second byte of an address in a lane's first table: behind the preface, the part's header and a region entry come
/// runs of 16 bytes. What it names then are other pages of the same region.
const IN_TABLE: u64 = 52 + 64 + 8 + 100 * 16 + 1;

/// Two daemons of this configuration, and a proxy that will invert one byte of payload, once.
fn damaged(checksum: bool) -> Faulty {
    damaged_at(IN_PAYLOAD, checksum)
}

/// The same with another byte.
fn damaged_at(at: u64, checksum: bool) -> Faulty {
    // The key follows those of the same section.
    let faulty = Faulty::with_config(80 * MIB, &format!("{CONFIG}checksum = {checksum}\n"));
    faulty.proxy.script(Rule { kind: Kind::Data, fault: Fault::Flip { at }, times: 1 });
    faulty
}

/// Pages with holes between them: tables of many runs, and something to hit beside them.
fn pages() -> Vec<Move> {
    Arrangement::Interleaved.moves(1000, 4096)
}

const DAMAGED: &str = "kvferry_damaged_parts_total";

#[test]
fn b3_a_flipped_byte_is_detected_retried_and_counted() {
    let mut faulty = damaged(true);
    let moves = megabytes(64);
    let report = done(faulty.transfer(faulty.request(Op::Write, &moves)), &moves);
    faulty.expect(Op::Write, &moves);
    faulty.scene.verify("after damage on the wire");
    assert_eq!(report.attempts, 2, "{report:?}");
    assert!((1..=WINDOW).contains(&report.bytes_resent), "{report:?}");
    eventually("its lane is closed", LIMIT, || faulty.lanes_lost() == 1);
    assert_eq!(counted(faulty.scene.nodes.target(), DAMAGED), 1);
}

#[test]
fn b3_without_a_retry_a_flipped_byte_fails_the_transfer() {
    let mut faulty = damaged(true);
    let moves = megabytes(64);
    let transfer = Transfer { policy: once(), ..faulty.request(Op::Write, &moves) };
    let (report, failure) = failed(faulty.transfer(transfer));
    // The target's word may be lost with the connection.
    assert_reason(&failure, &[Reason::Checksum, Reason::ConnectionLost]);
    // Whole parts were acknowledged before the one that was hit, and that one was not.
    assert!(report.bytes_done <= 20 * MIB, "{report:?}");
    assert_eq!(counted(faulty.scene.nodes.target(), DAMAGED), 1);
    faulty.scene.target.pool.forget(harness::batch::destination(&moves));
    faulty.works(&moves);
}

/// What the tests above would see if nothing were checked.
#[test]
fn b3_without_checksums_the_oracle_sees_the_flipped_byte() {
    let mut faulty = damaged(false);
    let moves = megabytes(64);
    let report = done(faulty.transfer(faulty.request(Op::Write, &moves)), &moves);
    assert_eq!(report.attempts, 1, "{report:?}");
    faulty.expect(Op::Write, &moves);
    let verdict = faulty.scene.target.pool.verify();
    assert_eq!((verdict.wrong, verdict.stray), (1, 0), "{verdict}");
    assert_eq!(counted(faulty.scene.nodes.target(), DAMAGED), 0);
}

#[test]
fn b3_a_flipped_byte_of_a_table_is_detected_retried_and_counted() {
    for op in [Op::Write, Op::Read] {
        let mut faulty = damaged_at(IN_TABLE, true);
        let moves = pages();
        let report = done(faulty.transfer(faulty.request(op, &moves)), &moves);
        faulty.expect(op, &moves);
        faulty.scene.verify("after a wrong table");
        assert_eq!(report.attempts, 2, "{op:?} {report:?}");
        assert_eq!(counted(faulty.scene.nodes.target(), DAMAGED), 1, "{op:?}");
    }
}

/// What the test above would see if nothing were checked.
#[test]
fn b3_without_checksums_the_oracle_sees_the_wrong_table() {
    for op in [Op::Write, Op::Read] {
        let mut faulty = damaged_at(IN_TABLE, false);
        let moves = pages();
        let report = done(faulty.transfer(faulty.request(op, &moves)), &moves);
        assert_eq!(report.attempts, 1, "{op:?} {report:?}");
        faulty.expect(op, &moves);
        let scene = &faulty.scene;
        let landed = if op == Op::Read { &scene.initiator.pool } else { &scene.target.pool };
        let verdict = landed.verify();
        assert!(verdict.wrong > 0, "{op:?} {verdict}");
        assert_eq!(verdict.stray > 0, op == Op::Write, "{op:?} {verdict}");
        assert_eq!(counted(scene.nodes.target(), DAMAGED), 0);
    }
}

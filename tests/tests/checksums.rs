//! Damage on the wire that TCP did not see: B3.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use harness::{
    faulty::{CONFIG, Faulty, WINDOW, megabytes},
    metrics::counted,
    proxy::{Fault, Kind, Rule},
    scene::{assert_reason, done, failed, once},
};
use kvferry_client::{Op, Reason, Transfer};

const MIB: u64 = 1 << 20;
/// Far from the beginning and the end of a part, whatever stands between the parts.
const IN_PAYLOAD: u64 = 20 * MIB + MIB / 2;

/// Two daemons of this configuration, and a proxy that will invert one byte of payload, once.
fn damaged(checksum: bool) -> Faulty {
    // The key follows those of the same section.
    let faulty = Faulty::with_config(80 * MIB, &format!("{CONFIG}checksum = {checksum}\n"));
    faulty.proxy.script(Rule { kind: Kind::Data, fault: Fault::Flip { at: IN_PAYLOAD }, times: 1 });
    faulty
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
    assert_eq!(faulty.lanes_lost(), 1, "its lane was closed");
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

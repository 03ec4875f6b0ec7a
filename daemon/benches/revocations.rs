//! What it costs to tell a peer of one revocation, by how many there were before. It is done for each session, on
//! the control thread and under the lock that parts are judged under: the rows of one run should be alike.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::{hint::black_box, time::Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kvferryd::{
    domain::{AddressRange, Epoch, Tag},
    policy::{RevocationLimits, Revocations},
};

const PAGE: u64 = 64 << 10;

/// So many single pages, and as many tags.
fn revoked(before: u64, now: Instant) -> Revocations {
    let mut all = Revocations::new(RevocationLimits::ranges(1 << 16));
    for number in 0..before {
        all.revoke(vec![AddressRange::new(2 * number * PAGE, PAGE).expect("a page")]);
        all.revoke_tag(Tag(u128::from(number).to_be_bytes()), now).expect("room");
    }
    all
}

fn telling(criterion: &mut Criterion) {
    let now = Instant::now();
    let mut group = criterion.benchmark_group("tell the newest of");
    for before in [16, 4096, 65_536] {
        let all = revoked(before, now);
        let told = Epoch(all.epoch().0 - 2);
        assert_eq!(all.since(told, now).ranges.len() + all.since(told, now).tags.len(), 2);
        group.bench_with_input(BenchmarkId::from_parameter(before), &all, |bencher, all| {
            bencher.iter(|| all.since(black_box(told), now));
        });
    }
    group.finish();
}

criterion_group!(benches, telling);
criterion_main!(benches);

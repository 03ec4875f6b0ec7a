//! What planning costs: the one step whose work grows with the number of slices. Compare the rows of one run.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvferryd::{
    domain::{Epoch, Generation, Op, RegionId, SliceBatch, TransferId},
    memory::{Backing, MapOptions, Mapping, MemoryKind, Region, RegionInfo, RegionTable},
    transfer::plan::{Order, plan},
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const BASE: u64 = 0x7000_0000_0000;
const REGION: u64 = 4 << 20;
const REGIONS: u64 = 160;

fn info(number: u64) -> RegionInfo {
    let (id, base) = (RegionId(number as u32), BASE + number * REGION);
    RegionInfo { id, generation: Generation(1), base, length: REGION, kind: MemoryKind::SharedFd }
}

/// One page for all: planning never touches a byte.
fn mapping() -> Mapping {
    let fd = memfd_create("plan", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&fd, 4096).expect("a page");
    fcntl_add_seals(&fd, SealFlags::SHRINK).expect("a seal");
    Mapping::new(std::os::fd::AsFd::as_fd(&fd), 0, 4096, MapOptions::default()).expect("a mapping")
}

/// Slices scattered over all regions on both sides, layer by layer, as a KV pool's are.
fn scattered(count: u64, length: u64) -> SliceBatch {
    let per_region = count / REGIONS;
    let address = |slice: u64, step: u64| {
        let slots = REGION / length;
        BASE + (slice / per_region) * REGION + (slice % per_region * step % slots) * length
    };
    SliceBatch {
        local: (0..count).map(|slice| address(slice, 7)).collect(),
        remote: (0..count).map(|slice| address(slice, 11)).collect(),
        lengths: vec![],
        uniform: Some(length),
    }
}

fn planning(criterion: &mut Criterion) {
    let local = RegionTable::new(
        (0..REGIONS).map(|number| Region::new(info(number), Backing::Shared(mapping())).0).collect(),
    );
    let remote = RegionTable::new((0..REGIONS).map(info).collect());
    let order = Order { transfer: TransferId([1; 16]), op: Op::Write, tag: None, admit_epoch: Epoch(0) };
    let mut group = criterion.benchmark_group("plan");
    for (count, length) in [(160, 1 << 20), (20_480, 16 << 10), (655_360, 256)] {
        let batch = scattered(count, length);
        group.throughput(Throughput::Elements(count));
        group.bench_with_input(BenchmarkId::from_parameter(count), &batch, |bencher, batch| {
            bencher.iter(|| plan(order, black_box(batch), &local, &remote).expect("all is registered"));
        });
    }
    group.finish();
}

criterion_group!(benches, planning);
criterion_main!(benches);

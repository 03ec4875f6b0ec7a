//! How fast, beside a raw socket in the same run. Prints; judges only what no machine's noise can turn.

use std::time::Instant;

use super::*;
use crate::transport::testing::{Slice, payload, sequenced};

const TOTAL: u64 = 64 << 20;

/// A blocking socket between two populated buffers, 1 MiB a call, with an 8-byte answer.
struct Raw {
    here: TcpStream,
    source: Vec<u8>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Raw {
    fn new() -> Self {
        let (here, mut there) = connection();
        let reader = std::thread::spawn(move || {
            let mut sink = vec![1; TOTAL as usize];
            let mut at = 0;
            loop {
                let end = (at + (1 << 20)).min(sink.len());
                match there.read(&mut sink[at..end]).expect("a read") {
                    0 => return,
                    bytes => at += bytes,
                }
                if at == sink.len() {
                    at = 0;
                    there.write_all(&[0; 8]).expect("an answer");
                }
            }
        });
        Self { here, source: vec![1; TOTAL as usize], reader: Some(reader) }
    }

    /// Seconds for `TOTAL` bytes.
    fn push(&mut self) -> f64 {
        let start = Instant::now();
        self.source.chunks(1 << 20).for_each(|chunk| self.here.write_all(chunk).expect("a write"));
        read_array::<8>(&mut self.here);
        start.elapsed().as_secs_f64()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.here.shutdown(std::net::Shutdown::Both).expect("an open socket");
        self.reader.take().into_iter().for_each(|reader| reader.join().expect("the reader"));
    }
}

#[test]
fn throughput_beside_a_raw_socket() {
    let shapes: [(&str, u64); 4] = [
        ("one slice", TOTAL),
        ("72 KiB slices", 72 << 10),
        ("16 KiB slices", 16 << 10),
        ("256 B slices", 256),
    ];
    let mut raw = Raw::new();
    let ways = [LaneKind::Write, LaneKind::Read].map(|kind| [(kind, false), (kind, true)]);
    for (kind, sums) in ways.into_iter().flatten() {
        let link = Link::over(connection(), kind, sums);
        let with = if sums { " with checksums" } else { "" };
        let (local, remote) = (link.initiator.shared(2 * TOTAL), link.target.shared(2 * TOTAL));
        let mut next = 1;
        for (what, length) in shapes {
            // Apart on both sides, so that nothing coalesces.
            let apart = if length == TOTAL { 0 } else { length };
            let slices: Vec<Slice> =
                (0..TOTAL / length).map(|i| (i * (length + apart), i * (length + apart), length)).collect();
            let payload = payload(kind, &link.initiator, &local, &remote, &slices);
            let mut ratios = Vec::new();
            for _ in 0..5 {
                let limit = raw.push();
                let parts = sequenced(&payload, next);
                next += parts.len() as u64;
                let start = Instant::now();
                link.lane.submit(parts);
                link.events.wait_processed(next - 1);
                ratios.push(limit / start.elapsed().as_secs_f64() * (payload.bytes as f64 / TOTAL as f64));
            }
            ratios.sort_by(f64::total_cmp);
            println!("{kind:?} {what}{with}: {:.2} of a raw socket (median of 5)", ratios[2]);
        }
    }
}

#[test]
fn latency_of_a_lone_small_part() {
    let link = Link::new(LaneKind::Write);
    let (local, remote) = (link.initiator.shared(4096), link.target.shared(4096));
    let payload = payload(LaneKind::Write, &link.initiator, &local, &remote, &[(0, 0, 4096)]);
    let mut times: Vec<_> = (1..=2000)
        .map(|sequence| {
            let start = Instant::now();
            link.lane.submit(sequenced(&payload, sequence));
            link.events.wait_processed(sequence);
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("1 x 4 KiB: p50 {:?}, p99 {:?}", times[1000], times[1980]);
}

//! The slice lists that real engines ask for, made again from their recorded shape.
//!
//! `workloads.json` holds what sglang's own send paths asked of a recording engine: counts, sizes, and how page
//! indices lie (`contig`: one run on both sides, `16`: runs of 16 pages, `scatter`: both sides permuted). From
//! that and a seed, two processes make the same [`Plan`] without sending it to each other.
//!
//! Source pools are as large as what is sent; sink pools at least twice that, with the expected slices spread
//! through them, so that a byte written astray lands on memory that somebody checks.

use std::{collections::BTreeMap, ops::Range};

use serde::Deserialize;

use crate::pattern::scramble;

const RECORDED: &str = include_str!("../workloads.json");

/// Tensor-parallel ranks of the engine that sends and of the one that receives.
#[derive(Clone, Copy, Debug)]
struct Ranks {
    source: u64,
    sink: u64,
}

/// Short names of the workloads people talk about.
const SHORT: [(&str, &str); 8] = [
    ("W1", "llama3-70b_tp8_page1_4k_fresh"),
    ("W1b", "llama3-70b_tp8_page1_4k_runs16"),
    ("W1c", "llama3-70b_tp8_page1_4k_scatter"),
    ("W2", "llama3-70b_tp8_page64_8k_scatter"),
    ("W3", "deepseek-v3_mla_page64_4k_scatter"),
    ("W4", "llama3-70b_P-tp4_D-tp8_page64_4k"),
    ("W5", "hybrid_12full_page64_8k_scatter"),
    ("aux", "aux_hidden8192"),
];

/// One entry of `workloads.json`.
#[derive(Clone, Debug, Deserialize)]
struct Recorded {
    name: String,
    calls: u64,
    bytes: u64,
    slice_sizes: BTreeMap<u64, u64>,
    registered_buffers: Option<u64>,
    item_len: Option<u64>,
    page_size: Option<u64>,
    tokens: Option<u64>,
    indices: Option<String>,
    chunk: Option<u64>,
    threads: Option<usize>,
}

/// A name that is neither a workload nor a size.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkloadError {
    #[error("no workload or size is called {name:?}; known: {known}, or a size such as 4KiB, 1MiB, 256MiB")]
    Unknown { name: String, known: String },
    #[error("workload {name}: {what}")]
    Malformed { name: String, what: &'static str },
}

/// Where one slice comes from and goes to; offsets are within the named pool buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) source_buffer: u32,
    pub(crate) sink_buffer: u32,
    pub(crate) source_offset: u64,
    pub(crate) sink_offset: u64,
    pub(crate) length: u64,
}

/// How the engine holds the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Sealed memfds, as KV pools are.
    Shared,
    /// Plain heap memory, as sglang's small aux buffers are.
    Process,
}

/// Everything two engines must agree on to replay a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) backing: Backing,
    /// Lengths of the sender's buffers, bytes.
    pub(crate) source: Vec<u64>,
    /// Lengths of the receiver's buffers, bytes.
    pub(crate) sink: Vec<u64>,
    pub(crate) slices: Vec<Slice>,
    /// The engine's calls, each a range of `slices`.
    pub(crate) calls: Vec<Range<usize>>,
    /// Threads of the engine that make the calls.
    pub(crate) threads: usize,
}

impl Plan {
    /// Payload of the whole plan, bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.slices.iter().map(|slice| slice.length).sum()
    }

    fn new(backing: Backing, source: Vec<u64>, sink: Vec<u64>) -> Self {
        Self { backing, source, sink, slices: Vec::new(), calls: Vec::new(), threads: 1 }
    }

    /// Closes the call that began at slice `from`.
    fn end_call(&mut self, from: usize) {
        self.calls.push(from..self.slices.len());
    }
}

/// Full names of all recorded workloads, in the order of the file.
pub(crate) fn names() -> Result<Vec<String>, WorkloadError> {
    Ok(recorded()?.into_iter().map(|workload| workload.name).collect())
}

/// The short name where there is one: for tables.
pub(crate) fn short(name: &str) -> &str {
    SHORT.iter().find(|(_, full)| *full == name).map_or(name, |(short, _)| short)
}

/// The plan of a workload (short or full name) or of a single slice of the given size.
pub(crate) fn plan(name: &str, seed: u64) -> Result<Plan, WorkloadError> {
    if let Some(bytes) = size(name) {
        return Ok(single(bytes));
    }
    let full =
        SHORT.iter().find(|(short, _)| short.eq_ignore_ascii_case(name)).map_or(name, |(_, full)| full);
    let all = recorded()?;
    match all.iter().find(|workload| workload.name == full) {
        Some(workload) => workload.plan(seed),
        None => Err(WorkloadError::Unknown {
            name: name.to_owned(),
            known: SHORT.iter().map(|(short, _)| *short).collect::<Vec<_>>().join(" "),
        }),
    }
}

fn recorded() -> Result<Vec<Recorded>, WorkloadError> {
    serde_json::from_str(RECORDED).map_err(|_| WorkloadError::Malformed {
        name: "workloads.json".to_owned(),
        what: "the embedded file cannot be parsed",
    })
}

/// `4KiB`, `1MiB`, `2GiB` or `512B` in bytes; None for anything else, zero included.
pub(crate) fn size(text: &str) -> Option<u64> {
    let (digits, shift) = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("B", 0)]
        .into_iter()
        .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits, shift)))?;
    let count: u64 = digits.parse().ok()?;
    count.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

/// One slice in the middle of a sink twice its size.
fn single(bytes: u64) -> Plan {
    let mut plan = Plan::new(Backing::Shared, vec![bytes], vec![bytes * 2]);
    plan.slices.push(Slice {
        source_buffer: 0,
        sink_buffer: 0,
        source_offset: 0,
        sink_offset: bytes / 2,
        length: bytes,
    });
    plan.end_call(0);
    plan
}

impl Recorded {
    fn plan(&self, seed: u64) -> Result<Plan, WorkloadError> {
        let plan = match (self.ranks(), &self.indices) {
            (Some(ranks), _) => self.split_heads(ranks, seed)?,
            (None, Some(indices)) => self.paged(indices, seed)?,
            (None, None) => self.states(),
        };
        if plan.bytes() == self.bytes && plan.calls.len() as u64 == self.calls {
            Ok(plan)
        } else {
            Err(self.malformed("its numbers contradict each other"))
        }
    }

    fn malformed(&self, what: &'static str) -> WorkloadError {
        WorkloadError::Malformed { name: self.name.clone(), what }
    }

    /// Read from `..._P-tp4_D-tp8_...`: prefill and decode differ, so every token's heads are cut apart.
    fn ranks(&self) -> Option<Ranks> {
        let number = |mark: &str| -> Option<u64> {
            let (_, rest) = self.name.split_once(mark)?;
            rest.split('_').next()?.parse().ok()
        };
        Some(Ranks { source: number("_P-tp")?, sink: number("_D-tp")? })
    }

    /// Buffers, bytes of a page, tokens of a page, tokens of the request.
    fn pages(&self) -> Result<(u64, u64, u64, u64), WorkloadError> {
        match (self.registered_buffers, self.item_len, self.page_size, self.tokens) {
            (Some(buffers), Some(item), Some(page), Some(tokens)) if page > 0 && item > 0 => {
                Ok((buffers, item, page, tokens))
            }
            _ => Err(self.malformed("registered_buffers, item_len, page_size or tokens is missing")),
        }
    }

    /// One slice per run of pages and layer buffer; all layers share the page indices, as in the engine.
    fn paged(&self, indices: &str, seed: u64) -> Result<Plan, WorkloadError> {
        let (buffers, item, page, tokens) = self.pages()?;
        let pages = tokens.div_ceil(page);
        let run = match indices {
            "contig" => pages,
            "scatter" => 1,
            runs => {
                runs.parse().map_err(|_| self.malformed("indices is not contig, scatter or a run length"))?
            }
        };
        if run == 0 || !pages.is_multiple_of(run) {
            return Err(self.malformed("the run length does not divide the pages"));
        }
        let places = places(pages / run, run, seed);
        let runs_per_call = self.chunk.unwrap_or(tokens).div_ceil(page) / run;
        let mut plan = Plan::new(
            Backing::Shared,
            vec![pages * item; buffers as usize],
            vec![2 * pages * item; buffers as usize],
        );
        for chunk in places.chunks(runs_per_call.max(1) as usize) {
            let from = plan.slices.len();
            for buffer in 0..buffers as u32 {
                plan.slices.extend(chunk.iter().map(|(source, sink)| Slice {
                    source_buffer: buffer,
                    sink_buffer: buffer,
                    source_offset: source * item,
                    sink_offset: sink * item,
                    length: run * item,
                }));
            }
            plan.end_call(from);
        }
        Ok(plan)
    }

    /// Differing tensor parallelism: every token of every layer is its own slice, one call per layer and rank.
    fn split_heads(&self, ranks: Ranks, seed: u64) -> Result<Plan, WorkloadError> {
        let (buffers, item, page, tokens) = self.pages()?;
        if ranks.source == 0 || ranks.sink == 0 {
            return Err(self.malformed("a tensor-parallel size is zero"));
        }
        let source_token = item / page;
        let sink_token = source_token * ranks.source / ranks.sink;
        let slice = source_token.min(sink_token);
        // Each receiving rank has buffers of its own; here they all belong to one engine.
        let sinks = (ranks.sink / ranks.source).max(1);
        let pages = tokens / page;
        let places = places(pages, 1, seed);
        let mut plan = Plan::new(
            Backing::Shared,
            vec![pages * item; buffers as usize],
            vec![2 * pages * page * sink_token; (buffers * sinks) as usize],
        );
        for (buffer, rank) in (0..buffers).flat_map(|buffer| (0..sinks).map(move |rank| (buffer, rank))) {
            let from = plan.slices.len();
            for (source, sink) in &places {
                plan.slices.extend((0..page).map(|token| Slice {
                    source_buffer: buffer as u32,
                    sink_buffer: (buffer * sinks + rank) as u32,
                    source_offset: (source * page + token) * source_token + rank * slice,
                    sink_offset: (sink * page + token) * sink_token,
                    length: slice,
                }));
            }
            plan.end_call(from);
        }
        plan.threads = self.threads.unwrap_or(1);
        Ok(plan)
    }

    /// A handful of per-request slots, one buffer each: the middle of three slots is written.
    fn states(&self) -> Plan {
        let backing = if self.name.starts_with("aux") { Backing::Process } else { Backing::Shared };
        let sizes: Vec<u64> = self
            .slice_sizes
            .iter()
            .flat_map(|(size, count)| std::iter::repeat_n(*size, *count as usize))
            .collect();
        let mut plan = Plan::new(backing, sizes.clone(), sizes.iter().map(|size| 3 * size).collect());
        plan.slices.extend((0..).zip(&sizes).map(|(buffer, size)| Slice {
            source_buffer: buffer,
            sink_buffer: buffer,
            source_offset: 0,
            sink_offset: *size,
            length: *size,
        }));
        plan.end_call(0);
        plan
    }
}

/// Page indices (source, sink) of `runs` runs of `run` pages, the sink having twice as many places.
///
/// No two neighbouring runs are adjacent on both sides: the recorded lists had already merged such runs, so
/// one more would give fewer slices than the engine asked for. Seeds are tried until that holds; for the
/// recorded sizes every second or third does.
fn places(runs: u64, run: u64, seed: u64) -> Vec<(u64, u64)> {
    if runs == 1 {
        return vec![(0, run / 2)];
    }
    let mut seed = seed;
    loop {
        let source = permutation(runs, scramble(seed ^ 1));
        let sink = permutation(2 * runs, scramble(seed ^ 2));
        let places: Vec<_> = source.into_iter().zip(sink).map(|(from, to)| (from * run, to * run)).collect();
        let merges = |pair: &[(u64, u64)]| pair[1].0 == pair[0].0 + run && pair[1].1 == pair[0].1 + run;
        if !places.windows(2).any(merges) {
            return places;
        }
        seed = scramble(seed.wrapping_add(3));
    }
}

/// Fisher-Yates over `0..count`.
fn permutation(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    for at in (1..order.len()).rev() {
        let other = scramble(seed.wrapping_add(at as u64)) % (at as u64 + 1);
        order.swap(at, other as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(plan: &Plan) -> BTreeMap<u64, u64> {
        let mut sizes = BTreeMap::new();
        plan.slices.iter().for_each(|slice| *sizes.entry(slice.length).or_insert(0) += 1);
        sizes
    }

    fn assert_inside_and_disjoint(plan: &Plan) {
        let mut ranges: Vec<_> = plan
            .slices
            .iter()
            .map(|slice| {
                assert!(slice.source_offset + slice.length <= plan.source[slice.source_buffer as usize]);
                assert!(slice.sink_offset + slice.length <= plan.sink[slice.sink_buffer as usize]);
                (slice.sink_buffer, slice.sink_offset, slice.length)
            })
            .collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].0 != pair[1].0 || pair[0].1 + pair[0].2 <= pair[1].1, "{pair:?} overlap");
        }
    }

    /// Slices after merging neighbours that are adjacent on both sides.
    fn runs(plan: &Plan) -> usize {
        let merges = |one: &Slice, two: &Slice| {
            (one.source_buffer, one.source_offset + one.length) == (two.source_buffer, two.source_offset)
                && (one.sink_buffer, one.sink_offset + one.length) == (two.sink_buffer, two.sink_offset)
        };
        plan.slices.len() - plan.slices.windows(2).filter(|pair| merges(&pair[0], &pair[1])).count()
    }

    #[test]
    fn every_recorded_workload_comes_back_with_its_counts_sizes_and_contiguity() {
        for workload in recorded().unwrap() {
            let plan = workload.plan(1).unwrap();
            assert_eq!(sizes(&plan), workload.slice_sizes, "{}", workload.name);
            assert_eq!(plan.bytes(), workload.bytes, "{}", workload.name);
            assert_eq!(plan.calls.len() as u64, workload.calls, "{}", workload.name);
            assert_eq!(
                plan.source.len() as u64,
                workload.registered_buffers.unwrap_or(plan.source.len() as u64)
            );
            assert!(plan.sink.iter().sum::<u64>() >= 2 * plan.bytes(), "{}", workload.name);
            assert_eq!(runs(&plan), plan.slices.len(), "{} has slices that merge", workload.name);
            assert_inside_and_disjoint(&plan);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_plan_and_another_seed_another() {
        assert_eq!(plan("W3", 5).unwrap(), plan("W3", 5).unwrap());
        assert_ne!(plan("W3", 5).unwrap().slices, plan("W3", 6).unwrap().slices);
    }

    #[test]
    fn short_names_sizes_and_mistakes() {
        for (short_name, full) in SHORT {
            assert_eq!(plan(short_name, 1).unwrap(), plan(full, 1).unwrap());
            assert_eq!(short(full), short_name);
        }
        assert_eq!(size("4KiB"), Some(4096));
        assert_eq!(size("256MiB"), Some(256 << 20));
        for wrong in
            ["", "KiB", "0MiB", "-1KiB", "1.5GiB", "99999999999999999999B", "18446744073709551615GiB"]
        {
            assert_eq!(size(wrong), None, "{wrong}");
        }
        assert!(matches!(plan("W9", 1), Err(WorkloadError::Unknown { name, .. }) if name == "W9"));
    }

    #[test]
    fn aux_is_plain_process_memory() {
        assert_eq!(plan("aux", 1).unwrap().backing, Backing::Process);
        assert_eq!(plan("W2", 1).unwrap().backing, Backing::Shared);
    }
}

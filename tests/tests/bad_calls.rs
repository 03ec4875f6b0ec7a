//! Bad input that the client library would never send: wrong columns, wrong tokens, wrong descriptors.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::{AsFd, OwnedFd};

use harness::{daemon::Daemon, handover, raw::RawEngine, raw::refusal};
use kvferry_proto::{
    engine::v1::{
        CancelRequest, Outcome, RegionSpec, RegisterRegionsReply, RegisterRegionsRequest, SharedFd, Slices,
        TransferReply, TransferRequest, region_spec::Backing,
    },
    types::v1::{Op, Reason},
};
use rustix::fs::{MemfdFlags, SealFlags};
use tonic::Status;

const LENGTH: u64 = 1 << 20;
const BASE: u64 = 1 << 40;

struct Bare {
    daemon: Daemon,
    engine: RawEngine,
}

impl Bare {
    fn new() -> Self {
        let daemon = Daemon::start().unwrap();
        let engine = RawEngine::attach(daemon.socket()).unwrap();
        Self { daemon, engine }
    }

    fn hand_over(&self, handle: u64, fd: &OwnedFd) -> Option<Reason> {
        let token = &self.engine.attached().token;
        handover::send(&self.daemon.fd_socket(), token, handle, fd.as_fd()).unwrap()
    }

    fn register(&self, regions: Vec<RegionSpec>) -> Result<RegisterRegionsReply, Status> {
        let request = RegisterRegionsRequest { regions, layouts: Vec::new() };
        self.engine
            .call(|mut client, token| async move { client.register_regions(token.request(request)).await })
    }

    fn transfer(&self, request: TransferRequest) -> Result<TransferReply, Status> {
        self.engine.call(|mut client, token| async move { client.transfer(token.request(request)).await })
    }

    /// Registers a proper memfd: what is refused next to it is refused for its own fault.
    fn registers_a_good_one(&self, handle: u64) {
        let fd = handover::memfd(LENGTH, MemfdFlags::empty(), SealFlags::SHRINK).unwrap();
        assert_eq!(self.hand_over(handle, &fd), None);
        let reply = self.register(vec![shared(BASE, LENGTH, handle, 0)]).unwrap();
        assert_eq!(reply.failure, None);
        assert_eq!(reply.regions.len(), 1);
    }
}

fn shared(base: u64, length: u64, handle: u64, offset: u64) -> RegionSpec {
    let backing = Some(Backing::SharedFd(SharedFd { handle, offset }));
    RegionSpec { base, length, backing, cuda_ipc: None }
}

fn slices(count: usize) -> Slices {
    let addresses: Vec<u64> = (0..count as u64).map(|index| BASE + index * 4096).collect();
    Slices { local: addresses.clone(), remote: addresses, lengths: Vec::new(), length: Some(4096) }
}

fn request(slices: Slices) -> TransferRequest {
    TransferRequest {
        transfer_id: vec![5; 16],
        session_id: "127.0.0.1:1".to_owned(),
        op: Op::Write.into(),
        slices: Some(slices),
        ..TransferRequest::default()
    }
}

fn transfer_refusal(answer: Result<TransferReply, Status>) -> (Reason, String) {
    refusal(answer, |reply| {
        assert_ne!(reply.outcome(), Outcome::Done);
        assert_eq!(reply.bytes_done, 0);
        reply.failure.clone()
    })
    .unwrap()
}

#[test]
fn columns_of_different_lengths() {
    let bare = Bare::new();
    let mut short_remote = slices(4);
    short_remote.remote.pop();
    let mut short_lengths = slices(4);
    short_lengths.length = None;
    short_lengths.lengths = vec![4096; 3];
    for (slices, field) in [(short_remote, "remote"), (short_lengths, "length")] {
        let (reason, message) = transfer_refusal(bare.transfer(request(slices)));
        assert_eq!(reason, Reason::BadArgument, "{message}");
        assert!(message.contains(field), "{field} is not named: {message}");
    }
    bare.registers_a_good_one(1);
}

#[test]
fn fields_that_make_no_sense() {
    let bare = Bare::new();
    let good = || request(slices(1));
    let cases = [
        ("transfer_id", TransferRequest { transfer_id: vec![5; 15], ..good() }),
        ("op", TransferRequest { op: 0, ..good() }),
        ("op", TransferRequest { op: 99, ..good() }),
        ("tag", TransferRequest { tag: vec![1; 3], ..good() }),
        ("slices", TransferRequest { slices: None, ..good() }),
    ];
    for (field, request) in cases {
        let (reason, message) = transfer_refusal(bare.transfer(request));
        assert_eq!(reason, Reason::BadArgument, "{field}: {message}");
        assert!(message.contains(field), "{field} is not named: {message}");
    }
    bare.registers_a_good_one(1);
}

#[test]
fn k1_a_token_that_is_nobodys() {
    let bare = Bare::new();
    let stolen = vec![0x5a; 32];
    for token in [Vec::new(), vec![1], stolen.clone()] {
        let answer = bare.engine.call_as(&token, |mut client, token| async move {
            client.transfer(token.request(request(slices(1)))).await
        });
        assert_eq!(transfer_refusal(answer).0, Reason::Unauthorised);
        let register = RegisterRegionsRequest::default();
        let answer = bare.engine.call_as(&token, |mut client, token| async move {
            client.register_regions(token.request(register)).await
        });
        let (reason, _) = refusal(answer, |reply| reply.failure.clone()).unwrap();
        assert_eq!(reason, Reason::Unauthorised);
    }
    let fd = handover::memfd(LENGTH, MemfdFlags::empty(), SealFlags::SHRINK).unwrap();
    let answer = handover::send(&bare.daemon.fd_socket(), &stolen, 1, fd.as_fd()).unwrap();
    assert_eq!(answer, Some(Reason::Unauthorised));
    bare.registers_a_good_one(1);
}

#[test]
fn k1_another_engines_token_reaches_only_that_engine() {
    let bare = Bare::new();
    let other = RawEngine::attach(bare.daemon.socket()).unwrap();
    bare.registers_a_good_one(1);
    // The handle was the first engine's: the second cannot name it.
    let request = RegisterRegionsRequest { regions: vec![shared(BASE, LENGTH, 1, 0)], layouts: Vec::new() };
    let answer =
        other.call(|mut client, token| async move { client.register_regions(token.request(request)).await });
    let (reason, message) = refusal(answer, |reply| reply.failure.clone()).unwrap();
    assert_eq!(reason, Reason::BadArgument, "{message}");
}

#[test]
fn cancelling_what_never_was() {
    let bare = Bare::new();
    for transfer_id in [vec![9; 16], vec![9; 3]] {
        let cancel = CancelRequest { transfer_id };
        let answer =
            bare.engine.call(|mut client, token| async move { client.cancel(token.request(cancel)).await });
        let (reason, message) = refusal(answer, |reply| reply.failure.clone()).unwrap();
        assert!([Reason::BadArgument, Reason::NotYours].contains(&reason), "{reason:?}: {message}");
    }
}

/// Hands the descriptor over and registers it. It may be refused at either step.
fn refused_memory(bare: &Bare, fd: &OwnedFd, length: u64, offset: u64) -> Reason {
    const HANDLE: u64 = 77;
    if let Some(reason) = bare.hand_over(HANDLE, fd) {
        return reason;
    }
    let answer = bare.register(vec![shared(BASE, length, HANDLE, offset)]);
    let (reason, message) = refusal(answer, |reply| {
        assert!(reply.regions.is_empty(), "all or nothing");
        let failure = reply.failure.clone();
        assert_eq!(failure.as_ref().and_then(|failure| failure.index), Some(0), "{failure:?}");
        failure
    })
    .unwrap();
    assert!(!message.is_empty());
    reason
}

#[test]
fn g5_a_memfd_that_can_shrink() {
    let bare = Bare::new();
    let unsealed = handover::memfd(LENGTH, MemfdFlags::empty(), SealFlags::empty()).unwrap();
    assert_eq!(refused_memory(&bare, &unsealed, LENGTH, 0), Reason::UnsupportedMemory);
    bare.registers_a_good_one(1);
}

#[test]
fn g5_a_memfd_of_huge_pages() {
    let bare = Bare::new();
    match handover::memfd(2 << 20, MemfdFlags::HUGETLB, SealFlags::SHRINK) {
        Ok(huge) => {
            assert_eq!(refused_memory(&bare, &huge, 2 << 20, 0), Reason::UnsupportedMemory);
            bare.registers_a_good_one(1);
        }
        Err(error) => println!("skipped: this kernel makes no memfd of huge pages: {error}"),
    }
}

#[test]
fn g5_a_memfd_shorter_than_claimed() {
    let bare = Bare::new();
    let fd = || handover::memfd(LENGTH, MemfdFlags::empty(), SealFlags::SHRINK).unwrap();
    let accepted = [Reason::OutOfBounds, Reason::BadArgument];
    for (length, offset) in [(LENGTH + 1, 0), (LENGTH, 4096), (4096, u64::MAX - 4095)] {
        // A fresh engine each, because a refused handle may or may not be used up.
        let engine = RawEngine::attach(bare.daemon.socket()).unwrap();
        let fd_socket = bare.daemon.fd_socket();
        let token = engine.attached().token.clone();
        assert_eq!(handover::send(&fd_socket, &token, 1, fd().as_fd()).unwrap(), None);
        let request =
            RegisterRegionsRequest { regions: vec![shared(BASE, length, 1, offset)], layouts: Vec::new() };
        let answer = engine
            .call(|mut client, token| async move { client.register_regions(token.request(request)).await });
        let (reason, message) = refusal(answer, |reply| reply.failure.clone()).unwrap();
        assert!(accepted.contains(&reason), "{length} at {offset}: {reason:?} {message}");
    }
    bare.registers_a_good_one(1);
}

#[test]
fn g5_a_descriptor_that_is_no_memfd() {
    let bare = Bare::new();
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    assert_eq!(refused_memory(&bare, &file, LENGTH, 0), Reason::UnsupportedMemory);
    bare.registers_a_good_one(1);
}

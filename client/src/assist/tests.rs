//! The engine's side of a ring, with the tests in the daemon's place.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use kvferry_proto::ring::{self, PIECES, SLOTS, Word, operation, status};
use rustix::io::Errno;

use super::*;
use crate::{assist::serve::Round, memory::Backing};

/// A server that is driven by hand, and the daemon's view of its ring.
struct Rig {
    server: Server,
    daemon: Ring,
    bell: Bell,
    duty: Arc<Duty>,
}

fn regions(ranges: &[(u64, u64)]) -> Arc<Regions> {
    let regions = Arc::<Regions>::default();
    let backing = |&(base, length): &(u64, u64)| Backing { base, length, file: None };
    let memory: Vec<_> = ranges.iter().map(backing).collect();
    let region = |(id, backing): (usize, &Backing)| crate::Region {
        id: id as u32,
        generation: 1,
        base: backing.base,
        length: backing.length,
        kind: crate::MemoryKind::Process,
    };
    let mut told: Vec<_> = memory.iter().enumerate().map(region).collect();
    assert!(regions.record(0, &mut told, memory));
    regions
}

fn rig(regions: Arc<Regions>) -> Rig {
    let ring = Ring::new().unwrap();
    let (daemon, bell, duty) = (ring.twin(), ring.bell(), Arc::<Duty>::default());
    let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    Rig { server: Server::new(ring, memory, regions, duty.clone()), daemon, bell, duty }
}

impl Rig {
    fn post(&self, slot: usize, operation: u32, pieces: &[(u64, u64)]) {
        for (at, (address, length)) in pieces.iter().enumerate() {
            let entry = [address.to_ne_bytes(), length.to_ne_bytes()].concat();
            let place = ring::table_at(slot) + at * ring::ENTRY_BYTES;
            rustix::io::pwrite(self.bell.as_fd(), &entry, place as u64).unwrap();
        }
        self.daemon.word(slot, Word::Operation).store(operation, SeqCst);
        self.daemon.word(slot, Word::Count).store(pieces.len() as u32, SeqCst);
        self.daemon.word(slot, Word::Status).store(status::POSTED, SeqCst);
    }

    fn status(&self, slot: usize) -> u32 {
        self.daemon.word(slot, Word::Status).load(SeqCst)
    }

    fn fault(&self, slot: usize) -> (u32, Errno) {
        assert_eq!(self.status(slot), status::FAILED);
        let errno = self.daemon.word(slot, Word::Errno).load(SeqCst).cast_signed();
        (self.daemon.word(slot, Word::Piece).load(SeqCst), Errno::from_raw_os_error(errno))
    }
}

#[test]
fn pieces_are_copied_both_ways() {
    let memory: Vec<u8> = (0..=255).collect();
    let base = memory.as_ptr().addr() as u64;
    let mut rig = rig(regions(&[(base, 256)]));
    rig.post(1, operation::READ, &[(base + 10, 3), (base + 200, 2)]);
    rig.post(3, operation::WRITE, &[(base + 100, 4)]);
    rustix::io::pwrite(rig.bell.as_fd(), b"rope", ring::data_at(3) as u64).unwrap();
    assert_eq!(rig.server.round(), Round::Served);
    assert_eq!((rig.status(1), rig.status(3), rig.status(0)), (status::DONE, status::DONE, status::IDLE));
    let mut read = [0; 5];
    rustix::io::pread(rig.bell.as_fd(), &mut read, ring::data_at(1) as u64).unwrap();
    assert_eq!(read, [10, 11, 12, 200, 201]);
    assert_eq!(std::hint::black_box(&memory)[99..105], [99, b'r', b'o', b'p', b'e', 104]);
    assert_eq!(rig.server.round(), Round::Idle);
}

#[test]
fn nothing_but_registered_private_memory_is_touched() {
    let memory = [7u8; 64];
    let base = memory.as_ptr().addr() as u64;
    let shared = crate::SharedBuffer::new(4096).unwrap();
    let registered = regions(&[(base, 32), (1 << 20, 16)]);
    let mut rig = rig(registered.clone());
    let cases = [
        (operation::WRITE, vec![(base, 32), (base, 33)], (1, Errno::FAULT)),
        (operation::WRITE, vec![(base + 31, 2)], (0, Errno::FAULT)),
        (operation::WRITE, vec![(shared.address(), 1)], (0, Errno::FAULT)),
        (operation::WRITE, vec![(u64::MAX, 2)], (0, Errno::FAULT)),
        (operation::WRITE, vec![(base, 1 << 40)], (0, Errno::TOOBIG)),
        (operation::WRITE, vec![(base, u64::MAX)], (0, Errno::TOOBIG)),
        (9, vec![(base, 1)], (0, Errno::OPNOTSUPP)),
        // Registered, but not there: an errno, and no crash.
        (operation::READ, vec![(base, 1), (1 << 20, 16)], (1, Errno::IO)),
        (operation::WRITE, vec![(1 << 20, 16)], (0, Errno::IO)),
    ];
    for (operation, pieces, fault) in cases {
        rig.post(0, operation, &pieces);
        assert_eq!(rig.server.round(), Round::Served);
        assert_eq!(rig.fault(0), fault, "{pieces:?}");
    }
    rig.daemon.word(0, Word::Count).store(PIECES as u32 + 1, SeqCst);
    rig.daemon.word(0, Word::Operation).store(operation::READ, SeqCst);
    rig.daemon.word(0, Word::Status).store(status::POSTED, SeqCst);
    assert_eq!(rig.server.round(), Round::Served);
    assert_eq!(rig.fault(0), (0, Errno::TOOBIG));
    assert_eq!(std::hint::black_box(&memory), &[7; 64]);
    // What is just being registered may be looked at; what was unregistered may not.
    let asked = registered.ask(&[Backing { base: base + 40, length: 8, file: None }]);
    rig.post(0, operation::READ, &[(base + 40, 8)]);
    rig.server.round();
    assert_eq!(rig.status(0), status::DONE);
    drop(asked);
    rig.post(0, operation::READ, &[(base + 40, 8)]);
    rig.server.round();
    assert_eq!(rig.fault(0), (0, Errno::FAULT));
    assert!(registered.remove(0, &[0]).is_some());
    rig.post(0, operation::READ, &[(base, 1)]);
    rig.server.round();
    assert_eq!(rig.fault(0), (0, Errno::FAULT));
}

/// I1: what a daemon had posted when it was lost does not happen late.
#[test]
fn who_is_retired_claims_nothing() {
    let memory = [7u8; 8];
    let base = memory.as_ptr().addr() as u64;
    let mut rig = rig(regions(&[(base, 8)]));
    rig.post(2, operation::WRITE, &[(base, 8)]);
    rig.duty.lock().retired = true;
    assert_eq!(rig.server.round(), Round::Retired);
    assert_eq!(rig.status(2), status::POSTED);
    assert_eq!(std::hint::black_box(&memory), &[7; 8]);
}

#[test]
fn a_slot_that_was_taken_back_is_left_alone() {
    let mut rig = rig(regions(&[]));
    for status in [status::IDLE, status::CLAIMED, status::DONE, status::FAILED, 77] {
        (0..SLOTS).for_each(|slot| rig.daemon.word(slot, Word::Status).store(status, SeqCst));
        assert_eq!(rig.server.round(), Round::Idle);
        assert!((0..SLOTS).all(|slot| rig.status(slot) == status));
    }
}

#[test]
fn the_thread_serves_until_it_is_retired_and_is_quiet_then() {
    let memory = [7u8; 8];
    let base = memory.as_ptr().addr() as u64;
    let assistant = Assistant::start(regions(&[(base, 8)])).unwrap();
    let begun = Instant::now();
    // Nothing is posted: it waits, and hears its bell all the same.
    assert!(assistant.retire());
    assistant.stop();
    drop(assistant);
    assert!(begun.elapsed() < Duration::from_secs(5));
    let duty = Duty::default();
    let on_duty = duty.begin().unwrap();
    assert!(duty.lock().copying);
    drop(on_duty);
    assert!(!duty.lock().copying);
    duty.lock().retired = true;
    assert!(duty.begin().is_none());
}

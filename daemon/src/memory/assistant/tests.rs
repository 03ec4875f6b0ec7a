//! The protocol of a slot, with threads of this process in the engine's place: well-behaved, silent, dead and hostile.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::Command,
    sync::atomic::{AtomicU32, AtomicU64},
    thread,
};

use kvferry_proto::ring;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::*;
use crate::memory::{
    Awaited, EngineMemory, LockPolicy, MapOptions, ProcessAccess, Quota, RegionRequest, Registrar,
    RevocationBook, Source, SystemDriver, Unregister, testing::sealed_memfd,
};

/// Far less than what a test waits where it must not.
const SOON: Duration = Duration::from_secs(5);
/// An answer that no test waits for.
const LONG: Duration = Duration::from_secs(3600);

fn pidfd(pid: Pid) -> Arc<OwnedFd> {
    Arc::new(pidfd_open(pid, PidfdFlags::NONBLOCK).expect("a pidfd"))
}

fn blank_ring() -> Arc<OwnedFd> {
    let memfd = sealed_memfd(ring::BYTES as u64);
    for (at, word) in [(ring::MAGIC_AT, ring::MAGIC), (ring::VERSION_AT, ring::VERSION)] {
        rustix::io::pwrite(&memfd, &word.to_ne_bytes(), at as u64).expect("a word");
    }
    Arc::new(memfd)
}

fn map(memfd: &OwnedFd) -> Mapping {
    Mapping::new(memfd.as_fd(), 0, ring::BYTES as u64, MapOptions::default()).expect("a mapping")
}

fn assistant_of(memfd: &Arc<OwnedFd>, process: Arc<OwnedFd>, answer: Duration) -> Assistant {
    Assistant::new(map(memfd), memfd.clone(), Some(process), answer).expect("an assistant")
}

/// An engine whose memory is a vector: address 0 is its first byte.
struct Peer {
    ring: Ring,
    memfd: Arc<OwnedFd>,
}

fn pair(answer: Duration) -> (Assistant, Peer) {
    let memfd = blank_ring();
    let assistant = assistant_of(&memfd, pidfd(rustix::process::getpid()), answer);
    (assistant, Peer { ring: Ring::new(map(&memfd)).expect("a ring"), memfd })
}

impl Peer {
    fn status(&self, slot: usize) -> &AtomicU32 {
        self.ring.word(slot, Word::Status)
    }

    fn claim(&self) -> Option<usize> {
        let claims = |slot: &usize| {
            self.status(*slot).compare_exchange(status::POSTED, status::CLAIMED, SeqCst, SeqCst).is_ok()
        };
        (0..SLOTS).find(claims)
    }

    fn wait_claim(&self) -> usize {
        loop {
            match self.claim() {
                Some(slot) => return slot,
                None => thread::yield_now(),
            }
        }
    }

    fn beat(&self) {
        let beat = self.ring.beat().wrapping_add(1);
        rustix::io::pwrite(&*self.memfd, &beat.to_ne_bytes(), ring::BEAT_AT as u64).expect("a beat");
    }

    fn pieces(&self, slot: usize) -> Vec<(usize, usize)> {
        let count = self.ring.word(slot, Word::Count).load(SeqCst) as usize;
        let mut table = vec![0; count * ring::ENTRY_BYTES];
        rustix::io::pread(&*self.memfd, &mut table, ring::table_at(slot) as u64).expect("a table");
        let number = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")) as usize;
        table.chunks(ring::ENTRY_BYTES).map(|entry| (number(&entry[..8]), number(&entry[8..]))).collect()
    }

    fn carry_out(&self, slot: usize, memory: &mut [u8]) {
        let writes = self.ring.word(slot, Word::Operation).load(SeqCst) == operation::WRITE;
        let mut at = 0;
        for (address, length) in self.pieces(slot) {
            let bytes = &mut memory[address..address + length];
            match writes {
                true => self.ring.get_data(slot, at, bytes),
                false => self.ring.put_data(slot, at, bytes),
            }
            at += length;
        }
    }

    fn tell(&self, slot: usize, word: u32) {
        self.status(slot).store(word, SeqCst);
        self.ring.wake(slot);
    }
}

fn serve(peer: &Peer, memory: &mut [u8], requests: usize) {
    for _ in 0..requests {
        let slot = peer.wait_claim();
        peer.carry_out(slot, memory);
        peer.tell(slot, status::DONE);
    }
}

/// Lets the thread beside a test end, whatever becomes of the test.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn one(length: usize) -> [Extent; 1] {
    [Extent { address: 0, at: 0, length }]
}

#[test]
fn a_part_is_one_request_and_more_is_cut() {
    let (assistant, peer) = pair(LONG);
    let mut memory: Vec<u8> = (0..3 << 20).map(|at: u32| (at.wrapping_mul(0x9e37) >> 8) as u8).collect();
    let before = memory.clone();
    let scattered: Vec<Extent> =
        (0..1022).map(|n| Extent { address: n * 2048, at: (1021 - n as usize) * 100, length: 100 }).collect();
    let bells = assistant.ring.beat();
    thread::scope(|scope| {
        scope.spawn(|| serve(&peer, &mut memory, 1 + 3 + 2));
        let mut bytes = vec![0; 1022 * 100];
        assistant.read(&scattered, &mut bytes).expect("one request");
        for extent in &scattered {
            let from = extent.address as usize;
            assert!(bytes[extent.at..extent.at + 100] == before[from..from + 100]);
        }
        let mut all = vec![0; 3 << 20];
        assistant.read(&one(3 << 20), &mut all).expect("three requests");
        assert!(all == before);
        let many: Vec<Extent> = (0..1025).map(|n| Extent { address: n, at: 0, length: 1 }).collect();
        assistant.write(&many, &[7]).expect("two requests");
    });
    assert!(memory[..1025].iter().all(|byte| *byte == 7) && memory[1025..] == before[1025..]);
    assert_eq!(assistant.ring.beat(), bells, "nobody but the engine beats");
}

#[test]
fn what_nobody_claims_is_taken_back_and_then_not_even_posted() {
    let (assistant, peer) = pair(Duration::from_millis(30));
    let failure = assistant.write(&one(8), &[1; 8]).expect_err("nobody serves");
    assert_eq!(failure.reason, Reason::EngineSilent);
    assert!(
        !Reason::EngineSilent.text().is_empty() && peer.claim().is_none(),
        "taken back: not to be claimed"
    );
    let patient = Instant::now();
    for _ in 0..100 {
        assert_eq!(assistant.write(&one(8), &[1; 8]).expect_err("silent").reason, Reason::EngineSilent);
    }
    assert!(patient.elapsed() < Duration::from_millis(30 * 50), "each refusal waited");
    assert!(peer.claim().is_none());
    // It wakes: from here on it is asked again.
    peer.beat();
    let mut memory = vec![0; 8];
    thread::scope(|scope| {
        scope.spawn(|| serve(&peer, &mut memory, 1));
        let written = (0..100).find_map(|_| {
            assistant.write(&one(8), &[2; 8]).ok().or_else(|| {
                peer.beat();
                None
            })
        });
        assert!(written.is_some(), "never asked again");
    });
    assert_eq!(memory, [2; 8]);
}

/// I1: the engine may write at any moment, so no answer is given.
#[test]
fn what_is_claimed_is_waited_for() {
    let (assistant, peer) = pair(Duration::from_millis(10));
    let mut memory = vec![0; 8];
    thread::scope(|scope| {
        let written = scope.spawn(|| assistant.write(&one(8), &[3; 8]));
        let slot = peer.wait_claim();
        assistant.close();
        thread::sleep(Duration::from_millis(200));
        assert!(!written.is_finished(), "an answer while the engine held the slot");
        peer.carry_out(slot, &mut memory);
        peer.tell(slot, status::DONE);
        assert_eq!(written.join().expect("no panic"), Ok(()));
    });
    assert_eq!(memory, [3; 8]);
}

#[test]
fn the_end_of_the_process_is_proof_and_a_closed_lease_takes_back() {
    for claims in [false, true] {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("a child");
        let memfd = blank_ring();
        let assistant = assistant_of(&memfd, pidfd(Pid::from_child(&child)), LONG);
        let peer = Peer { ring: Ring::new(map(&memfd)).expect("a ring"), memfd };
        let begun = Instant::now();
        thread::scope(|scope| {
            let written = scope.spawn(|| assistant.write(&one(8), &[3; 8]));
            match claims {
                true => _ = peer.wait_claim(),
                false => while (0..SLOTS).all(|slot| peer.status(slot).load(SeqCst) != status::POSTED) {},
            }
            child.kill().expect("our child");
            let failure = written.join().expect("no panic").expect_err("it is dead");
            assert_eq!(failure.reason, Reason::EngineGone, "claimed: {claims}");
        });
        child.wait().expect("our child");
        assert!(begun.elapsed() < SOON);
    }
    let (assistant, peer) = pair(LONG);
    thread::scope(|scope| {
        let written = scope.spawn(|| assistant.write(&one(8), &[3; 8]));
        while (0..SLOTS).all(|slot| peer.status(slot).load(SeqCst) != status::POSTED) {}
        assistant.close();
        assert_eq!(written.join().expect("no panic").expect_err("closed").reason, Reason::EngineGone);
    });
    assert!(peer.claim().is_none());
    assert_eq!(assistant.write(&one(8), &[3; 8]).expect_err("closed").reason, Reason::EngineGone);
}

/// I1, I6: who is in a copy is waited for, by every fence and by the region's release; nothing of it is a matter of time.
#[tokio::test(flavor = "multi_thread")]
async fn a_claimed_copy_holds_up_fence_and_release_until_it_is_over() {
    let (driver, lock) = (Arc::new(SystemDriver::default()), LockPolicy::Node { lock_file: None });
    let registrar = Registrar::start(&lock, driver, 10).expect("a registrar");
    let quota = Quota { regions: 10, bytes: 1 << 20, layouts: 1 };
    let awaited = Awaited::new(Some(pidfd(rustix::process::getpid())), Duration::from_millis(500));
    let access = ProcessAccess::Assisted(awaited);
    let engine = EngineMemory::with_revocations(registrar, quota, access, RevocationBook::default());
    let request = || vec![RegionRequest { base: 0x1000, length: 0x1000, source: Source::Process }];
    let refused = engine.register(request(), vec![]).await.expect_err("nobody copies yet");
    assert_eq!((refused.reason, refused.index), (Reason::UnsupportedMemory, Some(0)));
    let memfd = blank_ring();
    engine.take_assistant(memfd.clone()).await.expect("a ring");
    assert_eq!(
        engine.take_assistant(blank_ring()).await.expect_err("a second one").reason,
        Reason::BadArgument
    );
    let peer = Arc::new(Peer { ring: Ring::new(map(&memfd)).expect("a ring"), memfd });
    let probed = peer.clone();
    let probe = thread::spawn(move || serve(&probed, &mut [0; 0x2000], 1));
    let (regions, _) = engine.register(request(), vec![]).await.expect("both ends are there");
    probe.join().expect("no panic");
    let view = engine.view();
    let region = view.table.get(regions[0].id).expect("a live region").clone();
    drop(view);
    let mut seat = engine.gate().seat();
    let copy = thread::spawn(move || {
        let _inside = seat.enter();
        let extent = Extent { address: 0x1000, at: 0, length: 8 };
        region.process().expect("private memory").write(&[extent], &[1; 8])
    });
    let claimed = peer.clone();
    let slot = tokio::task::spawn_blocking(move || claimed.wait_claim()).await.expect("no panic");
    let unregister = Unregister { bases: vec![0x1000], ..Unregister::default() };
    let mut release = engine.unregister(unregister).await.expect("a live region");
    let soon = Duration::from_millis(700);
    assert!(tokio::time::timeout(soon, release.settled()).await.is_err(), "released in the middle of a copy");
    assert!(!engine.gate().is_quiet(engine.gate().raise()), "proven in the middle of a copy");
    peer.tell(slot, status::DONE);
    tokio::time::timeout(SOON, release.settled()).await.expect("nobody is in a copy");
    assert_eq!(copy.join().expect("no panic"), Ok(()));
    tokio::time::timeout(SOON, engine.close()).await.expect("nothing is left");
    let refused = engine.take_assistant(blank_ring()).await.expect_err("the engine is gone");
    assert_eq!(refused.reason, Reason::EngineGone);
}

/// Where the process cannot be seen, its record lock on the ring tells. A process's own locks never stand in its own
/// way, so the engine is another one here.
#[test]
fn where_the_process_cannot_be_seen_its_lock_tells() {
    let memfd = blank_ring();
    let unlocked = Assistant::new(map(&memfd), memfd.clone(), None, LONG).expect_err("nobody locks it");
    assert_eq!(unlocked.reason, Reason::BadArgument);
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&*memfd));
    let program = "import fcntl,sys,time; f=open(sys.argv[1],'r+b',buffering=0); fcntl.lockf(f,fcntl.LOCK_EX); \
                   print(flush=True); time.sleep(1000)";
    let child =
        Command::new("python3").args(["-c", program, &path]).stdout(std::process::Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        println!("skipped: no python3 to hold a lock");
        return;
    };
    std::io::Read::read(child.stdout.as_mut().expect("its output"), &mut [0]).expect("it has the lock");
    let assistant = Assistant::new(map(&memfd), memfd.clone(), None, LONG).expect("it is locked");
    let peer = Peer { ring: Ring::new(map(&memfd)).expect("a ring"), memfd };
    thread::scope(|scope| {
        let written = scope.spawn(|| assistant.write(&one(8), &[3; 8]));
        peer.wait_claim();
        thread::sleep(Duration::from_millis(200));
        assert!(!written.is_finished(), "it lives");
        child.kill().expect("our child");
        assert_eq!(written.join().expect("no panic").expect_err("dead").reason, Reason::EngineGone);
    });
    child.wait().expect("our child");
}

#[test]
fn more_requests_than_slots_wait_their_turn_and_no_longer_than_an_answer() {
    let (assistant, peer) = pair(Duration::from_millis(100));
    thread::scope(|scope| {
        let written: Vec<_> = (0..SLOTS).map(|_| scope.spawn(|| assistant.write(&one(8), &[1; 8]))).collect();
        let slots: Vec<_> = (0..SLOTS).map(|_| peer.wait_claim()).collect();
        assert_eq!(assistant.write(&one(8), &[2; 8]).expect_err("no slot").reason, Reason::EngineSilent);
        let late = scope.spawn(|| assistant.write(&one(8), &[2; 8]));
        slots.iter().for_each(|slot| peer.tell(*slot, status::DONE));
        assert!(written.into_iter().all(|written| written.join().expect("no panic").is_ok()));
        let slot = peer.wait_claim();
        peer.tell(slot, status::DONE);
        assert_eq!(late.join().expect("no panic"), Ok(()));
    });
}

#[test]
fn what_the_engine_says_of_a_failure_is_believed_as_far_as_it_makes_sense() {
    let cases = [
        (libc::EFAULT as u32, 1, libc::EFAULT, "0x2000"),
        (0, u32::MAX, libc::EIO, "0x1000"),
        (u32::MAX, 2, libc::EIO, "0x1000"),
        (i32::MAX as u32, 0, i32::MAX, "0x1000"),
    ];
    let extents = [0x1000, 0x2000].map(|address| Extent { address, at: 0, length: 1 });
    for (errno, piece, code, address) in cases {
        let (assistant, peer) = pair(LONG);
        thread::scope(|scope| {
            let read = scope.spawn(|| assistant.read(&extents, &mut [0]));
            let slot = peer.wait_claim();
            peer.ring.word(slot, Word::Errno).store(errno, SeqCst);
            peer.ring.word(slot, Word::Piece).store(piece, SeqCst);
            peer.tell(slot, status::FAILED);
            let failure = read.join().expect("no panic").expect_err("it failed");
            assert_eq!((failure.reason, failure.code), (Reason::Driver, code));
            assert!(failure.message.contains(address), "{failure}");
        });
    }
}

#[test]
fn what_is_no_ring_is_refused() {
    let me = || Some(pidfd(rustix::process::getpid()));
    for (at, word) in [(ring::MAGIC_AT, 0), (ring::VERSION_AT, ring::VERSION + 1)] {
        let memfd = blank_ring();
        rustix::io::pwrite(&*memfd, &word.to_ne_bytes(), at as u64).expect("a word");
        let refused = Assistant::new(map(&memfd), memfd, me(), LONG).expect_err("no ring");
        assert_eq!(refused.reason, Reason::UnsupportedMemory);
    }
    let memfd = blank_ring();
    let short = Mapping::new(memfd.as_fd(), 0, 4096, MapOptions::default()).expect("a mapping");
    let refused = Assistant::new(short, memfd, me(), LONG).expect_err("too short");
    assert_eq!(refused.reason, Reason::UnsupportedMemory);
}

/// Take-backs race with claims: each request was either carried out or never claimed, and its caller knows which (I1).
#[test]
fn a_request_is_claimed_or_taken_back_and_never_both() {
    const ENOUGH: u64 = 200;
    let (assistant, peer) = pair(Duration::from_micros(200));
    let carried_out = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let (mut done, mut silent) = (0, 0);
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(SeqCst) {
                peer.beat();
                if let Some(slot) = peer.claim() {
                    carried_out.fetch_add(1, SeqCst);
                    peer.tell(slot, status::DONE);
                    thread::sleep(Duration::from_micros(150));
                }
            }
        });
        let _ends = Ends(&over);
        // However a busy machine schedules the two, both ends are to be seen often.
        while (done < ENOUGH || silent < ENOUGH) && begun.elapsed() < 4 * SOON {
            match assistant.write(&one(8), &[1; 8]) {
                Ok(()) => done += 1,
                Err(failure) => {
                    assert_eq!(failure.reason, Reason::EngineSilent);
                    silent += 1;
                    thread::yield_now();
                }
            }
            assert_eq!(carried_out.load(SeqCst), done, "after {silent} taken back");
        }
    });
    assert!(done > 0 && silent > 0, "{done} done, {silent} taken back: no race was seen");
}

/// Whatever is written into the ring, and whenever: an answer comes, and no byte beside those asked for is touched.
#[test]
fn a_hostile_engine_deceives_nobody_but_itself() {
    for seed in 0..20u64 {
        let (assistant, peer) = pair(Duration::from_millis(1));
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                while !over.load(SeqCst) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let noise = (state >> 33) as u32;
                    // Statuses are mostly plausible ones: a wild one ends the game at once.
                    let wild = seed.is_multiple_of(4) && noise.is_multiple_of(1000);
                    let word = if wild { noise } else { noise % 5 };
                    let slot = (noise >> 8) as usize % SLOTS;
                    match noise >> 4 & 7 {
                        0..=3 => peer.tell(slot, word),
                        4 => rustix::io::pwrite(
                            &*peer.memfd,
                            &noise.to_ne_bytes(),
                            u64::from(noise) % ring::BYTES as u64,
                        )
                        .map_or((), drop),
                        5 => peer.ring.word(slot, Word::Count).store(noise, SeqCst),
                        _ => peer.beat(),
                    }
                }
                // Nobody is left waiting for a slot that is claimed for ever.
                for _ in 0..100 {
                    (0..SLOTS).for_each(|slot| peer.tell(slot, status::DONE));
                    thread::sleep(Duration::from_micros(100));
                }
            });
            let _ends = Ends(&over);
            let begun = Instant::now();
            let mut bytes = [0xaa; 48];
            for _ in 0..200 {
                let extents = [Extent { address: 5, at: 16, length: 16 }];
                let known = [Reason::EngineSilent, Reason::Driver];
                let result = match seed % 2 {
                    0 => assistant.read(&extents, &mut bytes),
                    _ => assistant.write(&extents, &bytes),
                };
                assert!(result.map_or_else(|failure| known.contains(&failure.reason), |()| true));
                assert!(bytes[..16] == [0xaa; 16] && bytes[32..] == [0xaa; 16], "beside what was asked for");
                assert!(begun.elapsed() < SOON * 4);
            }
        });
    }
}

//! Every call: its token, its answers, its refusals; and descriptors on the wire.

use std::{collections::HashSet, os::unix::fs::MetadataExt, time::Duration};

use kvferry_client::{
    Engine, Error, Memory, Outcome, Path, Reason, Settlement, SharedBuffer, TransferId, aio,
};
use kvferry_proto::{engine::v1 as wire, types::v1 as types};
use tonic::Code;

use crate::fake::{Answer, BOOT, Fake, TOKEN, transfer};

const PEER: &str = "127.0.0.1:20001";
const PATIENCE: Duration = Duration::from_secs(20);

/// All calls by name, each only for whether it works.
fn every_call(engine: &Engine) -> Vec<(&'static str, Result<(), Error>)> {
    let process = Memory::Process { address: 4096, length: 4096 };
    let id = TransferId([1; 16]);
    vec![
        ("RegisterRegions", engine.register(&[process]).map(drop)),
        ("UnregisterRegions", engine.unregister(&[1]).map(drop)),
        ("TransferStream", engine.transfer(transfer(1)).map(drop)),
        ("TransferStream", engine.transfer(transfer(65_537)).map(drop)),
        ("Wait", engine.wait(id, PATIENCE).map(drop)),
        ("Cancel", engine.cancel(id).map(drop)),
        ("Probe", engine.probe(PEER, PATIENCE).map(drop)),
        ("ResetSession", engine.reset_session(PEER)),
    ]
}

#[test]
fn every_call_carries_the_token() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    for (call, result) in every_call(&engine) {
        result.unwrap_or_else(|error| panic!("{call}: {error}"));
    }
    engine.submit(transfer(1)).unwrap().wait().unwrap();
    let calls = fake.calls();
    assert_eq!(calls.len(), 9);
    assert_eq!(calls.iter().map(|(call, _)| call).collect::<HashSet<_>>().len(), 8);
    for (call, token) in calls {
        assert_eq!(token.as_deref(), Some(&TOKEN[..]), "{call}");
    }
}

#[test]
fn every_reason_arrives_whatever_the_code() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let reasons: Vec<Reason> = (1..=68).filter_map(|number| Reason::try_from(number).ok()).collect();
    assert_eq!(reasons.len(), 34, "a reason was added: is it in error::retryable?");
    for (index, reason) in reasons.into_iter().enumerate() {
        let code = [Code::Unavailable, Code::InvalidArgument, Code::Internal][index % 3];
        fake.answer(Answer::Status(code, Some(reason as i32)));
        match engine.transfer(transfer(1)) {
            Err(Error::Refused(failure)) => assert_eq!(failure.reason, reason),
            other => panic!("{reason:?}: {other:?}"),
        }
    }
    fake.answer(Answer::Status(Code::NotFound, Some(Reason::NotYours as i32)));
    for (call, result) in every_call(&engine) {
        assert!(
            matches!(&result, Err(Error::Refused(failure)) if failure.reason == Reason::NotYours),
            "{call}: {result:?}"
        );
    }
}

#[test]
fn a_status_without_a_reason_is_a_failed_call() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Status(Code::Unimplemented, None));
    for (call, result) in every_call(&engine) {
        assert!(
            matches!(&result, Err(Error::Call { call: name, .. }) if *name == call),
            "{call}: {result:?}"
        );
    }
}

#[test]
fn a_failure_in_a_reply_keeps_all_its_fields() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Failure(types::Failure {
        reason: types::Reason::Memlock.into(),
        code: 12,
        message: "needs 4096 bytes".into(),
        index: Some(3),
        retryable: true,
    }));
    let report = engine.transfer(transfer(5)).unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    let told = report.failure.unwrap();
    assert_eq!((told.reason, told.code, told.index, told.retryable), (Reason::Memlock, 12, Some(3), true));
    let probe = engine.probe(PEER, PATIENCE).unwrap();
    assert!(!probe.alive);
    assert_eq!(probe.failure, Some(told.clone()));
    let refused: [Result<(), Error>; 4] = [
        engine.register(&[Memory::Process { address: 1, length: 1 }]).map(drop),
        engine.unregister(&[1]).map(drop),
        engine.cancel(report.id).map(drop),
        engine.reset_session(PEER),
    ];
    for result in refused {
        assert!(matches!(&result, Err(Error::Refused(failure)) if *failure == told), "{result:?}");
    }
}

#[test]
fn a_done_transfer_reports_all_of_itself() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let id = TransferId([9; 16]);
    let mut order = transfer(3);
    order.id = Some(id);
    order.tag = Some([4; 16]);
    order.deadline = Some(Duration::from_millis(1234));
    order.policy.attempts = Some(1);
    let report = engine.transfer(order).unwrap();
    assert_eq!((report.id, report.outcome, report.peer_confirmed), (id, Outcome::Done, true));
    assert_eq!((report.slices, report.slices_done, report.bytes, report.bytes_done), (3, 3, 300, 300));
    assert_eq!((report.path, report.total), (Some(Path::Tcp), Duration::from_micros(10)));
    assert!(report.failure.is_none());
    let sent = fake.transfers().remove(0);
    assert_eq!((sent.transfer_id, sent.tag, sent.deadline_ms), (vec![9; 16], vec![4; 16], 1234));
    assert_eq!(sent.policy.unwrap().attempts, Some(1));
    assert_eq!(sent.session_id, PEER);
    assert_eq!(sent.op, types::Op::Write as i32);
}

#[test]
fn wait_names_the_boot_and_never_asks_for_ever_by_accident() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let id = TransferId([3; 16]);
    for (timeout, sent) in [(Duration::ZERO, 1), (Duration::from_millis(20), 20), (Duration::MAX, 0)] {
        assert_eq!(engine.wait(id, timeout).unwrap().outcome, Outcome::Done);
        let wait = fake.waits().pop().unwrap();
        assert_eq!((wait.boot_id, wait.transfer_id, wait.timeout_ms), (BOOT.to_vec(), vec![3; 16], sent));
    }
    fake.answer(Answer::Status(Code::DeadlineExceeded, None));
    assert!(matches!(engine.wait(id, Duration::from_millis(5)), Err(Error::Timeout(_))));
    fake.answer(Answer::Nothing);
    assert!(matches!(engine.wait(id, Duration::from_millis(5)), Err(Error::Timeout(_))));
    assert!(matches!(engine.probe(PEER, Duration::from_millis(5)), Err(Error::Timeout(_))));
}

#[test]
fn a_descriptor_travels_once_with_exactly_these_bytes() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let (one, other) = (SharedBuffer::new(8192).unwrap(), SharedBuffer::new(4096).unwrap());
    let regions = engine
        .register(&[
            Memory::SharedRange(&one, 0..4096),
            Memory::Process { address: 0x5000, length: 10 },
            Memory::Shared(&other),
            Memory::SharedRange(&one, 4096..8192),
        ])
        .unwrap();
    assert_eq!(regions.len(), 4);
    assert_eq!((regions[3].base, regions[3].length), (one.address() + 4096, 4096));

    let handed = fake.handed();
    assert_eq!(handed.len(), 2);
    let mut handles = Vec::new();
    for (file, buffer) in handed.iter().zip([&one, &other]) {
        assert_eq!(file.bytes.len(), 52);
        assert_eq!(file.bytes[..4], *b"KVFD");
        assert_eq!(file.bytes[4..8], 1u32.to_le_bytes());
        assert_eq!(file.bytes[8..40], TOKEN);
        assert_eq!(file.bytes[48..], [0; 4]);
        handles.push(u64::from_le_bytes(file.bytes[40..48].try_into().unwrap()));
        let [received] = &file.files[..] else { panic!("{} descriptors", file.files.len()) };
        let inode = std::fs::File::from(received.try_clone().unwrap()).metadata().unwrap().ino();
        assert_eq!(inode, rustix::fs::fstat(buffer).unwrap().st_ino);
    }
    assert_ne!(handles[0], handles[1]);
    let specs = fake.registered().remove(0).regions;
    let backing =
        |handle, offset| Some(wire::region_spec::Backing::SharedFd(wire::SharedFd { handle, offset }));
    assert_eq!(specs[0].backing, backing(handles[0], 0));
    assert_eq!(specs[1].backing, Some(wire::region_spec::Backing::Process(wire::ProcessMemory {})));
    assert_eq!((specs[1].base, specs[1].length), (0x5000, 10));
    assert_eq!(specs[2].backing, backing(handles[1], 0));
    assert_eq!(specs[3].backing, backing(handles[0], 4096));
}

#[test]
fn a_descriptor_not_taken_is_a_refusal_and_nothing_is_registered() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    fake.refuse_files(Reason::UnsupportedMemory as u16);
    let buffer = SharedBuffer::new(4096).unwrap();
    match engine.register(&[Memory::Shared(&buffer)]) {
        Err(Error::Refused(failure)) => assert_eq!(failure.reason, Reason::UnsupportedMemory),
        other => panic!("{other:?}"),
    }
    assert!(fake.registered().is_empty());
}

#[test]
fn a_range_outside_its_buffer_is_refused_by_its_index() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let buffer = SharedBuffer::new(4096).unwrap();
    let memory = [Memory::Shared(&buffer), Memory::SharedRange(&buffer, 1..4097)];
    match engine.register(&memory) {
        Err(Error::Refused(failure)) => {
            assert_eq!((failure.reason, failure.index), (Reason::BadArgument, Some(1)));
        }
        other => panic!("{other:?}"),
    }
    assert!(fake.handed().is_empty());
}

/// Whether `address` is mapped in this process.
fn is_mapped(address: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|number| u64::from_str_radix(number, 16).unwrap());
        (start..end).contains(&address) && line.contains("memfd:kvferry")
    })
}

#[test]
fn a_registered_buffer_stays_mapped_until_it_is_unregistered() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    // So large that nothing else of these tests fits into the hole it leaves.
    let buffer = SharedBuffer::new(48 << 20).unwrap();
    let middle = buffer.address() + (24 << 20);
    let region = engine.register(&[Memory::Shared(&buffer)]).unwrap()[0];
    drop(buffer);
    assert!(is_mapped(middle));
    assert_eq!(engine.unregister(&[region.id]).unwrap(), Settlement::Settled);
    assert!(!is_mapped(middle));
}

#[test]
fn threads_call_in_parallel_each_on_its_own() {
    const THREADS: usize = 8;
    const EACH: usize = 50;
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..EACH {
                    assert_eq!(engine.transfer(transfer(2)).unwrap().outcome, Outcome::Done);
                }
            });
        }
    });
    let ids: HashSet<_> = fake.transfers().into_iter().map(|sent| sent.transfer_id).collect();
    assert_eq!(ids.len(), THREADS * EACH);
}

#[test]
fn a_call_that_waits_does_not_hold_up_others() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Nothing);
    std::thread::scope(|scope| {
        scope.spawn(|| engine.transfer(transfer(1)));
        fake.await_transfers(1);
        fake.answer(Answer::Good);
        assert_eq!(engine.transfer(transfer(1)).unwrap().outcome, Outcome::Done);
        let pending = engine.submit(transfer(1)).unwrap();
        assert_eq!(pending.wait().unwrap().outcome, Outcome::Done);
        fake.end_lease();
    });
}

#[test]
fn submitted_transfers_are_bounded_by_the_daemons_limit() {
    let fake = Fake::with(|attached| {
        attached.limits.as_mut().unwrap().transfers = 2;
    });
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Nothing);
    let pending: Vec<_> = (0..2).map(|_| engine.submit(transfer(1)).unwrap()).collect();
    assert_ne!(pending[0].id(), pending[1].id());
    fake.await_transfers(2);
    match engine.submit(transfer(1)).unwrap().wait() {
        Err(Error::Refused(failure)) => {
            assert_eq!((failure.reason, failure.retryable), (Reason::Limit, true))
        }
        other => panic!("{other:?}"),
    }
    fake.end_lease();
    for pending in pending {
        assert_eq!(pending.wait().unwrap().outcome, Outcome::Unsettled);
    }
}

#[test]
fn the_async_engine_does_the_same_on_a_runtime_of_the_caller() {
    let fake = Fake::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let engine = aio::Engine::attach(fake.options()).await.unwrap();
        let mut events = engine.events();
        let buffer = SharedBuffer::new(4096).unwrap();
        let regions = engine.register(&[Memory::Shared(&buffer)]).await.unwrap();
        let transfers: Vec<_> = (0..20)
            .map(|_| {
                let engine = engine.clone();
                tokio::spawn(async move { engine.transfer(transfer(4)).await.unwrap() })
            })
            .collect();
        for report in transfers {
            assert_eq!(report.await.unwrap().outcome, Outcome::Done);
        }
        let id = TransferId([5; 16]);
        assert_eq!(engine.wait(id, PATIENCE).await.unwrap().outcome, Outcome::Done);
        assert_eq!(engine.cancel(id).await.unwrap(), Settlement::Settled);
        assert!(engine.probe(PEER, PATIENCE).await.unwrap().alive);
        engine.reset_session(PEER).await.unwrap();
        assert_eq!(engine.unregister(&[regions[0].id]).await.unwrap(), Settlement::Settled);
        assert!(fake.calls().iter().all(|(_, token)| token.as_deref() == Some(&TOKEN[..])));
        fake.end_lease();
        let last = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap();
        assert!(matches!(last, Some(kvferry_client::Event::Detached { .. })), "{last:?}");
        drop(engine);
    });
}

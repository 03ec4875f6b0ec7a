//! The own daemon restarted: the engine attaches again by itself, and what was under way gets its end.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use kvferry_client::{
    Engine, EngineOptions, Error, Event, Memory, Outcome, Policy, Reason, Report, Settlement, SharedBuffer,
};
use kvferry_proto::{engine::v1 as wire, types::v1 as types};
use tonic::Code;

use crate::fake::{Answer, BOOT, Fake, First, NEXT_BOOT, SESSION, transfer};

const LIMIT: Duration = Duration::from_secs(20);

/// A daemon whose process nobody can watch: its exit is proven by the next one alone.
fn unwatched() -> Fake {
    Fake::with(|attached| attached.daemon_pid = 1)
}

fn attach(fake: &Fake) -> Engine {
    Engine::attach(EngineOptions { reattach: true, ..fake.options() }).unwrap()
}

fn reattached(events: &Receiver<Event>) -> (String, Option<String>, [u8; 16]) {
    loop {
        if let Event::Reattached { session_id, moved_from, boot_id } = events.recv_timeout(LIMIT).unwrap() {
            return (session_id, moved_from, boot_id);
        }
    }
}

fn settled(events: &Receiver<Event>) -> Report {
    loop {
        if let Event::TransferSettled(report) = events.recv_timeout(LIMIT).unwrap() {
            return report;
        }
    }
}

fn assert_gone(report: &Report, outcome: Outcome) {
    assert_eq!(report.outcome, outcome, "{report:?}");
    assert_eq!(report.failure.as_ref().unwrap().reason, Reason::OwnDaemonGone);
    assert!(!report.peer_confirmed);
}

fn met(session: &str, incarnation: &[u8]) -> wire::engine_event::Event {
    wire::engine_event::Event::SessionChanged(wire::SessionChanged {
        session_id: session.into(),
        state: types::SessionState::Healthy.into(),
        incarnation: incarnation.to_vec(),
        ..Default::default()
    })
}

#[test]
fn c4_the_engine_comes_back_as_who_it_was() {
    let mut fake = unwatched();
    let options = EngineOptions {
        reattach: true,
        policy: Policy { attempts: Some(7), ..Policy::default() },
        advertise_host: Some("10.1.2.3".into()),
        ..fake.options()
    };
    let engine = Engine::attach(options).unwrap();
    let events = engine.events();
    let first = fake.attach_request();
    assert_eq!((first.preferred_port, first.known_peers.len()), (0, 0));
    for (session, who) in [("a:1", vec![1; 32]), ("b:1", vec![2; 32]), ("c:1", vec![3; 32]), ("b:1", vec![])]
    {
        fake.send(met(session, &who));
        assert!(matches!(events.recv_timeout(LIMIT), Ok(Event::SessionChanged { .. })));
    }
    engine.reset_session("c:1").unwrap();

    let next = fake.next_boot(|_| {});
    fake.restart(next);
    assert_eq!(reattached(&events), (SESSION.to_owned(), None, NEXT_BOOT));
    let again = fake.attach_request();
    assert_eq!(again.preferred_port, 20_000, "the port that peers know");
    let known: Vec<_> = again.known_peers.iter().map(|peer| peer.session_id.as_str()).collect();
    assert_eq!(known, ["a:1"], "neither whom nobody is pinned to, nor who was reset");
    assert!(fake.registered()[0].regions.is_empty(), "nothing to register, and that is said");
    let nothing = wire::Revocations::default();
    assert_eq!(
        (first.revocations.as_ref(), again.revocations.as_ref()),
        (None, Some(&nothing)),
        "and it is said"
    );
    let same = wire::AttachRequest { preferred_port: 0, known_peers: Vec::new(), revocations: None, ..again };
    assert_eq!(same, first, "key, name, policy and host");
    assert_eq!((engine.boot_id(), engine.session_id()), (NEXT_BOOT, SESSION));
    let report = engine.transfer(transfer(2)).unwrap();
    assert_eq!(report.outcome, Outcome::Done);
}

#[test]
fn c4_everything_is_registered_again_and_keeps_its_ids() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    let buffer = SharedBuffer::new(3 * 4096).unwrap();
    let memory = [
        Memory::SharedRange(&buffer, 0..4096),
        Memory::Process { address: 1 << 30, length: 77 },
        Memory::SharedRange(&buffer, 4096..8192),
    ];
    let regions = engine.register(&memory).unwrap();
    let ids: Vec<u32> = regions.iter().map(|region| region.id).collect();
    assert_eq!(ids, [1, 2, 3]);
    assert_eq!(engine.unregister(&[2]).unwrap(), Settlement::Settled);
    let before = fake.registered()[0].clone();
    fake.handed();

    fake.number_regions_from(40);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    reattached(&events);
    let again = fake.registered()[1].clone();
    let place = |spec: &wire::RegionSpec| (spec.base, spec.length);
    let kept = [&before.regions[0], &before.regions[2]].map(place);
    assert_eq!(again.regions.iter().map(place).collect::<Vec<_>>(), kept);
    let handed = fake.handed();
    assert_eq!(handed.len(), 1, "one file, handed over once");
    assert_eq!(handed[0].files.len(), 1);

    let more = engine.register(&[Memory::Process { address: 1 << 31, length: 5 }]).unwrap();
    assert_eq!(more[0].id, 43, "the daemon's number, which nobody has");
    assert_eq!(engine.unregister(&[3]).unwrap(), Settlement::Settled);
    assert_eq!(fake.unregistered().last().unwrap().region_ids, [42], "what this daemon calls it");
    match engine.unregister(&[41]) {
        Err(Error::Refused(failure)) => assert_eq!(failure.reason, Reason::Unregistered),
        other => panic!("the caller knows no region 41: {other:?}"),
    }
}

#[test]
fn a_region_that_the_next_daemon_refuses_is_told_and_the_others_are_registered() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    let at = |address| Memory::Process { address, length: 5 };
    engine.register(&[at(4096), at(8192), at(12_288)]).unwrap();
    fake.refuse_region_at(8192);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    match events.recv_timeout(LIMIT).unwrap() {
        Event::RegionInvalidated { region: 2, cause: Some(cause) } => {
            assert_eq!(cause.reason, Reason::UnsupportedMemory);
        }
        other => panic!("{other:?}"),
    }
    reattached(&events);
    let bases: Vec<_> = fake.registered().last().unwrap().regions.iter().map(|spec| spec.base).collect();
    assert_eq!(bases, [4096, 12_288]);
    assert_eq!(engine.unregister(&[2]).unwrap(), Settlement::Settled, "no daemon has it any more");
    assert!(fake.unregistered().is_empty());
}

/// I6: while a daemon registers everything again it may have what is unregistered already. Only its own word, or its
/// end, is proof.
#[test]
fn i6_what_is_unregistered_while_it_is_registered_again_is_unsettled_until_that_daemon_let_go() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    let at = |address| Memory::Process { address, length: 5 };
    engine.register(&[at(4096), at(8192)]).unwrap();
    fake.number_regions_from(40);
    // It takes the registration, and does not answer yet.
    fake.answer(Answer::Later);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    fake.await_registrations(2);
    for _ in 0..2 {
        assert_eq!(engine.unregister(&[1]).unwrap(), Settlement::Unsettled);
    }
    assert!(fake.unregistered().is_empty());
    fake.answer(Answer::Good);
    reattached(&events);
    fake.await_unregistrations(1);
    assert_eq!(fake.unregistered()[0].region_ids, [41], "what this daemon calls it");
    assert_eq!(engine.unregister(&[1]).unwrap(), Settlement::Settled);
    assert_eq!(engine.unregister(&[2]).unwrap(), Settlement::Settled);
    assert_eq!(fake.unregistered().last().unwrap().region_ids, [42]);
}

/// I6: the daemon that has our memory was not seen to exit, and no other has attached us.
#[test]
fn i6_nothing_is_settled_before_another_daemon_has_attached_the_engine() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    engine.register(&[Memory::Process { address: 4096, length: 5 }]).unwrap();
    fake.restart(First::Silence);
    fake.await_attaches(2);
    match engine.unregister(&[1]) {
        Err(Error::NoDaemon { .. }) => {}
        other => panic!("nothing is proven, and nobody was asked: {other:?}"),
    }
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    reattached(&events);
    let bases: Vec<_> = fake.registered().last().unwrap().regions.iter().map(|spec| spec.base).collect();
    assert_eq!(bases, [4096], "the caller was not told that it is unregistered");
}

/// What a descriptor or a registration meets, the next attempt may not.
#[test]
fn only_the_refusal_to_attach_is_final() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    engine.register(&[Memory::Process { address: 4096, length: 5 }]).unwrap();
    fake.answer(Answer::Status(Code::PermissionDenied, Some(Reason::Unauthorised as i32)));
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    fake.await_attaches(4);
    fake.answer(Answer::Good);
    reattached(&events);
    assert_eq!(engine.unregister(&[1]).unwrap(), Settlement::Settled);
}

/// A10: UNSETTLED while nothing is proven, and an end as soon as the next daemon is the proof.
#[test]
fn a10_what_was_in_flight_is_unsettled_and_then_told() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    fake.answer(Answer::Nothing);
    let pending = engine.submit(transfer(3)).unwrap();
    let id = pending.id();
    fake.await_transfers(1);
    fake.die();
    assert_gone(&pending.wait().unwrap(), Outcome::Unsettled);
    assert_gone(&engine.wait(id, Duration::from_millis(300)).unwrap(), Outcome::Unsettled);
    assert_eq!(engine.cancel(id).unwrap(), Settlement::Unsettled);

    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| engine.wait(id, Duration::MAX).unwrap());
        fake.answer(Answer::Good);
        let next = fake.next_boot(|_| {});
        fake.restart(next);
        assert_gone(&waiting.join().unwrap(), Outcome::Failed);
    });
    let told = settled(&events);
    assert_gone(&told, Outcome::Failed);
    assert_eq!(told.id, id);
    assert_gone(&engine.wait(id, Duration::from_secs(1)).unwrap(), Outcome::Failed);
    assert_eq!(engine.cancel(id).unwrap(), Settlement::Settled);
    assert!(fake.waits().is_empty() && fake.cancels().is_empty(), "the next daemon knows nothing of it");
}

/// The same for a transfer that the daemon itself had answered UNSETTLED before it went.
#[test]
fn a10_an_unsettled_answer_outlives_its_daemon() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    fake.answer(Answer::Outcome(wire::Outcome::Unsettled));
    let report = engine.transfer(transfer(1)).unwrap();
    assert_eq!(report.outcome, Outcome::Unsettled);
    fake.answer(Answer::Good);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    let told = settled(&events);
    assert_gone(&told, Outcome::Failed);
    assert_eq!(told.id, report.id);
}

/// The daemon that was attached to can be watched, and lives: whoever else answers at the socket proves nothing.
#[test]
fn a10_another_daemon_is_no_proof_while_the_first_one_runs() {
    let mut fake = Fake::start();
    let engine = attach(&fake);
    let events = engine.events();
    fake.answer(Answer::Nothing);
    let pending = engine.submit(transfer(1)).unwrap();
    let id = pending.id();
    fake.await_transfers(1);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    assert_gone(&pending.wait().unwrap(), Outcome::Unsettled);
    fake.await_attaches(3);
    assert!(matches!(events.recv_timeout(Duration::from_millis(300)), Err(RecvTimeoutError::Timeout)));
    assert_gone(&engine.wait(id, Duration::from_millis(100)).unwrap(), Outcome::Unsettled);
    assert_eq!(engine.boot_id(), BOOT);
}

/// The daemon lives and has only lost touch: it has released the engine before it takes it again.
#[test]
fn an_engine_that_was_dropped_attaches_to_the_same_daemon_again() {
    let fake = Fake::start();
    let engine = attach(&fake);
    let events = engine.events();
    fake.answer(Answer::Nothing);
    let pending = engine.submit(transfer(1)).unwrap();
    fake.await_transfers(1);
    fake.answer(Answer::Good);
    fake.end_lease();
    assert_eq!(reattached(&events), (SESSION.to_owned(), None, BOOT));
    assert_gone(&pending.wait().unwrap(), Outcome::Failed);
}

#[test]
fn calls_fail_promptly_until_the_engine_is_attached_again() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    fake.die();
    let started = Instant::now();
    // A call may find the connection broken before the lease's thread does.
    while !engine.probe("127.0.0.1:1", LIMIT).unwrap_err().to_string().contains("renewed") {
        assert!(started.elapsed() < LIMIT);
    }
    let no_daemon = |result: Result<(), Error>| {
        assert!(matches!(&result, Err(Error::NoDaemon { path, .. }) if *path == fake.socket()), "{result:?}");
    };
    no_daemon(engine.probe("127.0.0.1:1", Duration::from_secs(60)).map(drop));
    no_daemon(engine.register(&[Memory::Process { address: 4096, length: 1 }]).map(drop));
    no_daemon(engine.transfer(transfer(1)).map(drop));
    no_daemon(engine.submit(transfer(1)).unwrap().wait().map(drop));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(events.try_iter().all(|event| !matches!(event, Event::Detached { .. })));
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    reattached(&events);
    assert!(engine.probe("127.0.0.1:1", LIMIT).unwrap().alive);
}

#[test]
fn another_port_is_told() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    let next = fake.next_boot(|attached| attached.session_id = "127.0.0.1:20009".into());
    fake.restart(next);
    let (session, moved_from, _) = reattached(&events);
    assert_eq!((session.as_str(), moved_from.as_deref()), ("127.0.0.1:20009", Some(SESSION)));
    assert_eq!(engine.session_id(), "127.0.0.1:20009");
}

#[test]
fn an_engine_that_is_refused_for_good_is_detached() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    fake.restart(First::Status(Code::PermissionDenied, Some(Reason::Unauthorised as i32)));
    match events.recv_timeout(LIMIT) {
        Ok(Event::Detached { cause }) => assert!(cause.contains("Unauthorised"), "{cause}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(engine.transfer(transfer(1)), Err(Error::NoDaemon { .. })));
}

#[test]
fn what_is_refused_for_now_is_tried_again() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    fake.restart(First::Status(Code::Unavailable, Some(Reason::Draining as i32)));
    assert!(matches!(events.recv_timeout(Duration::from_millis(500)), Err(RecvTimeoutError::Timeout)));
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    reattached(&events);
}

fn draining() -> Answer {
    let reason = types::Reason::Draining.into();
    Answer::Failure(types::Failure { reason, retryable: true, ..Default::default() })
}

/// J1: a daemon that leaves has not taken the transfer; the next one gets it, within its deadline.
#[test]
fn a_transfer_that_a_leaving_daemon_did_not_take_goes_to_the_next_one() {
    let mut fake = unwatched();
    let engine = attach(&fake);
    let events = engine.events();
    fake.send(wire::engine_event::Event::Draining(wire::Draining { grace_ms: 1 }));
    assert!(matches!(events.recv_timeout(LIMIT), Ok(Event::Draining { .. })));
    fake.answer(draining());
    let mut order = transfer(3);
    order.deadline = Some(LIMIT);
    let pending = engine.submit(order).unwrap();
    let id = pending.id();
    fake.await_transfers(1);
    fake.answer(Answer::Good);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
    let report = pending.wait().unwrap();
    assert_eq!((report.outcome, report.id, report.slices), (Outcome::Done, id, 3));
    let sent = fake.transfers();
    assert_eq!((sent.len(), &sent[0].transfer_id), (2, &sent[1].transfer_id));
    assert_eq!(sent[0].slices, sent[1].slices);
    assert!(sent[1].deadline_ms < sent[0].deadline_ms, "{} of {}", sent[1].deadline_ms, sent[0].deadline_ms);
}

#[test]
fn a_transfer_held_back_ends_at_its_deadline_or_when_it_is_cancelled() {
    let fake = unwatched();
    let engine = attach(&fake);
    fake.send(wire::engine_event::Event::Draining(wire::Draining { grace_ms: 1 }));
    fake.answer(draining());
    let mut brief = transfer(1);
    brief.deadline = Some(Duration::from_millis(300));
    let (brief, long) = (engine.submit(brief).unwrap(), engine.submit(transfer(1)).unwrap());
    let report = brief.wait().unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!(report.failure.unwrap().reason, Reason::Draining);
    fake.await_transfers(2);
    // The answer is on its way; once it is here the transfer is held back, and can be cancelled.
    let asked = Instant::now();
    while !matches!(engine.cancel(long.id()), Ok(Settlement::Settled)) {
        assert!(asked.elapsed() < LIMIT);
    }
    assert_eq!(long.wait().unwrap().outcome, Outcome::Cancelled);
    assert_eq!(fake.transfers().len(), 2);
}

/// A peer that drains says DRAINING too; the own daemon stays, and the caller is told.
#[test]
fn draining_is_an_answer_where_the_own_daemon_stays() {
    let fake = unwatched();
    let engine = attach(&fake);
    fake.answer(draining());
    let report = engine.transfer(transfer(1)).unwrap();
    assert_eq!(report.failure.unwrap().reason, Reason::Draining);
    assert_eq!(fake.transfers().len(), 1);
}

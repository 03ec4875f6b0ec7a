//! Transfers between the caller and the daemon: what overtakes them there, and who tells their end.

use std::time::{Duration, Instant};

use kvferry_client::{
    Engine, EngineOptions, Error, Event, Lengths, Outcome, Range, Reason, Settlement, TransferId, aio,
};
use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use crate::fake::{Answer, Fake, transfer};

const LIMIT: Duration = Duration::from_secs(20);

fn page(number: u64) -> [Range; 1] {
    [Range { address: number * 4096, length: 4096 }]
}

fn draining() -> Answer {
    let reason = types::Reason::Draining.into();
    Answer::Failure(types::Failure { reason, retryable: true, ..Default::default() })
}

/// The fake has a runtime of its own, which is not to end inside this one.
fn inside(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

/// An engine whose daemon has said that it leaves, and takes nothing any more.
fn leaving() -> (Fake, Engine) {
    let fake = Fake::with(|attached| attached.daemon_pid = 1);
    let engine = Engine::attach(EngineOptions { reattach: true, ..fake.options() }).unwrap();
    let events = engine.events();
    fake.send(wire::engine_event::Event::Draining(wire::Draining { grace_ms: 1 }));
    assert!(matches!(events.recv_timeout(LIMIT), Ok(Event::Draining { .. })));
    fake.answer(draining());
    (fake, engine)
}

fn come_back(fake: &mut Fake, engine: &Engine) {
    let events = engine.events();
    restart(fake);
    while !matches!(events.recv_timeout(LIMIT).unwrap(), Event::Reattached { .. }) {}
}

fn restart(fake: &mut Fake) {
    fake.answer(Answer::Good);
    let next = fake.next_boot(|_| {});
    fake.restart(next);
}

/// A1: a revocation goes its own way to the daemon, and may be there first.
#[test]
fn a1_a_transfer_says_which_revocations_were_before_it() {
    let fake = Fake::start();
    inside(async {
        let engine = aio::Engine::attach(fake.options()).await.unwrap();
        engine.transfer(transfer(1)).await.unwrap();
        let overtaken = engine.transfer(transfer(1));
        assert_eq!(engine.revoke(&page(1)).await.unwrap(), Settlement::Settled);
        assert_eq!(engine.revoke_tag([1; 16]).await.unwrap(), Settlement::Settled);
        overtaken.await.unwrap();
        engine.transfer(transfer(1)).await.unwrap();
        let stamps: Vec<_> = fake.transfers().iter().map(|sent| sent.own_epoch).collect();
        assert_eq!(stamps, [Some(0), Some(0), Some(2)]);
    });
}

/// A1: epochs carry on from one daemon to the next, and so do the stamps.
#[test]
fn a1_what_a_leaving_daemon_did_not_take_keeps_what_was_known_when_it_was_asked_for() {
    let (mut fake, engine) = leaving();
    fake.answer(Answer::Good);
    engine.revoke(&page(1)).unwrap();
    fake.answer(draining());
    fake.know(7, 3);
    let pending = engine.submit(transfer(1)).unwrap();
    fake.await_replies(1);
    fake.know(7, 9);
    come_back(&mut fake, &engine);
    assert_eq!(pending.wait().unwrap().outcome, Outcome::Done);
    let sent = fake.transfers();
    assert_eq!(sent.len(), 2);
    assert_eq!((sent[0].own_epoch, sent[1].own_epoch), (Some(1), Some(1)));
    let known = wire::KnownTarget { incarnation: vec![7; 32], epoch: 3 };
    assert_eq!((&sent[0].known_target, &sent[1].known_target), (&None, &Some(known)));
    engine.transfer(transfer(1)).unwrap();
    assert_eq!(fake.transfers()[2].known_target, None, "another transfer");
}

/// A1: the pieces of a batch were all asked for when the batch was.
#[test]
fn a1_every_piece_of_a_batch_is_judged_as_the_first() {
    let fake = Fake::with(|attached| attached.limits.as_mut().unwrap().slices = 2);
    let engine = Engine::attach(fake.options()).unwrap();
    fake.know(7, 3);
    engine.transfer(transfer(5)).unwrap();
    let epochs: Vec<_> =
        fake.transfers().iter().map(|sent| sent.known_target.as_ref().map(|known| known.epoch)).collect();
    assert_eq!(epochs, [None, Some(3), Some(3)]);
}

#[test]
fn the_end_of_a_transfer_held_back_is_that_of_its_call() {
    let (mut fake, engine) = leaving();
    let pending = engine.submit(transfer(1)).unwrap();
    let id = pending.id();
    assert!(matches!(engine.wait(id, Duration::from_millis(300)), Err(Error::Timeout(_))));
    fake.await_transfers(1);
    fake.die();
    assert!(matches!(engine.wait(id, Duration::from_millis(300)), Err(Error::Timeout(_))), "it did not run");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| engine.wait(id, LIMIT).unwrap());
        restart(&mut fake);
        assert_eq!(waiting.join().unwrap().outcome, Outcome::Done);
    });
    assert_eq!(pending.wait().unwrap().outcome, Outcome::Done);
    assert!(fake.waits().is_empty(), "no daemon was asked");
}

/// The daemon has not heard of it yet: that is no end.
#[test]
fn a_cancellation_that_overtakes_its_transfer_reaches_it_all_the_same() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Later);
    let pending = engine.submit(transfer(1)).unwrap();
    let id = pending.id();
    fake.await_transfers(1);
    fake.overtake_by_cancels(2);
    std::thread::scope(|scope| {
        let cancelling = scope.spawn(|| engine.cancel(id).unwrap());
        fake.await_overtaking();
        fake.await_cancels(1);
        fake.answer(Answer::Outcome(wire::Outcome::Cancelled));
        assert_eq!(cancelling.join().unwrap(), Settlement::Settled);
    });
    assert_eq!(pending.wait().unwrap().outcome, Outcome::Cancelled);
    // Nobody has such a transfer in hand.
    fake.overtake_by_cancels(1);
    match engine.cancel(TransferId([9; 16])) {
        Err(Error::Refused(failure)) => assert_eq!(failure.reason, Reason::BadArgument),
        other => panic!("{other:?}"),
    }
}

/// What the daemon would refuse is refused while nobody is there to do so: noted, it would be refused with the whole
/// list at the next attachment, for good.
#[test]
fn what_is_no_range_is_refused_without_a_daemon() {
    let mut fake = Fake::with(|attached| attached.daemon_pid = 1);
    let engine = Engine::attach(EngineOptions { reattach: true, ..fake.options() }).unwrap();
    fake.die();
    let bad = [Range { address: 4096, length: 0 }, Range { address: u64::MAX, length: 2 }];
    for range in bad {
        match engine.revoke(&[page(1)[0], range]) {
            Err(Error::Refused(failure)) => assert_eq!(failure.index, Some(1)),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(engine.revoke(&[]), Err(Error::Refused(_))));
    let events = engine.events();
    restart(&mut fake);
    while !matches!(events.recv_timeout(LIMIT).unwrap(), Event::Reattached { .. }) {}
    assert!(fake.attach_request().revocations.unwrap().ranges.is_empty());
}

/// Futures of batches dropped in the middle, more of them than batches may be under way.
#[test]
fn a_dropped_batch_makes_room_for_others() {
    let fake = Fake::with(|attached| attached.limits.as_mut().unwrap().slices = 1);
    inside(async {
        let engine = aio::Engine::attach(fake.options()).await.unwrap();
        fake.answer(Answer::Nothing);
        let batch = || {
            let mut batch = transfer(2);
            batch.slices.lengths = Lengths::Uniform(1);
            batch
        };
        let begun = Instant::now();
        for number in 1..=70 {
            let mut dropped = Box::pin(engine.transfer(batch()));
            while fake.transfers().len() < number {
                let polled = tokio::time::timeout(Duration::from_millis(5), &mut dropped).await;
                assert!(polled.is_err(), "{polled:?}");
                assert!(begun.elapsed() < LIMIT);
            }
        }
        fake.answer(Answer::Good);
        assert_eq!(engine.transfer(batch()).await.unwrap().outcome, Outcome::Done);
    });
}

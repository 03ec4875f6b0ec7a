//! Large batches: chunks of one transfer, and several transfers where one may not be that large.

use std::{collections::HashSet, time::Duration};

use kvferry_client::{Engine, Error, Lengths, Outcome, Reason, Settlement, TransferId};
use kvferry_proto::engine::v1 as wire;
use tonic::Code;

use crate::fake::{Answer, Fake, transfer};

/// (chunk, slices)
fn limited(chunk_slices: u64, slices: u64) -> Fake {
    Fake::with(|attached| {
        let limits = attached.limits.as_mut().unwrap();
        limits.chunk_slices = chunk_slices;
        limits.slices = slices;
    })
}

fn count(message: &wire::TransferRequest) -> usize {
    message.slices.as_ref().unwrap().local.len()
}

#[test]
fn a_batch_is_one_message_up_to_the_limit_and_chunks_beyond() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    for (slices, messages) in
        [(0, vec![0]), (65_536, vec![65_536]), (65_537, vec![65_536, 1]), (131_073, vec![65_536, 65_536, 1])]
    {
        let before = fake.transfers().len();
        let report = engine.transfer(transfer(slices)).unwrap();
        assert_eq!((report.outcome, report.slices_done), (Outcome::Done, slices));
        let sent = fake.transfers().split_off(before);
        assert_eq!(sent.iter().map(count).collect::<Vec<_>>(), messages);
        assert!(sent.iter().all(|message| message.transfer_id == report.id.0));
        let expected = transfer(slices).slices;
        let local: Vec<u64> = sent.iter().flat_map(|m| m.slices.clone().unwrap().local).collect();
        let remote: Vec<u64> = sent.iter().flat_map(|m| m.slices.clone().unwrap().remote).collect();
        assert!(local == expected.local && remote == expected.remote, "{slices} slices changed on the way");
        let (last, others) = sent.split_last().unwrap();
        assert!(!last.more && others.iter().all(|message| message.more));
    }
}

#[test]
fn the_transfers_of_a_thread_share_a_stream_until_one_of_them_breaks_it() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    for _ in 0..3 {
        assert_eq!(engine.transfer(transfer(1)).unwrap().outcome, Outcome::Done);
    }
    assert_eq!(fake.streams(), 1);
    std::thread::scope(|scope| scope.spawn(|| engine.transfer(transfer(1)).unwrap()).join().unwrap());
    assert_eq!(fake.streams(), 2, "another thread has its own");
    fake.answer(Answer::Status(Code::InvalidArgument, Some(40)));
    assert!(matches!(engine.transfer(transfer(1)), Err(Error::Refused(_))));
    fake.answer(Answer::Good);
    assert_eq!(engine.transfer(transfer(1)).unwrap().outcome, Outcome::Done);
    assert_eq!(fake.streams(), 3);
}

#[test]
fn columns_that_disagree_never_leave_the_process() {
    let fake = Fake::start();
    let engine = Engine::attach(fake.options()).unwrap();
    let mut bad = transfer(3);
    bad.slices.lengths = Lengths::Each(vec![1; 4]);
    match engine.transfer(bad.clone()) {
        Err(Error::Refused(failure)) => assert_eq!(failure.reason, Reason::BadArgument),
        other => panic!("{other:?}"),
    }
    assert!(matches!(engine.submit(bad), Err(Error::Refused(_))));
    assert!(fake.transfers().is_empty());
}

#[test]
fn a_batch_beyond_the_limit_becomes_several_transfers_and_one_report() {
    let fake = limited(4, 10);
    let engine = Engine::attach(fake.options()).unwrap();
    let mut order = transfer(25);
    order.id = Some(TransferId([6; 16]));
    let report = engine.transfer(order.clone()).unwrap();
    assert_eq!((report.id, report.outcome), (TransferId([6; 16]), Outcome::Done));
    assert_eq!((report.slices, report.slices_done, report.bytes, report.bytes_done), (25, 25, 2500, 2500));
    assert!(report.peer_confirmed);
    let sent = fake.transfers();
    assert_eq!(sent.iter().map(count).collect::<Vec<_>>(), [4, 4, 2, 4, 4, 2, 4, 1]);
    let local: Vec<u64> = sent.iter().flat_map(|m| m.slices.clone().unwrap().local).collect();
    assert_eq!(local, order.slices.local);
    let ids: HashSet<_> = sent.iter().map(|message| message.transfer_id.clone()).collect();
    assert_eq!(ids.len(), 3);

    engine.transfer(order).unwrap();
    let again: HashSet<_> = fake.transfers().into_iter().map(|message| message.transfer_id).collect();
    assert_eq!(again, ids, "submitting it again joins the same transfers");
}

#[test]
fn a_cut_batch_ends_with_the_first_transfer_that_does_not_get_done() {
    let fake = limited(10, 10);
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Failure(kvferry_proto::types::v1::Failure {
        reason: Reason::OutOfBounds.into(),
        index: Some(2),
        ..Default::default()
    }));
    let report = engine.transfer(transfer(25)).unwrap();
    assert_eq!((report.outcome, report.slices, report.slices_done), (Outcome::Failed, 25, 0));
    assert_eq!(report.failure.unwrap().index, Some(2));
    assert_eq!(fake.transfers().len(), 1);
}

#[test]
fn cancelling_a_cut_batch_reaches_the_transfer_under_way_and_starts_no_other() {
    let fake = limited(10, 10);
    let engine = Engine::attach(fake.options()).unwrap();
    fake.answer(Answer::Later);
    let pending = engine.submit(transfer(25)).unwrap();
    let id = pending.id();
    fake.await_transfers(1);
    let settlement = std::thread::scope(|scope| {
        let cancelling = scope.spawn(|| engine.cancel(id));
        fake.await_cancels(1);
        // The transfer under way gets done all the same, as it may.
        fake.answer(Answer::Good);
        cancelling.join().unwrap().unwrap()
    });
    assert_eq!(settlement, Settlement::Settled);
    assert_eq!(fake.cancels(), [id.0.to_vec()]);
    let report = pending.wait().unwrap();
    assert_eq!((report.id, report.outcome), (id, Outcome::Cancelled));
    assert_eq!((report.slices, report.slices_done), (25, 10));
    assert_eq!(report.failure.unwrap().reason, Reason::Cancelled);
    assert_eq!(fake.transfers().len(), 1);
}

#[test]
fn waiting_for_an_unsettled_cut_batch_waits_for_the_transfer_that_is() {
    let fake = limited(10, 10);
    let engine = Engine::attach(fake.options()).unwrap();
    let events = engine.events();
    fake.answer(Answer::Outcome(wire::Outcome::Unsettled));
    let report = engine.transfer(transfer(25)).unwrap();
    assert_eq!(report.outcome, Outcome::Unsettled);
    let piece = fake.transfers().pop().unwrap().transfer_id;
    fake.send(wire::engine_event::Event::TransferSettled(wire::TransferReply {
        transfer_id: piece.clone(),
        outcome: wire::Outcome::Failed.into(),
        ..Default::default()
    }));
    match events.recv_timeout(Duration::from_secs(20)).unwrap() {
        kvferry_client::Event::TransferSettled(settled) => {
            assert_eq!((settled.id, settled.outcome), (report.id, Outcome::Failed));
        }
        other => panic!("{other:?}"),
    }
    fake.answer(Answer::Good);
    assert_eq!(engine.wait(report.id, Duration::from_secs(20)).unwrap().id, report.id);
    assert_eq!(fake.waits().pop().unwrap().transfer_id, piece);
}

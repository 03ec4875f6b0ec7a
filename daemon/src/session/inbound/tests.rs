//! Who is confirmed, which lanes get in, and what a fence waits for.

use std::{
    io::Read,
    net::TcpListener,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

use super::{session::MAX_RECORDS, *};
use crate::{
    memory::{LockPolicy, Quota, Registrar, SystemDriver, testing::own_memory},
    transport::{TargetSink, tcp::TargetLane},
};

const ALICE: Incarnation = Incarnation([0xa; 32]);
const BOB: Incarnation = Incarnation([0xb; 32]);
const LANE: LaneId = LaneId(1);

struct Place {
    inbound: Arc<Inbound>,
    carriers: Arc<Carriers>,
}

impl Place {
    fn new(limit: usize) -> Self {
        let policy = LockPolicy::Node { lock_file: None };
        let registrar =
            Registrar::start(&policy, Arc::new(SystemDriver::default()), 10).expect("a registrar");
        let quota = Quota { regions: 1, bytes: 1, layouts: 1 };
        let memory = EngineMemory::new(registrar, quota, Some(own_memory()));
        let carriers = Arc::new(Carriers::start(1, Duration::ZERO).expect("a thread"));
        Self { inbound: Inbound::new(memory, carriers.clone(), limit), carriers }
    }

    async fn confirm(&self, who: Incarnation) -> (Arc<InboundSession>, Vec<(LaneId, LaneRecord)>) {
        self.inbound.confirm(who, "peer:1".into(), false).await.expect("a session")
    }

    fn grant(&self, session: &Arc<InboundSession>, lane: LaneId) -> Token {
        self.inbound.grant(session, lane, LaneKind::Write).expect("a token")
    }

    /// Presents the token; returns the initiator's end of the connection where it was taken.
    fn attach(&self, lane: LaneId, kind: LaneKind, token: Token) -> Result<TcpStream, Failure> {
        let (here, there) = connection();
        self.inbound.attach(&Preface { kind, lane, token }, there).map(|()| here)
    }

    fn open(&self, session: &Arc<InboundSession>, lane: LaneId) -> TcpStream {
        let token = self.grant(session, lane);
        self.attach(lane, LaneKind::Write, token).expect("a lane")
    }

    /// A lane whose owner says that it is closed only when the test says so for it.
    fn reluctant(&self, session: &Arc<InboundSession>, lane: LaneId) -> TcpStream {
        let (here, there) = connection();
        let setup = TargetSetup {
            lane,
            kind: LaneKind::Write,
            memory: self.inbound.memory().clone(),
            stops: session.stops.clone(),
            sink: Arc::new(Deaf),
            pulse: session.pulse.clone(),
            checksums: false,
        };
        let open: TargetLane = self.carriers.serve(there, setup);
        session.book().live.insert(lane, LiveLane::Open(open));
        here
    }
}

#[derive(Debug)]
struct Deaf;

impl TargetSink for Deaf {
    fn lane_closed(&self, _: LaneId, _: LaneRecord, _: Failure) {}
}

fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let here = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    here.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    (here, listener.accept().expect("a connection").0)
}

fn record(processed: u64) -> LaneRecord {
    LaneRecord { processed, refused: vec![] }
}

fn gone() -> Failure {
    Failure::plain(Reason::ConnectionLost)
}

fn closes(session: &InboundSession, lane: LaneId, processed: u64) {
    session.lane_closed(lane, record(processed), gone());
}

fn poll<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// The connection was ended by the other side.
fn is_ended(mut stream: TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0) | Err(_))
}

/// I4: a token opens the one lane it was made for, once.
#[tokio::test]
async fn i4_a_token_is_good_for_one_lane_and_once() {
    let place = Place::new(9);
    let (session, fenced) = place.confirm(ALICE).await;
    assert!(fenced.is_empty());
    let token = place.grant(&session, LANE);
    let _open = place.attach(LANE, LaneKind::Write, token).expect("a lane");
    let again = place.attach(LANE, LaneKind::Write, token).expect_err("it was used");
    assert_eq!(again.reason, Reason::HandshakeFailed);
    assert!(place.attach(LaneId(2), LaneKind::Write, [7; 32]).is_err(), "it was never granted");
    for (lane, kind) in [(LaneId(9), LaneKind::Write), (LaneId(2), LaneKind::Read)] {
        let granted = LaneId(session.book().live.len() as u64 + 10);
        let token = place.grant(&session, granted);
        let lane = if lane == LaneId(9) { lane } else { granted };
        assert!(place.attach(lane, kind, token).is_err(), "another lane, or another kind");
        assert!(place.attach(granted, LaneKind::Write, token).is_err(), "the grant is spent");
    }
}

#[tokio::test]
async fn a_lane_number_is_granted_once() {
    let place = Place::new(9);
    let (session, _) = place.confirm(ALICE).await;
    place.grant(&session, LANE);
    let twice =
        |lane| place.inbound.grant(&session, lane, LaneKind::Read).expect_err("granted before").reason;
    assert_eq!(twice(LANE), Reason::BadArgument);
    place.inbound.fence_lane(&session, LANE, &gone()).await;
    assert_eq!(twice(LANE), Reason::BadArgument, "closed ones are remembered");
}

/// I8: lanes of a session are bounded, and one that was fenced makes room.
#[tokio::test]
async fn i8_a_session_has_so_many_lanes_and_no_more() {
    let place = Place::new(9);
    let (session, _) = place.confirm(ALICE).await;
    for lane in 0..MAX_LANES as u64 {
        place.grant(&session, LaneId(lane));
    }
    let refused = place.inbound.grant(&session, LaneId(1000), LaneKind::Write).expect_err("it is full");
    assert_eq!(refused.reason, Reason::Limit);
    assert_eq!(place.inbound.fence_lane(&session, LaneId(3), &gone()).await, record(0));
    place.grant(&session, LaneId(1000));
}

/// I8: so are the records of closed ones.
#[tokio::test]
async fn i8_records_are_bounded() {
    let place = Place::new(9);
    let (session, _) = place.confirm(ALICE).await;
    for lane in 0..MAX_RECORDS as u64 + 5 {
        place.grant(&session, LaneId(lane));
        closes(&session, LaneId(lane), 1);
    }
    let records = place.inbound.fence_all(&session, &gone()).await;
    assert_eq!((records.len(), records[0].0), (MAX_RECORDS, LaneId(5)), "the oldest are forgotten");
}

#[tokio::test]
async fn a_fence_revokes_the_token_and_ends_the_connection() {
    let place = Place::new(9);
    let (session, _) = place.confirm(ALICE).await;
    let unused = place.grant(&session, LaneId(2));
    let open = place.open(&session, LANE);
    place.inbound.fence_lane(&session, LaneId(2), &gone()).await;
    assert!(place.attach(LaneId(2), LaneKind::Write, unused).is_err());
    assert_eq!(place.inbound.fence_lane(&session, LANE, &gone()).await, record(0));
    assert!(is_ended(open));
    assert_eq!(place.inbound.fence_lane(&session, LaneId(77), &gone()).await, record(0), "never seen");
}

/// I2: no two sessions of an initiator are live at an endpoint, and the earlier one is fenced first.
#[tokio::test]
async fn i2_a_newer_session_fences_the_earlier_one() {
    let place = Place::new(9);
    let (first, _) = place.confirm(ALICE).await;
    let (other, _) = place.confirm(BOB).await;
    let unused = place.grant(&first, LaneId(2));
    let (open, others) = (place.open(&first, LANE), place.open(&other, LANE));
    let (second, fenced) = place.confirm(ALICE).await;
    let mut lanes: Vec<LaneId> = fenced.iter().map(|(lane, _)| *lane).collect();
    lanes.sort_unstable();
    assert_eq!(lanes, [LANE, LaneId(2)]);
    assert!(is_ended(open));
    first.superseded().await;
    assert!(place.attach(LaneId(2), LaneKind::Write, unused).is_err());
    let over = place.inbound.grant(&first, LaneId(3), LaneKind::Write).expect_err("it is over");
    assert_eq!(over.reason, Reason::ConnectionLost);
    place.grant(&second, LANE);
    assert_eq!(other.book().live.len(), 1, "others are left alone");
    drop(others);
}

/// I2: what lanes had processed is handed on from session to session until the initiator has heard it.
#[tokio::test]
async fn i2_records_are_handed_on_until_the_initiator_is_ready() {
    let place = Place::new(9);
    let (first, _) = place.confirm(ALICE).await;
    place.grant(&first, LANE);
    closes(&first, LANE, 5);
    let (second, fenced) = place.confirm(ALICE).await;
    assert_eq!(fenced, [(LANE, record(5))]);
    place.grant(&second, LaneId(2));
    closes(&second, LaneId(2), 7);
    let (third, fenced) = place.confirm(ALICE).await;
    assert_eq!(fenced, [(LANE, record(5)), (LaneId(2), record(7))]);
    third.ready();
    assert!(place.confirm(ALICE).await.1.is_empty());
}

/// I2: a handshake that ends while it waits for a fence does not make the next one forget to wait.
#[tokio::test]
async fn i2_a_confirmation_that_is_given_up_leaves_its_fence_to_the_next() {
    let place = Place::new(9);
    let (first, _) = place.confirm(ALICE).await;
    let _open = place.reluctant(&first, LANE);
    {
        let mut given_up = pin!(place.confirm(ALICE));
        assert!(poll(given_up.as_mut()).is_none());
    }
    let mut next = pin!(place.confirm(ALICE));
    assert!(poll(next.as_mut()).is_none(), "the lane is not closed");
    closes(&first, LANE, 3);
    let (_, fenced) = poll(next.as_mut()).expect("it is now");
    assert_eq!(fenced, [(LANE, record(3))]);
}

/// I2: of two handshakes at once the later one to come through fences the other; both waited.
#[tokio::test]
async fn i2_two_confirmations_at_once() {
    let place = Place::new(9);
    let (first, _) = place.confirm(ALICE).await;
    let _open = place.reluctant(&first, LANE);
    let (mut one, mut other) = (pin!(place.confirm(ALICE)), pin!(place.confirm(ALICE)));
    assert!(poll(one.as_mut()).is_none() && poll(other.as_mut()).is_none());
    closes(&first, LANE, 3);
    let (one, fenced) = poll(one.as_mut()).expect("a session");
    assert_eq!(fenced, [(LANE, record(3))]);
    let (_, fenced) = poll(other.as_mut()).expect("a session");
    assert_eq!(fenced, [(LANE, record(3))], "the initiator may never have heard it");
    one.superseded().await;
    assert_eq!(place.inbound.list().len(), 1);
}

/// I8: initiators are bounded. One that is over makes room, but not before its lanes are closed (I2).
#[tokio::test]
async fn i8_sessions_that_are_over_make_room() {
    let place = Place::new(1);
    let (session, _) = place.confirm(ALICE).await;
    let _open = place.reluctant(&session, LANE);
    let refusal =
        || async { place.inbound.confirm(BOB, "peer:2".into(), false).await.map(drop).map_err(|f| f.reason) };
    assert_eq!(refusal().await, Err(Reason::Limit));
    let cause = gone();
    let mut fence = pin!(place.inbound.fence_all(&session, &cause));
    assert!(poll(fence.as_mut()).is_none());
    assert_eq!(refusal().await, Err(Reason::Limit), "its lane is not closed");
    closes(&session, LANE, 0);
    assert_eq!(refusal().await, Ok(()));
}

/// I8: so does one whose handshake was never completed.
#[tokio::test]
async fn i8_a_session_that_nobody_serves_makes_room() {
    let place = Place::new(1);
    drop(place.confirm(ALICE).await);
    let (session, _) = place.confirm(BOB).await;
    assert_eq!(place.inbound.list(), [(BOB, "peer:1".to_owned(), 0)]);
    // The same initiator is let in whatever the limit, in its own place.
    place.confirm(BOB).await;
    session.superseded().await;
}

/// I10: all lanes are told before any is waited for, and nobody is let in any more.
#[tokio::test]
async fn i10_the_engines_end_ends_all_sessions() {
    let place = Place::new(9);
    let (alice, _) = place.confirm(ALICE).await;
    let (bob, _) = place.confirm(BOB).await;
    let slow = [place.reluctant(&alice, LANE), place.reluctant(&bob, LANE)];
    let failure = Failure::plain(Reason::EngineGone);
    let mut close = pin!(place.inbound.close(&failure));
    assert!(poll(close.as_mut()).is_none());
    slow.into_iter().for_each(|open| assert!(is_ended(open)));
    closes(&alice, LANE, 0);
    assert!(poll(close.as_mut()).is_none(), "one lane is left");
    closes(&bob, LANE, 0);
    assert!(poll(close.as_mut()).is_some());
    alice.superseded().await;
    let refused = place.inbound.confirm(ALICE, "peer:1".into(), false).await.expect_err("the engine is gone");
    assert_eq!(refused.reason, Reason::EngineGone);
}

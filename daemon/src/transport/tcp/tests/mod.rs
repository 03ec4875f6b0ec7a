//! Two ends of real connections on 127.0.0.1, or one end and a test that plays the other byte by byte.

mod hostile;
mod moves;
mod refusals;
mod revoking;
mod speed;
mod stopping;
mod sums;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
};

use super::{
    wire::{ACK_BYTES, Ack, FrameKind, HEADER_AND_TABLE_START, PartHeader, TRAILER_BYTES, Trailer},
    *,
};
use crate::transport::testing::{Engine, Events, PATIENCE, SPIN, TargetEnd, TestRegion};

const LANE: LaneId = LaneId(1);

/// A connection: the initiator's end and the target's.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let here = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let (there, _) = listener.accept().expect("a connection");
    for end in [&here, &there] {
        end.set_nodelay(true).expect("an option");
        end.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        end.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    }
    (here, there)
}

/// A connection that holds far less than a part.
fn narrow_connection() -> (TcpStream, TcpStream) {
    let (here, there) = connection();
    for end in [&here, &there] {
        let end = socket2::SockRef::from(end);
        end.set_send_buffer_size(32 << 10).expect("a size");
        end.set_recv_buffer_size(32 << 10).expect("a size");
    }
    (here, there)
}

/// Two engines with a lane between them.
struct Link {
    initiator: Engine,
    target: Engine,
    events: Arc<Events>,
    stops: Arc<Stops>,
    end: Arc<TargetEnd>,
    lane: Lane,
    served: TargetLane,
    _carriers: Carriers,
}

impl Link {
    fn new(kind: LaneKind) -> Self {
        Self::over(connection(), kind, false)
    }

    /// Whose daemons have agreed on checksums.
    fn summed(kind: LaneKind) -> Self {
        Self::over(connection(), kind, true)
    }

    fn over((here, there): (TcpStream, TcpStream), kind: LaneKind, sums: bool) -> Self {
        let carriers = Carriers::start(2, SPIN).expect("threads");
        let initiator = Initiator::summing(Engine::new(), &carriers, kind, here, sums);
        let target = Target::summing(Engine::new(), &carriers, kind, there, sums);
        Self {
            initiator: initiator.engine,
            target: target.engine,
            events: initiator.events,
            stops: target.stops,
            end: target.end,
            lane: initiator.lane,
            served: target.lane,
            _carriers: carriers,
        }
    }
}

/// An initiator's lane whose target is the test.
struct Initiator {
    engine: Engine,
    events: Arc<Events>,
    lane: Lane,
    pulse: Arc<Pulse>,
}

impl Initiator {
    fn start(carriers: &Carriers, kind: LaneKind, stream: TcpStream) -> Self {
        Self::of(Engine::new(), carriers, kind, stream)
    }

    fn of(engine: Engine, carriers: &Carriers, kind: LaneKind, stream: TcpStream) -> Self {
        Self::summing(engine, carriers, kind, stream, false)
    }

    fn summing(
        engine: Engine,
        carriers: &Carriers,
        kind: LaneKind,
        stream: TcpStream,
        checksums: bool,
    ) -> Self {
        let (events, pulse) = (Events::new(), Pulse::new());
        let (memory, sink) = (engine.memory.clone(), events.clone());
        let setup = InitiatorSetup { lane: LANE, kind, memory, sink, pulse: pulse.clone(), checksums };
        let lane = carriers.initiate(stream, setup);
        Self { engine, events, lane, pulse }
    }
}

/// A target's lane whose initiator is the test.
struct Target {
    engine: Engine,
    stops: Arc<Stops>,
    end: Arc<TargetEnd>,
    lane: TargetLane,
}

impl Target {
    fn start(carriers: &Carriers, kind: LaneKind, stream: TcpStream) -> Self {
        Self::of(Engine::new(), carriers, kind, stream)
    }

    fn of(engine: Engine, carriers: &Carriers, kind: LaneKind, stream: TcpStream) -> Self {
        Self::summing(engine, carriers, kind, stream, false)
    }

    fn summing(
        engine: Engine,
        carriers: &Carriers,
        kind: LaneKind,
        stream: TcpStream,
        checksums: bool,
    ) -> Self {
        let (stops, end) = (Stops::new(), Arc::<TargetEnd>::default());
        let (memory, pulse) = (engine.memory.clone(), Pulse::new());
        let (marks, sink) = (stops.clone(), end.clone());
        let setup = TargetSetup { lane: LANE, kind, memory, stops: marks, sink, pulse, checksums };
        let lane = carriers.serve(stream, setup);
        Self { engine, stops, end, lane }
    }
}

/// Header and table of a part of a single run.
fn frame(kind: FrameKind, sequence: u64, region: &TestRegion, address: u64, bytes: u32) -> Vec<u8> {
    frame_with(|header| header, kind, sequence, region, address, bytes)
}

/// The same, with something else in its header.
fn frame_with(
    change: impl FnOnce(PartHeader) -> PartHeader,
    kind: FrameKind,
    sequence: u64,
    region: &TestRegion,
    address: u64,
    bytes: u32,
) -> Vec<u8> {
    let header = PartHeader { kind, runs: 1, regions: 1, bytes, ..PartHeader::abort(sequence, TRANSFER) };
    let mut frame = change(header).encode().to_vec();
    frame.extend_from_slice(&region.info.id.0.to_le_bytes());
    frame.extend_from_slice(&region.info.generation.0.to_le_bytes());
    frame.extend_from_slice(&wire::Descriptor { address, length: bytes, region: 0 }.encode());
    frame
}

/// The transfer that the test's own frames belong to.
const TRANSFER: crate::domain::TransferId = crate::domain::TransferId([3; 16]);

fn trailer(sequence: u64) -> [u8; TRAILER_BYTES] {
    Trailer { aborted: None, sequence, checksum: 0 }.encode()
}

fn read_array<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).expect("bytes in time");
    bytes
}

fn read_ack(stream: &mut TcpStream) -> Ack {
    Ack::parse(&read_array::<ACK_BYTES>(stream)).expect("an ack")
}

/// Header, payload and trailer of a part of a single run, as a write lane's target sees it.
fn read_part(stream: &mut TcpStream) -> (PartHeader, Vec<u8>, Option<Trailer>) {
    read_part_with(|_, _| {}, stream)
}

/// The same, with somebody who takes what follows the table where checksums were agreed on.
fn read_part_with(
    behind: impl FnOnce(&mut TcpStream, &[u8]),
    stream: &mut TcpStream,
) -> (PartHeader, Vec<u8>, Option<Trailer>) {
    let head = read_array::<HEADER_AND_TABLE_START>(stream);
    let header = PartHeader::parse(head.first_chunk().expect("a header")).expect("a header");
    if header.kind == FrameKind::Abort {
        return (header, Vec::new(), None);
    }
    behind(stream, &head[wire::HEADER_BYTES..]);
    let mut payload = vec![0; header.bytes as usize];
    stream.read_exact(&mut payload).expect("payload in time");
    let trailer = Trailer::parse(&read_array(stream), header.sequence).expect("a trailer");
    (header, payload, Some(trailer))
}

fn send(stream: &mut TcpStream, pieces: &[&[u8]]) {
    pieces.iter().for_each(|piece| stream.write_all(piece).expect("the lane reads"));
}

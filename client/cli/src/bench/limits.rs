//! What the machine itself can do, measured beside every figure of kvferry's.
//!
//! Both limits move the same bytes between the same kind of memory (populated memfds) as the transfer they are
//! compared with. Local: one `memcpy` per slice into a shared mapping. Tcp: one blocking socket to another
//! process, writes of 1 MiB (one for the whole payload holds the socket, and is a third slower), reads as large as
//! what is left, an 8-byte acknowledgement, default sysctls. Neither checks, retries nor settles anything.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::Context;
use kvferry_client::SharedBuffer;

use crate::{
    children::Children,
    worker::{handle::Worker, protocol::Way},
    workloads::Plan,
};

/// Bytes of a call: what was fastest.
const WRITE_BYTES: usize = 1 << 20;

const ACK: [u8; 8] = *b"received";
/// A receiver that says nothing for so long has ended.
const SILENCE: Duration = Duration::from_secs(30);

/// The raw limit of one path for one plan.
#[derive(Debug)]
pub(crate) enum Limit<'a> {
    Copy(CopyLimit),
    Socket(SocketLimit<'a>),
}

impl<'a> Limit<'a> {
    pub(crate) fn new(children: &'a Children, way: Way, plan: &Plan) -> anyhow::Result<Self> {
        Ok(match way {
            Way::Local => Self::Copy(CopyLimit::new(plan)?),
            Way::Tcp | Way::Rdma | Way::None => Self::Socket(SocketLimit::new(children, plan.bytes())?),
        })
    }

    /// Memory that the limit of such a plan needs, bytes.
    pub(crate) fn footprint(way: Way, plan: &Plan) -> u64 {
        match way {
            Way::Local => plan.source.iter().chain(&plan.sink).sum(),
            Way::Tcp | Way::Rdma | Way::None => 2 * plan.bytes(),
        }
    }

    /// Wall time of one run, ns.
    pub(crate) fn measure(&mut self) -> anyhow::Result<u64> {
        let start = Instant::now();
        match self {
            Self::Copy(copy) => copy.run(),
            Self::Socket(socket) => socket.run()?,
        }
        Ok(start.elapsed().as_nanos() as u64)
    }

    pub(crate) fn finish(self) {
        if let Self::Socket(SocketLimit { receiver, stream, .. }) = self {
            drop(stream);
            receiver.quit();
        }
    }
}

/// (source, sink, length) of one slice, in the two buffers below.
type Span = (usize, usize, usize);

/// All buffers of each half laid end to end: one mapping a side.
#[derive(Debug)]
pub(crate) struct CopyLimit {
    source: SharedBuffer,
    sink: SharedBuffer,
    spans: Vec<Span>,
}

impl CopyLimit {
    fn new(plan: &Plan) -> anyhow::Result<Self> {
        let (sources, source) = starts(&plan.source);
        let (sinks, sink) = starts(&plan.sink);
        let spans = plan
            .slices
            .iter()
            .map(|slice| {
                let from = sources[slice.source_buffer as usize] + slice.source_offset;
                let to = sinks[slice.sink_buffer as usize] + slice.sink_offset;
                (from as usize, to as usize, slice.length as usize)
            })
            .collect();
        Ok(Self {
            source: SharedBuffer::new(source as usize)?,
            sink: SharedBuffer::new(sink as usize)?,
            spans,
        })
    }

    fn run(&mut self) {
        let (source, sink) = (self.source.as_slice(), self.sink.as_mut_slice());
        for (from, to, length) in &self.spans {
            sink[*to..to + length].copy_from_slice(&source[*from..from + length]);
        }
        // Nobody reads the sink here; the copies must happen all the same.
        std::hint::black_box(sink);
    }
}

/// Where each buffer starts when they are laid end to end, and their total.
fn starts(lengths: &[u64]) -> (Vec<u64>, u64) {
    let mut total = 0;
    let mut starts = Vec::with_capacity(lengths.len());
    for length in lengths {
        starts.push(total);
        total += length;
    }
    (starts, total)
}

/// The sending end; the receiving one is a process of its own, as a daemon is.
#[derive(Debug)]
pub(crate) struct SocketLimit<'a> {
    receiver: Worker<'a>,
    stream: TcpStream,
    source: SharedBuffer,
}

impl<'a> SocketLimit<'a> {
    fn new(children: &'a Children, bytes: u64) -> anyhow::Result<Self> {
        let source = SharedBuffer::new(usize::try_from(bytes)?)?;
        let mut receiver = Worker::start(children, "raw-socket")?;
        let port = receiver.raw_sink(bytes)?;
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self { receiver, stream, source })
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let mut ack = [0; ACK.len()];
        for bytes in self.source.as_slice().chunks(WRITE_BYTES) {
            self.stream.write_all(bytes).context("the raw socket broke")?;
        }
        self.stream.read_exact(&mut ack).context("the raw socket's receiver gave no acknowledgement")
    }
}

/// The receiving end: takes messages of `bytes` from one connection until it ends. Answers with the port.
pub(crate) fn serve_socket_sink(bytes: u64) -> anyhow::Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let port = listener.local_addr()?.port();
    let mut sink = SharedBuffer::new(usize::try_from(bytes)?)?;
    let serve = move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let _ = stream.set_nodelay(true);
        while stream.read_exact(sink.as_mut_slice()).is_ok() && stream.write_all(&ACK).is_ok() {}
    };
    std::thread::Builder::new().name("raw-sink".into()).spawn(serve)?;
    Ok(port)
}

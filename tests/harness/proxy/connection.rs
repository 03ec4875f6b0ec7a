//! One connection through the proxy: two pumps, their faults, and the record of what passed.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, tcp::ReadHalf, tcp::WriteHalf},
    sync::{mpsc, watch},
    time::sleep,
};

use super::{Controls, Cut, Fault, Kind, Passed, Shared, Toward};

/// Bytes read at once.
const CHUNK: usize = 64 << 10;
/// Bytes of a data connection kept to be repeated.
const KEPT: usize = 8 << 20;

/// What has passed over a connection; shared between its task and the handle.
#[derive(Debug)]
pub(super) struct Record {
    kind: OnceLock<Kind>,
    to_target: Flow,
    to_client: Flow,
    ended: AtomicBool,
    /// Nothing passes over this one.
    held: AtomicBool,
    /// The begin of the stream to the target, at most a chunk.
    head: Mutex<Vec<u8>>,
    /// The end of it, of a data connection.
    kept: Mutex<Vec<u8>>,
    replays: mpsc::Sender<Vec<u8>>,
    /// What a storm has in store for it, if it carries data.
    fate: Option<Fault>,
}

#[derive(Debug, Default)]
struct Flow {
    read: AtomicU64,
    handed_on: AtomicU64,
}

impl Flow {
    fn held(&self) -> u64 {
        // Handed on first: between the two loads it can only rise, and never beyond what was read.
        let handed_on = self.handed_on.load(SeqCst);
        self.read.load(SeqCst) - handed_on
    }
}

impl Record {
    pub(super) fn new(fate: Option<Fault>) -> (Arc<Self>, mpsc::Receiver<Vec<u8>>) {
        let (replays, orders) = mpsc::channel(4);
        let record = Self {
            kind: OnceLock::new(),
            to_target: Flow::default(),
            to_client: Flow::default(),
            ended: AtomicBool::new(false),
            held: AtomicBool::new(false),
            head: Mutex::default(),
            kept: Mutex::default(),
            replays,
            fate,
        };
        (Arc::new(record), orders)
    }

    pub(super) fn kind(&self) -> Option<Kind> {
        self.kind.get().copied()
    }

    pub(super) fn passed(&self) -> Passed {
        Passed {
            kind: self.kind(),
            to_target: self.to_target.handed_on.load(SeqCst),
            to_client: self.to_client.handed_on.load(SeqCst),
            held: self.to_target.held() + self.to_client.held(),
            ended: self.ended.load(SeqCst),
        }
    }

    /// Orders the bytes from `begin` on to be sent again and says how many they are.
    pub(super) fn replay(&self, begin: u64) -> anyhow::Result<u64> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.to_target.handed_on.load(SeqCst);
        let length = end.checked_sub(begin).context("nothing passed after that byte")?;
        ensure!(length > 0 && length <= kept.len() as u64, "{length} bytes, {} kept", kept.len());
        let bytes = kept[kept.len() - length as usize..].to_vec();
        self.replays.try_send(bytes).context("the connection is over")?;
        Ok(length)
    }

    /// Seen by its pumps at the next change of the controls.
    pub(super) fn hold(&self, on: bool) {
        self.held.store(on, SeqCst);
    }

    pub(super) fn head(&self) -> Vec<u8> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, bytes: &[u8]) {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let room = CHUNK - head.len();
        head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        drop(head);
        if self.kind() != Some(Kind::Data) {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
    }
}

/// Carries the connection until it ends or is ended.
pub(super) async fn run(
    mut client: TcpStream,
    target: SocketAddr,
    controls: watch::Receiver<Controls>,
    shared: Arc<Shared>,
    record: Arc<Record>,
    replays: mpsc::Receiver<Vec<u8>>,
) {
    let Ok(mut server) = TcpStream::connect(target).await else {
        end(&client, None, Cut::Reset, &record);
        return;
    };
    // What was small and immediate must stay so. A connection that died meanwhile shows at its first read.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let how = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let there = Pump {
            toward: Toward::Target,
            controls: controls.clone(),
            shared: &shared,
            record: &record,
            vanish: 0,
        };
        let back = Pump { toward: Toward::Client, controls: controls.clone(), ..there.clone() };
        tokio::select! {
            how = ordered_cut(controls) => how,
            how = both(there.run(from_client, to_server, Some(replays)), back.run(from_server, to_client, None)) => how,
        }
    };
    end(&client, Some(&server), how, &record);
}

/// The first direction that ends the connection; where each side has only said that it will send no more, the last.
async fn both(there: impl Future<Output = Option<Cut>>, back: impl Future<Output = Option<Cut>>) -> Cut {
    tokio::pin!(there, back);
    let (first, there_is_left) = tokio::select! {
        how = &mut there => (how, false),
        how = &mut back => (how, true),
    };
    let how = match (first, there_is_left) {
        (Some(how), _) => return how,
        (None, true) => there.await,
        (None, false) => back.await,
    };
    how.unwrap_or(Cut::Fin)
}

/// Waits until all connections of now shall be cut.
async fn ordered_cut(mut controls: watch::Receiver<Controls>) -> Cut {
    let begun = controls.borrow().cut.0;
    match controls.wait_for(|controls| controls.cut.0 > begun).await {
        Ok(controls) => controls.cut.1,
        // The proxy is going away; its tasks end with it.
        Err(_) => Cut::Fin,
    }
}

/// Sets how both sockets, about to be dropped, tell their peers.
fn end(client: &TcpStream, server: Option<&TcpStream>, how: Cut, record: &Record) {
    let linger = match how {
        Cut::Fin => None,
        Cut::Reset => Some(Duration::ZERO),
    };
    for socket in [Some(client), server].into_iter().flatten() {
        let socket = SockRef::from(socket);
        // A FIN must be sent before the close: closing with unread bytes sends a reset. Either call fails only
        // on a socket that is dead already.
        let _ = match how {
            Cut::Fin => socket.shutdown(std::net::Shutdown::Write),
            Cut::Reset => socket.set_linger(linger),
        };
    }
    record.ended.store(true, SeqCst);
}

/// One direction.
#[derive(Clone)]
struct Pump<'a> {
    toward: Toward,
    controls: watch::Receiver<Controls>,
    shared: &'a Shared,
    record: &'a Record,
    /// Bytes that are still to be dropped.
    vanish: u64,
}

impl Pump<'_> {
    /// Ends when no more comes, and says how the connection shall end: a FIN from one side alone does not ask for it.
    async fn run(
        mut self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        mut replays: Option<mpsc::Receiver<Vec<u8>>>,
    ) -> Option<Cut> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let order = async {
                match &mut replays {
                    Some(replays) => replays.recv().await,
                    None => std::future::pending().await,
                }
            };
            let size = self.chunk();
            let read = tokio::select! {
                Some(again) = order => {
                    if to.write_all(&again).await.is_err() {
                        return Some(Cut::Reset);
                    }
                    continue;
                }
                read = from.read(&mut buffer[..size]) => read,
            };
            match self.pass(read, &mut buffer, &mut to).await {
                Ok(Next::More) => {}
                Ok(Next::HalfClosed) => {
                    let _ = to.shutdown().await;
                    return None;
                }
                Ok(Next::Cut(how)) => return Some(how),
                Err(_) => return Some(Cut::Reset),
            }
        }
    }

    async fn pass(
        &mut self,
        read: io::Result<usize>,
        buffer: &mut [u8],
        to: &mut WriteHalf<'_>,
    ) -> io::Result<Next> {
        let count = *read.as_ref().unwrap_or(&0);
        if count > 0 && self.toward == Toward::Target {
            self.record.kind.get_or_init(|| Kind::of(buffer[0]));
        }
        let begin = self.flow().read.fetch_add(count as u64, SeqCst);
        let toward = self.toward;
        let delay = self.controls.borrow().delay[toward as usize];
        if !delay.is_zero() {
            sleep(delay).await;
        }
        // A black hole swallows the end of a connection too. The sender is kept by the handle, which outlives
        // this task: an error cannot mean "go on".
        let held = &self.record.held;
        let opens = |controls: &Controls| !controls.hold[toward as usize] && !held.load(SeqCst);
        if self.controls.wait_for(opens).await.is_err() {
            return Ok(Next::Cut(Cut::Fin));
        }
        let read = read?;
        if read == 0 {
            return Ok(Next::HalfClosed);
        }
        let bytes = &mut buffer[..read];
        let (allowed, cut) = self.apply(begin, bytes);
        to.write_all(&bytes[..allowed]).await?;
        if self.toward == Toward::Target {
            self.record.keep(&bytes[..allowed]);
        }
        self.flow().handed_on.fetch_add(allowed as u64, SeqCst);
        if let Some(how) = cut {
            to.flush().await?;
            return Ok(Next::Cut(how));
        }
        if let Some(rate) = self.rate() {
            sleep(Duration::from_nanos(allowed as u64 * 1_000_000_000 / rate.max(1))).await;
        }
        Ok(Next::More)
    }

    /// Changes the bytes as scripted and says how many may pass, and what comes then.
    fn apply(&mut self, begin: u64, bytes: &mut [u8]) -> (usize, Option<Cut>) {
        let end = begin + bytes.len() as u64;
        let hits = |fault| match fault {
            Fault::CutAfter { toward, bytes, .. } => toward == self.toward && (begin..=end).contains(&bytes),
            Fault::Flip { at } | Fault::Drop { at, .. } => {
                self.toward == Toward::Target && (begin..end).contains(&at)
            }
        };
        // Of a drop that began in an earlier chunk.
        let mut gone = 0..usize::try_from(self.vanish).unwrap_or(usize::MAX).min(bytes.len());
        // An answer before the first byte of a connection has no kind, and no fault.
        let Some(kind) = self.record.kind() else { return (bytes.len(), None) };
        let mut allowed = (bytes.len(), None);
        let fate = self.record.fate.filter(|fate| kind == Kind::Data && hits(*fate));
        if fate.is_some() {
            self.shared.struck.fetch_add(1, SeqCst);
        }
        for fault in self.shared.strikes(kind, hits).into_iter().chain(fate) {
            match fault {
                Fault::CutAfter { bytes: limit, how, .. } => {
                    let pass = (limit - begin) as usize;
                    if pass <= allowed.0 {
                        allowed = (pass, Some(how));
                    }
                }
                Fault::Flip { at } => bytes[(at - begin) as usize] ^= 0xff,
                Fault::Drop { at, bytes: count } => {
                    let from = (at - begin) as usize;
                    self.vanish = count;
                    gone = from..bytes.len().min(from.saturating_add(count as usize));
                }
            }
        }
        self.vanish -= gone.len() as u64;
        bytes.copy_within(gone.end.., gone.start);
        (allowed.0 - gone.len().min(allowed.0), allowed.1)
    }

    /// Bytes to read at once: small enough that a throttled connection looks steady.
    fn chunk(&self) -> usize {
        match self.rate() {
            Some(rate) => (rate / 50).clamp(512, CHUNK as u64) as usize,
            None => CHUNK,
        }
    }

    fn rate(&self) -> Option<u64> {
        let slow = self.record.kind() == Some(Kind::Data);
        self.controls.borrow().throttle.filter(|_| slow)
    }

    fn flow(&self) -> &Flow {
        match self.toward {
            Toward::Target => &self.record.to_target,
            Toward::Client => &self.record.to_client,
        }
    }
}

enum Next {
    More,
    HalfClosed,
    Cut(Cut),
}

//! The proxy's thread: accepts, and owns every connection's task.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, mpsc},
};

use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::{
    Controls, Fault, Shared, Toward,
    connection::{self, Record},
};
use crate::dice::Dice;

/// Connections remembered.
const RECORDS: usize = 4096;

/// What the proxy's thread runs.
#[derive(Debug)]
pub(super) struct Server {
    controls: watch::Receiver<Controls>,
    shared: Arc<Shared>,
    taken: u64,
}

impl Server {
    pub(super) fn new(controls: watch::Receiver<Controls>, shared: Arc<Shared>) -> Self {
        Self { controls, shared, taken: 0 }
    }

    /// Tells its address once, then serves until it is told to stop.
    pub(super) fn run(self, started: &mpsc::SyncSender<anyhow::Result<SocketAddr>>) {
        let begun = (|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let place = Place::reserve()?;
            let listener = runtime.block_on(async { place.listen() })?;
            anyhow::Ok((runtime, place, listener))
        })();
        let told = match &begun {
            Ok((_, place, _)) => Ok(place.address),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        // A handle that gave up waiting is no reason to fail: the thread then ends with it.
        let _ = started.send(told);
        if let Ok((runtime, place, listener)) = begun {
            runtime.block_on(self.serve(&place, listener));
        }
    }

    async fn serve(mut self, place: &Place, listener: TcpListener) {
        let mut tasks = JoinSet::new();
        let mut listener = Some(listener);
        loop {
            let controls = self.controls.borrow_and_update().clone();
            if controls.stop {
                return;
            }
            if controls.refuse {
                listener = None;
            } else if listener.is_none() {
                listener = place.listen().inspect_err(|error| eprintln!("proxy: {error}")).ok();
            }
            let accept = async {
                match &listener {
                    Some(listener) => listener.accept().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.controls.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                Ok((client, _)) = accept => self.take(client, &mut tasks),
                Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
            }
        }
    }

    fn take(&mut self, client: TcpStream, tasks: &mut JoinSet<()>) {
        self.taken += 1;
        // As they are now: what was ordered before a connection began holds for it.
        let controls = self.controls.borrow().clone();
        let fate = controls.storm.as_ref().map(|storm| {
            let passes = Dice::new(storm.seed).fork(self.taken).within(storm.bytes.clone());
            Fault::CutAfter { toward: Toward::Target, bytes: passes, how: storm.how }
        });
        let (record, replays) = Record::new(fate);
        let mut records = self.shared.records();
        if records.len() == RECORDS {
            records.remove(0);
        }
        records.push(record.clone());
        tasks.spawn(connection::run(
            client,
            controls.target,
            self.controls.clone(),
            self.shared.clone(),
            record,
            replays,
        ));
    }
}

/// The proxy's port, kept for its lifetime by a socket that is bound and never listens: while the proxy refuses,
/// nobody else can take the port.
struct Place {
    _keeper: Socket,
    address: SocketAddr,
}

impl Place {
    fn reserve() -> anyhow::Result<Self> {
        let keeper = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = keeper
            .local_addr()?
            .as_socket()
            .ok_or_else(|| anyhow::anyhow!("a TCP socket without address"))?;
        Ok(Self { _keeper: keeper, address })
    }

    fn listen(&self) -> std::io::Result<TcpListener> {
        let socket = bound(self.address)?;
        socket.listen(1024)?;
        socket.set_nonblocking(true)?;
        TcpListener::from_std(socket.into())
    }
}

fn bound(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

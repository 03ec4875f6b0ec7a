//! The thread that holds the lease: it reads the daemon's events, listens for its silence, and carries the
//! transfers that `submit` hands it.
//!
//! It outlives the lease, so that transfers handed over get their verdict: everything ends when the engine's
//! last handle is dropped. Here is where re-attaching after a daemon restart belongs: another turn of
//! `attach` and `hold` with the same key.

use std::{pin::pin, sync::Arc, time::Duration};

use kvferry_proto::engine::v1::{self as wire, engine_client::EngineClient, engine_event};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time,
};
use tonic::{Streaming, transport::Channel};

use crate::{
    EngineOptions, Error, Event, Failure, Reason, Report, TransferId,
    attach::{self, Attached},
    caller::{Caller, Core},
    connection,
    error::describe,
    event::Fanout,
    lease::{Ending, Lease},
    submit::Order,
    transfer,
};

/// Pause between two questions whether the daemon is still there.
const BEAT: Duration = Duration::from_secs(1);
/// An unanswered question is judged in ticks that this thread was awake for, so that a stopped engine does
/// not take its own sleep for the daemon's silence.
const TICK: Duration = Duration::from_millis(500);
/// Ticks without an answer that are silence: 5 s.
const SILENT_TICKS: u32 = 10;
/// Transfers handed over and not yet taken up by this thread.
pub(crate) const SUBMISSIONS: usize = 1024;

/// A transfer handed over, and where its report goes.
pub(crate) struct Submission {
    pub(crate) order: Order,
    pub(crate) reply: std::sync::mpsc::SyncSender<Result<Report, Error>>,
}

/// What the thread is given.
pub(crate) struct Holder {
    pub(crate) options: EngineOptions,
    pub(crate) events: Arc<Fanout>,
    pub(crate) submissions: mpsc::Receiver<Submission>,
    /// Told once: attached, or why not.
    pub(crate) attached: oneshot::Sender<Result<Arc<Core>, Error>>,
}

impl Holder {
    /// The body of the thread.
    pub(crate) fn run(self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => runtime.block_on(self.live()),
            Err(source) => {
                let error = Error::System { doing: "starting the runtime of the lease", source };
                // Nobody to tell means nobody who wants to attach.
                let _told = self.attached.send(Err(error));
            }
        }
    }

    async fn live(self) {
        let Self { options, events, submissions, mut attached } = self;
        let attempt = tokio::select! {
            attempt = begin(&options) => attempt,
            () = attached.closed() => return,
        };
        let (core, lease) = match attempt {
            Ok((core, lease)) => (core, lease),
            Err(error) => {
                let _told = attached.send(Err(error));
                return;
            }
        };
        if attached.send(Ok(core.clone())).is_err() {
            return;
        }
        // Not over the lease's connection: its beats must not queue behind payload descriptions.
        let caller = Caller::new(core.clone(), connection::lazy(&core.socket));
        let mut work = Work { submissions, caller, running: JoinSet::new() };
        let ending = tokio::select! {
            ending = hold(&core, lease.events, lease.client, &events) => ending,
            () = work.run() => return,
        };
        tracing::warn!(session = core.lease.session_id, cause = ending.cause, "the lease has ended");
        lease.end.send_replace(Some(ending.clone()));
        events.detach(ending.cause);
        work.run().await;
    }
}

/// What keeps a lease and is not shared.
struct Held {
    events: Streaming<wire::EngineEvent>,
    client: EngineClient<Channel>,
    end: tokio::sync::watch::Sender<Option<Ending>>,
}

async fn begin(options: &EngineOptions) -> Result<(Arc<Core>, Held), Error> {
    let seed = transfer::random()?;
    let Attached { lease, events, client, end } = attach::attach(options, &seed).await?;
    let core = Core::new(options.socket.clone(), lease)?;
    Ok((Arc::new(core), Held { events, client, end }))
}

/// Returns when the lease has ended.
async fn hold(
    core: &Core,
    mut stream: Streaming<wire::EngineEvent>,
    client: EngineClient<Channel>,
    events: &Fanout,
) -> Ending {
    let mut silence = pin!(silence(client));
    loop {
        let cause = tokio::select! {
            message = stream.message() => match message {
                Ok(Some(message)) => {
                    if let Some(event) = translate(core, message) {
                        events.send(&event);
                    }
                    continue;
                }
                Ok(None) => "the daemon ended it".to_owned(),
                Err(status) => describe(&status),
            },
            () = &mut silence => {
                let cause = format!("the daemon is silent for {:?}", TICK * SILENT_TICKS);
                return Ending { cause, silent: true };
            }
        };
        return settle(&core.lease, cause).await;
    }
}

/// A daemon that leaves closes its sockets first: better to know, before anybody is told, that it has exited.
async fn settle(lease: &Lease, cause: String) -> Ending {
    lease.process.wait_exit().await;
    let cause = if lease.process.has_exited() { format!("{cause}; its process has exited") } else { cause };
    Ending { cause, silent: false }
}

/// Returns when the daemon does not answer any more. Any answer is life, errors included; a broken connection
/// is for the event stream to notice.
async fn silence(mut client: EngineClient<Channel>) {
    loop {
        let mut beat = pin!(client.get_node(wire::GetNodeRequest {}));
        let mut unanswered = 0;
        loop {
            tokio::select! {
                biased;
                _ = &mut beat => break,
                () = time::sleep(TICK) => unanswered += 1,
            }
            if unanswered == SILENT_TICKS {
                return;
            }
        }
        time::sleep(BEAT).await;
    }
}

/// `None` for what this library has no word for: a newer daemon may say more.
fn translate(core: &Core, message: wire::EngineEvent) -> Option<Event> {
    Some(match message.event? {
        engine_event::Event::SessionChanged(changed) => Event::SessionChanged {
            state: changed.state(),
            session: changed.session_id,
            cause: changed.cause.map(Failure::from),
        },
        engine_event::Event::TransferSettled(reply) => {
            let piece = TransferId::from_wire(&reply.transfer_id)?;
            let batch = core.cuts.batch_of(piece);
            if batch != piece {
                core.cuts.end(batch);
            }
            Event::TransferSettled(Report::from_wire(batch, reply))
        }
        engine_event::Event::RegionInvalidated(invalidated) => Event::RegionInvalidated {
            region: invalidated.region_id,
            cause: invalidated.cause.map(Failure::from),
        },
        engine_event::Event::Draining(draining) => {
            Event::Draining { grace: Duration::from_millis(draining.grace_ms) }
        }
        engine_event::Event::Attached(_) | engine_event::Event::Notification(_) => return None,
    })
}

/// The transfers of `submit`.
struct Work {
    submissions: mpsc::Receiver<Submission>,
    caller: Caller,
    running: JoinSet<()>,
}

impl Work {
    /// Returns when the engine's last handle is gone. May be dropped and called again.
    async fn run(&mut self) {
        loop {
            tokio::select! {
                submission = self.submissions.recv() => match submission {
                    Some(submission) => self.start(submission),
                    None => return,
                },
                Some(_) = self.running.join_next() => {}
            }
        }
    }

    fn start(&mut self, Submission { order, reply }: Submission) {
        // A receiver that is gone (`Pending` was dropped) does not want to know: `send` may fail below.
        let most = usize::try_from(self.caller.core.lease.limits.transfers).unwrap_or(usize::MAX).max(1);
        if self.running.len() >= most {
            let failure = Failure::new(Reason::Limit, format!("{most} transfers are under way"));
            let _told = reply.send(Err(Error::Refused(failure)));
            return;
        }
        let caller = self.caller.clone();
        self.running.spawn(async move {
            let _told = reply.send(caller.transfer(order).await);
        });
    }
}

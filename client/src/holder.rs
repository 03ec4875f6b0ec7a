//! The thread that holds the lease: it reads the daemon's events, listens for its silence, attaches again after a
//! daemon restart, and carries the transfers that `submit` hands it.
//!
//! It outlives the lease, so that transfers handed over get their verdict: everything ends when the engine's
//! last handle is dropped.

use std::sync::Arc;

use kvferry_proto::engine::v1::engine_client::EngineClient;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tonic::transport::Channel;

use crate::{
    EngineOptions, Error, Event, Failure, Reason, Report,
    attach::{self, Attached, Introduction},
    caller::{Caller, Core},
    event::Fanout,
    lease::Lease,
    reattach,
    submit::Order,
    transfer, watch,
};

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
        let (core, attachment) = match attempt {
            Ok(begun) => begun,
            Err(error) => {
                let _told = attached.send(Err(error));
                return;
            }
        };
        if attached.send(Ok(core.clone())).is_err() {
            return;
        }
        // Not over the lease's connection: its beats must not queue behind payload descriptions.
        let caller = Caller::connect(&core);
        let mut work = Work { submissions, caller, running: JoinSet::new() };
        tokio::select! {
            () = keep(&core, &options, attachment, &events) => {}
            () = watch::orphans(&core, &events) => {}
            () = work.run() => return,
        }
        // Detached for good; what was handed over still gets its verdict.
        tokio::select! {
            () = watch::orphans(&core, &events) => {}
            () = work.run() => {}
        }
    }
}

/// An attachment, and the key it was made with.
struct Attachment {
    seed: [u8; 32],
    attached: Attached,
}

async fn begin(options: &EngineOptions) -> Result<(Arc<Core>, Attachment), Error> {
    let seed = transfer::random()?;
    let introduction = Introduction {
        options,
        seed: &seed,
        number: 0,
        port: options.preferred_port,
        known_peers: Vec::new(),
        revocations: None,
        patience: options.attach_timeout,
    };
    let attached = attach::attach(introduction).await?;
    let core = Core::new(options, attached.lease.clone())?;
    Ok((Arc::new(core), Attachment { seed, attached }))
}

/// Holds one lease after the other. Returns when there will be no other, and everybody was told.
async fn keep(core: &Arc<Core>, options: &EngineOptions, attachment: Attachment, events: &Fanout) {
    let Attachment { seed, mut attached } = attachment;
    // Of the regions that the daemon has been given: no use of theirs any more.
    let mut leaving = Vec::new();
    let cause = loop {
        let Attached { lease, events: stream, client, end } = attached;
        let parting = part_with(core, client.clone(), &lease, &leaving);
        let ending = tokio::select! {
            ending = watch::hold(core, &lease, stream, client, events) => ending,
            ending = parting => ending,
        };
        tracing::warn!(session = lease.session_id, cause = ending.cause, "the lease has ended");
        end.send_replace(Some(ending.clone()));
        core.unsettled.look();
        if !options.reattach {
            break ending.cause;
        }
        let renewed = match reattach::again(core, options, &seed, events).await {
            Ok(renewed) => renewed,
            Err(error) => break format!("{}; then: {error}", ending.cause),
        };
        attached = renewed.attached;
        let now = attached.lease.clone();
        leaving = core.renew(now.clone(), &renewed.regions);
        tracing::info!(session = now.session_id, "attached again");
        events.send(&Event::Reattached {
            session_id: now.session_id.clone(),
            moved_from: reattach::moved_from(&lease, &now),
            boot_id: now.boot_id,
        });
    };
    core.give_up();
    tracing::warn!(cause, "detached for good");
    events.detach(cause);
}

/// Never returns: whoever holds the lease says when it is over.
async fn part_with<T>(core: &Arc<Core>, client: EngineClient<Channel>, lease: &Lease, regions: &[u32]) -> T {
    if !regions.is_empty() {
        Caller::over(core, client).part_with(lease, regions).await;
    }
    std::future::pending().await
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
        let most = usize::try_from(self.caller.core.facts().limits.transfers).unwrap_or(usize::MAX).max(1);
        if self.running.len() >= most {
            let failure = Failure::new(Reason::Limit, format!("{most} transfers are under way"));
            let _told = reply.send(Err(Error::Refused(failure)));
            return;
        }
        let caller = self.caller.renewed().clone();
        self.running.spawn(async move {
            let _told = reply.send(caller.transfer(order).await);
        });
    }
}

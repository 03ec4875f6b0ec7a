//! An engine's attachment: what its handles share, from attaching to the drop of the last one.

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    EngineOptions, Error, Failure, Reason, Report, Transfer, TransferId,
    caller::{Caller, Core},
    event::Fanout,
    holder::{Holder, SUBMISSIONS, Submission},
    links::{Link, Links},
    rails,
    submit::Order,
};

/// Shared by all handles of an engine.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) core: Arc<Core>,
    pub(crate) events: Arc<Fanout>,
    links: Arc<Links>,
    /// Both taken in `drop` alone.
    submissions: Option<mpsc::Sender<Submission>>,
    thread: Option<JoinHandle<()>>,
}

/// Attaching, under way on the lease's thread. Dropping it gives up.
pub(crate) struct Attaching {
    attached: oneshot::Receiver<Result<Arc<Core>, Error>>,
    rest: Rest,
}

struct Rest {
    events: Arc<Fanout>,
    submissions: mpsc::Sender<Submission>,
    thread: JoinHandle<()>,
}

impl Attaching {
    pub(crate) fn start(mut options: EngineOptions) -> Result<Self, Error> {
        options.rail_map = options.rail_map.map(rails::inline).transpose()?;
        let events = Arc::new(Fanout::default());
        let (submissions, taken) = mpsc::channel(SUBMISSIONS);
        let (tell, attached) = oneshot::channel();
        let holder = Holder { options, events: events.clone(), submissions: taken, attached: tell };
        let thread = thread::Builder::new()
            .name("kvferry-lease".into())
            .spawn(move || holder.run())
            .map_err(Error::system("starting the thread of the lease"))?;
        Ok(Self { attached, rest: Rest { events, submissions, thread } })
    }

    /// The first event, or why there is none.
    pub(crate) async fn finish(self) -> Result<Arc<Attachment>, Error> {
        let answer = self.attached.await;
        self.rest.finish(answer)
    }

    pub(crate) fn finish_blocking(self) -> Result<Arc<Attachment>, Error> {
        let answer = self.attached.blocking_recv();
        self.rest.finish(answer)
    }
}

impl Rest {
    fn finish(
        self,
        answer: Result<Result<Arc<Core>, Error>, oneshot::error::RecvError>,
    ) -> Result<Arc<Attachment>, Error> {
        let gone = |_| Error::Call { call: "Attach", message: "the thread of the lease has ended".into() };
        let core = answer.map_err(gone)??;
        Ok(Arc::new(Attachment {
            core,
            events: self.events,
            links: Arc::default(),
            submissions: Some(self.submissions),
            thread: Some(self.thread),
        }))
    }
}

impl Attachment {
    /// This thread's way to the daemon.
    pub(crate) fn caller(&self) -> Result<(Arc<Link>, Caller), Error> {
        let attachment = self.core.lease().number;
        let link = self.links.mine(&self.core.socket, attachment)?;
        let caller = Caller::new(self.core.clone(), link.channel.clone()).through(link.pipe.clone());
        Ok((link, caller))
    }

    /// Hands a transfer to the lease's thread.
    pub(crate) fn submit(&self, transfer: Transfer) -> Result<(TransferId, ReportReceiver), Error> {
        transfer.slices.count()?;
        let order = Order::new(&self.core, transfer);
        let id = order.id;
        let (reply, report) = std::sync::mpsc::sync_channel(1);
        let queue = self.submissions.as_ref().expect("the queue is taken only when the engine is dropped");
        queue.try_send(Submission { order, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                let text = format!("{SUBMISSIONS} transfers wait to be taken up");
                Error::Refused(Failure::new(Reason::Limit, text))
            }
            mpsc::error::TrySendError::Closed(_) => {
                self.core.no_daemon(&self.core.lease(), "the lease's thread ended".into())
            }
        })?;
        Ok((id, report))
    }
}

/// Gets one report.
pub(crate) type ReportReceiver = std::sync::mpsc::Receiver<Result<Report, Error>>;

impl Drop for Attachment {
    fn drop(&mut self) {
        // The thread ends when the queue does, and with it the lease. None of its tasks holds an `Attachment`,
        // so it is never the thread itself that waits here.
        drop(self.submissions.take());
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(?panic, "the thread of the lease panicked");
        }
        // Whoever drops its engine may drop its memory next: nothing is copied from here on.
        if let Some(assistant) = self.core.lease().assistant.get() {
            assistant.stop();
        }
    }
}

//! Carrying a transfer to the daemon and its end back: one message, chunks of one id, or several transfers.

use std::time::{Duration, Instant};

use kvferry_proto::engine::v1 as wire;
use tokio::time;
use tonic::{Code, Status};

use crate::{
    Error, Failure, Outcome, Reason, Report, Slices, Transfer, TransferId,
    batch::{self, Chunks},
    caller::{ANSWER_MARGIN, Caller, Core},
    error::NoReply,
    transfer::millis,
};

/// A transfer with its id.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) id: TransferId,
    /// The id was minted for it: the daemon cannot know it yet.
    fresh: bool,
    transfer: Transfer,
}

impl Order {
    pub(crate) fn new(core: &Core, transfer: Transfer) -> Self {
        let fresh = transfer.id.is_none();
        Self { id: transfer.id.unwrap_or_else(|| core.ids.mint()), fresh, transfer }
    }
}

impl Caller {
    /// An error means that nothing was started.
    pub(crate) async fn transfer(&self, mut order: Order) -> Result<Report, Error> {
        let count = order.transfer.slices.count()?;
        if order.fresh && self.core.lease.ending().is_some() {
            return Err(self.core.no_daemon(String::new()));
        }
        if count as u64 > self.core.lease.limits.slices.max(1) {
            return self.cut(order, count).await;
        }
        let slices = std::mem::take(&mut order.transfer.slices);
        self.one(order.id, order.transfer.header(order.id), slices).await
    }

    /// A batch that the daemon takes as one transfer.
    async fn one(
        &self,
        id: TransferId,
        header: wire::TransferRequest,
        slices: Slices,
    ) -> Result<Report, Error> {
        let step = self.core.lease.limits.chunk_slices.max(1);
        let (count, bytes) = (slices.local.len() as u64, slices.bytes());
        let reply = if count <= step {
            let message = wire::TransferRequest { slices: Some(slices.into_wire()), ..header };
            let call = if self.pipe.is_some() { "TransferStream" } else { "Transfer" };
            self.ask(call, self.whole(message)).await
        } else {
            let rpc = self.stream(id, Chunks::new(id, header, slices, step));
            self.ask("TransferStream", rpc).await
        };
        match reply {
            Ok(reply) => Ok(Report::from_wire(id, reply)),
            Err(NoReply::Answered(error)) => Err(error),
            Err(NoReply::Lost(..)) => {
                let verdict = self.core.lease.verdict().await;
                Ok(Report { slices: count, bytes, ..verdict.report(id) })
            }
        }
    }

    async fn whole(&self, message: wire::TransferRequest) -> Result<wire::TransferReply, Status> {
        match &self.pipe {
            Some(pipe) => {
                let token = &self.core.lease.token;
                pipe.exchange(&self.client, token, message, |messages| self.request(messages)).await
            }
            None => {
                let mut client = self.client.clone();
                client.transfer(self.request(message)).await.map(tonic::Response::into_inner)
            }
        }
    }

    async fn stream(&self, id: TransferId, chunks: Chunks) -> Result<wire::TransferReply, Status> {
        let mut client = self.client.clone();
        let messages = self.request(tokio_stream::iter(chunks));
        let mut replies = client.transfer_stream(messages).await?.into_inner();
        while let Some(reply) = replies.message().await? {
            if reply.transfer_id == id.0 {
                return Ok(reply);
            }
        }
        Err(Status::unavailable("the stream ended without the transfer's reply"))
    }

    /// A batch larger than the daemon takes: one transfer after the other, until one does not get done.
    async fn cut(&self, mut order: Order, count: usize) -> Result<Report, Error> {
        let (id, limit) = (order.id, self.core.lease.limits.slices.max(1));
        let slices = std::mem::take(&mut order.transfer.slices);
        tracing::info!(
            transfer = ?id,
            slices = count,
            limit,
            "more slices than one transfer may have: cut into several"
        );
        if !self.core.cuts.begin(id) {
            let text = "too many batches that had to be cut are under way";
            return Err(Error::Refused(Failure::new(Reason::Limit, text)));
        }
        let result = self.pieces(&order, &slices, count, limit).await;
        if !matches!(&result, Ok(report) if report.outcome == Outcome::Unsettled) {
            self.core.cuts.end(id);
        }
        let bytes = slices.bytes();
        result.map(|report| Report { id, slices: count as u64, bytes, ..report })
    }

    async fn pieces(
        &self,
        order: &Order,
        slices: &Slices,
        count: usize,
        limit: u64,
    ) -> Result<Report, Error> {
        let started = Instant::now();
        let mut whole: Option<Report> = None;
        for (index, range) in batch::ranges(count, limit).enumerate() {
            let piece = batch::piece_id(order.id, index);
            let header = match remaining(order.transfer.deadline, started) {
                Remaining::Until(deadline_ms) => {
                    wire::TransferRequest { deadline_ms, ..order.transfer.header(piece) }
                }
                Remaining::Nothing => return Ok(stopped(whole, order.id, Reason::Deadline)),
            };
            if !self.core.cuts.advance(order.id, piece) {
                return Ok(stopped(whole, order.id, Reason::Cancelled));
            }
            let first = range.start;
            let report = match self.one(piece, header, slices.part(range)).await {
                Ok(report) => report,
                // Nothing of the batch was started if nothing of its first piece was.
                Err(error) if whole.is_none() => return Err(error),
                Err(error) => refused(piece, error),
            };
            let merged = batch::merge(whole.take(), report, first);
            if !batch::goes_on(&merged) {
                return Ok(merged);
            }
            whole = Some(merged);
        }
        whole.ok_or_else(|| Error::argument("an empty batch was cut", None))
    }

    /// `Duration::MAX` waits until it is over.
    pub(crate) async fn wait(&self, id: TransferId, timeout: Duration) -> Result<Report, Error> {
        const CALL: &str = "Wait";
        let current = self.core.cuts.current(id);
        let message = wire::WaitRequest {
            boot_id: self.core.lease.boot_id.to_vec(),
            transfer_id: current.0.to_vec(),
            // 0 is how the wire says "until it is over".
            timeout_ms: if timeout == Duration::MAX { 0 } else { millis(timeout).max(1) },
        };
        let mut client = self.client.clone();
        let rpc = self.ask(CALL, client.wait(self.request(message)));
        let reply = time::timeout(timeout.saturating_add(ANSWER_MARGIN), rpc)
            .await
            .map_err(|_| Error::Timeout(timeout))?;
        let report = match reply {
            Ok(reply) => Report::from_wire(id, reply.into_inner()),
            Err(NoReply::Answered(error)) => return Err(error),
            Err(NoReply::Lost(Code::DeadlineExceeded, _)) => return Err(Error::Timeout(timeout)),
            Err(NoReply::Lost(..)) => self.core.lease.verdict().await.report(id),
        };
        if report.outcome != Outcome::Unsettled && current != id {
            self.core.cuts.end(id);
        }
        Ok(report)
    }
}

enum Remaining {
    /// In milliseconds, as the wire says it: 0 is the policy's own.
    Until(u64),
    Nothing,
}

/// A deadline is for the whole batch.
fn remaining(deadline: Option<Duration>, started: Instant) -> Remaining {
    match deadline.map(|deadline| deadline.saturating_sub(started.elapsed())) {
        None => Remaining::Until(0),
        Some(Duration::ZERO) => Remaining::Nothing,
        Some(left) => Remaining::Until(millis(left)),
    }
}

/// The batch ends between two of its pieces: all that was started is done.
fn stopped(whole: Option<Report>, id: TransferId, reason: Reason) -> Report {
    let outcome = if reason == Reason::Cancelled { Outcome::Cancelled } else { Outcome::Failed };
    let failure = Failure::new(reason, "the batch ended before all of its transfers were started");
    let done = whole
        .unwrap_or_else(|| Report { peer_confirmed: true, ..Report::untold(id, outcome, failure.clone()) });
    Report { outcome, failure: Some(failure), ..done }
}

/// A later piece was not carried out, with earlier ones done: the batch has failed, and is settled.
fn refused(id: TransferId, error: Error) -> Report {
    let failure = match error {
        Error::Refused(failure) => failure,
        other => Failure::new(Reason::Unspecified, other.to_string()),
    };
    Report { peer_confirmed: true, ..Report::untold(id, Outcome::Failed, failure) }
}

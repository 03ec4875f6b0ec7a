//! Carrying a transfer to the daemon and its end back: one message, chunks of one id, or several transfers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvferry_proto::engine::v1 as wire;
use tokio::time;
use tonic::{Code, Status};

use crate::{
    Error, Failure, Outcome, Reason, Report, Slices, Transfer, TransferId,
    batch::{self, Chunks},
    caller::{ANSWER_MARGIN, Caller, Core, STRANGER},
    error::NoReply,
    lease::{Lease, PROOF_LOOK, Verdict},
    orders::InHand,
    transfer::millis,
    unsettled::Known,
};

/// Life of a transfer where nobody says: the daemon's default.
const LIFETIME: Duration = Duration::from_secs(30);
/// Deadlines beyond it are as good as none, and sums of instants stay far from overflow.
const LONGEST_LIFETIME: Duration = Duration::from_secs(86_400);

/// A transfer with its id.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) id: TransferId,
    /// The id was minted for it: the daemon cannot know it yet.
    fresh: bool,
    transfer: Transfer,
    stamp: Stamp,
    in_hand: InHand,
}

impl Order {
    pub(crate) fn new(core: &Core, transfer: Transfer) -> Self {
        let fresh = transfer.id.is_none();
        let id = transfer.id.unwrap_or_else(|| core.ids.mint());
        let stamp = Stamp { own_epoch: core.revocations.epoch(), target: None };
        Self { id, fresh, transfer, stamp, in_hand: core.orders.take(id) }
    }
}

/// What was known when a transfer was asked for. Whatever is revoked later hits it, on whichever way it comes to a
/// daemon: overtaken by the revocation, in pieces, or again after a daemon that did not take it.
#[derive(Debug)]
struct Stamp {
    /// The newest answered revocation of the own engine.
    own_epoch: u64,
    /// What the first daemon to receive it knew of the target.
    target: Option<wire::KnownTarget>,
}

impl Stamp {
    fn on(&self, message: wire::TransferRequest) -> wire::TransferRequest {
        let (own_epoch, known_target) = (Some(self.own_epoch), self.target.clone());
        wire::TransferRequest { own_epoch, known_target, ..message }
    }

    fn learn(&mut self, reply: &wire::TransferReply) {
        if self.target.is_none() {
            self.target.clone_from(&reply.known_target);
        }
    }
}

impl Caller {
    /// An error means that nothing was started.
    pub(crate) async fn transfer(&self, mut order: Order) -> Result<Report, Error> {
        let result = self.carry(&mut order).await;
        if let Ok(report) = &result {
            if ended_with_its_daemon(report) {
                self.core.unsettled.ended(report.clone());
            }
            order.in_hand.ends_with(report);
        }
        result
    }

    async fn carry(&self, order: &mut Order) -> Result<Report, Error> {
        let slices = Arc::new(std::mem::take(&mut order.transfer.slices));
        let count = slices.count()?;
        let give_up = Instant::now() + self.lifetime(&order.transfer);
        if !order.fresh {
            self.core.unsettled.begins_again(order.id);
        }
        loop {
            let lease = self.core.lease();
            if order.fresh && lease.ending().is_some() {
                return Err(self.core.no_daemon(&lease, String::new()));
            }
            // Under an id of the caller's own it may run already: then its end is the daemon's to tell.
            if order.fresh && order.in_hand.is_cancelled() {
                let report = stopped(None, order.id, Reason::Cancelled);
                let report = Report { slices: count as u64, bytes: slices.bytes(), ..report };
                // No daemon has heard of it: whoever asks later is told here.
                self.core.unsettled.ended(report.clone());
                return Ok(report);
            }
            let report = if count as u64 > lease.limits.slices.max(1) {
                self.cut(&lease, order, &slices).await?
            } else {
                let header = order.transfer.header(order.id);
                self.one(&lease, order.id, header, slices.clone(), &mut order.stamp).await?
            };
            if !was_drained(&report) || !self.core.returns() || !lease.leaves().await {
                return Ok(report);
            }
            if let Some(ended) = self.hold_back(&lease, &order.in_hand, &report, give_up).await {
                self.core.unsettled.ended(ended.clone());
                return Ok(ended);
            }
            order.transfer.deadline = Some(give_up.saturating_duration_since(Instant::now()));
        }
    }

    /// How long a transfer may be held back for another daemon.
    fn lifetime(&self, transfer: &Transfer) -> Duration {
        let policy = [transfer.policy.deadline, self.core.policy.deadline];
        transfer.deadline.or(policy[0]).or(policy[1]).unwrap_or(LIFETIME).min(LONGEST_LIFETIME)
    }

    /// The daemon leaves and has not taken the transfer: waits until the engine is attached again. Otherwise how
    /// the transfer ends instead.
    async fn hold_back(
        &self,
        lease: &Lease,
        in_hand: &InHand,
        report: &Report,
        give_up: Instant,
    ) -> Option<Report> {
        let next = async {
            while self.core.returns() {
                // Woken now and then, because an engine that will not be attached again does not say so here.
                if time::timeout(PROOF_LOOK, self.core.after(lease)).await.is_ok() {
                    return None;
                }
            }
            Some(report.clone())
        };
        tokio::select! {
            biased;
            () = in_hand.cancelled() => {
                let failure = Failure::new(Reason::Cancelled, "the caller cancelled the transfer");
                Some(Report { outcome: Outcome::Cancelled, failure: Some(failure), ..report.clone() })
            }
            next = next => next,
            () = time::sleep_until(give_up.into()) => Some(report.clone()),
        }
    }

    /// A batch that the daemon takes as one transfer.
    async fn one(
        &self,
        lease: &Arc<Lease>,
        id: TransferId,
        header: wire::TransferRequest,
        slices: Arc<Slices>,
        stamp: &mut Stamp,
    ) -> Result<Report, Error> {
        let header = stamp.on(header);
        let step = lease.limits.chunk_slices.max(1);
        let (count, bytes) = (slices.local.len() as u64, slices.bytes());
        let reply = if count <= step {
            let slices = slices.part(0..slices.local.len()).into_wire();
            let message = wire::TransferRequest { slices: Some(slices), ..header };
            let call = if self.pipe.is_some() { "TransferStream" } else { "Transfer" };
            self.ask(lease, call, self.whole(lease, message)).await
        } else {
            let rpc = self.stream(lease, id, Chunks::new(id, header, slices, step));
            self.ask(lease, "TransferStream", rpc).await
        };
        let report = match reply {
            Ok(reply) => {
                stamp.learn(&reply);
                Report::from_wire(id, reply)
            }
            Err(NoReply::Answered(error)) => return Err(error),
            Err(NoReply::Lost(STRANGER, seen)) => return Err(self.core.no_daemon(lease, seen)),
            Err(NoReply::Lost(..)) => Report { slices: count, bytes, ..lease.verdict().await.report(id) },
        };
        Ok(self.core.unsettled.note(id, lease, report))
    }

    async fn whole(
        &self,
        lease: &Lease,
        message: wire::TransferRequest,
    ) -> Result<wire::TransferReply, Status> {
        match &self.pipe {
            Some(pipe) => pipe.exchange(&self.client, lease, message).await,
            None => {
                let mut client = self.client.clone();
                client.transfer(lease.request(message)).await.map(tonic::Response::into_inner)
            }
        }
    }

    async fn stream(
        &self,
        lease: &Lease,
        id: TransferId,
        chunks: Chunks,
    ) -> Result<wire::TransferReply, Status> {
        let mut client = self.client.clone();
        let messages = lease.request(tokio_stream::iter(chunks));
        let mut replies = client.transfer_stream(messages).await?.into_inner();
        while let Some(reply) = replies.message().await? {
            if reply.transfer_id == id.0 {
                return Ok(reply);
            }
        }
        Err(Status::unavailable("the stream ended without the transfer's reply"))
    }

    /// A batch larger than the daemon takes: one transfer after the other, until one does not get done.
    async fn cut(&self, lease: &Arc<Lease>, order: &mut Order, slices: &Slices) -> Result<Report, Error> {
        let (id, count, limit) = (order.id, slices.local.len(), lease.limits.slices.max(1));
        tracing::info!(
            transfer = ?id,
            slices = count,
            limit,
            "more slices than one transfer may have: cut into several"
        );
        let Some(cutting) = self.core.cuts.begin(id) else {
            let text = "too many batches that had to be cut are under way";
            return Err(Error::Refused(Failure::new(Reason::Limit, text)));
        };
        let result = self.pieces(lease, order, slices).await;
        match &result {
            Ok(report) if report.outcome == Outcome::Unsettled => cutting.stays(),
            _ => cutting.end(),
        }
        let bytes = slices.bytes();
        result.map(|report| Report { id, slices: count as u64, bytes, ..report })
    }

    async fn pieces(&self, lease: &Arc<Lease>, order: &mut Order, slices: &Slices) -> Result<Report, Error> {
        let Order { id, transfer, stamp, in_hand, .. } = order;
        let (id, count, limit) = (*id, slices.local.len(), lease.limits.slices.max(1));
        let started = Instant::now();
        let mut whole: Option<Report> = None;
        for (index, range) in batch::ranges(count, limit).enumerate() {
            let piece = batch::piece_id(id, index);
            let header = match remaining(transfer.deadline, started) {
                Remaining::Until(deadline_ms) => {
                    wire::TransferRequest { deadline_ms, ..transfer.header(piece) }
                }
                Remaining::Nothing => return Ok(stopped(whole, id, Reason::Deadline)),
            };
            // Cancelled before the batch was known to be cut, or since.
            if in_hand.is_cancelled() || !self.core.cuts.advance(id, piece) {
                return Ok(stopped(whole, id, Reason::Cancelled));
            }
            let first = range.start;
            let part = Arc::new(slices.part(range));
            let report = match self.one(lease, piece, header, part, stamp).await {
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
        let begun = Instant::now();
        loop {
            let left = match timeout {
                Duration::MAX => timeout,
                _ => timeout.saturating_sub(begun.elapsed()),
            };
            // Nobody else can tell the end of what a call has in hand.
            if let Some(mut call) = self.core.orders.find(id) {
                match time::timeout(left, call.over()).await {
                    Err(_) => return Err(Error::Timeout(timeout)),
                    Ok(Some(report)) if report.outcome != Outcome::Unsettled => return Ok(report),
                    Ok(_) => continue,
                }
            }
            let answer = self.wait_there(id, left).await;
            // Submitted meanwhile: what was answered is not of that call.
            if self.core.orders.find(id).is_none() {
                return answer;
            }
        }
    }

    /// For a transfer that no call has in hand.
    async fn wait_there(&self, id: TransferId, timeout: Duration) -> Result<Report, Error> {
        const CALL: &str = "Wait";
        let current = self.core.cuts.current(id);
        match self.core.unsettled.find(id, current) {
            Known::Ended(report) => return Ok(report),
            Known::Lost(lease) => return Ok(self.outlast(&lease, id, timeout).await),
            Known::Nothing => {}
        }
        let (lease, begun) = (self.core.lease(), Instant::now());
        let message = wire::WaitRequest {
            boot_id: lease.boot_id.to_vec(),
            transfer_id: current.0.to_vec(),
            // 0 is how the wire says "until it is over".
            timeout_ms: if timeout == Duration::MAX { 0 } else { millis(timeout).max(1) },
        };
        let mut client = self.client.clone();
        let rpc = self.ask(&lease, CALL, client.wait(lease.request(message)));
        let reply = time::timeout(timeout.saturating_add(ANSWER_MARGIN), rpc)
            .await
            .map_err(|_| Error::Timeout(timeout))?;
        let report = match reply {
            Ok(reply) => {
                let report = Report::from_wire(id, reply.into_inner());
                Report { id, ..self.core.unsettled.note(current, &lease, report) }
            }
            Err(NoReply::Answered(error)) => return Err(error),
            Err(NoReply::Lost(Code::DeadlineExceeded, _)) => return Err(Error::Timeout(timeout)),
            Err(NoReply::Lost(..)) => {
                lease.ends_soon().await;
                self.outlast(&lease, id, timeout.saturating_sub(begun.elapsed())).await
            }
        };
        if report.outcome != Outcome::Unsettled && current != id {
            self.core.cuts.end(id);
        }
        Ok(report)
    }

    /// The end of a transfer whose daemon is gone: waits for the proof, where there will be one.
    async fn outlast(&self, lease: &Lease, id: TransferId, timeout: Duration) -> Report {
        let proof = async {
            while lease.standing() == Verdict::Unproven && self.core.returns() {
                time::sleep(PROOF_LOOK).await;
            }
        };
        let _in_time = time::timeout(timeout, proof).await;
        lease.standing().report(id)
    }
}

/// No daemon can be asked how.
fn ended_with_its_daemon(report: &Report) -> bool {
    let gone = report.failure.as_ref().is_some_and(|failure| failure.reason == Reason::OwnDaemonGone);
    report.outcome == Outcome::Failed && gone
}

/// The daemon leaves, and nothing of the transfer was sent.
fn was_drained(report: &Report) -> bool {
    let drained = report.failure.as_ref().is_some_and(|failure| failure.reason == Reason::Draining);
    report.outcome == Outcome::Failed && drained && report.path.is_none() && report.bytes_done == 0
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

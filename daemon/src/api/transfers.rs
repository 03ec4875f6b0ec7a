//! Transfer calls: one at a time, or many on a stream, with large batches in chunks.

use std::{collections::HashMap, sync::Arc, time::Duration};

use kvferry_proto::engine::v1 as wire;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use super::{convert, refusal::status};
use crate::{
    domain::{Epoch, Failure, Outcome, PeerHalf, Reason, Report, SessionId, TransferId},
    engine::{Arrival, Engine, Node, TransferOrder},
    session::Known,
    transfer::{log::Verdict, run::Request},
};

/// Transfers of one stream of which some chunks, but not all, have come.
const MAX_INCOMPLETE: usize = 16;

/// Replies that may wait for the client.
const REPLIES: usize = 256;

/// One call, one transfer.
pub(super) async fn transfer(
    node: &Node,
    engine: &Arc<Engine>,
    request: wire::TransferRequest,
) -> Result<wire::TransferReply, Status> {
    if request.more {
        let failure = Failure::new(Reason::BadArgument, "more: chunks are taken on TransferStream only");
        return Err(status(&failure));
    }
    let arrival = arrival(engine, &request)?;
    let order = convert::order(request)?;
    let report = run(node, engine, order, arrival).await;
    Ok(reply(&report, arrival))
}

/// What is known as this moment, but nothing that came after what the engine brings along.
fn arrival(engine: &Engine, request: &wire::TransferRequest) -> Result<Arrival, Status> {
    let known = request.known_target.as_ref().map(convert::known_target).transpose()?;
    let here = engine.arrival(&SessionId::new(request.session_id.as_str()));
    Ok(here.not_after(request.own_epoch.map(Epoch), known))
}

/// With what it was judged by, for whoever submits the transfer again.
fn reply(report: &Report, arrival: Arrival) -> wire::TransferReply {
    let known = |(who, epoch): Known| wire::KnownTarget { incarnation: who.0.to_vec(), epoch: epoch.0 };
    wire::TransferReply { known_target: arrival.known().map(known), ..convert::report(report) }
}

/// Runs or joins the transfer, and waits for its end or for UNSETTLED.
async fn run(node: &Node, engine: &Arc<Engine>, order: TransferOrder, arrival: Arrival) -> Report {
    let id = order.id;
    // What is known before the transfer begins: how much was asked for.
    let asked = match &order.request {
        Request::Slices(batch) if batch.validate().is_ok() => {
            (batch.len() as u64, batch.iter().fold(0u64, |sum, slice| sum.saturating_add(slice.2)))
        }
        _ => (0, 0),
    };
    let waiting = Waiting { engine, id: Some(id) };
    let result = match engine.transfer(node, order, arrival).await {
        Ok(verdict) => ended(verdict, Patience::Call).await,
        Err(failure) => Err(failure),
    };
    waiting.over();
    result.unwrap_or_else(|failure| Report {
        slices: asked.0,
        bytes: asked.1,
        ..Report::refused(id, failure)
    })
}

/// A call under way. Dropped before its time (the client went away), it cancels the transfer; the fence goes on.
struct Waiting<'a> {
    engine: &'a Arc<Engine>,
    id: Option<TransferId>,
}

impl Waiting<'_> {
    fn over(mut self) {
        self.id = None;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.engine.abandon(id);
        }
    }
}

/// What answers whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Patience {
    /// A transfer call: the end, or UNSETTLED.
    Call,
    /// Wait: the end, within this time if one is given; then whatever is known.
    End(Option<Duration>),
}

/// Waits for the answer.
pub(super) async fn ended(mut verdict: Verdict, patience: Patience) -> Result<Report, Failure> {
    let over = |report: &Option<Report>| {
        let answers = |report: &Report| patience == Patience::Call || report.outcome != Outcome::Unsettled;
        report.as_ref().is_some_and(answers)
    };
    let limit = match patience {
        Patience::Call => None,
        Patience::End(limit) => limit,
    };
    let waits = async { verdict.wait_for(over).await.ok().and_then(|report| report.clone()) };
    let report = match limit {
        Some(limit) => tokio::time::timeout(limit, waits).await.unwrap_or(None),
        None => waits.await,
    };
    report.or_else(|| verdict.borrow().clone()).ok_or_else(|| match limit {
        Some(limit) => Failure::new(Reason::Deadline, format!("not over within {} ms", limit.as_millis())),
        None => Failure::plain(Reason::EngineGone),
    })
}

/// A transfer of an earlier run of the daemon: this run began after that one's process had exited, so this side
/// is settled; what became of the bytes, nobody here knows. A transfer of this run has an end of its own, whatever
/// boot the caller names.
pub(super) fn of_an_earlier_boot(engine: &Engine, id: TransferId) -> Result<Report, Failure> {
    if engine.log.find(id).is_some() {
        return Err(Failure::new(Reason::BadArgument, "boot_id: the transfer is of the running daemon"));
    }
    let gone = Failure::plain(Reason::OwnDaemonGone);
    Ok(Report { peer_half: PeerHalf::Unconfirmed, ..Report::refused(id, gone) })
}

/// Many transfers on one stream; replies come in the order they end.
pub(super) fn stream(
    node: Arc<Node>,
    engine: Arc<Engine>,
    requests: Streaming<wire::TransferRequest>,
) -> impl Stream<Item = Result<wire::TransferReply, Status>> + Send {
    let (replies, outgoing) = mpsc::channel(REPLIES);
    let calls = Calls { node, engine, replies, incomplete: HashMap::new(), running: JoinSet::new() };
    tokio::spawn(calls.serve(requests));
    ReceiverStream::new(outgoing)
}

struct Calls {
    node: Arc<Node>,
    engine: Arc<Engine>,
    replies: mpsc::Sender<Result<wire::TransferReply, Status>>,
    /// With what was known when the first chunk came.
    incomplete: HashMap<Vec<u8>, (Arrival, wire::TransferRequest)>,
    running: JoinSet<()>,
}

impl Calls {
    /// Ends when the client has ended its side and all is answered, or has gone: then what runs is dropped,
    /// which cancels it.
    async fn serve(mut self, mut requests: Streaming<wire::TransferRequest>) {
        let mut open = true;
        while open || !self.running.is_empty() {
            tokio::select! {
                request = requests.message(), if open => match request {
                    Ok(Some(request)) => {
                        if let Err(refusal) = self.take(request) {
                            let _ = self.replies.send(Err(refusal)).await;
                            return;
                        }
                    }
                    Ok(None) => open = false,
                    Err(_) => return,
                },
                Some(_) = self.running.join_next() => {}
                () = self.replies.closed() => return,
            }
        }
    }

    fn take(&mut self, request: wire::TransferRequest) -> Result<(), Status> {
        let (arrival, whole) = match self.incomplete.remove(&request.transfer_id) {
            Some((arrival, begun)) => (arrival, join(begun, request)),
            None => (arrival(&self.engine, &request)?, request),
        };
        self.check_size(&whole)?;
        if whole.more {
            if self.incomplete.len() >= MAX_INCOMPLETE {
                let message = format!("{MAX_INCOMPLETE} transfers of this stream are incomplete");
                return Err(status(&Failure::new(Reason::Limit, message)));
            }
            self.incomplete.insert(whole.transfer_id.clone(), (arrival, whole));
            return Ok(());
        }
        let order = convert::order(whole)?;
        let (node, engine, replies) = (self.node.clone(), self.engine.clone(), self.replies.clone());
        self.running.spawn(async move {
            let report = run(&node, &engine, order, arrival).await;
            let _ = replies.send(Ok(reply(&report, arrival))).await;
        });
        Ok(())
    }

    fn check_size(&self, request: &wire::TransferRequest) -> Result<(), Status> {
        let limits = &self.node.resources.config.limits;
        let slices = request.slices.as_ref().map_or(0, |slices| slices.local.len().max(slices.lengths.len()));
        if slices > limits.slices {
            let message = format!("{slices} slices; limits.slices is {}", limits.slices);
            return Err(status(&Failure::new(Reason::Limit, message)));
        }
        if self.running.len() >= limits.transfers {
            let message = format!("{} transfers run on this stream (limits.transfers)", limits.transfers);
            return Err(status(&Failure::new(Reason::Limit, message)));
        }
        Ok(())
    }
}

/// The first chunk's fields hold; later ones bring slices and say whether more follow.
fn join(begun: wire::TransferRequest, next: wire::TransferRequest) -> wire::TransferRequest {
    let mut batch = convert::batch(begun.slices.unwrap_or_default());
    batch.append(convert::batch(next.slices.unwrap_or_default()));
    let slices = wire::Slices {
        local: batch.local,
        remote: batch.remote,
        lengths: batch.lengths,
        length: batch.uniform,
    };
    wire::TransferRequest { slices: Some(slices), more: next.more, ..begun }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    fn unsettled(id: TransferId) -> Report {
        Report { outcome: Outcome::Unsettled, ..Report::refused(id, Failure::plain(Reason::Cancelled)) }
    }

    /// UNSETTLED is an answer for a transfer call, and not yet one for a Wait with a limit.
    #[tokio::test(start_paused = true)]
    async fn unsettled_answers_a_call_and_is_waited_on_by_wait() {
        let id = TransferId([1; 16]);
        let (sender, verdict) = watch::channel(Some(unsettled(id)));
        let now = ended(verdict.clone(), Patience::Call).await.expect("an answer");
        assert_eq!(now.outcome, Outcome::Unsettled);
        let later =
            ended(verdict.clone(), Patience::End(Some(Duration::from_secs(1)))).await.expect("an answer");
        assert_eq!(later.outcome, Outcome::Unsettled);
        let waits = tokio::spawn(ended(verdict, Patience::End(None)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        sender.send_replace(Some(Report::refused(id, Failure::plain(Reason::Cancelled))));
        let end = waits.await.expect("the task").expect("an answer");
        assert_eq!(end.outcome, Outcome::Cancelled);
    }

    #[test]
    fn chunks_join_under_the_first_ones_fields() {
        let chunk = |first: u64, more| wire::TransferRequest {
            session_id: if first == 0 { "a:1".into() } else { String::new() },
            slices: Some(wire::Slices {
                local: vec![first],
                remote: vec![first],
                lengths: vec![],
                length: Some(8),
            }),
            more,
            ..Default::default()
        };
        let whole = join(join(chunk(0, true), chunk(1, true)), chunk(2, false));
        assert!(!whole.more);
        assert_eq!(whole.session_id, "a:1");
        assert_eq!(whole.slices.map(|slices| slices.local), Some(vec![0, 1, 2]));
    }
}

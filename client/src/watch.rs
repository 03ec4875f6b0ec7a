//! A lease under way: what the daemon tells over it, and how its end is noticed.

use std::{pin::pin, sync::atomic::Ordering::SeqCst, time::Duration};

use kvferry_proto::engine::v1::{self as wire, engine_client::EngineClient, engine_event};
use tokio::time;
use tonic::{Streaming, transport::Channel};

use crate::{
    Event, Failure, Report, TransferId,
    caller::Core,
    error::describe,
    event::Fanout,
    lease::{Ending, Lease, PROOF_LOOK, Verdict},
};

/// Pause between two questions whether the daemon is still there.
const BEAT: Duration = Duration::from_secs(1);
/// An unanswered question is judged in ticks that this thread was awake for, so that a stopped engine does
/// not take its own sleep for the daemon's silence.
const TICK: Duration = Duration::from_millis(500);
/// Ticks without an answer that are silence: 5 s.
const SILENT_TICKS: u32 = 10;

/// Returns when the lease has ended.
pub(crate) async fn hold(
    core: &Core,
    lease: &Lease,
    mut stream: Streaming<wire::EngineEvent>,
    client: EngineClient<Channel>,
    events: &Fanout,
) -> Ending {
    let mut silence = pin!(silence(client));
    loop {
        let cause = tokio::select! {
            message = stream.message() => match message {
                Ok(Some(message)) => {
                    if let Some(event) = translate(core, lease, message) {
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
        return settle(lease, cause).await;
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
pub(crate) async fn silence(mut client: EngineClient<Channel>) {
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
fn translate(core: &Core, lease: &Lease, message: wire::EngineEvent) -> Option<Event> {
    Some(match message.event? {
        engine_event::Event::SessionChanged(changed) => {
            core.peers.met(&changed.session_id, changed.incarnation.clone());
            Event::SessionChanged {
                state: changed.state(),
                session: changed.session_id,
                cause: changed.cause.map(Failure::from),
            }
        }
        engine_event::Event::TransferSettled(reply) => {
            let piece = TransferId::from_wire(&reply.transfer_id)?;
            core.unsettled.forget(piece);
            let batch = core.cuts.batch_of(piece);
            if batch != piece {
                core.cuts.end(batch);
            }
            Event::TransferSettled(Report::from_wire(batch, reply))
        }
        engine_event::Event::RegionInvalidated(invalidated) => Event::RegionInvalidated {
            region: core.regions.ours(invalidated.region_id),
            cause: invalidated.cause.map(Failure::from),
        },
        engine_event::Event::Draining(draining) => {
            lease.draining.store(true, SeqCst);
            Event::Draining { grace: Duration::from_millis(draining.grace_ms) }
        }
        engine_event::Event::Attached(_) | engine_event::Event::Notification(_) => return None,
    })
}

/// Tells the end of every transfer that only the end of its daemon can end. Never returns.
pub(crate) async fn orphans(core: &Core, events: &Fanout) {
    loop {
        core.unsettled.orphaned().await;
        for report in core.unsettled.settle(|piece| Verdict::Exited.report(core.cuts.batch_of(piece))) {
            core.cuts.end(report.id);
            events.send(&Event::TransferSettled(report));
        }
        time::sleep(PROOF_LOOK).await;
    }
}

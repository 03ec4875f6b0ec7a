//! The attach stream: the lease of an engine, and what it is told over it.

use std::pin::Pin;

use kvferry_proto::engine::v1::{self as wire, engine_event::Event};
use tokio_stream::Stream;
use tonic::Status;

use super::{EngineService, convert, refusal::status};
use crate::engine::{Caller, Lease};

type Events = Pin<Box<dyn Stream<Item = Result<wire::EngineEvent, Status>> + Send>>;

/// Attaches; the stream holds the lease, so that its end, for whatever reason, is the lease's end.
pub(super) async fn attach(
    service: &EngineService,
    request: wire::AttachRequest,
    caller: Caller,
) -> Result<Events, Status> {
    let request = convert::attach(request).map_err(|failure| status(&failure))?;
    let lease = service.node.attach(request, caller).await.map_err(|failure| status(&failure))?;
    let first = Ok(attached(service, &lease));
    let rest = events(lease);
    Ok(Box::pin(tokio_stream::StreamExt::chain(tokio_stream::once(first), rest)))
}

/// Events until the engine is gone; the failure that ended the lease is the stream's error.
fn events(lease: Lease) -> impl Stream<Item = Result<wire::EngineEvent, Status>> + Send {
    let (to_engine, outgoing) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        let engine = lease.engine().clone();
        loop {
            tokio::select! {
                event = engine.events.next() => {
                    if to_engine.send(Ok(convert::event(event))).await.is_err() {
                        return;
                    }
                }
                () = to_engine.closed() => return,
                why = engine.over() => {
                    let _ = to_engine.send(Err(status(&why))).await;
                    return;
                }
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(outgoing)
}

fn attached(service: &EngineService, lease: &Lease) -> wire::EngineEvent {
    let (engine, resources) = (lease.engine(), &service.node.resources);
    let limits = &resources.config.limits;
    let attached = wire::Attached {
        engine_id: engine.id.0,
        session_id: engine.session_id.to_string(),
        boot_id: resources.boot.0.to_vec(),
        token: engine.token.to_vec(),
        limits: Some(wire::Limits {
            slices: limits.slices as u64,
            chunk_slices: limits.chunk_slices as u64,
            regions: limits.regions as u64,
            transfers: limits.transfers as u64,
            message_bytes: limits.message_bytes as u64,
        }),
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        daemon_pid: std::process::id(),
        fd_socket: service.fd_socket.display().to_string(),
        process_access: convert::process_access(engine.memory.process_access()).into(),
    };
    wire::EngineEvent { event: Some(Event::Attached(attached)) }
}

//! One thread's open stream of transfers: the way of every batch that fits into one message.
//!
//! A call of its own costs HTTP/2 headers and trailers both ways, as much work as all the rest of a small
//! transfer's hop. A message on a stream that is open already costs none of that. The stream carries one
//! transfer at a time and is used again only after a whole exchange: whatever ends one in the middle drops the
//! stream, and the daemon cancels what it carried, as it does for a dropped call.

use std::sync::{Mutex, PoisonError};

use kvferry_proto::engine::v1::{self as wire, engine_client::EngineClient};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::lease::Lease;

/// Where the stream is kept between two transfers of its thread.
#[derive(Debug, Default)]
pub(crate) struct Pipe(Mutex<Option<Open>>);

#[derive(Debug)]
struct Open {
    /// Attachments have tokens of their own: a stream belongs to the one it was opened for.
    attachment: u64,
    requests: mpsc::Sender<wire::TransferRequest>,
    replies: Streaming<wire::TransferReply>,
}

impl Pipe {
    /// Sends one transfer, whole, and waits for its reply.
    pub(crate) async fn exchange(
        &self,
        client: &EngineClient<Channel>,
        lease: &Lease,
        message: wire::TransferRequest,
    ) -> Result<wire::TransferReply, Status> {
        let id = message.transfer_id.clone();
        let kept =
            self.slot().take().filter(|kept| kept.attachment == lease.number && !kept.requests.is_closed());
        let mut stream = match kept {
            Some(kept) => {
                kept.requests.send(message).await.map_err(|_| ended())?;
                kept
            }
            None => {
                let (requests, outgoing) = mpsc::channel(1);
                // The first message goes with the call: the daemon may answer nothing before it has one.
                requests.send(message).await.map_err(|_| ended())?;
                let request = lease.request(ReceiverStream::new(outgoing));
                let replies = client.clone().transfer_stream(request).await?.into_inner();
                Open { attachment: lease.number, requests, replies }
            }
        };
        loop {
            let reply = stream.replies.message().await?.ok_or_else(ended)?;
            if reply.transfer_id == id {
                *self.slot() = Some(stream);
                return Ok(reply);
            }
        }
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ended() -> Status {
    Status::unavailable("the stream ended without the transfer's reply")
}

//! The fake's fd socket.

use std::mem::MaybeUninit;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncWriteExt, Interest};

use super::{Handed, Shared};

pub(super) async fn take(mut stream: tokio::net::UnixStream, shared: &Shared) {
    let handed = stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut bytes = vec![0; 100];
            let received = rustix::net::recvmsg(
                &stream,
                &mut [std::io::IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            bytes.truncate(received.bytes);
            let files = control
                .drain()
                .flat_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(files) => files.collect::<Vec<_>>(),
                    _ => Vec::new(),
                })
                .collect();
            Ok(Handed { bytes, files })
        })
        .await
        .unwrap();
    let reason = shared.update(|state| {
        state.handed.push(handed);
        state.fd_reason
    });
    let mut answer = [0; 4];
    answer[..2].copy_from_slice(&reason.to_le_bytes());
    stream.write_all(&answer).await.unwrap();
}

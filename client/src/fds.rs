//! Hands file descriptors to the daemon on its fd socket, because gRPC cannot.
//!
//! One descriptor per connection. Little endian, the client sends 52 bytes: magic `KVFD`, u32 version 1,
//! 32-byte engine token, u64 handle, u32 zero, with the descriptor as SCM_RIGHTS. The daemon answers 4 bytes:
//! u16 reason number (0: taken), u16 zero. Regions then name the descriptor by its handle.

use std::{
    io::{self, IoSlice},
    os::fd::BorrowedFd,
    path::Path,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::UnixStream,
};

use crate::{Error, Failure, connection};

const MAGIC: [u8; 4] = *b"KVFD";
const VERSION: u32 = 1;
const GREETING: usize = 52;
/// The daemon only puts the descriptor aside: longer than this means that it does not run.
const PATIENCE: Duration = Duration::from_secs(5);

/// Returns when the daemon has taken the descriptor under `handle`.
pub(crate) async fn hand_over(
    socket: &Path,
    token: &[u8; 32],
    handle: u64,
    file: BorrowedFd<'_>,
) -> Result<(), Error> {
    let exchange = async {
        let mut stream = connection::open(socket).await?;
        send(&stream, &greeting(token, handle), file)
            .await
            .map_err(Error::system("sending a file descriptor to the daemon"))?;
        let mut answer = [0; 4];
        stream
            .read_exact(&mut answer)
            .await
            .map_err(Error::system("waiting for the daemon to take a file descriptor"))?;
        match u16::from_le_bytes([answer[0], answer[1]]) {
            0 => Ok(()),
            reason => Err(Error::Refused(Failure::from_number(
                reason.into(),
                "the daemon did not take the file descriptor",
            ))),
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap_or(Err(Error::Timeout(PATIENCE)))
}

fn greeting(token: &[u8; 32], handle: u64) -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..40].copy_from_slice(token);
    bytes[40..48].copy_from_slice(&handle.to_le_bytes());
    bytes
}

async fn send(stream: &UnixStream, bytes: &[u8], file: BorrowedFd<'_>) -> io::Result<()> {
    let files = [file];
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&files)) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            let flags = SendFlags::NOSIGNAL;
            Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
        })
        .await?;
    // A fresh socket's buffer is far larger than this, so a short write means a broken socket.
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

//! One message of the fd socket: receiving it with its descriptor, and reading it.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
};

use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags, recvmsg},
};
use tokio::{io::Interest, net::UnixStream};

use crate::domain::{Failure, Reason};

pub(super) const MESSAGE_BYTES: usize = 52;
pub(super) const MAGIC: [u8; 4] = *b"KVFD";
pub(super) const VERSION: u32 = 1;

/// What a message says.
pub(super) struct Greeting {
    pub(super) token: [u8; 32],
    pub(super) handle: u64,
}

impl Greeting {
    /// BAD_ARGUMENT for anything but the one form there is.
    pub(super) fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, Failure> {
        let (magic, rest) = split::<4>(bytes)?;
        let (version, rest) = split::<4>(rest)?;
        let (token, rest) = split::<32>(rest)?;
        let (handle, reserved) = split::<8>(rest)?;
        if magic != MAGIC {
            return Err(bad("the magic is not KVFD"));
        }
        if u32::from_le_bytes(version) != VERSION {
            return Err(bad("the version is not 1"));
        }
        if reserved != [0; 4] {
            return Err(bad("the reserved field is not zero"));
        }
        Ok(Self { token, handle: u64::from_le_bytes(handle) })
    }
}

fn split<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), Failure> {
    let (field, rest) = bytes.split_first_chunk::<N>().ok_or_else(|| bad("a field is missing"))?;
    Ok((*field, rest))
}

fn bad(message: &str) -> Failure {
    Failure::new(Reason::BadArgument, message)
}

/// Receives one message and its one descriptor, never a byte more; nothing where the stream ended before it.
/// Descriptors received with anything else are closed here.
pub(super) async fn receive(stream: &UnixStream) -> Result<Option<([u8; MESSAGE_BYTES], OwnedFd)>, Failure> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut filled = 0;
    let mut descriptor = None;
    while filled < MESSAGE_BYTES {
        let (count, fd) = receive_some(stream, &mut bytes[filled..]).await?;
        if let Some(fd) = fd
            && descriptor.replace(fd).is_some()
        {
            return Err(bad("more than one descriptor came with the message"));
        }
        match (count, filled) {
            (0, 0) => return Ok(None),
            (0, _) => return Err(bad("the connection ended inside a message")),
            _ => filled += count,
        }
    }
    let fd = descriptor.ok_or_else(|| bad("no descriptor came with the message"))?;
    Ok(Some((bytes, fd)))
}

async fn receive_some(stream: &UnixStream, bytes: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Failure> {
    // Room for one more than is wanted, so that two are told from one; the kernel closes what does not fit.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received: RecvMsg = stream
        .async_io(Interest::READABLE, || {
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, flags).map_err(io::Error::from)
        })
        .await
        .map_err(|error| Failure::io(Reason::ConnectionLost, "receiving on the fd socket", &error))?;
    let mut fds = Vec::with_capacity(2);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) && fds.is_empty() {
        // There was room for two: it is this process that had no number for it, and recvmsg(2) has no errno for that.
        let message = "the daemon has no free descriptor (RLIMIT_NOFILE)";
        return Err(Failure { code: Errno::MFILE.raw_os_error(), ..Failure::new(Reason::Limit, message) });
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > 1 {
        return Err(bad("more than one descriptor came with the message"));
    }
    Ok((received.bytes, fds.pop()))
}

//! The fd socket with bare hands: descriptors that the client library would never send.

use std::{
    io::{IoSlice, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use anyhow::Context;
use kvferry_proto::types::v1::Reason;
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};

/// The longest the daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends one descriptor under a handle. `Ok(None)`: the daemon keeps it; otherwise its reason.
pub fn send(socket: &Path, token: &[u8], handle: u64, fd: BorrowedFd<'_>) -> anyhow::Result<Option<Reason>> {
    let mut message = Vec::with_capacity(52);
    message.extend_from_slice(b"KVFD");
    message.extend_from_slice(&1u32.to_le_bytes());
    message.extend_from_slice(token);
    message.extend_from_slice(&handle.to_le_bytes());
    message.extend_from_slice(&0u32.to_le_bytes());
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    anyhow::ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
    sendmsg(stream.as_fd(), &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).context("no answer on the fd socket")?;
    match i32::from(u16::from_le_bytes([answer[0], answer[1]])) {
        0 => Ok(None),
        number => Ok(Some(Reason::try_from(number)?)),
    }
}

/// A memfd of this length, with these seals.
pub fn memfd(length: u64, flags: MemfdFlags, seals: SealFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("kvferry-tests", flags)?;
    ftruncate(&fd, length)?;
    if !seals.is_empty() {
        fcntl_add_seals(&fd, seals)?;
    }
    Ok(fd)
}

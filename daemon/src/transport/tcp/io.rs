//! Scattered socket calls from and into engine memory.
//!
//! A [`Scatter`] can only hold bytes that are safe to hand to the kernel for as long as it lives: ranges of
//! regions, together with the leases that keep those mapped (I6), or the static pages of padding. So the
//! calls here are safe functions, whoever makes them. *Whether* memory may be touched is another question,
//! answered by the fence around each call. The kernel copies before it returns: no MSG_ZEROCOPY, no io_uring,
//! because then it would touch memory after the lane's owner had said that nobody does.
#![allow(unsafe_code)]

use std::{
    cell::UnsafeCell,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use crate::{memory::Region, transport::touch};

const PAGE_BYTES: usize = 64 << 10;

/// Bytes summed at once.
pub(super) const SUM_STEP_BYTES: usize = 16 << 10;

/// Where padding is sent from: never written, so that one peer's bytes cannot leak to another.
static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Where bytes go that nobody wants.
static SCRAP: ScrapPage = ScrapPage(UnsafeCell::new([0; PAGE_BYTES]));

struct ScrapPage(UnsafeCell<[u8; PAGE_BYTES]>);

// SAFETY: only the kernel writes to the page, through the pointers given out by `Page::base`, and nothing ever
// reads it: no reference to the bytes exists.
unsafe impl Sync for ScrapPage {}

/// What stands in for engine memory that may not be touched any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Page {
    /// For sending.
    Zeros,
    /// For receiving.
    Scrap,
}

impl Page {
    fn base(self) -> *mut u8 {
        match self {
            Self::Zeros => ZEROS.as_ptr().cast_mut(),
            Self::Scrap => SCRAP.0.get().cast(),
        }
    }
}

/// What came of a receiving call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing there yet.
    Nothing,
    /// The peer has finished sending.
    End,
}

/// Bytes of engine memory in the order in which they travel, with a cursor. Reused from part to part.
#[derive(Debug)]
pub(super) struct Scatter {
    /// The slot before the cursor is always free (spent, or the unused first one): headers are put there.
    spans: Vec<libc::iovec>,
    at: usize,
    left: u64,
    leases: Vec<Arc<Region>>,
}

// SAFETY: the pointers lead into mappings that the leases keep, into static pages, or are spent; none is bound
// to a thread.
unsafe impl Send for Scatter {}

impl Default for Scatter {
    fn default() -> Self {
        Self { spans: vec![span(std::ptr::null_mut(), 0)], at: 1, left: 0, leases: Vec::new() }
    }
}

impl Scatter {
    /// Forgets all spans and lets go of the leases.
    pub(super) fn clear(&mut self) {
        self.spans.truncate(1);
        self.at = 1;
        self.left = 0;
        self.leases.clear();
    }

    /// Appends a range of a region; false where it is not mapped here.
    pub(super) fn push(&mut self, region: &Arc<Region>, address: u64, length: u64) -> bool {
        let Some(base) = touch::mapped(region, address, length) else { return false };
        if self.leases.last().is_none_or(|last| !Arc::ptr_eq(last, region)) {
            self.leases.push(region.clone());
        }
        self.append(base, length as usize);
        true
    }

    /// Appends bytes of a static page.
    pub(super) fn push_page(&mut self, page: Page, mut bytes: u64) {
        while bytes > 0 {
            let step = bytes.min(PAGE_BYTES as u64);
            self.append(page.base(), step as usize);
            bytes -= step;
        }
    }

    fn append(&mut self, base: *mut u8, length: usize) {
        self.left += length as u64;
        // Neighbours in memory become one span, which is what most page tables of real requests allow.
        if let Some(last) = self.spans.get_mut(self.at..).and_then(|open| open.last_mut())
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base
        {
            last.iov_len += length;
            return;
        }
        self.spans.push(span(base, length));
    }

    /// Bytes ahead of the cursor.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Continues a CRC32C over the next `bytes` ahead of the cursor. Its engine may write to the memory whenever
    /// it pleases, so it is copied, never looked at in place (see `touch`): through `room`, a step at a time, so
    /// that each step stays in the nearest cache.
    pub(super) fn sum(&self, mut crc: u32, mut bytes: u64, room: &mut [u8]) -> u32 {
        let most = room.len().min(SUM_STEP_BYTES);
        for span in &self.spans[self.at..] {
            let length = bytes.min(span.iov_len as u64) as usize;
            bytes -= length as u64;
            let mut done = 0;
            while done < length {
                let step = &mut room[..most.min(length - done)];
                let from = span.iov_base.cast::<u8>().cast_const().wrapping_add(done);
                // SAFETY: `from` lies in a span of ours (see `Scatter`: leased regions and static pages), with
                // at least `step` bytes of it ahead; `step` is exclusively ours and no engine's memory.
                unsafe { std::ptr::copy_nonoverlapping(from, step.as_mut_ptr(), step.len()) };
                crc = crc32c::crc32c_append(crc, step);
                done += step.len();
            }
        }
        crc
    }

    /// Moves the cursor.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut bytes = bytes.min(self.left) as usize;
        self.left -= bytes as u64;
        while bytes > 0 {
            let first = &mut self.spans[self.at];
            if bytes < first.iov_len {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                first.iov_len -= bytes;
                return;
            }
            bytes -= first.iov_len;
            self.at += 1;
        }
    }
}

fn span(base: *mut u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: length }
}

/// Sends `before`, the rest of `middle` and `after` in one call; 0 when the socket takes nothing now. Moves no
/// cursor.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    before: &[u8],
    middle: &mut Scatter,
    after: &[u8],
) -> io::Result<usize> {
    let mut first = middle.at;
    if !before.is_empty() {
        first -= 1;
        middle.spans[first] = span(before.as_ptr().cast_mut(), before.len());
    }
    let own = middle.spans.len();
    if !after.is_empty() {
        middle.spans.push(span(after.as_ptr().cast_mut(), after.len()));
    }
    let message = message(&mut middle.spans[first..]);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` names only spans of `middle` (see `Scatter`: leased regions and static pages), of
    // `before` and of `after`, all borrowed until after the call; the kernel only reads them. It keeps no
    // pointer past its return.
    let sent = retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) });
    middle.spans.truncate(own);
    match sent {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

/// Receives into the rest of `middle`, then `after`, in one call. Moves no cursor.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    middle: &mut Scatter,
    after: [&mut [u8]; 2],
) -> io::Result<Received> {
    let own = middle.spans.len();
    for slice in after {
        middle.spans.push(span(slice.as_mut_ptr(), slice.len()));
    }
    let mut message = message(&mut middle.spans[middle.at..]);
    // SAFETY: `message` names only spans of `middle` (leased regions and the scrap page; `Body` never receives
    // into the zero page) and of `after`, which are exclusively borrowed until after the call. Engine memory
    // has no references in this process. The kernel keeps no pointer past its return.
    let received = retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) });
    middle.spans.truncate(own);
    match received {
        Ok(0) => Ok(Received::End),
        Ok(bytes) => Ok(Received::Bytes(bytes)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
        Err(error) => Err(error),
    }
}

fn message(spans: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = spans.as_mut_ptr();
    message.msg_iovlen = spans.len() as _;
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsFd, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn the_cursor_moves_over_partial_transfers() {
        let (here, mut there) = UnixStream::pair().expect("a pair");
        let mut padding = Scatter::default();
        padding.push_page(Page::Zeros, 3 * PAGE_BYTES as u64 + 5);
        let all = padding.left() as usize;
        assert_eq!(all, 3 * PAGE_BYTES + 5);
        let mut sent = 0;
        let mut buffer = vec![1; PAGE_BYTES];
        while padding.left() > 0 {
            let bytes = send(here.as_fd(), &[], &mut padding, &[]).expect("a send");
            padding.advance(bytes as u64);
            sent += bytes;
            let read = there.read(&mut buffer).expect("a read");
            assert!(buffer[..read].iter().all(|&byte| byte == 0));
        }
        assert_eq!(sent, all);
    }

    #[test]
    fn what_surrounds_the_middle_keeps_its_place() {
        let (here, there) = UnixStream::pair().expect("a pair");
        let mut padding = Scatter::default();
        padding.push_page(Page::Zeros, 4);
        assert_eq!(send(here.as_fd(), b"head", &mut padding, b"tail").expect("a send"), 12);
        let mut scrap = Scatter::default();
        let (mut head, mut rest) = ([0; 4], [0; 8]);
        let received = receive(there.as_fd(), &mut scrap, [&mut head, &mut []]).expect("a receive");
        assert_eq!((received, &head), (Received::Bytes(4), b"head"));
        scrap.push_page(Page::Scrap, 4);
        let received = receive(there.as_fd(), &mut scrap, [&mut head, &mut rest]).expect("a receive");
        assert_eq!((received, &head), (Received::Bytes(8), b"tail"));
        assert_eq!(
            receive(there.as_fd(), &mut scrap, [&mut head, &mut []]).expect("a call"),
            Received::Nothing
        );
        drop(here);
        assert_eq!(receive(there.as_fd(), &mut scrap, [&mut head, &mut []]).expect("a call"), Received::End);
    }
}

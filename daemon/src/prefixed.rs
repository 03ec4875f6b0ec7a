//! HTTP/2's preface, read under a deadline before a connection reaches the gRPC server, and read once more by it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
};
use tonic::transport::server::Connected;

/// What every HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads the preface, whose first byte may have been read already. Anything else is an error.
pub(crate) async fn http2_preface(
    stream: &mut (impl AsyncRead + Unpin),
    first: Option<u8>,
) -> io::Result<()> {
    let mut bytes = [0; PREFACE.len()];
    let read = match first {
        Some(byte) => {
            bytes[0] = byte;
            1
        }
        None => 0,
    };
    stream.read_exact(&mut bytes[read..]).await?;
    match bytes == *PREFACE {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "not HTTP/2")),
    }
}

/// A stream whose preface was read, and is there to be read again. It holds a place among its kind until it ends.
#[derive(Debug)]
pub(crate) struct Prefixed<S> {
    preface: &'static [u8],
    stream: S,
    _place: OwnedSemaphorePermit,
}

impl<S> Prefixed<S> {
    /// After [`http2_preface`].
    pub(crate) fn new(stream: S, place: OwnedSemaphorePermit) -> Self {
        Self { preface: &PREFACE[..], stream, _place: place }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.preface.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let (now, later) = self.preface.split_at(self.preface.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.preface = later;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S: Connected> Connected for Prefixed<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_preface_is_read_twice_and_nothing_else_passes() {
        let mut sent: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest";
        http2_preface(&mut sent, None).await.expect("a preface");
        let mut whole = Vec::new();
        let places = std::sync::Arc::new(tokio::sync::Semaphore::new(1));
        let place = places.clone().try_acquire_owned().expect("a place");
        Prefixed::new(sent, place).read_to_end(&mut whole).await.expect("all of it");
        assert_eq!(places.available_permits(), 1, "the place is free again");
        assert_eq!(whole, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest");
        let mut after_first: &[u8] = &PREFACE[1..];
        http2_preface(&mut after_first, Some(b'P')).await.expect("a preface");
        for bad in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"PRI", b""] {
            let mut bad = bad;
            assert!(http2_preface(&mut bad, None).await.is_err());
        }
    }
}

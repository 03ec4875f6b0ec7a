//! Dialling a data connection: TCP to the endpoint, then the preface that binds it to its session.

use std::{net::SocketAddr, time::Duration};

use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    domain::{Failure, LaneId, Reason},
    transport::{LaneKind, tcp::Preface},
};

/// Connects and presents the token. Non-blocking, ready for a lane's owner.
pub(super) async fn connect(
    address: SocketAddr,
    lane: LaneId,
    kind: LaneKind,
    token: [u8; 32],
    timeout: Duration,
) -> Result<std::net::TcpStream, Failure> {
    let preface = Preface { lane, kind, token }.encode();
    let dial = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        stream.write_all(&preface).await?;
        stream.into_std()
    };
    match tokio::time::timeout(timeout, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => {
            let reason = match error.kind() {
                std::io::ErrorKind::ConnectionRefused => Reason::ConnectRefused,
                std::io::ErrorKind::TimedOut => Reason::ConnectTimeout,
                _ => Reason::ConnectionLost,
            };
            Err(Failure::io(reason, format_args!("connecting lane {lane} to {address}"), &error))
        }
        Err(_) => {
            let message =
                format!("lane {lane} to {address}: not connected within {} ms", timeout.as_millis());
            Err(Failure::new(Reason::ConnectTimeout, message))
        }
    }
}

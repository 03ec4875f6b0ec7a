//! Accepting and bounding connections.

use std::{io, net::TcpListener, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};

/// Connections served at once; others wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;

/// Longest time for the head of a request, the first one or the next on a kept connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest life of a connection; scrapers open another.
const CONNECTION_LIFE: Duration = Duration::from_secs(30);

/// Wait after a failed accept, which is mostly a lack of descriptors and would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until dropped. The connections live on the same runtime and end with it.
pub(super) async fn serve(listener: TcpListener, router: Router) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    let _ = timeout(CONNECTION_LIFE, connection(stream, router)).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "the admin port could not accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
    if let Err(error) = served {
        tracing::debug!(error, "an admin connection ended early");
    }
}

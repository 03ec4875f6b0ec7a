//! The admin port: `/metrics`, `/healthz`, `/readyz` and `/status.json`.
//!
//! It has an OS thread and a runtime of its own, so it answers while the control runtime is busy or stuck: that
//! is when somebody asks. It only reads, through [`AdminSource`]. Connections are bounded in number (a permit
//! before each accept) and in time, so whoever sends garbage or nothing costs one permit for a few seconds.
//!
//! Not here: anything that changes the daemon, and any password. It listens on loopback unless told otherwise.

mod connections;

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread::{self, JoinHandle},
};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::sync::oneshot;

/// What OpenMetrics text is called in HTTP.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the admin port shows. Methods are called on its thread and should return at once: nothing that waits for
/// the control runtime, or the port is stuck when that is.
pub trait AdminSource: Send + Sync + 'static {
    /// All metrics in the OpenMetrics text format.
    fn metrics_text(&self) -> String;

    /// Whether the daemon works; if not, one line per reason.
    fn health(&self) -> Result<(), String>;

    /// Whether engines may attach now.
    fn ready(&self) -> bool;

    /// The state of the daemon for people and tools.
    fn status(&self) -> serde_json::Value;
}

type Source = Arc<dyn AdminSource>;

/// The running admin port. Dropping it stops it.
pub struct Admin {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Admin {
    /// Binds and serves. Fails if the address cannot be bound or the thread not started.
    pub fn start(listen: SocketAddr, source: Arc<dyn AdminSource>) -> io::Result<Self> {
        let listener = TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    // An error means that the listener did not fit the runtime; without a port there is
                    // nothing to do but say so.
                    served = connections::serve(listener, router(source)) => {
                        if let Err(error) = served {
                            tracing::error!(%error, "the admin port does not serve");
                        }
                    }
                    _ = stopped => {}
                }
            });
        };
        let thread = thread::Builder::new().name("admin".to_owned()).spawn(serve)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens: the port that was picked where 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Closes the port and what is open on it, and waits for its thread.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        // The other end is gone only when the thread has ended, which is what is wanted.
        let _ = self.stop.take().map(|stop| stop.send(()));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the admin thread panicked");
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.stop();
    }
}

fn router(source: Source) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/status.json", get(status))
        .with_state(source)
}

async fn metrics(State(source): State<Source>) -> Response {
    ([(CONTENT_TYPE, OPENMETRICS)], source.metrics_text()).into_response()
}

async fn health(State(source): State<Source>) -> Response {
    match source.health() {
        Ok(()) => "ok\n".into_response(),
        Err(reasons) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", reasons.trim_end())).into_response()
        }
    }
}

async fn ready(State(source): State<Source>) -> Response {
    match source.ready() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response(),
    }
}

async fn status(State(source): State<Source>) -> Response {
    Json(source.status()).into_response()
}

#[cfg(test)]
mod tests;

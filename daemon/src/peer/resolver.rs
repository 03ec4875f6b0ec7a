//! Names of peers to addresses, a few at a time.
//!
//! The system's resolver blocks, and nothing can interrupt it. So each look-up holds a helper thread until it ends,
//! for minutes where the name server does not answer; those threads also plan transfers to peers that are there (I9).

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    sync::Arc,
};

use tokio::sync::Semaphore;

/// Look-ups under way on a node. Few enough to leave most of the helper threads to plans; they are never many where
/// names are answered.
const LOOK_UPS: usize = 16;

/// One per daemon.
#[derive(Debug)]
pub struct Resolver {
    places: Arc<Semaphore>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(LOOK_UPS)) }
    }
}

impl Resolver {
    /// The addresses of a host, with the port. Waits its turn; how long is for the caller to bound.
    ///
    /// # Errors
    /// What the system's resolver said.
    pub async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let host = host.to_owned();
        self.look_up(move || Ok((host.as_str(), port).to_socket_addrs()?.collect())).await
    }

    /// The place goes with the look-up, not with who waits for it: a caller that gives up frees no thread.
    async fn look_up(
        &self,
        ask: impl FnOnce() -> io::Result<Vec<SocketAddr>> + Send + 'static,
    ) -> io::Result<Vec<SocketAddr>> {
        let place = self.places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let asked = tokio::task::spawn_blocking(move || {
            let answer = ask();
            drop(place);
            answer
        });
        asked.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[tokio::test]
    async fn names_that_nobody_answers_hold_no_more_threads_than_they_may() {
        let resolver = Resolver::default();
        let (answers, silence) = (0..LOOK_UPS).map(|_| mpsc::channel::<()>()).unzip::<_, _, Vec<_>, Vec<_>>();
        let soon = Duration::from_millis(20);
        for server in silence {
            let silent = resolver.look_up(move || {
                let _ = server.recv();
                Ok(Vec::new())
            });
            assert!(tokio::time::timeout(soon, silent).await.is_err(), "it was answered");
        }
        // All have given up, and their look-ups have not.
        let one_more = tokio::time::timeout(soon, resolver.resolve("localhost", 7)).await;
        assert!(one_more.is_err(), "one look-up more than may be: {one_more:?}");
        drop(answers);
        let found = resolver.resolve("localhost", 7).await.expect("localhost has an address");
        assert!(found.iter().any(|address| address.ip().is_loopback() && address.port() == 7), "{found:?}");
    }
}

//! Attaching again after a daemon restart: the same key, name, port and known peers, and everything that was
//! registered.
//!
//! Whoever is attached again knows that nobody of the attachment before can touch its memory: either the daemon
//! is the same and has released it first, or it is another one, and its predecessor has exited.

use std::{sync::Arc, time::Duration};

use tokio::time;

use crate::{
    EngineOptions, Error, Event, Failure, Reason,
    attach::{self, Attached, Introduction},
    caller::{Caller, Core},
    event::Fanout,
    lease::Lease,
    memory::Backing,
    transfer, watch,
};

/// First pause before an attempt. It doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// What one attempt may take. Long, because a daemon that is stopped holds it and answers when it goes on; one
/// that ends breaks it off.
const ATTEMPT: Duration = Duration::from_secs(60);

/// Attached again, and everything registered.
pub(crate) struct Renewed {
    pub(crate) attached: Attached,
    /// Our numbers of the regions, beside the daemon's.
    pub(crate) regions: Vec<(u32, u32)>,
}

/// Attaches until it works.
///
/// # Errors
/// A refusal that the next attempt would meet as well.
pub(crate) async fn again(
    core: &Arc<Core>,
    options: &EngineOptions,
    seed: &[u8; 32],
    events: &Fanout,
) -> Result<Renewed, Error> {
    let mut pauses = Pauses(FIRST_PAUSE);
    // Who may have our memory: the last daemon we were attached to, or one that was given it since and then lost.
    let mut holds = core.lease();
    loop {
        time::sleep(pauses.next(draw())).await;
        let attached = match attach_again(core, options, seed, &holds).await {
            Ok(attached) => attached,
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => {
                tracing::debug!(%error, "attaching again did not work out yet");
                continue;
            }
        };
        holds = attached.lease.clone();
        // Whatever this meets, descriptors included, the next attempt may not.
        match register_again(core, options, &attached, events).await {
            Ok(regions) => return Ok(Renewed { attached, regions }),
            Err(error) => tracing::debug!(%error, "registering again did not work out yet"),
        }
    }
}

/// Once this has returned nobody of the attachment before can touch our memory.
async fn attach_again(
    core: &Arc<Core>,
    options: &EngineOptions,
    seed: &[u8; 32],
    holds: &Lease,
) -> Result<Attached, Error> {
    let last = core.lease();
    let introduction = Introduction {
        options,
        seed,
        number: last.number + 1,
        port: port(&last.session_id).or(options.preferred_port),
        known_peers: core.peers.to_wire(),
        revocations: Some(core.revocations.hand_over()),
        patience: ATTEMPT,
    };
    let attached = attach::attach(introduction).await?;
    if attached.lease.boot_id != holds.boot_id && holds.process.is_alive() {
        // Somebody else serves at the socket. Our memory is with a daemon that has not exited.
        let cause = "another daemon answers, and the one before it has not exited".to_owned();
        return Err(Error::NoDaemon { path: options.socket.clone(), cause });
    }
    // What that one had posted is not done any more; the copy under way, if any, takes milliseconds.
    if let Some(assistant) = holds.assistant.get() {
        while !assistant.retire() {
            time::sleep(Duration::from_millis(1)).await;
        }
    }
    Ok(attached)
}

async fn register_again(
    core: &Arc<Core>,
    options: &EngineOptions,
    attached: &Attached,
    events: &Fanout,
) -> Result<Vec<(u32, u32)>, Error> {
    let regions = core.regions.begin(&attached.lease);
    // However much there is to register, it is waited for; but not for a daemon that does not run.
    tokio::select! {
        registered = register(core, attached, regions, events) => registered,
        () = watch::silence(attached.client.clone()) => {
            let cause = "the daemon fell silent while memory was registered again".to_owned();
            Err(Error::NoDaemon { path: options.socket.clone(), cause })
        }
    }
}

/// Registers everything again, in one call, even if it is nothing: until then the daemon keeps peers waiting. What
/// it refuses by name is left out, and told.
async fn register(
    core: &Arc<Core>,
    attached: &Attached,
    mut regions: Vec<(u32, Backing)>,
    events: &Fanout,
) -> Result<Vec<(u32, u32)>, Error> {
    let caller = Caller::over(core, attached.client.clone());
    loop {
        let memory: Vec<Backing> = regions.iter().map(|(_, backing)| backing.clone()).collect();
        match caller.register_with(&attached.lease, &memory).await {
            Ok(registered) => {
                let theirs = registered.iter().map(|region| region.id);
                return Ok(regions.iter().map(|(ours, _)| *ours).zip(theirs).collect());
            }
            Err(Error::Refused(failure)) => {
                let at = failure.index.and_then(|index| usize::try_from(index).ok());
                let Some(at) = at.filter(|at| *at < regions.len() && !failure.retryable) else {
                    return Err(Error::Refused(failure));
                };
                let (region, _) = regions.remove(at);
                tracing::error!(region, %failure, "a region could not be registered again");
                core.regions.invalidate(region);
                events.send(&Event::RegionInvalidated { region, cause: Some(failure) });
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether the next attempt would be refused as well: the daemon will not have this engine.
fn is_final(error: &Error) -> bool {
    const FOR_GOOD: [Reason; 2] = [Reason::BadArgument, Reason::Unauthorised];
    matches!(error, Error::Refused(Failure { reason, .. }) if FOR_GOOD.contains(reason))
}

/// Of `host:port`.
fn port(session: &str) -> Option<u16> {
    session.rsplit_once(':')?.1.parse().ok()
}

/// Where peers knew the engine, if they must be told another place now.
pub(crate) fn moved_from(last: &Lease, now: &Lease) -> Option<String> {
    (last.session_id != now.session_id).then(|| last.session_id.clone())
}

/// In [0, 1).
fn draw() -> f64 {
    transfer::random::<4>()
        .map_or(0.5, |bytes| f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0))
}

struct Pauses(Duration);

impl Pauses {
    /// Between half of the pause and all of it, so that the engines of a node do not come all at once.
    fn next(&mut self, draw: f64) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        pause.mul_f64(0.5 + draw / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_from_50_ms_to_a_second_and_vary() {
        let mut pauses = Pauses(FIRST_PAUSE);
        let most: Vec<u128> = (0..8).map(|_| pauses.next(1.0).as_millis()).collect();
        assert_eq!(most, [50, 100, 200, 400, 800, 1000, 1000, 1000]);
        assert_eq!(pauses.next(0.0).as_millis(), 500);
        assert!((0..100).map(|_| draw()).all(|draw| (0.0..1.0).contains(&draw)));
    }

    #[test]
    fn only_a_refusal_of_this_engine_is_final() {
        let refused = |reason| Error::Refused(Failure::new(reason, ""));
        for reason in [Reason::BadArgument, Reason::Unauthorised] {
            assert!(is_final(&refused(reason)), "{reason:?}");
        }
        for reason in
            [Reason::Draining, Reason::Limit, Reason::PortUnavailable, Reason::Memlock, Reason::Driver]
        {
            assert!(!is_final(&refused(reason)), "{reason:?}");
        }
        assert!(!is_final(&Error::Timeout(Duration::ZERO)));
        let message = "its first event is not Attached".into();
        assert!(!is_final(&Error::Call { call: "Attach", message }), "it died while it answered");
    }

    #[test]
    fn the_port_wanted_is_that_of_the_session() {
        assert_eq!(port("10.0.0.1:20001"), Some(20_001));
        assert_eq!(port("[::1]:20001"), Some(20_001));
        assert_eq!(port("nonsense"), None);
    }
}

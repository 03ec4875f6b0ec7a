//! What an attached engine may ask for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use super::{Arrival, Engine, EnginePolicy, Node};
use crate::{
    domain::{EngineId, Failure, Op, Outcome, PathKind, Reason, Report, SessionId, Tag, TransferId},
    memory::Region,
    peer,
    policy::{Hit, RetryPolicy},
    session::{
        Command, Handle,
        outbound::{Outbound, Summary},
    },
    transfer::{
        log::{Admission, Verdict},
        plan,
        run::{Admitted, Request},
    },
};

/// A transfer as the engine asks for it.
#[derive(Debug)]
pub struct TransferOrder {
    /// Minted by the engine.
    pub id: TransferId,
    /// Where to.
    pub session: SessionId,
    /// Direction.
    pub op: Op,
    /// The bytes.
    pub request: Request,
    /// The request it serves.
    pub tag: Option<Tag>,
    /// Its own settings.
    pub policy: EnginePolicy,
}

/// The answer to a probe.
#[derive(Debug)]
pub struct ProbeResult {
    /// Whether it came through, both ways.
    pub result: Result<(), Failure>,
    /// The way it took.
    pub path: Option<PathKind>,
    /// From asking to answer.
    pub round_trip: Duration,
}

/// A session in a table.
#[derive(Debug)]
pub struct SessionView {
    /// Whose.
    pub engine: EngineId,
    /// Where it leads.
    pub target: SessionId,
    /// How it stands.
    pub summary: Summary,
}

impl Engine {
    /// Begins the transfer, or joins it if its id is known. Local faults are told before anything is opened.
    pub async fn transfer(
        &self,
        node: &Node,
        order: TransferOrder,
        arrival: Arrival,
    ) -> Result<Verdict, Failure> {
        if let Some(known) = self.log.find(order.id) {
            return Ok(known);
        }
        node.drain().admit()?;
        if order.session.authority().is_none() {
            return Err(Failure::new(
                Reason::UnknownSession,
                format!("session_id {:?} is not host:port", order.session.as_str()),
            ));
        }
        if order.tag.is_some_and(|tag| self.memory.revocations().refuses(tag)) {
            return Err(Hit::Tag.into());
        }
        let local = self.check_locally(&order)?;
        let received = Instant::now();
        let session = self.session(&order.session)?;
        // Room first: once it is in the log, nothing may come between the transfer and its session.
        let room = session.reserve().await.ok_or_else(|| self.gone_failure())?;
        let (teller, verdict) = match self.log.admit(order.id)? {
            Admission::Known(verdict) => return Ok(verdict),
            Admission::New(teller, verdict) => (teller, verdict),
        };
        room.send(Command::Submit(Box::new(Admitted {
            teller: Some(teller),
            id: order.id,
            op: order.op,
            request: Arc::new(order.request),
            local,
            tag: order.tag,
            policy: order.policy.retry(self.retry),
            failure_threshold: order.policy.failure_threshold,
            received,
            known: arrival.known,
            own_epoch: arrival.own_epoch,
        })));
        Ok(verdict)
    }

    /// Gives the local regions that the transfer names.
    fn check_locally(&self, order: &TransferOrder) -> Result<Vec<Arc<Region>>, Failure> {
        let view = self.memory.view();
        match &order.request {
            Request::Slices(batch) => {
                batch.validate()?;
                plan::check_local(batch, &view.table)
            }
            Request::Pages(pages) => {
                pages.validate()?;
                // A layout that is not there is told when the pages are expanded.
                let layout = view.layouts.get(&pages.local_layout);
                Ok(layout.map(|layout| layout.regions(&view.table)).unwrap_or_default())
            }
        }
    }

    /// Has a transfer of this engine ended, and says whether nobody on this node touches memory for it any more;
    /// waits for that, but no longer than `settle`. What the peer says of its own half is not waited for: the
    /// transfer's report tells it.
    pub async fn cancel(&self, node: &Node, transfer: TransferId, settle: Duration) -> Result<bool, Failure> {
        let verdict = self.find(node, transfer)?;
        Ok(cancel(self.handles(), verdict, transfer, settle).await)
    }

    /// As [`Engine::cancel`], from where waiting is not possible: the caller has gone away.
    pub fn abandon(&self, transfer: TransferId) {
        end(self.handles(), transfer, &Failure::new(Reason::Cancelled, "the call was dropped"));
    }

    /// A transfer of this engine.
    pub fn find(&self, node: &Node, transfer: TransferId) -> Result<Verdict, Failure> {
        self.log.find(transfer).ok_or_else(|| match node.is_anothers(transfer, self) {
            true => Failure::new(Reason::NotYours, "transfer_id: another engine's transfer"),
            false => Failure::new(Reason::BadArgument, "transfer_id: no such transfer"),
        })
    }

    /// Whether the peer is there.
    pub async fn probe(&self, session: &SessionId, limit: Duration) -> Result<ProbeResult, Failure> {
        let handle = self.session(session)?;
        let asked = Instant::now();
        let answer = tokio::time::timeout(limit, handle.ask(Command::Probe)).await;
        let round_trip = asked.elapsed();
        let result = match answer {
            Ok(Some(result)) => result,
            Ok(None) => Err(self.gone_failure()),
            Err(_) => Err(Failure::new(
                Reason::ConnectTimeout,
                format!("no answer within {} ms", limit.as_millis()),
            )),
        };
        let path = handle.ask(Command::Describe).await.and_then(|summary| summary.path);
        Ok(ProbeResult { result, path, round_trip })
    }

    /// Accepts whoever is at that session id now.
    pub async fn reset(&self, session: &SessionId) -> Result<(), Failure> {
        self.forget_peer(session);
        self.session(session)?.ask(Command::Reset).await.ok_or_else(|| self.gone_failure())
    }

    /// All outbound sessions.
    pub async fn session_views(&self) -> Vec<SessionView> {
        let mut views = Vec::new();
        for handle in self.handles() {
            if let Some(summary) = handle.ask(Command::Describe).await {
                views.push(SessionView { engine: self.id, target: handle.id().clone(), summary });
            }
        }
        views
    }

    /// How the engine's transfers are retried.
    pub fn retry(&self) -> RetryPolicy {
        self.retry
    }

    /// The session to that endpoint; made when it is first asked for.
    fn session(&self, target: &SessionId) -> Result<Handle, Failure> {
        if target.authority().is_none() {
            let message = format!("session_id {:?} is not host:port", target.as_str());
            return Err(Failure::new(Reason::UnknownSession, message));
        }
        let mut sessions = self.sessions();
        if let Some(handle) = sessions.by_target.get(target) {
            return Ok(handle.clone());
        }
        // Under the lock that `release` takes: an engine that is gone gets no new session.
        if let Some(failure) = self.gone() {
            return Err(failure);
        }
        if sessions.by_target.len() >= self.max_sessions {
            sessions.forget_idle();
        }
        if sessions.by_target.len() >= self.max_sessions {
            let message = format!("{} sessions of this engine exist (limits.sessions)", self.max_sessions);
            return Err(Failure::new(Reason::Limit, message));
        }
        let known = self.known_peer(target);
        let policy = self.session_policy.clone();
        let core = Outbound::new(target.clone(), policy, known, self.next_first_lane(), Instant::now());
        let handle = peer::initiator::start(self.context.clone(), target.clone(), core, &mut sessions.tasks);
        sessions.by_target.insert(target.clone(), handle.clone());
        Ok(handle)
    }

    fn gone_failure(&self) -> Failure {
        self.gone().unwrap_or_else(|| Failure::plain(Reason::EngineGone))
    }
}

/// Whether the transfer was settled on this node within `settle`. It is ended in any case: if not by then, later.
async fn cancel(handles: Vec<Handle>, mut verdict: Verdict, transfer: TransferId, settle: Duration) -> bool {
    let failure = Failure::new(Reason::Cancelled, "the caller cancelled the transfer");
    let mut asked = JoinSet::new();
    for handle in handles.clone() {
        let failure = failure.clone();
        asked.spawn(async move { handle.ask(|answer| Command::Cancel(transfer, failure, answer)).await });
    }
    // The session that carries it answers, and no other.
    let settled_here = async {
        while let Some(answer) = asked.join_next().await {
            if matches!(answer, Ok(Some(()))) {
                return;
            }
        }
        std::future::pending().await
    };
    let over = async {
        let end = |told: &Option<Report>| told.as_ref().is_some_and(|end| end.outcome != Outcome::Unsettled);
        if verdict.wait_for(end).await.is_err() {
            std::future::pending().await
        }
    };
    let settled = async {
        tokio::select! {
            biased;
            () = over => {}
            () = settled_here => {}
        }
    };
    let settled = tokio::time::timeout(settle, settled).await.is_ok();
    if !settled {
        // Whoever still waits before a full inbox gives up with this call, and a session that was asked before it
        // got the transfer knew nothing of it.
        end(handles, transfer, &failure);
    }
    settled
}

/// Has a transfer ended by whichever session carries it, without waiting.
fn end(handles: Vec<Handle>, transfer: TransferId, failure: &Failure) {
    for handle in handles {
        if !handle.try_end(transfer, failure.clone()) {
            let failure = failure.clone();
            // As many as calls end while a session does not read. One that is gone takes nothing.
            tokio::spawn(async move { handle.send(Command::End(transfer, failure)).await.ok() });
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{oneshot, watch};

    use super::*;

    /// The call no longer waits, and the transfer ends all the same.
    #[tokio::test]
    async fn a_cancel_that_finds_the_inbox_full_is_heard_when_there_is_room() {
        let (handle, mut inbox) = Handle::new(SessionId::new("peer:1"), watch::channel(None).1);
        let (_told, verdict) = watch::channel(None);
        while handle.try_end(TransferId([1; 16]), Failure::plain(Reason::Cancelled)) {}
        let transfer = TransferId([2; 16]);
        assert!(!cancel(vec![handle], verdict, transfer, Duration::from_millis(20)).await);
        let heard = async {
            while let Some(command) = inbox.recv().await {
                if matches!(command, Command::End(which, _) if which == transfer) {
                    return true;
                }
            }
            false
        };
        assert!(heard.await, "nobody told the session");
    }

    #[tokio::test]
    async fn a_cancel_is_settled_by_the_session_that_carries_it() {
        let sessions = ["peer:1", "peer:2"].map(|id| Handle::new(SessionId::new(id), watch::channel(None).1));
        let [(stranger, mut knows_nothing), (carrier, mut carries)] = sessions;
        let (_told, verdict) = watch::channel(None);
        let answer = |command| match command {
            Some(Command::Cancel(_, _, answer)) => answer,
            other => panic!("not a cancel: {other:?}"),
        };
        let serve = async {
            drop::<oneshot::Sender<()>>(answer(knows_nothing.recv().await));
            answer(carries.recv().await).send(()).expect("somebody waits");
        };
        let asked = cancel(vec![stranger, carrier], verdict, TransferId([2; 16]), Duration::from_secs(60));
        let (settled, ()) = tokio::join!(asked, serve);
        assert!(settled);
        assert!(knows_nothing.try_recv().is_err() && carries.try_recv().is_err(), "told twice");
    }
}

//! The target's side of sessions: who was confirmed at one endpoint, which lanes they have, how far each came.
//!
//! A session is known by its initiator's incarnation: confirming a new one fences the earlier one first, so no
//! two of an initiator are ever live at an endpoint. What a closed lane had processed is remembered until the
//! initiator has surely heard it (I2); where it is forgotten, the initiator sends again what was applied, which
//! costs bytes and harms nothing.
//!
//! This is the table; [`session`] is one of them. Not here: the handshake that proves who comes, and the control stream. `peer` has both.

mod session;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use session::InboundSession;
use session::LiveLane;

use crate::{
    domain::{Failure, Incarnation, LaneId, Reason},
    memory::EngineMemory,
    transport::{
        LaneKind, LaneRecord,
        tcp::{Carriers, Preface, TargetSetup},
    },
};

/// Lanes of one session that are granted or open.
const MAX_LANES: usize = 64;

/// Single use; binds a data connection to a confirmed session.
pub type Token = [u8; 32];

/// The sessions confirmed at one endpoint. Locks are held for map steps only.
#[derive(Debug)]
pub struct Inbound {
    limit: usize,
    memory: Arc<EngineMemory>,
    carriers: Arc<Carriers>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Why nobody is taken any more.
    closed: Option<Failure>,
    /// Ordered, so that the same events always end them in the same order.
    sessions: BTreeMap<Incarnation, Arc<InboundSession>>,
    tokens: HashMap<Token, Grant>,
}

#[derive(Debug)]
struct Grant {
    session: Arc<InboundSession>,
    lane: LaneId,
    kind: LaneKind,
}

impl Inbound {
    /// Nobody yet. At most `limit` initiators are remembered.
    pub fn new(memory: Arc<EngineMemory>, carriers: Arc<Carriers>, limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, memory, carriers, table: Mutex::default() })
    }

    /// The engine's memory.
    pub fn memory(&self) -> &Arc<EngineMemory> {
        &self.memory
    }

    /// Confirms a session: fences the initiator's earlier one and hands on what its lanes had processed.
    ///
    /// The earlier one keeps its place until it is fenced, so that a confirmation that is given up half-way
    /// leaves it there for the next one to wait for (I2).
    pub async fn confirm(
        &self,
        initiator: Incarnation,
        label: String,
        checksums: bool,
    ) -> Result<(Arc<InboundSession>, Vec<(LaneId, LaneRecord)>), Failure> {
        loop {
            let earlier = self.table().sessions.get(&initiator).cloned();
            let fenced = match &earlier {
                Some(earlier) => {
                    earlier.supersede();
                    self.fence_all(earlier, &Failure::new(Reason::ConnectionLost, "superseded")).await
                }
                None => Vec::new(),
            };
            let session = InboundSession::new(initiator, label.clone(), checksums, fenced.clone());
            // Somebody else may have been confirmed meanwhile; then that one is the earlier one.
            if self.insert(&session, earlier.as_ref())? {
                return Ok((session, fenced));
            }
        }
    }

    /// Puts the session in the place of the earlier one, if that is still there.
    fn insert(
        &self,
        session: &Arc<InboundSession>,
        earlier: Option<&Arc<InboundSession>>,
    ) -> Result<bool, Failure> {
        let mut table = self.table();
        if let Some(failure) = &table.closed {
            return Err(failure.clone());
        }
        let now_there = table.sessions.get(&session.initiator);
        if now_there.map(Arc::as_ptr) != earlier.map(Arc::as_ptr) {
            return Ok(false);
        }
        if now_there.is_none() && table.sessions.len() >= self.limit {
            let over = table.sessions.iter().find(|(_, known)| InboundSession::is_over(known));
            let Some(over) = over.map(|(who, _)| *who) else {
                let message = format!("{} initiators are connected (limits.sessions)", self.limit);
                return Err(Failure::new(Reason::Limit, message));
            };
            table.sessions.remove(&over);
        }
        table.sessions.insert(session.initiator, session.clone());
        Ok(true)
    }

    /// A token for a lane.
    pub fn grant(
        &self,
        session: &Arc<InboundSession>,
        lane: LaneId,
        kind: LaneKind,
    ) -> Result<Token, Failure> {
        let mut table = self.table();
        let mut book = session.book();
        if book.ended {
            return Err(Failure::new(Reason::ConnectionLost, "the session is over"));
        }
        if book.live.len() >= MAX_LANES {
            return Err(Failure::new(Reason::Limit, format!("{MAX_LANES} lanes of this session are live")));
        }
        if book.live.contains_key(&lane) || book.closed.iter().any(|(closed, _)| *closed == lane) {
            return Err(Failure::new(Reason::BadArgument, format!("lane {lane} was granted before")));
        }
        let token = Incarnation::random().0;
        book.live.insert(lane, LiveLane::Granted);
        session.stops.expect(lane);
        table.tokens.insert(token, Grant { session: session.clone(), lane, kind });
        Ok(token)
    }

    /// A data connection presents its preface. What does not fit a grant is refused, and the grant is spent.
    pub fn attach(&self, preface: &Preface, stream: TcpStream) -> Result<(), Failure> {
        let refused = |what: &str| Err(Failure::new(Reason::HandshakeFailed, what.to_owned()));
        let Some(grant) = self.table().tokens.remove(&preface.token) else {
            return refused("a lane token that was never granted, or was used before");
        };
        if grant.lane != preface.lane || grant.kind != preface.kind {
            return refused("a lane token presented for another lane");
        }
        let session = &grant.session;
        {
            let mut book = session.book();
            if book.ended || !matches!(book.live.get(&grant.lane), Some(LiveLane::Granted)) {
                return refused("a lane of a session that is over");
            }
            book.live.insert(grant.lane, LiveLane::Attaching(None));
        }
        let setup = TargetSetup {
            lane: grant.lane,
            kind: grant.kind,
            memory: self.memory.clone(),
            stops: session.stops.clone(),
            sink: session.clone(),
            pulse: session.pulse.clone(),
            checksums: session.checksums,
        };
        // Not under the lock: a lane may close, and say so, before this returns.
        let open = self.carriers.serve(stream, setup);
        let mut book = session.book();
        match book.live.get_mut(&grant.lane) {
            Some(live) => {
                if let LiveLane::Attaching(Some(cause)) = live {
                    open.close(cause.clone());
                }
                *live = LiveLane::Open(open);
                Ok(())
            }
            None => refused("the lane closed at once"),
        }
    }

    /// Has the lane's owner close it, and says how far it came (I2). A lane never seen has processed nothing.
    pub async fn fence_lane(&self, session: &InboundSession, lane: LaneId, cause: &Failure) -> LaneRecord {
        self.revoke_tokens(|grant| std::ptr::eq(&*grant.session, session) && grant.lane == lane);
        session.close(|id| id == lane, cause);
        session.closed(|id| id == lane).await;
        let book = session.book();
        let record = book.closed.iter().rev().find(|(closed, _)| *closed == lane);
        record.map(|(_, record)| record.clone()).unwrap_or_default()
    }

    /// Ends the session: no token of it is good any more, and all of its lanes are closed.
    pub async fn fence_all(&self, session: &InboundSession, cause: &Failure) -> Vec<(LaneId, LaneRecord)> {
        self.begin_fence(session, cause);
        session.closed(|_| true).await;
        let book = session.book();
        book.inherited.iter().chain(&book.closed).cloned().collect()
    }

    /// What of a fence needs no waiting.
    fn begin_fence(&self, session: &InboundSession, cause: &Failure) {
        session.book().ended = true;
        self.revoke_tokens(|grant| std::ptr::eq(&*grant.session, session));
        session.close(|_| true, cause);
    }

    /// Ends all sessions and takes no new one: the engine is gone.
    pub async fn close(&self, cause: &Failure) {
        let sessions: Vec<Arc<InboundSession>> = {
            let mut table = self.table();
            table.closed = Some(cause.clone());
            std::mem::take(&mut table.sessions).into_values().collect()
        };
        // All are told before any is waited for: one slow lane must not keep the others open (I10).
        for session in &sessions {
            session.supersede();
            self.begin_fence(session, cause);
        }
        for session in sessions {
            session.closed(|_| true).await;
        }
    }

    /// Bytes heard from all initiators so far.
    pub fn heard(&self) -> u64 {
        self.table().sessions.values().map(|session| session.pulse.total()).sum()
    }

    /// Everyone confirmed and not ended: label, lanes.
    pub fn list(&self) -> Vec<(Incarnation, String, usize)> {
        let table = self.table();
        let live = table.sessions.values().filter(|session| !session.book().ended);
        live.map(|session| (session.initiator, session.label().to_owned(), session.book().live.len()))
            .collect()
    }

    fn revoke_tokens(&self, of: impl Fn(&Grant) -> bool) {
        self.table().tokens.retain(|_, grant| !of(grant));
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

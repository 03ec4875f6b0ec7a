//! How the rest of the daemon talks to a session: commands into a bounded inbox.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::outbound::Summary;
use crate::{
    domain::{Epoch, Failure, Incarnation, Reason, SessionId, TransferId},
    policy::Revocations,
    transfer::run::Admitted,
};

/// Commands that may wait for a session; beyond it callers wait.
const INBOX: usize = 1024;

/// What a session is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Carry a transfer.
    Submit(Box<Admitted>),
    /// Have a transfer over.
    End(TransferId, Failure),
    /// The same, and answer when nobody on this node touches memory for it any more. A session that does not carry
    /// it can say nothing of it: the answer is dropped.
    Cancel(TransferId, Failure, oneshot::Sender<()>),
    /// The own engine has revoked: end what is hit, and answer when nobody on this node touches memory for it
    /// any more. Where that cannot be said the answer is dropped.
    Revoke(Arc<Revocations>, oneshot::Sender<()>),
    /// See whether the peer is there.
    Probe(oneshot::Sender<Result<(), Failure>>),
    /// Accept whoever is there now.
    Reset(oneshot::Sender<()>),
    /// Describe yourself.
    Describe(oneshot::Sender<Summary>),
    /// End everything; answers when nothing of the session touches memory any more.
    Shutdown(Failure, oneshot::Sender<()>),
}

/// A session's address.
#[derive(Clone, Debug)]
pub struct Handle {
    id: SessionId,
    inbox: mpsc::Sender<Command>,
    idle: Arc<AtomicBool>,
    known: watch::Receiver<Option<Known>>,
}

/// An endpoint's incarnation, and the newest revocation of it that is known.
pub type Known = (Incarnation, Epoch);

impl Handle {
    /// A handle and the inbox it fills. `known` is where the session says what it knows of the endpoint.
    pub fn new(id: SessionId, known: watch::Receiver<Option<Known>>) -> (Self, mpsc::Receiver<Command>) {
        let (inbox, commands) = mpsc::channel(INBOX);
        (Self { id, inbox, idle: Arc::default(), known }, commands)
    }

    /// Whom the session knows at the endpoint, and how often they have revoked. A call that arrives now is
    /// admitted under it, however long it waits in the inbox.
    pub fn known(&self) -> Option<Known> {
        *self.known.borrow()
    }

    /// Where the session says whether it leads anywhere or carries anything.
    pub fn idle(&self) -> Arc<AtomicBool> {
        self.idle.clone()
    }

    /// Ends the session if it is idle. What races with this is answered LIMIT, and may be tried again.
    pub fn let_go(&self) -> bool {
        let failure = Failure::new(Reason::Limit, "the session made room for another (limits.sessions)");
        self.idle.load(SeqCst)
            && self.inbox.try_send(Command::Shutdown(failure, oneshot::channel().0)).is_ok()
    }

    /// Where it leads.
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// Hands a command over. A session that is gone gives it back.
    pub async fn send(&self, command: Command) -> Result<(), Command> {
        self.inbox.send(command).await.map_err(|refused| refused.0)
    }

    /// Room for one command, taken before anything is begun that the command would have to carry on. Nothing
    /// where the session is gone.
    pub async fn reserve(&self) -> Option<mpsc::Permit<'_, Command>> {
        self.inbox.reserve().await.ok()
    }

    /// Has a transfer ended, from where waiting is not possible. Returns whether the inbox had room.
    pub fn try_end(&self, transfer: TransferId, failure: Failure) -> bool {
        self.inbox.try_send(Command::End(transfer, failure)).is_ok()
    }

    /// Asks and waits for the answer; nothing where the session is gone.
    pub async fn ask<A>(&self, question: impl FnOnce(oneshot::Sender<A>) -> Command) -> Option<A> {
        let (answer, hears) = oneshot::channel();
        self.send(question(answer)).await.ok()?;
        hears.await.ok()
    }
}

//! What can go wrong, and how a gRPC status becomes one of these.
//!
//! Decisions follow the gRPC code and the reason number in the metadata, never the text of a message.

use std::{path::PathBuf, time::Duration};

use kvferry_proto::{REASON_METADATA, types::v1 as wire};
use tonic::{Code, Status};

use crate::Reason;

/// Everything that can go wrong in a call. From [`Engine::transfer`](crate::Engine::transfer) an error means
/// that nothing of the transfer was started: whatever was started ends in a [`Report`](crate::Report).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers at the daemon's socket, or the attachment has ended.
    #[error("no kvferry daemon answers at {path}: {cause}")]
    NoDaemon {
        /// The socket tried.
        path: PathBuf,
        /// What happened, and what helps.
        cause: String,
    },
    /// The daemon (or this library, for arguments it can judge itself) says no, and why.
    #[error("{0}")]
    Refused(Failure),
    /// The call itself failed with a gRPC status that carries no reason.
    #[error("the daemon could not carry out {call}: {message}")]
    Call {
        /// Name of the RPC.
        call: &'static str,
        /// For people.
        message: String,
    },
    /// A system call of this process failed.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// Its errno.
        source: std::io::Error,
    },
    /// The handle was inherited over fork.
    #[error("this handle belongs to process {owner}; a forked child must attach for itself")]
    Forked {
        /// Process id of the one that attached.
        owner: u32,
    },
    /// The time given has passed.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl Error {
    /// For `map_err` on system calls.
    pub(crate) fn system<E: Into<std::io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { doing, source: source.into() }
    }

    /// An argument that this library refuses before it asks the daemon.
    pub(crate) fn argument(message: impl Into<String>, index: Option<u64>) -> Self {
        Self::Refused(Failure { index, ..Failure::new(Reason::BadArgument, message) })
    }
}

/// One refusal or failure, precise enough to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why. The only field to decide by, besides `retryable`.
    pub reason: Reason,
    /// Raw errno or work-completion status; 0 when there is none.
    pub code: i32,
    /// For people; nothing is decided by it.
    pub message: String,
    /// Index of the slice, region or buffer at fault, where there is one.
    pub index: Option<u64>,
    /// The same call may succeed with nothing changed by the engine.
    pub retryable: bool,
}

impl Failure {
    /// A failure told in words.
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, code: 0, message: message.into(), index: None, retryable: retryable(reason) }
    }

    /// From a bare reason number. Numbers of a newer daemon become `Unspecified` and stay in the text.
    pub(crate) fn from_number(number: i32, message: impl Into<String>) -> Self {
        match Reason::try_from(number) {
            Ok(reason) => Self::new(reason, message),
            Err(_) => Self::new(Reason::Unspecified, format!("{} (unknown reason {number})", message.into())),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.reason, self.message)
    }
}

impl From<wire::Failure> for Failure {
    fn from(failure: wire::Failure) -> Self {
        Self {
            code: failure.code,
            index: failure.index,
            retryable: failure.retryable,
            ..Self::from_number(failure.reason, failure.message)
        }
    }
}

/// Whether the same call may succeed with nothing changed by the engine. The daemon says so itself wherever
/// it sends a whole failure; this fills in where only the reason's number arrives.
fn retryable(reason: Reason) -> bool {
    let fabric = (Reason::ConnectRefused as i32..=Reason::SessionFailed as i32).contains(&(reason as i32));
    fabric
        || matches!(
            reason,
            Reason::PeerDaemonRestarted
                | Reason::Deadline
                | Reason::Limit
                | Reason::Draining
                | Reason::EngineSilent
                | Reason::OwnDaemonGone
                | Reason::PortUnavailable
        )
}

/// Why a call to the daemon has no reply.
#[derive(Debug)]
pub(crate) enum NoReply {
    /// The daemon answered: it did not carry the call out.
    Answered(Error),
    /// No answer of the daemon arrived; it may or may not have acted. Holds what was seen, for people.
    Lost(Code, String),
}

impl NoReply {
    /// Sorts a status. A reason number is an answer whatever the code; without one, the codes that the
    /// transport makes up by itself prove nothing.
    pub(crate) fn from_status(call: &'static str, status: &Status) -> Self {
        if let Some(number) = reason_number(status) {
            return Self::Answered(Error::Refused(Failure::from_number(number, status.message())));
        }
        match status.code() {
            code @ (Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::Internal
            | Code::Aborted
            | Code::DataLoss
            | Code::DeadlineExceeded) => Self::Lost(code, describe(status)),
            _ => Self::Answered(Error::Call { call, message: describe(status) }),
        }
    }
}

fn reason_number(status: &Status) -> Option<i32> {
    status.metadata().get(REASON_METADATA)?.to_str().ok()?.parse().ok()
}

/// Status text with the innermost cause, which is where the transport hides the errno.
pub(crate) fn describe(status: &Status) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    let mut innermost = None;
    while let Some(error) = cause {
        innermost = Some(error);
        cause = error.source();
    }
    match innermost {
        Some(error) => format!("{:?}: {}: {error}", status.code(), status.message()),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataMap;

    use super::*;

    fn with_reason(code: Code, text: &str) -> Status {
        let mut metadata = MetadataMap::new();
        metadata.insert(REASON_METADATA, text.parse().unwrap());
        Status::with_metadata(code, "m", metadata)
    }

    #[test]
    fn an_unknown_number_stays_readable() {
        match NoReply::from_status("Probe", &with_reason(Code::Internal, "999")) {
            NoReply::Answered(Error::Refused(failure)) => {
                assert_eq!(failure.reason, Reason::Unspecified);
                assert!(failure.message.contains("999"), "{failure}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn garbage_in_the_metadata_is_no_reason() {
        assert!(matches!(
            NoReply::from_status("Probe", &with_reason(Code::Unavailable, "soon")),
            NoReply::Lost(..)
        ));
    }

    #[test]
    fn codes_the_transport_makes_up_prove_nothing() {
        for code in [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Internal] {
            assert!(matches!(NoReply::from_status("Transfer", &Status::new(code, "")), NoReply::Lost(..)));
        }
        for code in [Code::InvalidArgument, Code::NotFound, Code::PermissionDenied, Code::Unimplemented] {
            assert!(matches!(
                NoReply::from_status("Transfer", &Status::new(code, "")),
                NoReply::Answered(Error::Call { call: "Transfer", .. })
            ));
        }
    }
}

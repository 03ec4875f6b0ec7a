//! Why something did not happen, and what follows from it.

use std::fmt;

macro_rules! reasons {
    ($($name:ident = $number:literal, $class:ident, $retryable:literal, $text:literal;)*) => {
        /// The closed list of reasons; numbers are stable and the same on the wire.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        pub enum Reason {
            $(#[doc = $text] $name = $number,)*
        }

        impl Reason {
            /// Every reason, in order of number.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// The reason with this number.
            pub fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            /// What kind of trouble it is: decides retry and health accounting.
            pub fn class(self) -> Class {
                match self { $(Self::$name => Class::$class,)* }
            }

            /// Whether the same call may succeed with nothing changed by the engine.
            pub fn retryable(self) -> bool {
                match self { $(Self::$name => $retryable,)* }
            }

            /// A sentence for people.
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    Unspecified = 0, Local, false, "no reason was given";
    ConnectRefused = 1, Fabric, true, "the peer refused the connection";
    ConnectTimeout = 2, Fabric, true, "the peer did not answer the connection in time";
    ConnectionLost = 3, Fabric, true, "the connection was lost";
    PeerSilent = 4, Fabric, true, "the peer daemon is silent";
    HandshakeFailed = 5, Fabric, true, "the handshake with the peer failed";
    WorkCompletion = 6, Fabric, true, "a work request failed on the NIC";
    Checksum = 7, Fabric, true, "bytes were changed on the way";
    ProgressTimeout = 8, Fabric, true, "no byte moved within the progress timeout";
    SessionFailed = 9, Fabric, true, "the session has failed and waits for its next probe";
    PeerRestarted = 20, Stale, false, "another engine lives at this session id now";
    PeerDaemonRestarted = 21, Stale, true, "the peer's daemon restarted while the transfer ran";
    RegionChanged = 22, Stale, false, "a region of the transfer was unregistered or registered anew";
    LayoutChanged = 23, Stale, false, "a layout of the transfer changed";
    BadArgument = 40, Caller, false, "the request is malformed";
    Unregistered = 41, Caller, false, "a slice lies in no registered region";
    OutOfBounds = 42, Caller, false, "a slice leaves its region";
    Overlap = 43, Caller, false, "the range overlaps a live region";
    LayoutMismatch = 44, Caller, false, "the two layouts do not match";
    Revoked = 45, Caller, false, "the target revoked the memory or the tag";
    Cancelled = 46, Caller, false, "the transfer was cancelled";
    Deadline = 47, Caller, true, "the deadline passed";
    UnknownSession = 48, Caller, false, "the session id names no endpoint";
    NotYours = 49, Caller, false, "the handle belongs to another engine";
    UnsupportedMemory = 50, Caller, false, "this memory cannot be registered";
    NoPath = 51, Caller, false, "no allowed transport reaches the peer";
    Limit = 60, Local, true, "a limit is reached";
    Memlock = 61, Local, false, "RLIMIT_MEMLOCK is too small";
    Draining = 62, Local, true, "the daemon is draining";
    EngineGone = 63, Local, false, "the engine process is gone";
    EngineSilent = 64, Local, true, "the engine process does not answer";
    Driver = 65, Local, false, "a driver or system call failed";
    OwnDaemonGone = 66, Local, true, "the engine's own daemon is gone";
    Unauthorised = 67, Local, false, "the caller may not do this";
    PortUnavailable = 68, Local, true, "no endpoint port is free";
}

/// What kind of trouble a reason is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// The path failed: retried, counted against the session once given up.
    Fabric,
    /// What was named is no longer there: told to the caller, never counted.
    Stale,
    /// The request itself.
    Caller,
    /// This node.
    Local,
}

/// One refusal or failure, precise enough to act on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason:?}: {message}")]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// Raw errno or work-completion status; 0 when there is none.
    pub code: i32,
    /// For people; nothing is decided by it.
    pub message: String,
    /// Index of the slice, region or buffer at fault.
    pub index: Option<u64>,
}

impl Failure {
    /// A failure told in words.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, code: 0, message: message.into(), index: None }
    }

    /// The reason's own sentence says it all.
    pub fn plain(reason: Reason) -> Self {
        Self::new(reason, reason.text())
    }

    /// A failed system call: keeps its errno.
    pub fn io(reason: Reason, doing: impl fmt::Display, error: &std::io::Error) -> Self {
        Self {
            reason,
            code: error.raw_os_error().unwrap_or(0),
            message: format!("{doing}: {error}"),
            index: None,
        }
    }

    /// Names the slice, region or buffer at fault.
    pub fn at(mut self, index: u64) -> Self {
        self.index = Some(index);
        self
    }

    /// The class of its reason.
    pub fn class(&self) -> Class {
        self.reason.class()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_classes_go_together() {
        for &reason in Reason::ALL {
            let number = reason as u16;
            assert_eq!(Reason::from_number(number), Some(reason));
            let class = match number {
                1..=19 => Class::Fabric,
                20..=39 => Class::Stale,
                40..=59 => Class::Caller,
                _ => Class::Local,
            };
            assert_eq!(reason.class(), class, "{reason:?}");
        }
        assert_eq!(Reason::from_number(10), None);
    }
}

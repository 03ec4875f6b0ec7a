//! Label sets. Each value comes from an enum of this program, so the number of series is bounded (I8).

use std::fmt::{self, Write as _};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

use crate::domain::{Op, Outcome, PathKind, Reason};

/// What a session is doing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SessionState {
    /// Nothing is open.
    Idle,
    /// The first open is under way.
    Opening,
    /// Takes transfers.
    Healthy,
    /// Lost, and being opened again.
    Recovering,
    /// Refuses transfers until a probe comes through.
    Failed,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct PathOp {
    pub(super) path: PathLabel,
    pub(super) op: OpLabel,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct Ending {
    pub(super) outcome: OutcomeLabel,
    pub(super) reason: ReasonLabel,
    pub(super) path: PathLabel,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct PathReason {
    pub(super) path: PathLabel,
    pub(super) reason: ReasonLabel,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct Why {
    pub(super) reason: ReasonLabel,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct State {
    pub(super) state: SessionState,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct InPhase {
    pub(super) phase: Phase,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct OfWhat {
    pub(super) of: RevokedLabel,
}

/// What was revoked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum RevokedLabel {
    Ranges,
    Tag,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct Build {
    pub(super) version: &'static str,
}

/// Where a transfer's time went.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Phase {
    Queued,
    Moving,
    Settling,
}

/// A path, or none where none was chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct PathLabel(pub(super) Option<PathKind>);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct OpLabel(pub(super) Op);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct OutcomeLabel(pub(super) Outcome);

/// A reason, or none where all went well.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct ReasonLabel(pub(super) Option<Reason>);

macro_rules! text_label {
    ($type:ty, |$value:ident| $text:expr) => {
        impl EncodeLabelValue for $type {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
                let $value = *self;
                encoder.write_str($text)
            }
        }
    };
}

text_label!(PathLabel, |path| path.0.map_or("none", PathKind::name));
text_label!(OpLabel, |op| match op.0 {
    Op::Write => "write",
    Op::Read => "read",
});
text_label!(OutcomeLabel, |outcome| match outcome.0 {
    Outcome::Done => "done",
    Outcome::Failed => "failed",
    Outcome::Cancelled => "cancelled",
    Outcome::Unsettled => "unsettled",
});
text_label!(SessionState, |state| match state {
    SessionState::Idle => "idle",
    SessionState::Opening => "opening",
    SessionState::Healthy => "healthy",
    SessionState::Recovering => "recovering",
    SessionState::Failed => "failed",
});
text_label!(RevokedLabel, |revoked| match revoked {
    RevokedLabel::Ranges => "ranges",
    RevokedLabel::Tag => "tag",
});
text_label!(Phase, |phase| match phase {
    Phase::Queued => "queued",
    Phase::Moving => "moving",
    Phase::Settling => "settling",
});
text_label!(ReasonLabel, |reason| &match reason.0 {
    Some(reason) => snake_case(&format!("{reason:?}")),
    None => "none".to_owned(),
});

/// `ConnectRefused` as `connect_refused`: the name in the protocol, in the case of labels.
fn snake_case(name: &str) -> String {
    let mut text = String::with_capacity(name.len() + 4);
    for (at, c) in name.char_indices() {
        if c.is_ascii_uppercase() && at > 0 {
            text.push('_');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named_as_in_the_protocol() {
        assert_eq!(snake_case(&format!("{:?}", Reason::OwnDaemonGone)), "own_daemon_gone");
        assert_eq!(snake_case("Driver"), "driver");
    }
}

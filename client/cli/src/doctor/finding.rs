//! One line of the doctor's report.

use std::fmt;

use serde_json::{Value, json};

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Status {
    Ok,
    /// Works, but not for everything or everybody.
    Warn,
    /// Engines cannot work like this.
    Fail,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// What was looked at, what was seen, and what to do about it.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) status: Status,
    /// The name of the check.
    pub(super) what: &'static str,
    pub(super) why: String,
    /// Nothing where nothing is wrong.
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn ok(what: &'static str, why: impl Into<String>) -> Self {
        Self { status: Status::Ok, what, why: why.into(), fix: None }
    }

    pub(super) fn warn(what: &'static str, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { status: Status::Warn, what, why: why.into(), fix: Some(fix.into()) }
    }

    pub(super) fn fail(what: &'static str, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { status: Status::Fail, what, why: why.into(), fix: Some(fix.into()) }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({ "status": self.status.word(), "check": self.what, "why": self.why, "fix": self.fix })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<4}  {:<15}  {}", self.status.word(), self.what, self.why)?;
        match &self.fix {
            Some(fix) => write!(f, "  Fix: {fix}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_and_one_object() {
        let finding = Finding::fail("socket", "it is not there", "start kvferryd");
        assert_eq!(finding.to_string(), "FAIL  socket           it is not there  Fix: start kvferryd");
        let object = finding.to_json();
        assert_eq!((&object["status"], &object["check"]), (&"FAIL".into(), &"socket".into()));
        assert_eq!(Finding::ok("x", "y").to_json()["fix"], Value::Null);
    }
}

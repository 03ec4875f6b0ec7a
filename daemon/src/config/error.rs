//! What can be wrong with the settings.

use std::{fmt, io, path::PathBuf};

/// One key that cannot be used as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// `section.key`.
    pub key: String,
    /// The file, environment variable or flag that set it, or "the default".
    pub origin: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (from {}): {}", self.key, self.origin, self.message)
    }
}

/// Why the daemon does not start with these settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: {error}", path = path.display())]
    Unreadable {
        /// As given.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The file is not TOML.
    #[error("{path}: {message}", path = path.display())]
    Syntax {
        /// As given.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// Keys that do not exist, or values that cannot be.
    #[error("{}", lines(.0))]
    Keys(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

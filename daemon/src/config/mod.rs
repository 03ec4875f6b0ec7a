//! Settings of the daemon: defaults < TOML file < environment < flags.
//!
//! Read and validated once, before anything is opened or bound; every complaint names the key and where its
//! value came from. The environment is `KVFERRYD__SECTION__KEY`; names that begin with `KVFERRY_` belong to
//! clients (and Kubernetes makes up more of them), so they are not looked at.
//!
//! Not here: what an engine asks for itself at Attach, and settings that change while the daemon runs: none do.

mod error;
mod flags;
mod layers;
mod rails;
mod schema;
mod validate;
mod values;

use std::ffi::OsString;

pub use error::{ConfigError, Problem};
pub use flags::Flags;
pub use rails::MAX_RAIL_MAP;
pub use schema::{
    Admin, Config, Control, Drain, Endpoint, Fence, Limits, Local, Log, Memory, Process, Rdma, Registration,
    Restart, Retry, Security, Session, Tcp,
};
pub use values::{LockMode, LogFormat, PortRange, ProcessMode, Transport};

/// What environment variables of the daemon begin with.
pub const ENV_PREFIX: &str = "KVFERRYD__";

impl Config {
    /// Puts the layers together and checks the result. `environment` is usually `std::env::vars_os()`.
    pub fn load(
        flags: &Flags,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let mut layers = layers::Layers::default();
        if let Some(path) = &flags.config {
            layers.add_file(path)?;
        }
        layers.add_environment(environment)?;
        layers.add_flags(flags);
        let (config, origins) = layers.merge()?;
        let problems = validate::problems(&config, &origins);
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Keys(problems)) }
    }

    /// The settings as a TOML file that would give the same daemon.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("the settings are tables of plain values")
    }
}

#[cfg(test)]
mod tests;

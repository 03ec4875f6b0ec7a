//! The command line.

use std::path::PathBuf;

use clap::Parser;

/// The per-node daemon that moves KV-cache slices between LLM engines.
///
/// Each flag stands for one key of the configuration and wins over the file and the environment. Exit codes:
/// 0 ok, 2 bad configuration, 3 cannot bind or the daemon before has not exited, 70 internal error.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "kvferryd", version)]
pub struct Flags {
    /// TOML file to read; deploy/kvferryd.example.toml explains every key
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Unix socket for engines; the fd socket is the same path with .fd [endpoint.socket]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// Host that peers are told to reach endpoints at [endpoint.advertise_host]
    #[arg(long, value_name = "HOST")]
    pub advertise_host: Option<String>,
    /// Address that endpoints are bound to [endpoint.bind_host]
    #[arg(long, value_name = "IP")]
    pub bind_host: Option<String>,
    /// Ports for endpoints, one per engine [endpoint.ports]
    #[arg(long, value_name = "A-B")]
    pub endpoint_ports: Option<String>,
    /// Where the daemon keeps what outlives it [endpoint.state_dir]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<String>,
    /// Address of the admin port, or "" for none [admin.listen]
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<String>,
    /// Print the configuration as it would be used, and exit
    #[arg(long)]
    pub check_config: bool,
    /// What to log: a level, or directives such as kvferryd=debug,warn [log.filter]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
}

/// One flag that was given.
pub(super) struct Given {
    /// As typed.
    pub(super) flag: &'static str,
    /// The key it stands for.
    pub(super) key: &'static str,
    /// Its value.
    pub(super) value: String,
}

impl Flags {
    /// Every flag that sets a key.
    pub(super) fn given(&self) -> impl Iterator<Item = Given> {
        [
            ("--socket", "endpoint.socket", &self.socket),
            ("--advertise-host", "endpoint.advertise_host", &self.advertise_host),
            ("--bind-host", "endpoint.bind_host", &self.bind_host),
            ("--endpoint-ports", "endpoint.ports", &self.endpoint_ports),
            ("--state-dir", "endpoint.state_dir", &self.state_dir),
            ("--admin", "admin.listen", &self.admin),
            ("--log", "log.filter", &self.log),
        ]
        .into_iter()
        .filter_map(|(flag, key, value)| Some(Given { flag, key, value: value.clone()? }))
    }
}

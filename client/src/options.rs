//! How to attach, and what the environment says about it.

use std::{path::PathBuf, str::FromStr, time::Duration};

use kvferry_proto::engine::v1 as wire;

use crate::Path;

const DEFAULT_SOCKET: &str = "/run/kvferry/engine.sock";

/// How to attach.
///
/// `Default` takes the socket from `KVFERRY_SOCKET`, else `/run/kvferry/engine.sock`, and the policy from
/// `SGLANG_DISAGG_TRANSFER_RETRIES`, `SGLANG_DISAGG_TRANSFER_RETRY_BACKOFF_MS` and
/// `SGLANG_DISAGG_SESSION_FAILURE_THRESHOLD` where set; a value that makes no sense there is ignored with a
/// warning.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The daemon's engine socket.
    pub socket: PathBuf,
    /// For people: shown in status and logs.
    pub name: String,
    /// For every transfer of this engine that does not say otherwise.
    pub policy: Policy,
    /// Allowed paths in order of preference; empty: the daemon's configuration.
    pub transports: Vec<Path>,
    /// Host that peers know this engine by; `None`: the daemon's.
    pub advertise_host: Option<String>,
    /// The GPU whose memory this engine moves, as its process numbers them; shown, and looked up in rail maps.
    pub gpu_id: Option<u32>,
    /// RDMA devices that may be used, as sglang writes them: a comma list (`mlx5_0,mlx5_1`), a JSON object from GPU to
    /// comma list (`{"0": "mlx5_0", "1": "mlx5_1"}`), or the path of a `.json` file with such an object. The file is
    /// read once, by this process. `None`: the daemon's configuration.
    ///
    /// A device that the node does not have is refused only where `transports` has rdma.
    pub rail_map: Option<String>,
    /// Port wanted for the endpoint; `None`: any.
    pub preferred_port: Option<u16>,
    /// Attach again, with everything registered, when the daemon restarts, for as long as the engine lives.
    /// False: the end of the daemon is the end of the attachment.
    pub reattach: bool,
    /// How long the daemon may take from connecting to its first event. It may have to release a previous
    /// attachment first.
    pub attach_timeout: Duration,
}

/// Retry and health. Unset fields fall back to the engine's policy, then to the daemon's configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Tries of a transfer, the first included; 1 is no retry.
    pub attempts: Option<u32>,
    /// Added once more before each further try.
    pub backoff: Option<Duration>,
    /// Outages in a row, each with a transfer given up, that fail a session; 1 is fail fast. A transfer's own holds
    /// where that transfer is given up; the session is FAILED for all then.
    pub failure_threshold: Option<u32>,
    /// From receipt of a transfer to its end, settling not included.
    pub deadline: Option<Duration>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self {
            socket: std::env::var_os("KVFERRY_SOCKET")
                .filter(|path| !path.is_empty())
                .map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from),
            name: process_name(),
            policy: Policy::from_environment(variable),
            transports: Vec::new(),
            advertise_host: None,
            gpu_id: None,
            rail_map: None,
            preferred_port: None,
            reattach: true,
            attach_timeout: Duration::from_secs(10),
        }
    }
}

impl Policy {
    /// The names are sglang's own, so that what is set for it today keeps its meaning.
    fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &'static str, least: u32| {
            let text = variable(name)?;
            match u32::from_str(text.trim()) {
                Ok(value) if value >= least => Some(value),
                _ => {
                    tracing::warn!(variable = name, value = text, "ignored: not a whole number >= {least}");
                    None
                }
            }
        };
        Self {
            attempts: number("SGLANG_DISAGG_TRANSFER_RETRIES", 1),
            backoff: number("SGLANG_DISAGG_TRANSFER_RETRY_BACKOFF_MS", 0)
                .map(|ms| Duration::from_millis(ms.into())),
            failure_threshold: number("SGLANG_DISAGG_SESSION_FAILURE_THRESHOLD", 1),
            deadline: None,
        }
    }

    /// `None` where nothing is set, so that ordinary requests stay small.
    pub(crate) fn to_wire(self) -> Option<wire::Policy> {
        let millis = |time: Duration| u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX);
        (self != Self::default()).then(|| wire::Policy {
            attempts: self.attempts,
            backoff_ms: self.backoff.map(millis),
            failure_threshold: self.failure_threshold,
            deadline_ms: self.deadline.map(millis),
        })
    }
}

fn process_name() -> String {
    let program = std::env::current_exe().ok();
    let name = program.as_deref().and_then(std::path::Path::file_name).map(|name| name.to_string_lossy());
    format!("{}-{}", name.as_deref().unwrap_or("engine"), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(variables: &[(&str, &str)]) -> Policy {
        Policy::from_environment(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_sglang_names_set_the_policy() {
        let read = policy(&[
            ("SGLANG_DISAGG_TRANSFER_RETRIES", "5"),
            ("SGLANG_DISAGG_TRANSFER_RETRY_BACKOFF_MS", " 0 "),
            ("SGLANG_DISAGG_SESSION_FAILURE_THRESHOLD", "1"),
        ]);
        let expected = Policy {
            attempts: Some(5),
            backoff: Some(Duration::ZERO),
            failure_threshold: Some(1),
            deadline: None,
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn values_that_make_no_sense_are_ignored_one_by_one() {
        for bad in ["", "-1", "three", "1.5", "99999999999", "0"] {
            let read = policy(&[
                ("SGLANG_DISAGG_TRANSFER_RETRIES", bad),
                ("SGLANG_DISAGG_SESSION_FAILURE_THRESHOLD", "7"),
            ]);
            assert_eq!(read.attempts, None, "{bad:?}");
            assert_eq!(read.failure_threshold, Some(7), "{bad:?}");
        }
        assert_eq!(policy(&[]), Policy::default());
    }

    #[test]
    fn a_policy_that_says_nothing_is_not_sent() {
        assert_eq!(Policy::default().to_wire(), None);
        let short = Policy { backoff: Some(Duration::from_micros(1)), ..Policy::default() };
        assert_eq!(short.to_wire().and_then(|policy| policy.backoff_ms), Some(1));
    }
}

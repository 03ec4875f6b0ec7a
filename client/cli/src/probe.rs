//! `kvferry probe HOST:PORT`: is that engine attached to its daemon, and reachable from here?
//!
//! Asked as an engine that is thrown away afterwards, because that is what a transfer would go through.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use kvferry_client::{Engine, EngineOptions, Probe};

use crate::worker::protocol::Way;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The engine's session id
    #[arg(value_name = "HOST:PORT", value_parser = session_id)]
    session: String,
    /// The daemon's socket; default: KVFERRY_SOCKET, else /run/kvferry/engine.sock
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How long to wait for an answer
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    timeout_ms: u64,
}

fn session_id(text: &str) -> Result<String, &'static str> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(1..)) => Ok(text.to_owned()),
        _ => Err("a session id is HOST:PORT, or [ADDRESS]:PORT for IPv6"),
    }
}

/// Exit code 0 if it is alive, 1 if not.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut options = EngineOptions { name: "kvferry probe".to_owned(), ..EngineOptions::default() };
    if let Some(socket) = args.socket {
        options.socket = socket;
    }
    let found = Engine::attach(options)?.probe(&args.session, Duration::from_millis(args.timeout_ms))?;
    println!("{}", line(&args.session, &found));
    Ok(if found.alive { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(session: &str, found: &Probe) -> String {
    let why = found.failure.as_ref().map_or_else(String::new, |failure| format!(": {failure}"));
    if found.alive {
        let round_trip = found.round_trip.as_secs_f64() * 1e6;
        format!("{session} is alive over {}, round trip {round_trip:.0} us", Way::from(found.path))
    } else {
        format!("{session} is not alive{why}")
    }
}

#[cfg(test)]
mod tests {
    use kvferry_client::{Failure, Path, Reason};

    use super::*;

    #[test]
    fn session_ids_are_checked_before_anything_is_attached() {
        for good in ["10.0.0.1:20000", "node-1:1", "[::1]:20000"] {
            assert!(session_id(good).is_ok(), "{good}");
        }
        for bad in ["", "host", ":20000", "host:0", "host:65536", "host:x"] {
            assert!(session_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_answer_says_how_or_why_not() {
        let round_trip = Duration::from_micros(150);
        let alive = Probe { alive: true, failure: None, path: Some(Path::Tcp), round_trip };
        assert_eq!(line("h:1", &alive), "h:1 is alive over tcp, round trip 150 us");
        let refused = Failure {
            reason: Reason::ConnectRefused,
            code: 111,
            message: "nobody listens".into(),
            index: None,
            retryable: true,
        };
        let dead = Probe { alive: false, failure: Some(refused), path: None, round_trip: Duration::ZERO };
        assert!(line("h:1", &dead).ends_with("nobody listens"));
    }
}

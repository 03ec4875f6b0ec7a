//! The `kvferry` command.
//!
//! `demo` and `bench` start daemons and engines of their own; `status`, `probe` and `doctor` ask a running daemon. Exit
//! codes: 0 ok, 1 the answer is no or something failed (one line on stderr says what), 2 usage.
mod bench;
mod children;
mod daemon;
mod demo;
mod doctor;
mod pair;
mod pattern;
mod probe;
mod proxy;
mod status;
mod worker;
mod workloads;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(
    name = "kvferry",
    version,
    about = "Moves KV-cache slices between LLM engines: demo, bench, status, probe, doctor"
)]
enum Cli {
    /// Replay real workloads between two daemons on this machine, every byte checked, and break things on purpose
    Demo(demo::Args),
    /// Measure workloads beside the raw limits of the machine
    Bench(bench::Args),
    /// Show what a daemon knows: its engines and sessions
    Status(status::Args),
    /// Ask whether an engine is attached and reachable: exit code 0 or 1
    Probe(probe::Args),
    /// Find out why engines cannot work here, and what helps; run it where the engine runs: exit code 0 or 1
    Doctor(doctor::Args),
    /// One engine process, driven over stdin and stdout
    #[command(hide = true)]
    EngineWorker,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse() {
        Cli::Demo(args) => demo::run(&args).map(|()| ExitCode::SUCCESS),
        Cli::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Cli::Status(args) => status::run(args).map(|()| ExitCode::SUCCESS),
        Cli::Probe(args) => probe::run(args),
        Cli::Doctor(args) => doctor::run(args),
        Cli::EngineWorker => worker::serve().map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("kvferry: {error:#}");
        ExitCode::FAILURE
    })
}

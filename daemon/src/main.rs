//! kvferryd: reads its settings, starts the daemon, waits for a signal.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use kvferryd::{
    app::Daemon,
    config::{Config, Flags},
    memory::{MapOptions, SystemDriver},
    telemetry,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

const BAD_CONFIG: u8 = 2;
const INTERNAL: u8 = 70;

fn main() -> ExitCode {
    let flags = Flags::parse();
    let config = match Config::load(&flags, std::env::vars_os()) {
        Ok(config) => config,
        Err(error) => return fail(BAD_CONFIG, &error),
    };
    if flags.check_config {
        print!("{}", config.to_toml());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = telemetry::init(&config.log) {
        return fail(BAD_CONFIG, &error);
    }
    match control_runtime(config.control.threads) {
        Ok(runtime) => runtime.block_on(run(config)),
        Err(error) => fail(INTERNAL, &format_args!("the control runtime: {error}")),
    }
}

/// Threads for what must not hold up the control runtime: plans of large transfers, names to be resolved.
const HELPERS: usize = 64;
const FOR_GOOD: Duration = Duration::from_secs(u32::MAX as u64);

/// One thread is the main one, with a scheduler that need not wake others. The first helper is begun at once and
/// none ever ends: where no further thread can be had, one that is there does the work.
fn control_runtime(threads: usize) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.worker_threads(threads).thread_name("control").enable_all();
    // Where there is no thread at all, tokio panics: whoever cannot have this one is told.
    std::thread::Builder::new().spawn(|| ())?.join().ok();
    let runtime = builder.max_blocking_threads(HELPERS).thread_keep_alive(FOR_GOOD).build()?;
    runtime.spawn_blocking(|| ());
    Ok(runtime)
}

async fn run(config: Config) -> ExitCode {
    let (mut terminate, mut interrupt) = match signals() {
        Ok(signals) => signals,
        Err(error) => return fail(INTERNAL, &error),
    };
    let options = MapOptions { allow_hugetlb: config.memory.allow_hugetlb };
    let daemon = match Daemon::start(config, Arc::new(SystemDriver { options })).await {
        Ok(daemon) => daemon,
        Err(error) => return fail(error.exit_code(), &error),
    };
    // Without systemd these say nothing to nobody.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let watchdog = tokio::spawn(watchdog());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("draining");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tokio::select! {
        () = daemon.drain() => {}
        _ = terminate.recv() => tracing::warn!("told twice: exiting now"),
        _ = interrupt.recv() => tracing::warn!("told twice: exiting now"),
    }
    watchdog.abort();
    ExitCode::SUCCESS
}

fn signals() -> std::io::Result<(Signal, Signal)> {
    Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
}

/// Says that the control runtime is alive, twice as often as systemd wants to hear it.
async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut tick = tokio::time::interval((limit / 2).max(Duration::from_millis(1)));
    loop {
        tick.tick().await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("kvferryd: {error}");
    ExitCode::from(code)
}

//! What the admin port shows of this node.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use tokio::runtime::Handle;

use crate::{
    admin::AdminSource,
    engine::{Engine, Node, SessionView},
};

/// A driver call that takes longer makes the node unhealthy.
const STUCK_CALL: Duration = Duration::from_secs(30);

/// Longest wait for sessions to describe themselves.
const DESCRIBE_WAIT: Duration = Duration::from_millis(500);

pub(super) struct Source {
    node: Arc<Node>,
    control: Handle,
}

impl Source {
    pub(super) fn new(node: Arc<Node>, control: Handle) -> Self {
        Self { node, control }
    }
}

impl Source {
    /// Asked on the control runtime, where sessions live; the admin thread waits, and not for long.
    fn sessions(&self, engines: Vec<Arc<Engine>>) -> Vec<SessionView> {
        let (answer, hears) = std::sync::mpsc::sync_channel(1);
        self.control.spawn(async move {
            let mut all = Vec::new();
            for engine in &engines {
                all.extend(engine.session_views().await);
            }
            let _ = answer.send(all);
        });
        hears.recv_timeout(DESCRIBE_WAIT).unwrap_or_default()
    }
}

impl AdminSource for Source {
    fn metrics_text(&self) -> String {
        let engines = self.node.engines_by_id();
        let registered = engines.iter().map(|engine| engine.registered());
        let (regions, bytes) = registered.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let metrics = &self.node.resources.metrics;
        metrics.engines.set(engines.len() as i64);
        metrics.active_transfers.set(self.node.active_transfers() as i64);
        metrics.regions.set(regions as i64);
        metrics.region_bytes.set(bytes as i64);
        metrics.to_text()
    }

    fn health(&self) -> Result<(), String> {
        let mut reasons = Vec::new();
        if let Some(running) =
            self.node.resources.registrar.longest_running().filter(|call| *call > STUCK_CALL)
        {
            reasons.push(format!("a driver call has been running for {} s", running.as_secs()));
        }
        if !self.node.resources.carriers.is_healthy() {
            reasons.push("a lane thread has died".to_owned());
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons.join("\n")) }
    }

    fn ready(&self) -> bool {
        self.node.drain().admit().is_ok()
    }

    fn status(&self) -> serde_json::Value {
        let resources = &self.node.resources;
        let engines = self.node.engines_by_id();
        let sessions = self.sessions(engines.clone());
        json!({
            "node_id": resources.node_id,
            "boot_id": resources.boot.to_string(),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_ms": resources.started.elapsed().as_millis() as u64,
            "draining": !self.ready(),
            "engines": engines.iter().map(|engine| {
                let (regions, region_bytes) = engine.registered();
                json!({
                    "id": engine.id.0,
                    "name": engine.name,
                    "session_id": engine.session_id.as_str(),
                    "pid": engine.caller.pid,
                    "gpu_id": engine.gpu_id,
                    "rails": engine.rails,
                    "regions": regions,
                    "region_bytes": region_bytes,
                    "transfers_active": engine.log.active(),
                    "labels": engine.labels,
                })
            }).collect::<Vec<_>>(),
            "sessions": sessions.iter().map(|view| json!({
                "engine": view.engine.0,
                "session_id": view.target.as_str(),
                "state": format!("{:?}", view.summary.state),
                "path": view.summary.path.map(|path| path.name()),
                "lanes": view.summary.lanes,
                "transfers_active": view.summary.active,
                "transfers_done": view.summary.counts.done,
                "transfers_failed": view.summary.counts.failed,
                "bytes_done": view.summary.counts.bytes,
                "retries": view.summary.counts.retries,
                "consecutive_failures": view.summary.consecutive_failures,
                "last_failure": view.summary.last_failure.as_ref().map(ToString::to_string),
            })).collect::<Vec<_>>(),
        })
    }
}

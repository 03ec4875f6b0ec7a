//! What is shown: the node, its engines, regions and sessions.

use std::time::Instant;

use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use super::convert;
use crate::{
    engine::{Engine, Node, ProbeResult, SessionView},
    memory::PROBE_BASE,
};

pub(super) fn node(node: &Node, admin: &str) -> wire::NodeInfo {
    let resources = &node.resources;
    wire::NodeInfo {
        node_id: resources.node_id.clone(),
        boot_id: resources.boot.0.to_vec(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_ms: resources.started.elapsed().as_millis() as u64,
        advertise_host: resources.config.endpoint.advertised(),
        draining: node.drain().admit().is_err(),
        transports: resources.config.paths().into_iter().map(|path| types::Path::from(path).into()).collect(),
        admin: admin.to_owned(),
    }
}

pub(super) fn engine(engine: &Engine) -> wire::EngineInfo {
    let (regions, region_bytes) = engine.registered();
    wire::EngineInfo {
        engine_id: engine.id.0,
        name: engine.name.clone(),
        session_id: engine.session_id.to_string(),
        pid: engine.caller.pid.unwrap_or(0) as u32,
        uid: engine.caller.uid,
        incarnation: engine.incarnation.0.to_vec(),
        regions,
        region_bytes,
        transfers_active: engine.log.active() as u64,
        epoch: engine.memory.revocations().epoch().0,
        gpu_id: engine.gpu_id,
        rails: engine.rails.clone(),
        process_access: convert::process_access(engine.memory.process_access()).into(),
    }
}

pub(super) fn regions(engine: &Engine) -> wire::ListRegionsReply {
    let view = engine.memory.view();
    let own = view.table.iter().filter(|region| region.info.base != PROBE_BASE);
    wire::ListRegionsReply {
        regions: own.map(|region| types::Region::from(&region.info)).collect(),
        layouts: view.layouts.values().map(|layout| types::Layout::from(&**layout)).collect(),
    }
}

pub(super) async fn sessions(engine: &Engine) -> Vec<wire::SessionInfo> {
    let outbound = engine.session_views().await;
    let inbound = engine.inbound().list().into_iter().map(|(_, label, lanes)| wire::SessionInfo {
        engine_id: engine.id.0,
        session_id: label,
        inbound: true,
        state: types::SessionState::Healthy.into(),
        lanes: lanes as u32,
        ..Default::default()
    });
    outbound.iter().map(session).chain(inbound).collect()
}

fn session(view: &SessionView) -> wire::SessionInfo {
    let summary = &view.summary;
    let wait = summary.next_probe.map(|at| at.saturating_duration_since(Instant::now()));
    wire::SessionInfo {
        engine_id: view.engine.0,
        session_id: view.target.to_string(),
        inbound: false,
        state: convert::state(summary.state).into(),
        path: summary.path.map_or(types::Path::Unspecified, types::Path::from).into(),
        lanes: summary.lanes as u32,
        transfers_active: summary.active as u64,
        transfers_done: summary.counts.done,
        transfers_failed: summary.counts.failed,
        bytes_done: summary.counts.bytes,
        retries: summary.counts.retries,
        consecutive_failures: summary.consecutive_failures,
        last_failure: summary.last_failure.as_ref().map(types::Failure::from),
        next_probe_ms: wait.map_or(0, |wait| wait.as_millis() as u64),
    }
}

pub(super) fn probe(probe: &ProbeResult) -> wire::ProbeReply {
    wire::ProbeReply {
        alive: probe.result.is_ok(),
        failure: probe.result.as_ref().err().map(types::Failure::from),
        path: probe.path.map_or(types::Path::Unspecified, types::Path::from).into(),
        round_trip_us: probe.round_trip.as_micros() as u64,
    }
}

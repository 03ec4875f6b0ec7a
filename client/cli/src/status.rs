//! `kvferry status`: what one daemon knows, as tables or JSON.

use std::path::PathBuf;

use comfy_table::{Table, presets};
use kvferry_client::{EngineOptions, Node, Path, ProcessAccess, SessionState};
use kvferry_proto::{
    engine::v1::{EngineInfo, NodeInfo, SessionInfo},
    types::v1::Failure,
};
use serde_json::{Value, json};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The daemon's socket; default: KVFERRY_SOCKET, else /run/kvferry/engine.sock
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let node = Node::connect(&args.socket.unwrap_or_else(|| EngineOptions::default().socket))?;
    let (info, engines, sessions) = (node.info()?, node.engines()?, node.sessions()?);
    if args.json {
        let all = json!({
            "node": node_json(&info),
            "engines": engines.iter().map(engine_json).collect::<Vec<_>>(),
            "sessions": sessions.iter().map(session_json).collect::<Vec<_>>(),
        });
        println!("{all:#}");
    } else {
        println!("{}\n{}\n{}", node_line(&info), engine_table(&engines), session_table(&sessions));
    }
    Ok(())
}

/// `TCP` for `PATH_TCP`: names of the protocol without their prefix, in lower case.
fn word(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_ascii_lowercase()
}

fn path(path: Path) -> String {
    match path {
        Path::Unspecified => "-".to_owned(),
        path => word(path.as_str_name(), "PATH_"),
    }
}

fn state(state: SessionState) -> String {
    word(state.as_str_name(), "SESSION_STATE_")
}

/// How private memory of an engine is reached.
fn access(access: ProcessAccess) -> String {
    match access {
        ProcessAccess::Unspecified => "-".to_owned(),
        access => word(access.as_str_name(), "PROCESS_ACCESS_"),
    }
}

fn failure(failure: Option<&Failure>) -> Option<String> {
    failure.map(|f| format!("{}: {}", f.reason().as_str_name().trim_start_matches("REASON_"), f.message))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn node_line(info: &NodeInfo) -> String {
    let paths: Vec<_> = info.transports().map(path).collect();
    format!(
        "node {} (kvferryd {}, pid {}, up {} s{}) at {}, paths {}",
        info.node_id,
        info.version,
        info.pid,
        info.uptime_ms / 1000,
        if info.draining { ", draining" } else { "" },
        info.advertise_host,
        paths.join(" ")
    )
}

fn engine_table(engines: &[EngineInfo]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "engine",
        "name",
        "session id",
        "pid",
        "gpu",
        "rails",
        "private memory",
        "regions",
        "bytes",
        "active",
    ]);
    for engine in engines {
        table.add_row([
            engine.engine_id.to_string(),
            engine.name.clone(),
            engine.session_id.clone(),
            engine.pid.to_string(),
            engine.gpu_id.map_or_else(|| "-".to_owned(), |gpu| gpu.to_string()),
            rails(engine),
            access(engine.process_access()),
            engine.regions.to_string(),
            engine.region_bytes.to_string(),
            engine.transfers_active.to_string(),
        ]);
    }
    table
}

/// What the engine may use, not what is there: a rail map is kept without rdma too.
fn rails(engine: &EngineInfo) -> String {
    if engine.rails.is_empty() { "any".to_owned() } else { engine.rails.join(" ") }
}

fn session_table(sessions: &[SessionInfo]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "engine",
        "peer",
        "state",
        "path",
        "lanes",
        "active",
        "done",
        "failed",
        "bytes",
        "retries",
        "last failure",
    ]);
    for session in sessions {
        let arrow = if session.inbound { "<-" } else { "->" };
        table.add_row([
            session.engine_id.to_string(),
            format!("{arrow} {}", session.session_id),
            state(session.state()),
            path(session.path()),
            session.lanes.to_string(),
            session.transfers_active.to_string(),
            session.transfers_done.to_string(),
            session.transfers_failed.to_string(),
            session.bytes_done.to_string(),
            session.retries.to_string(),
            failure(session.last_failure.as_ref()).unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table
}

fn node_json(info: &NodeInfo) -> Value {
    json!({
        "node_id": info.node_id,
        "boot_id": hex(&info.boot_id),
        "version": info.version,
        "pid": info.pid,
        "uptime_ms": info.uptime_ms,
        "advertise_host": info.advertise_host,
        "draining": info.draining,
        "transports": info.transports().map(path).collect::<Vec<_>>(),
        "admin": info.admin,
    })
}

fn engine_json(engine: &EngineInfo) -> Value {
    json!({
        "engine_id": engine.engine_id,
        "name": engine.name,
        "session_id": engine.session_id,
        "pid": engine.pid,
        "uid": engine.uid,
        "gpu_id": engine.gpu_id,
        "rails": engine.rails,
        "incarnation": hex(&engine.incarnation),
        "regions": engine.regions,
        "region_bytes": engine.region_bytes,
        "transfers_active": engine.transfers_active,
        "epoch": engine.epoch,
        "private_memory": access(engine.process_access()),
    })
}

fn session_json(session: &SessionInfo) -> Value {
    json!({
        "engine_id": session.engine_id,
        "session_id": session.session_id,
        "inbound": session.inbound,
        "state": state(session.state()),
        "path": path(session.path()),
        "lanes": session.lanes,
        "transfers_active": session.transfers_active,
        "transfers_done": session.transfers_done,
        "transfers_failed": session.transfers_failed,
        "bytes_done": session.bytes_done,
        "retries": session.retries,
        "consecutive_failures": session.consecutive_failures,
        "last_failure": failure(session.last_failure.as_ref()),
        "next_probe_ms": session.next_probe_ms,
    })
}

#[cfg(test)]
mod tests {
    use kvferry_proto::types::v1::Reason;

    use super::*;

    #[test]
    fn a_session_is_told_in_words() {
        let last =
            Failure { reason: Reason::PeerSilent as i32, message: "no life".into(), ..Failure::default() };
        let session = SessionInfo {
            engine_id: 3,
            session_id: "h:1".into(),
            inbound: true,
            state: SessionState::Healthy as i32,
            path: Path::Tcp as i32,
            last_failure: Some(last),
            ..SessionInfo::default()
        };
        let json = session_json(&session);
        assert_eq!((&json["state"], &json["path"]), (&"healthy".into(), &"tcp".into()));
        assert_eq!(json["last_failure"], "PEER_SILENT: no life");
        let table = session_table(&[session]).to_string();
        assert!(table.contains("<- h:1") && table.contains("healthy"), "{table}");
    }

    #[test]
    fn an_engine_shows_its_gpu_and_rails() {
        let rails = vec!["mlx5_0".to_owned(), "mlx5_1".to_owned()];
        let engine = EngineInfo { engine_id: 1, gpu_id: Some(3), rails, ..EngineInfo::default() };
        let json = engine_json(&engine);
        assert_eq!((&json["gpu_id"], &json["rails"]), (&3.into(), &json!(["mlx5_0", "mlx5_1"])));
        let table = engine_table(&[engine, EngineInfo::default()]).to_string();
        assert!(table.contains(" 3 ") && table.contains("mlx5_0 mlx5_1"), "{table}");
        assert!(table.contains(" - ") && table.contains(" any "), "{table}");
        assert_eq!(engine_json(&EngineInfo::default())["gpu_id"], Value::Null);
    }

    #[test]
    fn an_engine_says_how_its_private_memory_is_reached() {
        for (access, word) in [
            (ProcessAccess::Unspecified, "-"),
            (ProcessAccess::Direct, "direct"),
            (ProcessAccess::Assisted, "assisted"),
        ] {
            let engine = EngineInfo { process_access: access.into(), ..EngineInfo::default() };
            assert_eq!(engine_json(&engine)["private_memory"], word);
            assert!(engine_table(&[engine]).to_string().contains(word));
        }
    }

    #[test]
    fn a_node_is_one_line() {
        let info = NodeInfo {
            node_id: "n1".into(),
            boot_id: vec![0, 255],
            uptime_ms: 61_000,
            draining: true,
            transports: vec![Path::Local as i32, Path::Tcp as i32],
            ..NodeInfo::default()
        };
        let line = node_line(&info);
        assert!(line.contains("up 61 s, draining") && line.ends_with("paths local tcp"), "{line}");
        assert_eq!(node_json(&info)["boot_id"], "00ff");
    }
}

//! `rdma.rail_map`: the rail map of this configuration, which may lie in a file of its own.
//!
//! The path is the daemon's, named by whoever configures it. Paths that engines name are never opened here.

use std::{fs::File, io::Read, path::Path};

use super::Rdma;
use crate::policy::{RailError, RailMap};

/// Longest rail map, in bytes: hundreds of GPUs.
pub const MAX_RAIL_MAP: usize = 16_384;

impl Rdma {
    /// The rail map, if one is set. Reads its file.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn rail_map(&self) -> Result<Option<RailMap>, String> {
        let text = self.rail_map.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        let map = match RailMap::is_path(text) {
            true => read(text.trim()),
            false if text.len() > MAX_RAIL_MAP => Err(too_long(text.len() as u64)),
            false => RailMap::parse(text).map_err(|error| error.to_string()),
        };
        map.map(Some)
    }
}

fn read(path: &str) -> Result<RailMap, String> {
    // Not a pipe, for example, which would be waited for.
    if !Path::new(path).is_file() {
        return Err(format!("File {path} does not exist."));
    }
    let failed = |error: std::io::Error| format!("Failed to read JSON file {path}: {error}");
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if length > MAX_RAIL_MAP as u64 {
        return Err(format!("{path}: {}", too_long(length)));
    }
    let mut text = String::new();
    file.take(MAX_RAIL_MAP as u64).read_to_string(&mut text).map_err(failed)?;
    RailMap::parse_json(&text).map_err(|error| match error {
        RailError::Json { wrong, .. } => format!("Failed to parse JSON content from file {path}: {wrong}"),
        other => format!("{path}: {other}"),
    })
}

fn too_long(bytes: u64) -> String {
    format!("a rail map of {bytes} bytes, where at most {MAX_RAIL_MAP} are taken")
}

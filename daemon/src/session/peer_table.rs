//! What an initiator knows of a target's memory: a versioned copy of its tables.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    domain::LayoutId,
    memory::{Layout, RegionInfo, RegionTable},
};

/// A target engine's regions and layouts, as last heard.
#[derive(Clone, Debug, Default)]
pub struct PeerTable {
    /// Rises with each change at the target.
    pub version: u64,
    /// Its regions.
    pub regions: RegionTable<RegionInfo>,
    /// Its layouts.
    pub layouts: BTreeMap<LayoutId, Arc<Layout>>,
}

//! `kvferry.types.v1` to domain types and back: the one place both edges (`api`, `peer`) share.

use std::sync::Arc;

use kvferry_proto::types::v1 as wire;

use crate::{
    domain::{Failure, Generation, LayoutId, PathKind, Reason, RegionId},
    memory::{Layout, MemoryKind, RegionInfo},
};

/// A message field that does not hold what it must.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {wrong}")]
pub(crate) struct BadField {
    /// Its name, as in the proto file.
    pub(crate) field: &'static str,
    /// What is wrong with it.
    pub wrong: String,
}

impl BadField {
    /// Names the field.
    pub(crate) fn new(field: &'static str, wrong: impl Into<String>) -> Self {
        Self { field, wrong: wrong.into() }
    }
}

impl From<BadField> for Failure {
    fn from(bad: BadField) -> Self {
        Failure::new(Reason::BadArgument, bad.to_string())
    }
}

/// A fixed number of bytes, or the field's name.
pub(crate) fn bytes<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], BadField> {
    bytes.try_into().map_err(|_| BadField::new(field, format!("{} bytes where {N} are needed", bytes.len())))
}

impl From<Reason> for wire::Reason {
    fn from(reason: Reason) -> Self {
        // The numbers are the same by definition; a test holds the two lists together.
        wire::Reason::try_from(i32::from(reason as u16)).unwrap_or(wire::Reason::Unspecified)
    }
}

impl From<&Failure> for wire::Failure {
    fn from(failure: &Failure) -> Self {
        wire::Failure {
            reason: wire::Reason::from(failure.reason).into(),
            code: failure.code,
            message: failure.message.clone(),
            index: failure.index,
            retryable: failure.reason.retryable(),
        }
    }
}

/// A peer's failure. A reason this daemon does not know yet is UNSPECIFIED, with the number in the message.
pub(crate) fn failure(failure: wire::Failure) -> Failure {
    let known = u16::try_from(failure.reason).ok().and_then(Reason::from_number);
    let message = match known {
        Some(_) => failure.message,
        None => format!("{} (reason {})", failure.message, failure.reason),
    };
    Failure {
        reason: known.unwrap_or(Reason::Unspecified),
        code: failure.code,
        message,
        index: failure.index,
    }
}

impl From<PathKind> for wire::Path {
    fn from(path: PathKind) -> Self {
        match path {
            PathKind::Local => Self::Local,
            PathKind::Tcp => Self::Tcp,
            PathKind::Rdma => Self::Rdma,
        }
    }
}

/// A path, unless it is unknown or unspecified.
pub(crate) fn path(path: i32) -> Option<PathKind> {
    match wire::Path::try_from(path).ok()? {
        wire::Path::Local => Some(PathKind::Local),
        wire::Path::Tcp => Some(PathKind::Tcp),
        wire::Path::Rdma => Some(PathKind::Rdma),
        wire::Path::Unspecified => None,
    }
}

impl From<&RegionInfo> for wire::Region {
    fn from(region: &RegionInfo) -> Self {
        let kind = match region.kind {
            MemoryKind::SharedFd => wire::MemoryKind::SharedFd,
            MemoryKind::Process => wire::MemoryKind::Process,
        };
        Self {
            id: region.id.0,
            generation: region.generation.0,
            base: region.base,
            length: region.length,
            kind: kind.into(),
        }
    }
}

/// A peer's region. Its range must not wrap.
pub(crate) fn region(region: wire::Region) -> Result<RegionInfo, BadField> {
    if region.base.checked_add(region.length).is_none() {
        return Err(BadField::new("region.length", "wraps around the address space"));
    }
    // Only its owner touches a region, so a kind unknown here does no harm.
    let kind = match region.kind() {
        wire::MemoryKind::Process => MemoryKind::Process,
        _ => MemoryKind::SharedFd,
    };
    Ok(RegionInfo {
        id: RegionId(region.id),
        generation: Generation(region.generation),
        base: region.base,
        length: region.length,
        kind,
    })
}

impl From<&Layout> for wire::Layout {
    fn from(layout: &Layout) -> Self {
        Self {
            id: layout.id.0,
            generation: layout.generation.0,
            layer_bases: layout.layer_bases.clone(),
            page_stride: layout.page_stride,
            page_bytes: layout.page_bytes,
            pages: layout.pages,
            dtype_tag: layout.dtype_tag.clone(),
        }
    }
}

/// A peer's layout. Every page must have an address.
pub(crate) fn layout(layout: wire::Layout) -> Result<Arc<Layout>, BadField> {
    let span =
        layout.pages.checked_mul(layout.page_stride).and_then(|span| span.checked_add(layout.page_bytes));
    let fits = |base: &u64| span.is_some_and(|span| base.checked_add(span).is_some());
    if !layout.layer_bases.iter().all(fits) {
        return Err(BadField::new("layout.pages", "wrap around the address space"));
    }
    Ok(Arc::new(Layout {
        id: LayoutId(layout.id),
        generation: Generation(layout.generation),
        layer_bases: layout.layer_bases,
        page_stride: layout.page_stride,
        page_bytes: layout.page_bytes,
        pages: layout.pages,
        dtype_tag: layout.dtype_tag,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_the_same_numbers_and_names_on_the_wire() {
        for &reason in Reason::ALL {
            let wire = wire::Reason::from(reason);
            assert_eq!(wire as i32, i32::from(reason as u16));
            let name: String = wire.as_str_name().trim_start_matches("REASON_").replace('_', "");
            assert_eq!(name, format!("{reason:?}").to_uppercase());
        }
        let unknown = failure(wire::Failure { reason: 999, message: "new".into(), ..Default::default() });
        assert_eq!((unknown.reason, unknown.message.as_str()), (Reason::Unspecified, "new (reason 999)"));
    }

    #[test]
    fn what_wraps_is_refused() {
        let wide = wire::Region { base: u64::MAX, length: 2, ..Default::default() };
        assert!(region(wide).is_err());
        let wide =
            wire::Layout { layer_bases: vec![8], pages: u64::MAX, page_stride: 2, ..Default::default() };
        assert!(layout(wide).is_err());
    }
}

//! The pages form: two registered layouts and page numbers, expanded to slices on this side of the socket.

use crate::{
    domain::{Failure, LayoutId, Reason, SliceBatch},
    memory::Layout,
};

/// What the engine asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageBatch {
    /// A layout of the initiator engine.
    pub local_layout: LayoutId,
    /// A layout of the target engine.
    pub remote_layout: LayoutId,
    /// Page numbers in the local layout.
    pub local_pages: Vec<u32>,
    /// Page numbers in the remote layout; as many.
    pub remote_pages: Vec<u32>,
}

impl PageBatch {
    /// Checks what can be checked without the layouts.
    pub fn validate(&self) -> Result<(), Failure> {
        let (local, remote) = (self.local_pages.len(), self.remote_pages.len());
        if local != remote {
            let message =
                format!("pages.remote_pages has {remote} entries where pages.local_pages has {local}");
            return Err(Failure::new(Reason::BadArgument, message));
        }
        Ok(())
    }
}

/// Every layer's slices, layer by layer. Page numbers are checked against both layouts.
pub fn expand(pages: &PageBatch, local: &Layout, remote: &Layout, limit: u64) -> Result<SliceBatch, Failure> {
    matching(local, remote)?;
    check("local", &pages.local_pages, local)?;
    check("remote", &pages.remote_pages, remote)?;
    let layers = local.layer_bases.len() as u64;
    let count = layers.saturating_mul(pages.local_pages.len() as u64);
    if count > limit {
        let message = format!("{count} slices after expansion; limits.slices is {limit}");
        return Err(Failure::new(Reason::Limit, message));
    }
    let mut batch = SliceBatch { uniform: Some(local.page_bytes), ..SliceBatch::default() };
    batch.local.reserve_exact(count as usize);
    batch.remote.reserve_exact(count as usize);
    for (&local_base, &remote_base) in local.layer_bases.iter().zip(&remote.layer_bases) {
        let at = |base: u64, stride: u64| move |&page: &u32| base + u64::from(page) * stride;
        batch.local.extend(pages.local_pages.iter().map(at(local_base, local.page_stride)));
        batch.remote.extend(pages.remote_pages.iter().map(at(remote_base, remote.page_stride)));
    }
    Ok(batch)
}

fn matching(local: &Layout, remote: &Layout) -> Result<(), Failure> {
    let differs = |what: &str, here: &dyn std::fmt::Display, there: &dyn std::fmt::Display| {
        Err(Failure::new(Reason::LayoutMismatch, format!("{what}: {here} here, {there} at the target")))
    };
    if local.layer_bases.len() != remote.layer_bases.len() {
        return differs("layers", &local.layer_bases.len(), &remote.layer_bases.len());
    }
    if local.page_bytes != remote.page_bytes {
        return differs("page_bytes", &local.page_bytes, &remote.page_bytes);
    }
    if local.dtype_tag != remote.dtype_tag {
        return differs("dtype_tag", &local.dtype_tag, &remote.dtype_tag);
    }
    Ok(())
}

fn check(side: &str, pages: &[u32], layout: &Layout) -> Result<(), Failure> {
    match pages.iter().position(|&page| u64::from(page) >= layout.pages) {
        None => Ok(()),
        Some(index) => {
            let message = format!("{side} page {} of {} in layout {}", pages[index], layout.pages, layout.id);
            Err(Failure::new(Reason::OutOfBounds, message).at(index as u64))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Generation;

    fn layout(bases: &[u64]) -> Layout {
        Layout {
            id: LayoutId(1),
            generation: Generation(1),
            layer_bases: bases.to_vec(),
            page_stride: 100,
            page_bytes: 64,
            pages: 10,
            dtype_tag: "bf16".into(),
        }
    }

    fn pages(local: &[u32], remote: &[u32]) -> PageBatch {
        PageBatch {
            local_layout: LayoutId(1),
            remote_layout: LayoutId(1),
            local_pages: local.to_vec(),
            remote_pages: remote.to_vec(),
        }
    }

    #[test]
    fn every_layer_moves_every_page() {
        let batch = expand(&pages(&[1, 2], &[9, 0]), &layout(&[0, 1000]), &layout(&[5000, 7000]), 10)
            .expect("layouts match");
        let slices: Vec<_> = batch.iter().collect();
        assert_eq!(slices, [(100, 5900, 64), (200, 5000, 64), (1100, 7900, 64), (1200, 7000, 64)]);
    }

    #[test]
    fn faults_have_their_reasons() {
        let reason = |pages: &PageBatch, remote: &Layout, limit| {
            expand(pages, &layout(&[0]), remote, limit).expect_err("refused").reason
        };
        assert_eq!(reason(&pages(&[10], &[0]), &layout(&[0]), 10), Reason::OutOfBounds);
        assert_eq!(reason(&pages(&[0, 1], &[0, 1]), &layout(&[0]), 1), Reason::Limit);
        assert_eq!(reason(&pages(&[0], &[0]), &layout(&[0, 1]), 10), Reason::LayoutMismatch);
        let other = Layout { dtype_tag: "fp8".into(), ..layout(&[0]) };
        assert_eq!(reason(&pages(&[0], &[0]), &other, 10), Reason::LayoutMismatch);
        assert_eq!(pages(&[0], &[]).validate().expect_err("refused").reason, Reason::BadArgument);
    }
}

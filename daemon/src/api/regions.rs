//! Registering and unregistering.

use std::time::Duration;

use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use super::convert;
use crate::{
    domain::{Failure, LayoutId, Reason, RegionId},
    engine::Engine,
    memory::Unregister,
};

pub(super) async fn register(
    engine: &Engine,
    request: wire::RegisterRegionsRequest,
) -> wire::RegisterRegionsReply {
    let handles: Vec<u64> = request.regions.iter().filter_map(convert::handle).collect();
    let regions: Result<Vec<_>, Failure> = request
        .regions
        .into_iter()
        .enumerate()
        .map(|(index, spec)| convert::region(spec, index as u64, &engine.fds))
        .collect();
    let layouts = request.layouts.into_iter().map(convert::layout).collect();
    let registered = match regions {
        Ok(regions) => engine.memory.register(regions, layouts).await,
        Err(failure) => Err(failure),
    };
    // The mappings keep the memory; a descriptor kept here would keep it after they are gone.
    for handle in handles {
        engine.fds.take(handle);
    }
    match registered {
        Ok((regions, layouts)) => {
            engine.registered_all();
            wire::RegisterRegionsReply {
                regions: regions.iter().map(types::Region::from).collect(),
                layouts: layouts.iter().map(types::Layout::from).collect(),
                failure: None,
            }
        }
        Err(failure) => {
            tracing::warn!(engine = %engine.id, name = engine.name, %failure, "registration refused");
            wire::RegisterRegionsReply { failure: Some((&failure).into()), ..Default::default() }
        }
    }
}

/// Takes up the ring through which the engine copies for itself.
pub(super) async fn take_assistant(
    engine: &Engine,
    request: wire::OfferAssistantRequest,
) -> wire::OfferAssistantReply {
    let handle = request.handle;
    let taken = match engine.fds.take(handle) {
        Some(memfd) => engine.memory.take_assistant(memfd).await,
        None => {
            let message = format!("handle: no descriptor {handle} was handed over");
            Err(Failure::new(Reason::BadArgument, message))
        }
    };
    if let Err(failure) = &taken {
        tracing::warn!(engine = %engine.id, name = engine.name, %failure, "an assistant was refused");
    }
    wire::OfferAssistantReply { failure: taken.err().as_ref().map(Into::into) }
}

/// Answers when nothing touches the memory any more, or UNSETTLED when that takes longer than `settle`; the
/// release goes on by itself, and the same call again waits on.
pub(super) async fn unregister(
    engine: &Engine,
    request: wire::UnregisterRegionsRequest,
    settle: Duration,
) -> wire::SettleReply {
    let wanted = Unregister {
        ids: request.region_ids.into_iter().map(RegionId).collect(),
        bases: request.bases,
        layouts: request.layout_ids.into_iter().map(LayoutId).collect(),
    };
    match engine.memory.unregister(wanted).await {
        Ok(mut release) => settled(tokio::time::timeout(settle, release.settled()).await.is_ok()),
        Err(failure) => not_applied(&failure),
    }
}

pub(super) fn settled(settled: bool) -> wire::SettleReply {
    let settlement = match settled {
        true => wire::Settlement::Settled,
        false => wire::Settlement::Unsettled,
    };
    wire::SettleReply { settlement: settlement.into(), ..Default::default() }
}

pub(super) fn not_applied(failure: &Failure) -> wire::SettleReply {
    wire::SettleReply { failure: Some(failure.into()), ..Default::default() }
}

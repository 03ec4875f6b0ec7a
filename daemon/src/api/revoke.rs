//! Revoking ranges and tags.

use std::time::Duration;

use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use super::{convert, regions};
use crate::{
    domain::{AddressRange, Failure, Reason},
    engine::{Engine, Revocation},
};

pub(super) async fn ranges(
    engine: &Engine,
    request: wire::RevokeRequest,
    settle: Duration,
) -> wire::SettleReply {
    answer(engine, checked(request.ranges).map(Revocation::Ranges), settle).await
}

pub(super) async fn tag(
    engine: &Engine,
    request: wire::RevokeTagRequest,
    settle: Duration,
) -> wire::SettleReply {
    let tag = convert::tag(&request.tag).map(Revocation::Tag);
    answer(engine, tag.map_err(Failure::from), settle).await
}

async fn answer(
    engine: &Engine,
    revocation: Result<Revocation, Failure>,
    settle: Duration,
) -> wire::SettleReply {
    let revoked = match revocation {
        Ok(revocation) => engine.revoke(revocation, settle).await,
        Err(failure) => Err(failure),
    };
    match revoked {
        Ok(revoked) => wire::SettleReply { epoch: revoked.epoch.0, ..regions::settled(revoked.settled) },
        Err(failure) => regions::not_applied(&failure),
    }
}

fn checked(ranges: Vec<types::Range>) -> Result<Vec<AddressRange>, Failure> {
    if ranges.is_empty() {
        return Err(Failure::new(Reason::BadArgument, "ranges is empty"));
    }
    ranges.into_iter().enumerate().map(|(at, range)| convert::range("ranges", at, range)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_is_none_is_named_by_its_index() {
        let range = |base, length| types::Range { base, length };
        let refusal = |bad| {
            let failure = checked(vec![range(1, 1), bad]).expect_err("a refusal");
            (failure.reason, failure.index)
        };
        assert_eq!(refusal(range(7, 0)), (Reason::BadArgument, Some(1)));
        assert_eq!(refusal(range(u64::MAX, 1)), (Reason::OutOfBounds, Some(1)));
        assert_eq!(checked(vec![]).map_err(|failure| failure.reason), Err(Reason::BadArgument));
        assert_eq!(checked(vec![range(0, u64::MAX)]).map(|ranges| ranges.len()), Ok(1));
    }
}

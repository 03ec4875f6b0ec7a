//! The calls that end something: unregister, cancel, revoke. Each answers whether it is proven that nobody on this
//! node touches the memory any more, whatever became of the daemon meanwhile.

use std::{future::Future, time::Duration};

use kvferry_proto::{engine::v1 as wire, types::v1 as types};
use tokio::time;
use tonic::{Response, Status};

use crate::{
    Error, Outcome, Settlement, TransferId,
    caller::Caller,
    error::NoReply,
    lease::{Lease, PROOF_LOOK, Verdict},
    orders::Joined,
    regions::Theirs,
    revocations::{self, Noted, Range},
    unsettled::Known,
};

/// How long a cancellation waits for a daemon to have the transfer that it is to cancel.
const CANCEL_WAIT: Duration = Duration::from_secs(5);

impl Caller {
    pub(crate) async fn unregister(&self, regions: &[u32]) -> Result<Settlement, Error> {
        loop {
            let lease = self.core.lease();
            let settlement = self.unregister_with(&lease, regions).await?;
            if settlement == Settlement::Unsettled {
                self.core.regions.leave(regions);
                return Ok(settlement);
            }
            // Registered anew with the next daemon while the last one was asked: that one is asked as well.
            if let Some(settlement) = self.core.regions.remove(lease.number, regions) {
                return Ok(settlement);
            }
        }
    }

    /// Tells the daemon what was unregistered while it registered everything. Whoever did so was told UNSETTLED, and
    /// learns the end by asking again.
    pub(crate) async fn part_with(&self, lease: &Lease, regions: &[u32]) {
        match self.unregister_with(lease, regions).await {
            Ok(Settlement::Settled) => self.core.regions.gone(lease.number, regions),
            Ok(Settlement::Unsettled) => {}
            Err(error) => tracing::warn!(%error, ?regions, "unregistered regions are still with the daemon"),
        }
    }

    async fn unregister_with(&self, lease: &Lease, regions: &[u32]) -> Result<Settlement, Error> {
        const CALL: &str = "UnregisterRegions";
        let region_ids = match self.core.regions.theirs(regions)? {
            Theirs::Known(ids) => ids,
            // It may have got them already. Where there will be no other daemon, its exit is proof.
            Theirs::Renewing(_) if self.core.returns() => return Ok(Settlement::Unsettled),
            Theirs::Renewing(daemon) => return Ok(daemon.standing().into()),
        };
        if region_ids.is_empty() && !regions.is_empty() {
            return Ok(Settlement::Settled);
        }
        let message = wire::UnregisterRegionsRequest { region_ids, ..Default::default() };
        let mut client = self.client.clone();
        match self.ask(lease, CALL, client.unregister_regions(lease.request(message))).await {
            Ok(reply) => settlement(reply.into_inner()),
            Err(NoReply::Lost(..)) if lease.verdict().await == Verdict::Exited => Ok(Settlement::Settled),
            Err(lost) => Err(self.explain(lease, CALL, lost)),
        }
    }

    pub(crate) async fn cancel(&self, id: TransferId) -> Result<Settlement, Error> {
        let in_hand = self.core.orders.cancel(id);
        // In this order: whoever looks at the one and then at the other misses no cancellation.
        self.core.cuts.cancel(id);
        if let Some(settlement) = self.cancel_in_hand(id, in_hand).await? {
            return Ok(settlement);
        }
        match self.core.unsettled.find(id, self.core.cuts.current(id)) {
            Known::Ended(_) => return Ok(Settlement::Settled),
            Known::Lost(lease) => return Ok(lease.standing().into()),
            Known::Nothing => {}
        }
        let lease = self.core.lease();
        match self.ask_cancel(&lease, id).await {
            Ok(settlement) => Ok(settlement),
            Err(NoReply::Answered(error)) => Err(error),
            Err(NoReply::Lost(..)) => Ok(lease.verdict().await.into()),
        }
    }

    /// A call has the transfer in hand: it ends by itself if it was not sent yet, and otherwise once its daemon is
    /// told, which the call itself may reach later than this. Nothing when the call is over and has not proven anything.
    async fn cancel_in_hand(
        &self,
        id: TransferId,
        in_hand: Option<Joined>,
    ) -> Result<Option<Settlement>, Error> {
        let Some(mut call) = in_hand else { return Ok(None) };
        let told = async {
            loop {
                if let Ok(settlement) = self.ask_cancel(&self.core.lease(), id).await {
                    return settlement;
                }
                time::sleep(PROOF_LOOK).await;
            }
        };
        tokio::select! {
            biased;
            report = call.over() => {
                let settled = report.is_some_and(|report| report.outcome != Outcome::Unsettled);
                Ok(settled.then_some(Settlement::Settled))
            }
            told = time::timeout(CANCEL_WAIT, told) => Ok(Some(told.unwrap_or(Settlement::Unsettled))),
        }
    }

    async fn ask_cancel(&self, lease: &Lease, id: TransferId) -> Result<Settlement, NoReply> {
        let current = self.core.cuts.current(id);
        let mut client = self.client.clone();
        let rpc = client.cancel(lease.request(wire::CancelRequest { transfer_id: current.0.to_vec() }));
        let reply = self.ask(lease, "Cancel", rpc).await?.into_inner();
        settlement(reply).map_err(NoReply::Answered)
    }

    pub(crate) async fn revoke(&self, ranges: &[Range]) -> Result<Settlement, Error> {
        // What a daemon refuses must not be noted: it would refuse the whole list at the next attachment.
        revocations::check(ranges)?;
        let noted = self.core.revocations.note(ranges);
        let wire_range = |range: &Range| types::Range { base: range.address, length: range.length };
        let message = wire::RevokeRequest { ranges: ranges.iter().map(wire_range).collect() };
        let lease = self.core.lease();
        let mut client = self.client.clone();
        self.revoked(&lease, "Revoke", &noted, client.revoke(lease.request(message))).await
    }

    pub(crate) async fn revoke_tag(&self, tag: [u8; 16]) -> Result<Settlement, Error> {
        let noted = self.core.revocations.note_tag(tag)?;
        let message = wire::RevokeTagRequest { tag: tag.to_vec() };
        let lease = self.core.lease();
        let mut client = self.client.clone();
        self.revoked(&lease, "RevokeTag", &noted, client.revoke_tag(lease.request(message))).await
    }

    /// Without an answer the revocation stays noted, and it is settled where no daemon will ever serve this engine
    /// again. Where one will, it may be attaching at this moment with a list that was made before: ask it.
    async fn revoked(
        &self,
        lease: &Lease,
        call: &'static str,
        noted: &Noted,
        rpc: impl Future<Output = Result<Response<wire::SettleReply>, Status>>,
    ) -> Result<Settlement, Error> {
        let revocations = &self.core.revocations;
        let answer = match self.ask(lease, call, rpc).await {
            Ok(reply) => {
                let reply = reply.into_inner();
                let epoch = reply.epoch;
                settlement(reply).inspect(|_| revocations.answered(noted, epoch))
            }
            Err(NoReply::Answered(error)) => Err(error),
            Err(NoReply::Lost(..)) => {
                let verdict = lease.verdict().await;
                return Ok(if self.core.returns() { Settlement::Unsettled } else { verdict.into() });
            }
        };
        answer.inspect_err(|_| revocations.refused(noted))
    }
}

fn settlement(reply: wire::SettleReply) -> Result<Settlement, Error> {
    let settlement = Settlement::from_wire(reply.settlement());
    reply.failure.map_or(Ok(settlement), |failure| Err(Error::Refused(failure.into())))
}

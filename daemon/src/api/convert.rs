//! `kvferry.engine.v1` to domain types and back. Errors name the field.

use std::time::Duration;

use ed25519_dalek::SigningKey;
use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use crate::{
    config::MAX_RAIL_MAP,
    convert::{self, BadField, bytes},
    domain::{
        AddressRange, Epoch, Failure, Incarnation, LayoutId, Op, Outcome, PeerHalf, Reason, Report,
        SessionId, SliceBatch, Tag, TransferId,
    },
    engine::{AttachRequest, EngineEvent, EnginePolicy, KnownPeer, TransferOrder},
    memory::{FdShelf, LayoutRequest, ProcessAccess, RegionRequest, Source},
    policy::{RailMap, RevocationList, TOMBSTONES, TagRevoked},
    session::outbound::State,
    transfer::{pages::PageBatch, run::Request},
};

/// Longest name, label or host an engine may give.
const MAX_TEXT: usize = 256;

/// Most revoked ranges that are taken at attach; the daemon may keep fewer (`limits.revocations`).
const MAX_HANDED_OVER: usize = 65_536;

/// Most labels and known peers.
const MAX_ENTRIES: usize = 1024;

fn text(field: &'static str, text: String) -> Result<String, BadField> {
    match text.len() {
        0..=MAX_TEXT => Ok(text),
        long => Err(BadField::new(field, format!("{long} bytes where at most {MAX_TEXT} are taken"))),
    }
}

pub(super) fn attach(request: wire::AttachRequest) -> Result<AttachRequest, Failure> {
    let key = SigningKey::from_bytes(&bytes("key", &request.key)?);
    if request.labels.len() > MAX_ENTRIES || request.known_peers.len() > MAX_ENTRIES {
        return Err(BadField::new("labels, known_peers", format!("more than {MAX_ENTRIES} entries")).into());
    }
    let labels: Result<_, BadField> = request
        .labels
        .into_iter()
        .map(|(name, value)| Ok((text("labels", name)?, text("labels", value)?)))
        .collect();
    let preferred_port = u16::try_from(request.preferred_port)
        .map_err(|_| BadField::new("preferred_port", format!("{} is no port", request.preferred_port)))?;
    let transports: Option<Vec<_>> = request.transports.iter().map(|path| convert::path(*path)).collect();
    let known_peers: Result<Vec<KnownPeer>, BadField> =
        request.known_peers.into_iter().map(known_peer).collect();
    let host = text("advertise_host", request.advertise_host)?;
    Ok(AttachRequest {
        key,
        name: text("name", request.name)?,
        gpu_id: request.gpu_id,
        rail_map: request.rail_map.map(|map| rail_map(&map)).transpose()?,
        policy: policy(request.policy)?,
        labels: labels?,
        advertise_host: (!host.is_empty()).then_some(host),
        preferred_port: (preferred_port != 0).then_some(preferred_port),
        transports: transports.ok_or_else(|| BadField::new("transports", "an unknown path"))?,
        known_peers: known_peers?,
        revocations: revocations(request.revocations.unwrap_or_default())?,
    })
}

/// A range of this field's list. The failure names it by its index.
pub(super) fn range(field: &str, index: usize, range: types::Range) -> Result<AddressRange, Failure> {
    AddressRange::new(range.base, range.length).map_err(|failure| {
        Failure::new(failure.reason, format!("{field}[{index}]: {}", failure.message)).at(index as u64)
    })
}

/// What an engine hands over when it attaches again. Tombstones have no epochs of their own there: the newest.
fn revocations(told: wire::Revocations) -> Result<RevocationList, Failure> {
    if told.ranges.len() > MAX_HANDED_OVER || told.tombstones.len() > TOMBSTONES {
        let message = format!("revocations: more than {MAX_HANDED_OVER} ranges or {TOMBSTONES} tombstones");
        return Err(Failure::new(Reason::Limit, message));
    }
    let epoch = Epoch(told.epoch);
    let revoked = |(at, revocation): (usize, wire::Revocation)| {
        let range = range("revocations.ranges", at, revocation.range.unwrap_or_default())?;
        Ok((Epoch(revocation.epoch), range))
    };
    let tombstone = |tombstone: wire::Tombstone| {
        let tag = Tag(bytes("revocations.tombstones.tag", &tombstone.tag)?);
        Ok(TagRevoked { tag, epoch, age: Duration::from_millis(tombstone.age_ms) })
    };
    Ok(RevocationList {
        epoch,
        floor: Epoch(told.floor),
        ranges: told.ranges.into_iter().enumerate().map(revoked).collect::<Result<_, Failure>>()?,
        tags: told.tombstones.into_iter().map(tombstone).collect::<Result<_, BadField>>()?,
    })
}

fn rail_map(text: &str) -> Result<RailMap, Failure> {
    if text.len() > MAX_RAIL_MAP {
        let long = format!("{} bytes where at most {MAX_RAIL_MAP} are taken", text.len());
        return Err(BadField::new("rail_map", long).into());
    }
    RailMap::parse(text).map_err(|error| error.of("rail_map"))
}

fn known_peer(peer: wire::KnownPeer) -> Result<KnownPeer, BadField> {
    Ok(KnownPeer {
        session_id: SessionId::new(text("known_peers.session_id", peer.session_id)?),
        incarnation: Incarnation(bytes("known_peers.incarnation", &peer.incarnation)?),
    })
}

fn policy(policy: Option<wire::Policy>) -> Result<EnginePolicy, BadField> {
    let policy = policy.unwrap_or_default();
    let positive = |field, value: Option<u32>| match value {
        Some(0) => Err(BadField::new(field, "0 where at least 1 is needed")),
        other => Ok(other),
    };
    let millis = |ms: Option<u32>| ms.map(|ms| Duration::from_millis(ms.into()));
    Ok(EnginePolicy {
        attempts: positive("policy.attempts", policy.attempts)?,
        backoff: millis(policy.backoff_ms),
        failure_threshold: positive("policy.failure_threshold", policy.failure_threshold)?,
        deadline: millis(positive("policy.deadline_ms", policy.deadline_ms)?),
    })
}

/// A request's tag. Zeros say "none" between daemons.
pub(super) fn tag(tag: &[u8]) -> Result<Tag, BadField> {
    let tag = Tag(bytes("tag", tag)?);
    match tag.0.iter().any(|&byte| byte != 0) {
        true => Ok(tag),
        false => Err(BadField::new("tag", "16 zeros are no tag")),
    }
}

pub(super) fn transfer_id(field: &'static str, id: &[u8]) -> Result<TransferId, BadField> {
    bytes(field, id).map(TransferId)
}

pub(super) fn session_id(session: String) -> Result<SessionId, BadField> {
    text("session_id", session).map(SessionId::new)
}

/// A whole transfer; `more` was false, or the chunks have been joined.
pub(super) fn order(request: wire::TransferRequest) -> Result<TransferOrder, BadField> {
    let op = match request.op() {
        types::Op::Write => Op::Write,
        types::Op::Read => Op::Read,
        types::Op::Unspecified => return Err(BadField::new("op", "neither WRITE nor READ")),
    };
    let tag = match request.tag.as_slice() {
        [] => None,
        bytes => Some(tag(bytes)?),
    };
    let mut policy = policy(request.policy)?;
    if request.deadline_ms > 0 {
        policy.deadline = Some(Duration::from_millis(request.deadline_ms.min(MAX_DEADLINE_MS)));
    }
    if let Some(wire::source_ready::How::CudaEventHandle(_)) =
        request.source_ready.and_then(|ready| ready.how)
    {
        return Err(BadField::new("source_ready.cuda_event_handle", "this daemon has no GPU support"));
    }
    let body = match (request.slices, request.pages) {
        (Some(slices), None) => Request::Slices(batch(slices)),
        (None, Some(pages)) => Request::Pages(page_batch(pages)),
        (None, None) => return Err(BadField::new("slices", "neither slices nor pages are given")),
        (Some(_), Some(_)) => return Err(BadField::new("pages", "slices and pages exclude each other")),
    };
    Ok(TransferOrder {
        id: transfer_id("transfer_id", &request.transfer_id)?,
        session: session_id(request.session_id)?,
        op,
        request: body,
        tag,
        policy,
    })
}

/// Who was known at a target, and their newest revocation.
pub(super) fn known_target(target: &wire::KnownTarget) -> Result<(Incarnation, Epoch), BadField> {
    Ok((Incarnation(bytes("known_target.incarnation", &target.incarnation)?), Epoch(target.epoch)))
}

/// A year: keeps deadlines away from the end of the clock.
const MAX_DEADLINE_MS: u64 = 365 * 24 * 3600 * 1000;

pub(super) fn batch(slices: wire::Slices) -> SliceBatch {
    SliceBatch { local: slices.local, remote: slices.remote, lengths: slices.lengths, uniform: slices.length }
}

fn page_batch(pages: wire::Pages) -> PageBatch {
    PageBatch {
        local_layout: LayoutId(pages.local_layout),
        remote_layout: LayoutId(pages.remote_layout),
        local_pages: pages.local_pages,
        remote_pages: pages.remote_pages,
    }
}

/// The handle of the descriptor that a region names, if it names one.
pub(super) fn handle(spec: &wire::RegionSpec) -> Option<u64> {
    use wire::region_spec::Backing;
    match &spec.backing {
        Some(Backing::SharedFd(shared)) => Some(shared.handle),
        Some(Backing::DmaBuf(shared)) => Some(shared.handle),
        Some(Backing::Process(_)) | None => None,
    }
}

/// Finds the descriptor that the engine handed over before.
pub(super) fn region(spec: wire::RegionSpec, index: u64, fds: &FdShelf) -> Result<RegionRequest, Failure> {
    use wire::region_spec::Backing;
    let refused = |reason, message: String| Failure::new(reason, message).at(index);
    let source = match spec.backing {
        Some(Backing::SharedFd(shared)) => {
            let fd = fds.get(shared.handle).ok_or_else(|| {
                let message = format!(
                    "regions[{index}].shared_fd.handle: no descriptor {} was handed over",
                    shared.handle
                );
                refused(Reason::BadArgument, message)
            })?;
            Source::SharedFd { fd, offset: shared.offset }
        }
        Some(Backing::Process(_)) => Source::Process,
        Some(Backing::DmaBuf(_)) => {
            let message = format!("regions[{index}].dma_buf: this daemon has no RDMA or GPU support");
            return Err(refused(Reason::UnsupportedMemory, message));
        }
        None => {
            let message = format!("regions[{index}].backing: missing");
            return Err(refused(Reason::BadArgument, message));
        }
    };
    Ok(RegionRequest { base: spec.base, length: spec.length, source })
}

pub(super) fn process_access(access: &ProcessAccess) -> wire::ProcessAccess {
    match access {
        ProcessAccess::OutOfReach => wire::ProcessAccess::Unspecified,
        ProcessAccess::Direct(_) => wire::ProcessAccess::Direct,
        ProcessAccess::Assisted(_) => wire::ProcessAccess::Assisted,
    }
}

pub(super) fn layout(layout: types::Layout) -> LayoutRequest {
    LayoutRequest {
        layer_bases: layout.layer_bases,
        page_stride: layout.page_stride,
        page_bytes: layout.page_bytes,
        pages: layout.pages,
        dtype_tag: layout.dtype_tag,
    }
}

pub(super) fn report(report: &Report) -> wire::TransferReply {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let outcome = match report.outcome {
        Outcome::Done => wire::Outcome::Done,
        Outcome::Failed => wire::Outcome::Failed,
        Outcome::Cancelled => wire::Outcome::Cancelled,
        Outcome::Unsettled => wire::Outcome::Unsettled,
    };
    let peer_half = match report.peer_half {
        PeerHalf::Confirmed => wire::PeerHalf::Confirmed,
        PeerHalf::Unconfirmed => wire::PeerHalf::Unconfirmed,
    };
    let timings = report.timings;
    wire::TransferReply {
        transfer_id: report.transfer.0.to_vec(),
        outcome: outcome.into(),
        peer_half: peer_half.into(),
        failure: report.failure.as_ref().map(types::Failure::from),
        slices: report.slices,
        slices_done: report.slices_done,
        bytes: report.bytes,
        bytes_done: report.bytes_done,
        attempts: report.attempts,
        path: report.path.map_or(types::Path::Unspecified, types::Path::from).into(),
        rails: vec![],
        timings: Some(wire::Timings {
            queued_us: micros(timings.queued),
            moving_us: micros(timings.moving),
            settling_us: micros(timings.settling),
            total_us: micros(timings.queued + timings.moving + timings.settling),
        }),
        bytes_resent: report.bytes_resent,
        known_target: None,
    }
}

pub(super) fn state(state: State) -> types::SessionState {
    match state {
        State::Idle => types::SessionState::Idle,
        State::Opening => types::SessionState::Opening,
        State::Healthy => types::SessionState::Healthy,
        State::Recovering => types::SessionState::Recovering,
        State::Failed => types::SessionState::Failed,
    }
}

pub(super) fn event(event: EngineEvent) -> wire::EngineEvent {
    use wire::engine_event::Event;
    let event = match event {
        EngineEvent::SessionChanged(session, to, pin, cause) => Event::SessionChanged(wire::SessionChanged {
            session_id: session.to_string(),
            state: state(to).into(),
            cause: cause.as_ref().map(types::Failure::from),
            incarnation: pin.map_or_else(Vec::new, |pin| pin.0.to_vec()),
        }),
        EngineEvent::TransferSettled(settled) => Event::TransferSettled(report(&settled)),
        EngineEvent::Draining(grace) => {
            Event::Draining(wire::Draining { grace_ms: grace.as_millis() as u64 })
        }
    };
    wire::EngineEvent { event: Some(event) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> wire::TransferRequest {
        wire::TransferRequest {
            transfer_id: vec![1; 16],
            session_id: "a:1".into(),
            op: types::Op::Write.into(),
            slices: Some(wire::Slices::default()),
            ..Default::default()
        }
    }

    #[test]
    fn a_malformed_field_is_named() {
        let field = |change: fn(&mut wire::TransferRequest)| {
            let mut message = request();
            change(&mut message);
            order(message).expect_err("malformed").field
        };
        assert_eq!(field(|r| r.op = 7), "op");
        assert_eq!(field(|r| r.transfer_id.truncate(3)), "transfer_id");
        assert_eq!(field(|r| r.tag = vec![1; 17]), "tag");
        assert_eq!(field(|r| r.tag = vec![0; 16]), "tag");
        assert_eq!(field(|r| r.session_id = "x".repeat(300)), "session_id");
        assert_eq!(
            field(|r| r.policy = Some(wire::Policy { attempts: Some(0), ..Default::default() })),
            "policy.attempts"
        );
        assert_eq!(
            field(|r| {
                r.slices = Some(Default::default());
                r.pages = Some(Default::default());
            }),
            "pages"
        );
    }

    #[test]
    fn an_attach_request_is_checked_field_by_field() {
        let good = wire::AttachRequest { key: vec![1; 32], name: "prefill".into(), ..Default::default() };
        assert_eq!(attach(good.clone()).expect("well-formed").name, "prefill");
        let refusal = |request: wire::AttachRequest| attach(request).expect_err("malformed");
        let names = |request, field: &str| {
            let failure = refusal(request);
            assert_eq!(failure.reason, Reason::BadArgument);
            assert!(failure.message.starts_with(&format!("{field}: ")), "{failure}");
        };
        names(wire::AttachRequest { key: vec![1; 31], ..good.clone() }, "key");
        names(wire::AttachRequest { preferred_port: 70_000, ..good.clone() }, "preferred_port");
        names(wire::AttachRequest { transports: vec![99], ..good.clone() }, "transports");
        for map in ["", "{}", "/etc/passwd.json", "mlx5_0,".repeat(4096).as_str()] {
            names(wire::AttachRequest { rail_map: Some(map.to_owned()), ..good.clone() }, "rail_map");
        }

        let handing = |revocations| wire::AttachRequest { revocations: Some(revocations), ..good.clone() };
        let tombstones = vec![wire::Tombstone { tag: vec![1; 15], age_ms: 1 }];
        let bad_tag = handing(wire::Revocations { tombstones, ..Default::default() });
        names(bad_tag, "revocations.tombstones.tag");
        let wrapping = wire::Revocation { epoch: 1, range: Some(types::Range { base: u64::MAX, length: 1 }) };
        let failure = refusal(handing(wire::Revocations { ranges: vec![wrapping], ..Default::default() }));
        assert_eq!((failure.reason, failure.index), (Reason::OutOfBounds, Some(0)));
        let many = vec![wire::Tombstone { tag: vec![1; 16], age_ms: 1 }; TOMBSTONES + 1];
        let failure = refusal(handing(wire::Revocations { tombstones: many, ..Default::default() }));
        assert_eq!(failure.reason, Reason::Limit);
    }
}

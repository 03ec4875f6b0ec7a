//! C4b: what was revoked stays revoked over a restart of the target's daemon.

use harness::{
    batch::Move,
    daemon::Daemon,
    oracle::{Kind, Pool},
    pattern::Stamp,
    proxy::{Cut, Proxy},
    raw::RawEngine,
    scene::{Nodes, Peer, SOURCE, TARGET, done, request},
};
use kvferry_client::{Op, Path, Transfer, tag};
use kvferry_proto::{engine::v1 as wire, types::v1 as types};

use super::{MIB, arrived, is_revoked, megabytes};

/// A target engine with bare hands, so that it can come back with its key and its past.
struct Phoenix {
    key: Vec<u8>,
    pool: Pool,
    raw: RawEngine,
}

impl Phoenix {
    fn attach(daemon: &Daemon, key: &[u8], pool: Pool, revocations: Option<wire::Revocations>) -> Self {
        let request = wire::AttachRequest { key: key.to_vec(), revocations, ..Default::default() };
        let raw = RawEngine::attach_as(daemon.socket(), request).unwrap();
        let region = wire::RegionSpec {
            base: pool.address(),
            length: pool.length(),
            backing: Some(wire::region_spec::Backing::Process(wire::ProcessMemory {})),
            ..Default::default()
        };
        let message = wire::RegisterRegionsRequest { regions: vec![region], ..Default::default() };
        let reply = raw
            .call(|mut client, token| async move { client.register_regions(token.request(message)).await });
        assert_eq!(reply.unwrap().failure, None);
        Self { key: key.to_vec(), pool, raw }
    }

    fn session(&self) -> &str {
        &self.raw.attached().session_id
    }

    fn revoke(&self, range: types::Range) -> u64 {
        let message = wire::RevokeRequest { ranges: vec![range] };
        let call =
            self.raw.call(|mut client, token| async move { client.revoke(token.request(message)).await });
        let reply = call.unwrap();
        assert_eq!(reply.settlement(), wire::Settlement::Settled, "{reply:?}");
        reply.epoch
    }

    fn revoke_tag(&self, tag: [u8; 16]) -> u64 {
        let message = wire::RevokeTagRequest { tag: tag.to_vec() };
        let call =
            self.raw.call(|mut client, token| async move { client.revoke_tag(token.request(message)).await });
        call.unwrap().epoch
    }
}

/// C4b's plain half: revoked, then the target's daemon is another one, then the peer sends what it had queued.
#[test]
fn c4b_what_was_revoked_stays_revoked_over_a_restart_of_the_daemon() {
    let nodes = Nodes::start(Path::Local, "[retry]\nreconnect_ms = 14000\n").unwrap();
    let initiator = Peer::attach(nodes.initiator(), Kind::Shared, 8 * MIB, SOURCE).unwrap();
    let target = Daemon::start().unwrap();
    let pool = Pool::new(Kind::Process, 8 * MIB, TARGET).unwrap();
    let mut phoenix = Phoenix::attach(&target, &[9; 32], pool, None);
    let proxy = Proxy::start(phoenix.session()).unwrap();
    let moves = megabytes(2);
    let write = |pool: &Pool, moves: &[Move], tag| Transfer {
        tag,
        ..request(Op::Write, &proxy.address(), moves, &initiator.pool, pool)
    };
    done(initiator.engine.transfer(write(&phoenix.pool, &moves, None)), &moves);

    // Nothing of it is sent, and nothing of it may be.
    proxy.refuse(true);
    proxy.cut_all(Cut::Reset);
    let queued = initiator.engine.submit(write(&phoenix.pool, &moves, None)).unwrap();
    arrived(nodes.initiator(), &initiator.engine);
    let range = types::Range { base: phoenix.pool.address(), length: 4 * MIB };
    assert_eq!(phoenix.revoke(range), 1);
    assert_eq!(phoenix.revoke_tag(tag("seventeen")), 2);
    phoenix.pool.hand_over(0..8 * MIB, Stamp { owner: 4, transfer: 1 });

    let target = target.restart_after_kill().unwrap();
    let revocations = wire::Revocations {
        epoch: 2,
        floor: 0,
        ranges: vec![wire::Revocation { epoch: 1, range: Some(range) }],
        tombstones: vec![wire::Tombstone { tag: tag("seventeen").to_vec(), age_ms: 10 }],
    };
    let Phoenix { key, pool, raw } = phoenix;
    drop(raw);
    let mut phoenix = Phoenix::attach(&target, &key, pool, Some(revocations));
    proxy.retarget(phoenix.session()).unwrap();
    proxy.refuse(false);
    let report = is_revoked(queued.wait());
    assert_eq!(report.bytes_done, 0);
    let tagged = write(&phoenix.pool, &moves, Some(tag("seventeen")));
    assert_eq!(is_revoked(initiator.engine.transfer(tagged)).bytes_done, 0);
    phoenix.pool.verify().assert_clean("after the daemon's restart");

    // Who is admitted under what the new daemon told may use the memory.
    done(initiator.engine.transfer(write(&phoenix.pool, &moves, None)), &moves);
    phoenix.pool.expect(&initiator.pool, &moves);
    phoenix.pool.verify().assert_clean("after a new transfer");
}

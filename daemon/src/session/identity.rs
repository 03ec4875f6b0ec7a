//! Who is at the other end: the transcript of the four-message open, and the signatures over it.
//!
//! Open -> Challenge(signature) -> Confirm(signature) -> Accept. Each side signs its role and the hash of what
//! was said so far with its engine's key, so a delayed, replayed, relayed or forged open proves nothing and
//! changes nothing (I4). The hash is taken over the fields both sides know, each with its length, and not over
//! encoded messages: a newer peer may add fields without breaking an older one.

use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use sha2::{Digest, Sha256};

use crate::domain::{BootId, Failure, Incarnation, PathKind, Reason};

/// Protocol versions this daemon speaks.
pub const PROTOCOL: ProtocolRange = ProtocolRange { min: 1, max: 1 };

/// Versions from `min` through `max`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProtocolRange {
    /// Oldest.
    pub min: u32,
    /// Newest.
    pub max: u32,
}

impl ProtocolRange {
    /// The newest version both speak.
    pub fn agree(self, other: Self) -> Result<u32, Failure> {
        let version = self.max.min(other.max);
        if version < self.min || version < other.min {
            let message = format!(
                "no common protocol version: {}..={} here, {}..={} there",
                self.min, self.max, other.min, other.max
            );
            return Err(Failure::new(Reason::HandshakeFailed, message));
        }
        Ok(version)
    }
}

/// What the initiator says first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Open {
    /// Versions it speaks.
    pub protocol: ProtocolRange,
    /// Random, fresh.
    pub nonce: [u8; 32],
    /// Its daemon's run.
    pub boot: BootId,
    /// Its engine.
    pub incarnation: Incarnation,
    /// Its own endpoint, for people.
    pub session_id: String,
    /// Who it expects to meet.
    pub expected: Option<Incarnation>,
    /// What its daemon can do, as it said it: signed with names unknown here.
    pub capabilities: Vec<String>,
}

/// What the target answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Challenge {
    /// The version both will speak.
    pub protocol: u32,
    /// Random, fresh.
    pub nonce: [u8; 32],
    /// Its daemon's run.
    pub boot: BootId,
    /// Its engine.
    pub incarnation: Incarnation,
    /// What its daemon can do, as it said it: signed with names unknown here.
    pub capabilities: Vec<String>,
}

/// Which side signs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The initiator, in Confirm.
    Initiator,
    /// The target, in Challenge.
    Target,
}

/// The hash of Open and Challenge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transcript([u8; 32]);

impl Transcript {
    /// Of these two messages.
    pub fn new(open: &Open, challenge: &Challenge) -> Self {
        let mut hash = Fields(Sha256::new_with_prefix(b"kvferry.peer.v1 transcript"));
        hash.number(open.protocol.min).number(open.protocol.max).bytes(&open.nonce).bytes(&open.boot.0);
        hash.bytes(&open.incarnation.0).bytes(open.session_id.as_bytes());
        hash.bytes(open.expected.as_ref().map_or(&[][..], |key| &key.0)).texts(&open.capabilities);
        hash.number(challenge.protocol).bytes(&challenge.nonce).bytes(&challenge.boot.0);
        hash.bytes(&challenge.incarnation.0).texts(&challenge.capabilities);
        Self(hash.0.finalize().into())
    }

    /// The signature of one side.
    pub fn sign(&self, role: Role, key: &SigningKey) -> [u8; 64] {
        key.sign(&self.message(role)).to_bytes()
    }

    /// Whether that side really signed.
    pub fn verify(&self, role: Role, signer: &Incarnation, signature: &[u8]) -> Result<(), Failure> {
        let refused = |what| Failure::new(Reason::HandshakeFailed, format!("the {role:?}'s {what}"));
        let key = VerifyingKey::from_bytes(&signer.0).map_err(|_| refused("key is no Ed25519 key"))?;
        let signature = Signature::from_slice(signature).map_err(|_| refused("signature is malformed"))?;
        key.verify(&self.message(role), &signature).map_err(|_| refused("signature is wrong"))
    }

    pub(super) fn message(&self, role: Role) -> [u8; 48] {
        let mut message = [0; 48];
        let label: &[u8; 16] = match role {
            Role::Initiator => b"kvferry initiate",
            Role::Target => b"kvferry target  ",
        };
        message[..16].copy_from_slice(label);
        message[16..].copy_from_slice(&self.0);
        message
    }
}

/// A daemon that can sum the payload of tcp parts says this.
const CAN_SUM: &str = "tcp-checksum";

/// One that was configured to (`tcp.checksum`) says this too.
const WANTS_SUMS: &str = "tcp-checksum-wanted";

/// Whether payload is summed on the tcp lanes of a session: where both can and either wants it. The same for both
/// sides, from what both have signed.
pub fn checksums(one: &[String], other: &[String]) -> bool {
    let says = |side: &[String], what| side.iter().any(|capability| capability == what);
    let can = says(one, CAN_SUM) && says(other, CAN_SUM);
    can && (says(one, WANTS_SUMS) || says(other, WANTS_SUMS))
}

/// The paths among a peer's capabilities.
pub fn offers(capabilities: &[String]) -> Vec<PathKind> {
    let known = [PathKind::Local, PathKind::Tcp, PathKind::Rdma];
    capabilities.iter().filter_map(|name| known.into_iter().find(|path| path.name() == name)).collect()
}

/// The capabilities this daemon states: the paths it allows, and whether payload on tcp can, and shall, be summed.
pub fn capabilities(allowed: &[PathKind], checksum: bool) -> Vec<String> {
    let paths = allowed.iter().map(|path| path.name());
    let sums = [CAN_SUM].into_iter().chain(checksum.then_some(WANTS_SUMS));
    paths.chain(sums.filter(|_| allowed.contains(&PathKind::Tcp))).map(str::to_owned).collect()
}

/// The incarnation a private key belongs to.
pub fn incarnation(key: &SigningKey) -> Incarnation {
    Incarnation(key.verifying_key().to_bytes())
}

struct Fields(Sha256);

impl Fields {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    fn number(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    fn texts(&mut self, texts: &[String]) -> &mut Self {
        self.number(texts.len() as u32);
        for text in texts {
            self.bytes(text.as_bytes());
        }
        self
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    pub(in crate::session) fn messages() -> (Open, Challenge) {
        let open = Open {
            protocol: PROTOCOL,
            nonce: [1; 32],
            boot: BootId([1; 16]),
            incarnation: incarnation(&key(1)),
            session_id: "a:1".into(),
            expected: None,
            capabilities: vec!["tcp".into()],
        };
        let challenge = Challenge {
            protocol: 1,
            nonce: [2; 32],
            boot: BootId([2; 16]),
            incarnation: incarnation(&key(2)),
            capabilities: vec!["tcp".into()],
        };
        (open, challenge)
    }

    /// I4: a signature proves its side of this very conversation, and nothing else.
    #[test]
    fn a_signature_fits_one_role_of_one_conversation() {
        let (open, challenge) = messages();
        let transcript = Transcript::new(&open, &challenge);
        let signature = transcript.sign(Role::Target, &key(2));
        let signer = challenge.incarnation;
        assert_eq!(transcript.verify(Role::Target, &signer, &signature), Ok(()));
        assert!(transcript.verify(Role::Initiator, &signer, &signature).is_err());
        assert!(transcript.verify(Role::Target, &open.incarnation, &signature).is_err());
        assert!(transcript.verify(Role::Target, &signer, &signature[..63]).is_err());
        let replayed = Transcript::new(&Open { nonce: [3; 32], ..open.clone() }, &challenge);
        assert!(replayed.verify(Role::Target, &signer, &signature).is_err());
        let relayed = Transcript::new(&open, &Challenge { boot: BootId([9; 16]), ..challenge });
        assert!(relayed.verify(Role::Target, &signer, &signature).is_err());
    }

    #[test]
    fn fields_cannot_flow_into_each_other() {
        let (open, challenge) = messages();
        let one = Open { session_id: "ab".into(), capabilities: vec![], ..open.clone() };
        let two = Open { session_id: "a".into(), capabilities: vec!["tcp".into()], ..open };
        assert_ne!(Transcript::new(&one, &challenge), Transcript::new(&two, &challenge));
    }

    #[test]
    fn payload_is_summed_where_both_can_and_either_wants_it() {
        let tcp = |wanted| capabilities(&[PathKind::Tcp], wanted);
        let older = vec!["tcp".to_owned()];
        for (one, other, summed) in [
            (tcp(false), tcp(false), false),
            (tcp(true), tcp(false), true),
            (tcp(true), tcp(true), true),
            (tcp(true), older, false),
            (tcp(true), capabilities(&[PathKind::Local], true), false),
        ] {
            assert_eq!(checksums(&one, &other), summed, "{one:?} {other:?}");
            assert_eq!(checksums(&other, &one), summed, "{other:?} {one:?}");
        }
        assert_eq!(offers(&tcp(true)), [PathKind::Tcp]);
    }

    #[test]
    fn versions_meet_or_say_what_each_speaks() {
        let range = |min, max| ProtocolRange { min, max };
        assert_eq!(range(1, 3).agree(range(2, 5)), Ok(3));
        assert_eq!(range(1, 1).agree(range(1, 9)), Ok(1));
        let failure = range(1, 1).agree(range(2, 3)).expect_err("nothing in common");
        assert_eq!(failure.reason, Reason::HandshakeFailed);
        assert!(failure.message.contains("1..=1") && failure.message.contains("2..=3"));
    }
}

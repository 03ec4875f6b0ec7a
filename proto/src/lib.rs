//! The wire contracts of kvferry, generated from `proto/` with protox (no protoc needed) and checked in.
//!
//! [`engine`] is what an engine asks of its own node's daemon, [`peer`] what two daemons say to each other,
//! [`types`] the words both share. `tests/generated.rs` fails when the checked-in code is stale and tells how
//! to renew it. Nothing but conversions belongs here: the daemon and the client turn these messages into
//! their own types at their edges.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::large_enum_variant)]

/// Words shared by both protocols.
pub mod types {
    pub mod v1 {
        include!("generated/kvferry.types.v1.rs");
    }
}

/// The engine API, on the Unix socket.
pub mod engine {
    pub mod v1 {
        include!("generated/kvferry.engine.v1.rs");
    }
}

/// The daemon-to-daemon protocol, on the target engine's endpoint.
pub mod peer {
    pub mod v1 {
        include!("generated/kvferry.peer.v1.rs");
    }
}

/// Shared memory between a daemon and an engine's client library.
pub mod ring;

/// Encoded descriptors of all files, for gRPC reflection.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");

/// Metadata key of the engine token on every call after Attach.
pub const TOKEN_METADATA: &str = "kvferry-token-bin";

/// Metadata key that carries a [`types::v1::Reason`] number on a gRPC error.
pub const REASON_METADATA: &str = "kvferry-reason";

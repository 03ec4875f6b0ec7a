//! Identities. Each is its own type, so that none can be mistaken for another.

use std::{fmt, net::Ipv6Addr, sync::Arc};

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// A fresh random one.
            pub fn random() -> Self {
                let mut bytes = [0; $len];
                getrandom::fill(&mut bytes).expect("the kernel's random source");
                Self(bytes)
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = std::array::TryFromSliceError;

            fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
                Ok(Self(bytes.try_into()?))
            }
        }

        impl fmt::Display for $name {
            /// The first eight bytes in hexadecimal: enough to tell two apart in a log.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

bytes_id! {
    /// One run of a daemon: random at every start.
    BootId, 16
}
bytes_id! {
    /// An engine process: its Ed25519 public key.
    Incarnation, 32
}
bytes_id! {
    /// A transfer, named by the client that asked for it; unique per incarnation.
    TransferId, 16
}
bytes_id! {
    /// What an engine calls the request a transfer serves, so that all of its transfers can be revoked.
    Tag, 16
}
number_id! {
    /// An attached engine, within one boot of one daemon. Never used twice.
    EngineId, u64
}
number_id! {
    /// A registered range of one engine. A number may return, with a new [`Generation`].
    RegionId, u32
}
number_id! {
    /// A registered page layout of one engine.
    LayoutId, u32
}
number_id! {
    /// Which registration a [`RegionId`] or [`LayoutId`] means; unique per run of a daemon.
    Generation, u32
}
number_id! {
    /// A data path of a session; minted by the initiator's daemon, never used twice in one boot.
    LaneId, u64
}
number_id! {
    /// How many times an endpoint has revoked.
    Epoch, u64
}

/// `host:port` of an engine's endpoint: how other engines address it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SessionId(Arc<str>);

impl SessionId {
    /// Takes the text as it is; [`SessionId::authority`] is where it must prove to be an address.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// Host and port, or nothing when the text is not `host:port` (IPv6 hosts in brackets).
    pub fn authority(&self) -> Option<(&str, u16)> {
        let (host, port) = self.0.rsplit_once(':')?;
        let host = match host.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').filter(|inner| inner.parse::<Ipv6Addr>().is_ok())?,
            None => Some(host).filter(|host| is_host(host))?,
        };
        let port: u16 = port.parse().ok()?;
        (port != 0).then_some((host, port))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An IPv4 address or a name; the characters of RFC 1123 and the underscore that Kubernetes lets through.
fn is_host(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !text.is_empty() && text.bytes().all(allowed)
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_id_is_a_host_and_a_port() {
        let authority = |text: &'static str| {
            let id = SessionId::new(text);
            id.authority().map(|(host, port)| (host.to_owned(), port))
        };
        assert_eq!(authority("10.0.0.1:20001"), Some(("10.0.0.1".into(), 20001)));
        assert_eq!(authority("[::1]:20001"), Some(("::1".into(), 20001)));
        for bad in [
            "",
            ":1",
            "host",
            "host:",
            "host:x",
            "host:0",
            "host:70000",
            "::1:20001",
            "[::1:2",
            "[x]:2",
            "a b:1",
        ] {
            assert_eq!(authority(bad), None, "{bad}");
        }
    }
}

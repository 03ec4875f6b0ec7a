//! An initiator without a daemon: says the messages of a session's opening in whatever order it is told to.
//!
//! It has a key of its own and can sign, so nothing it says is refused for want of a good signature but what shall be.

use std::time::Duration;

use anyhow::Context;
use hyper_util::rt::TokioIo;
use kvferry_proto::{
    peer::v1::{
        self as wire, peer_client::PeerClient, to_initiator::Message as Heard, to_target::Message as Said,
    },
    types::v1::Reason,
};
use kvferryd::{
    domain::{BootId, Incarnation},
    session::identity::{self, Challenge, Open, Role, Transcript},
};
use tokio::{
    runtime::Runtime,
    sync::mpsc,
    time::{error::Elapsed, timeout},
};
use tonic::{Status, Streaming, codegen::tokio_stream::wrappers::ReceiverStream};

/// Whatever is not answered within this is not answered.
const PATIENCE: Duration = Duration::from_secs(10);

/// One control stream to an endpoint.
#[derive(Debug)]
pub struct Stranger {
    runtime: Runtime,
    key: [u8; 32],
    open: Open,
    to_target: mpsc::Sender<wire::ToTarget>,
    from_target: Streaming<wire::ToInitiator>,
}

impl Stranger {
    /// Connects to the endpoint, and says nothing yet. The same `key` is the same engine.
    pub fn connect(endpoint: &str, key: [u8; 32]) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (to_target, outgoing) = mpsc::channel(16);
        let address = endpoint.to_owned();
        let from_target = runtime.block_on(async {
            let connector = tower::service_fn(move |_| {
                let address = address.clone();
                async move { anyhow::Ok(TokioIo::new(tokio::net::TcpStream::connect(address).await?)) }
            });
            // The address is a formality: the connector knows where to go.
            let channel = tonic::transport::Endpoint::from_static("http://kvferry");
            let mut client = PeerClient::new(channel.connect_with_connector(connector).await?);
            anyhow::Ok(client.session(ReceiverStream::new(outgoing)).await?.into_inner())
        })?;
        let open = Open {
            protocol: identity::PROTOCOL,
            nonce: Incarnation::random().0,
            boot: BootId([0x77; 16]),
            incarnation: identity::incarnation(&key.into()),
            session_id: "stranger:1".to_owned(),
            expected: None,
            capabilities: vec!["tcp".to_owned()],
        };
        Ok(Self { runtime, key, open, to_target, from_target })
    }

    /// Its Open.
    pub fn open(&self) -> Said {
        let open = &self.open;
        Said::Open(wire::Open {
            protocol: Some(wire::Protocol { min: open.protocol.min, max: open.protocol.max }),
            nonce: open.nonce.to_vec(),
            boot_id: open.boot.0.to_vec(),
            incarnation: open.incarnation.0.to_vec(),
            session_id: open.session_id.clone(),
            expected_incarnation: Vec::new(),
            capabilities: open.capabilities.clone(),
            version: String::new(),
        })
    }

    /// The Confirm that answers this challenge.
    ///
    /// # Errors
    /// When it is no proper challenge.
    pub fn confirm(&self, challenge: &wire::Challenge) -> anyhow::Result<Said> {
        let array = |bytes: &[u8]| <[u8; 32]>::try_from(bytes).context("not 32 bytes");
        let challenge = Challenge {
            protocol: challenge.protocol,
            nonce: array(&challenge.nonce)?,
            boot: BootId(<[u8; 16]>::try_from(challenge.boot_id.as_slice())?),
            incarnation: Incarnation(array(&challenge.incarnation)?),
            capabilities: challenge.capabilities.clone(),
        };
        let transcript = Transcript::new(&self.open, &challenge);
        let signature = transcript.sign(Role::Initiator, &self.key.into()).to_vec();
        Ok(Said::Confirm(wire::Confirm { signature, proof: Vec::new() }))
    }

    /// Says it. The target may have hung up.
    pub fn say(&self, message: Said) {
        let _ = self.runtime.block_on(self.to_target.send(wire::ToTarget { message: Some(message) }));
    }

    /// The next message but beats.
    ///
    /// # Errors
    /// When there is none within 10 s, or the stream is over.
    pub fn hear(&mut self) -> anyhow::Result<Heard> {
        loop {
            let next = self.next();
            let message = next.context("the target is silent")??.context("the stream is over")?;
            match message.message {
                Some(Heard::Beat(_)) | None => {}
                Some(message) => return Ok(message),
            }
        }
    }

    fn next(&mut self) -> Result<Result<Option<wire::ToInitiator>, Status>, Elapsed> {
        let message = self.from_target.message();
        self.runtime.block_on(async { timeout(PATIENCE, message).await })
    }

    /// Says its Open and hears the challenge.
    ///
    /// # Errors
    /// When something else comes.
    pub fn meet(&mut self) -> anyhow::Result<wire::Challenge> {
        self.say(self.open());
        match self.hear()? {
            Heard::Challenge(challenge) => Ok(challenge),
            other => anyhow::bail!("no challenge: {other:?}"),
        }
    }

    /// Why the target wants no more of it: a refusal before the session is open, a farewell after. Nothing comes behind.
    ///
    /// # Errors
    /// When something else comes first, or nothing.
    pub fn refused(mut self) -> anyhow::Result<Reason> {
        let failure = loop {
            match self.hear()? {
                Heard::Refused(refused) => break refused.failure,
                Heard::Bye(bye) => break bye.failure,
                // What was due to what was said in order.
                Heard::Challenge(_) | Heard::Accept(_) | Heard::Welcome(_) | Heard::Table(_) => {}
                other => anyhow::bail!("no refusal: {other:?}"),
            }
        };
        let after = self.next();
        anyhow::ensure!(!matches!(after, Err(_) | Ok(Ok(Some(_)))), "the stream goes on: {after:?}");
        Ok(failure.context("no reason")?.reason())
    }
}

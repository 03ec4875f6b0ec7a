//! The engine API without the client library: to say what the library never would.

use std::path::{Path, PathBuf};

use anyhow::Context;
use hyper_util::rt::TokioIo;
use kvferry_proto::{
    REASON_METADATA, TOKEN_METADATA,
    engine::v1::{AttachRequest, Attached, EngineEvent, engine_client::EngineClient, engine_event::Event},
    types::v1::{Failure, Reason},
};
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::{
    Request, Response, Status, Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

/// An engine that speaks gRPC with its bare hands. Blocking, for tests without a runtime.
#[derive(Debug)]
pub struct RawEngine {
    runtime: Runtime,
    client: EngineClient<Channel>,
    attached: Attached,
    /// The lease.
    _events: Streaming<EngineEvent>,
}

impl RawEngine {
    /// Attaches with a fresh key.
    pub fn attach(socket: &Path) -> anyhow::Result<Self> {
        let mut key = vec![0; 32];
        getrandom::fill(&mut key).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
        Self::attach_as(socket, AttachRequest { key, name: "raw".to_owned(), ..AttachRequest::default() })
    }

    /// Attaches with this request.
    pub fn attach_as(socket: &Path, request: AttachRequest) -> anyhow::Result<Self> {
        // A worker of its own: the connection must be served also while no call is made.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (client, attached, events) = runtime.block_on(async {
            let mut client = connect(socket).await?;
            let mut events = client.attach(request).await?.into_inner();
            let first = events.message().await?.and_then(|event| event.event);
            let Some(Event::Attached(attached)) = first else {
                anyhow::bail!("the first event is not Attached: {first:?}")
            };
            anyhow::Ok((client, attached, events))
        })?;
        Ok(Self { runtime, client, attached, _events: events })
    }

    /// What Attach answered.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Makes one call with the engine's token.
    pub fn call<T, F>(&self, call: impl FnOnce(EngineClient<Channel>, Token) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_as(&self.attached.token.clone(), call)
    }

    /// Makes one call with any token.
    pub fn call_as<T, F>(
        &self,
        token: &[u8],
        call: impl FnOnce(EngineClient<Channel>, Token) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let future = call(self.client.clone(), Token(token.to_vec()));
        self.runtime.block_on(future).map(Response::into_inner)
    }
}

/// Who says to be calling.
#[derive(Clone, Debug)]
pub struct Token(Vec<u8>);

impl Token {
    /// A request that carries it.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert_bin(TOKEN_METADATA, MetadataValue::from_bytes(&self.0));
        request
    }
}

/// The typed reason of a call that was not carried out, whether it came as an answer or as a gRPC error.
pub fn refusal<T>(
    answer: Result<T, Status>,
    failure_of: impl FnOnce(&T) -> Option<Failure>,
) -> anyhow::Result<(Reason, String)> {
    match answer {
        Ok(answer) => {
            let failure = failure_of(&answer).context("it was carried out")?;
            Ok((failure.reason(), failure.message))
        }
        Err(status) => {
            let number = status.metadata().get(REASON_METADATA);
            let number = number.with_context(|| format!("an error without reason: {status:?}"))?;
            let reason = Reason::try_from(number.to_str()?.parse::<i32>()?)?;
            Ok((reason, status.message().to_owned()))
        }
    }
}

async fn connect(socket: &Path) -> anyhow::Result<EngineClient<Channel>> {
    let path: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { anyhow::Ok(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    // The address is a formality: the connector knows where to go.
    let channel = Endpoint::from_static("http://kvferry").connect_with_connector(connector).await?;
    Ok(EngineClient::new(channel))
}

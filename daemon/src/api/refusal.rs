//! Failures as gRPC errors, for calls that could not be carried out at all. The one place where codes are chosen.

use kvferry_proto::REASON_METADATA;
use tonic::{Code, Status};

use crate::{
    convert::BadField,
    domain::{Class, Failure, Reason},
};

/// The failure as a status: code for generic clients, reason number in the metadata for ours.
pub(super) fn status(failure: &Failure) -> Status {
    let code = match (failure.reason, failure.class()) {
        (Reason::Unauthorised, _) => Code::Unauthenticated,
        (Reason::NotYours, _) => Code::PermissionDenied,
        (Reason::Limit | Reason::Memlock | Reason::PortUnavailable, _) => Code::ResourceExhausted,
        (Reason::Draining, _) => Code::Unavailable,
        (Reason::EngineGone, _) => Code::Aborted,
        (_, Class::Caller) => Code::InvalidArgument,
        (_, Class::Stale) => Code::FailedPrecondition,
        (_, Class::Fabric | Class::Local) => Code::Internal,
    };
    let mut status = Status::new(code, failure.message.clone());
    let number = tonic::metadata::MetadataValue::from(failure.reason as u16);
    status.metadata_mut().insert(REASON_METADATA, number);
    status
}

impl From<BadField> for Status {
    fn from(bad: BadField) -> Self {
        status(&bad.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_in_the_metadata() {
        for &reason in Reason::ALL {
            let status = status(&Failure::plain(reason));
            let number = status.metadata().get(REASON_METADATA).and_then(|value| value.to_str().ok());
            assert_eq!(number, Some((reason as u16).to_string().as_str()));
            assert_ne!(status.code(), Code::Ok);
        }
    }
}

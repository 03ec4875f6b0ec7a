//! The end of a transfer, told once: to the log, to the metrics and to whoever waits for it.

use crate::{
    domain::{Op, Outcome, Reason, Report, SessionId},
    transfer::run::{Request, Run},
};

use super::Context;

pub(super) fn announce(context: &Context, session: &SessionId, run: Run, report: Report) {
    context.metrics.transfer_ended(run.admitted.op, &report);
    log(session, &run, &report);
    if let Some(teller) = run.admitted.teller
        && teller.end(report.clone())
    {
        context.outcomes.settled(report);
    }
}

/// A success after a retry is one warning; giving up is one error; both name the session. What the caller asked
/// for (cancel) or could not have (bad slices) is the caller's to log.
fn log(session: &SessionId, run: &Run, report: &Report) {
    match (report.outcome, &report.failure) {
        (Outcome::Done, _) if report.attempts > 1 => tracing::warn!(
            %session,
            transfer = %report.transfer,
            attempts = report.attempts,
            bytes_resent = report.bytes_resent,
            "transfer recovered after retries"
        ),
        (Outcome::Failed, Some(failure)) if failure.reason != Reason::Cancelled => {
            let (local, remote, length) = first_slice(&run.admitted.request);
            let (source, destination) = match run.admitted.op {
                Op::Write => (local, remote),
                Op::Read => (remote, local),
            };
            tracing::error!(
                %session,
                transfer = %report.transfer,
                slices = report.slices,
                bytes = report.bytes,
                bytes_done = report.bytes_done,
                first_source = format_args!("{source:#x}"),
                first_destination = format_args!("{destination:#x}"),
                first_length = length,
                attempts = report.attempts,
                code = failure.code,
                peer_half = ?report.peer_half,
                cause = %failure,
                "transfer failed"
            );
        }
        _ => {}
    }
}

fn first_slice(request: &Request) -> (u64, u64, u64) {
    match request {
        Request::Slices(batch) => batch.iter().next().unwrap_or_default(),
        Request::Pages(_) => (0, 0, 0),
    }
}

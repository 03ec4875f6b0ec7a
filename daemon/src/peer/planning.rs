//! Planning for a session: the core's order and the two tables become a payload, or the reason why not.

use super::Context;
use crate::{
    domain::{Failure, Reason, SliceBatch},
    memory::View,
    session::{
        PeerTable,
        outbound::{Event, PlanFailure, PlanOrder},
    },
    transfer::{
        pages::{self, PageBatch},
        plan,
        run::Request,
    },
};

/// The answer to the order, as an event. Runs on any thread: it blocks on nothing, but a large batch takes time.
pub(super) fn make_plan(context: &Context, order: &PlanOrder) -> Event {
    let view = context.memory.view();
    let limit = context.limit_slices;
    let expanded;
    let batch = match &*order.request {
        Request::Slices(batch) => Ok(batch),
        Request::Pages(pages) => {
            expanded = expand(pages, &view, &order.table, limit);
            expanded.as_ref().map_err(Clone::clone)
        }
    };
    let result = batch
        .map_err(|failure| {
            let wants_newer_table = failure.reason == Reason::LayoutChanged;
            PlanFailure { failure, wants_newer_table }
        })
        .and_then(|batch| {
            plan::check_size(batch).map_err(|failure| PlanFailure { failure, wants_newer_table: false })?;
            plan::plan(order.order, batch, &view.table, &order.table.regions).map_err(|fault| PlanFailure {
                wants_newer_table: plan::wants_newer_table(&fault),
                failure: fault.into(),
            })
        });
    Event::Planned(order.order.transfer, order.boot, result)
}

fn expand(wanted: &PageBatch, view: &View, table: &PeerTable, limit: u64) -> Result<SliceBatch, Failure> {
    let missing =
        |side: &str, id, reason| Failure::new(reason, format!("{side} layout {id} is not registered"));
    let local = view
        .layouts
        .get(&wanted.local_layout)
        .ok_or_else(|| missing("local", wanted.local_layout, Reason::Unregistered))?;
    let remote = table
        .layouts
        .get(&wanted.remote_layout)
        .ok_or_else(|| missing("remote", wanted.remote_layout, Reason::LayoutChanged))?;
    pages::expand(wanted, local, remote, limit)
}

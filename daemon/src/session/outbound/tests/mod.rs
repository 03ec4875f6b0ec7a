//! The core of an outbound session, told as stories: no I/O, no clock, every event by hand.
//!
//! [`rig`] carries out what costs nothing (planning), and keeps everything else for the test to look at and to
//! answer. [`table`] shows every state every event; [`model`] plays lives at
//! random in the [`world`] of a peer.

mod endings;
mod health;
mod lane_life;
mod model;
mod opening;
mod planning;
mod revoking;
mod rig;
mod table;
pub(super) mod words;
mod world;

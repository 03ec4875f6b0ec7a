//! CPython's view of the client library, as `kvferry._native`; the package `kvferry` beside it gives it names.
//!
//! Nothing is decided here: arguments are taken apart ([`arguments`]), the call is made without the interpreter's
//! lock ([`engine`]), and what comes back becomes plain Python values ([`values`]) or exceptions ([`errors`]).
//! Every call may be made on any thread. A blocked call is not interrupted by signals, but for
//! [`wait`](engine::Engine::wait) and [`get`](events::Events::get), which look for them.

// PyO3's macros make it so.
#![allow(unreachable_pub, missing_docs)]

mod arguments;
mod buffer;
mod engine;
mod errors;
mod events;
mod values;

use pyo3::pymodule;

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    use crate::arguments::Name;
    #[pymodule_export]
    use crate::{
        buffer::SharedBuffer,
        engine::{Engine, Pending},
        events::Events,
        values::{Failure, Probe, Region, Report},
    };

    /// What the library warns of goes to stderr. `KVFERRY_LOG` filters it as `RUST_LOG` does elsewhere.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        let filter = tracing_subscriber::EnvFilter::try_from_env("KVFERRY_LOG")
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
        // Somebody who embeds the interpreter may have set one up before: theirs stays.
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        Ok(())
    }

    /// The tag of a request: what a transfer carries and `Engine.revoke_tag` names. A name of exactly 16 bytes is the
    /// tag itself, of every other name it is the first 16 bytes of its SHA-256.
    #[pyfunction]
    fn tag(name: Name) -> [u8; 16] {
        kvferry_client::tag(name)
    }
}

//! The REST API on a unix socket: requests come in, the owner is asked, answers go out.
//!
//! ```text
//!   client ──HTTP/1.1──▶ server ──▶ routes ──▶ body ──Call──▶ CallSink (the owner's)
//! ```
//! Names, bodies and statuses are Cloud Hypervisor's, so what drives that drives this; `openapi.json` tells them all. It is made
//! from the table of paths and the types of the bodies, when it is first asked for. Everything runs on one thread,
//! `http-server`, which changes nothing of the machine: it checks the shape of what it is told, posts it to the owner
//! and waits for the answer beside all the other clients.
//!
//! Invariants:
//! - No client can hold up another: every wait has an end, and connections, headers, bodies and descriptors a limit.
//! - A client that is wrong is told what was asked, what is so and what mends it; bytes that are no HTTP get the
//!   library's bare 400 or 431.
//! - Nothing is ignored: unknown paths, unknown fields and a body where none belongs are errors.
//!
//! Not done here: whether a request makes sense in the machine's state is the owner's to tell.

#![forbid(unsafe_code)]

mod body;
mod heads;
mod info;
mod listener;
mod openapi;
pub mod request;
mod routes;
mod server;
pub(crate) mod stream;
#[cfg(test)]
mod tests;

pub use info::{
    BackendNode, BackendState, DaxMemory, DeviceNode, MemoryLeaving, VmCounters, VmInfo, VmState,
};
pub use listener::{ListenError, Listener};
pub use request::{Answer, ApiError, Call, CallSink, DeviceAdded, ErrorKind, Gone, Reply, Request};
pub use server::{Limits, Server, StartError};

/// What every path begins with.
pub const PREFIX: &str = "/api/v1/";

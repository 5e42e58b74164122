//! What the lab and a caller of a VMM's REST interface on the emulated host say to each other: JSON, one value per line.
//!
//! The caller sends a request's bytes as they are, so that the lab can speak as a known client does.

use serde::{Deserialize, Serialize};

/// A request that the caller is to send.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// All of it, head and body.
    pub request: String,
    /// The tap whose descriptor goes beside it; made when it is asked for first.
    pub tap: Option<String>,
    /// Whether it goes over a connection of its own, and those after it; else over the one before, while that is open.
    pub anew: bool,
}

/// What came of it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Exchanged {
    /// A whole answer.
    Answer {
        /// Its status.
        status: u16,
        /// Its body, which is as long as its head says.
        body: String,
        /// From before the connection was made, where that had to be, until all of it was there.
        took_ns: u64,
    },
    /// None.
    Failure(String),
}

//! Counts of what was done; given to whoever connects to `--metrics-socket` ([`daxhund_vhost_user::metrics`]).

#![forbid(unsafe_code)]

use std::path::Path;

use daxhund_vhost_user::metrics::{Counter, MetricsSocketError, Server};

const PREFIX: &str = "daxhund_vhost_user_pmem";

/// Counters that only grow, from the daemon's start on.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests that were answered.
    pub requests: Counter,
    /// Those of them that failed.
    pub errors: Counter,
    /// Flushes of the host, each for all requests that waited.
    pub flushes: Counter,
    /// Frontends that have connected.
    pub sessions: Counter,
    /// Those of them that have mapped the memory.
    pub loans: Counter,
}

impl Metrics {
    /// Gives them on a socket.
    pub fn serve(&self, path: &Path) -> Result<Server, MetricsSocketError> {
        let counters = [
            ("requests", "Requests that were answered", &self.requests),
            ("errors", "Requests that failed", &self.errors),
            ("flushes", "Flushes of the host", &self.flushes),
            ("sessions", "Frontends that connected", &self.sessions),
            ("loans", "Frontends that mapped the memory", &self.loans),
        ];
        Server::open(path, PREFIX, &counters)
    }
}

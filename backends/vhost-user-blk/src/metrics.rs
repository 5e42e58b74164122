//! Counts of what was served; given to whoever connects to `--metrics-socket` ([`daxhund_vhost_user::metrics`]).

#![forbid(unsafe_code)]

use std::path::Path;

use daxhund_vhost_user::metrics::{Counter, MetricsSocketError, Server};

const PREFIX: &str = "daxhund_vhost_user_blk";

/// Counters that only grow, from the daemon's start on.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests that were answered.
    pub requests: Counter,
    /// Those of them that failed.
    pub errors: Counter,
    /// Bytes that were read from the disk.
    pub read_bytes: Counter,
    /// Bytes that were written to it.
    pub written_bytes: Counter,
    /// Flushes that were asked for and done.
    pub flushes: Counter,
    /// Frontends that have connected.
    pub sessions: Counter,
}

impl Metrics {
    /// Gives them on a socket.
    pub fn serve(&self, path: &Path) -> Result<Server, MetricsSocketError> {
        let counters = [
            ("requests", "Requests that were answered", &self.requests),
            ("errors", "Requests that failed", &self.errors),
            ("read_bytes", "Bytes read from the disk", &self.read_bytes),
            (
                "written_bytes",
                "Bytes written to the disk",
                &self.written_bytes,
            ),
            ("flushes", "Flushes that were done", &self.flushes),
            ("sessions", "Frontends that connected", &self.sessions),
        ];
        Server::open(path, PREFIX, &counters)
    }
}

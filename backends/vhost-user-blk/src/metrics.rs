//! Counts of what was served, as text of the `OpenMetrics` form on a unix socket: whoever connects gets it, then the end.
//!
//! ```text
//! socat - UNIX-CONNECT:/run/blk.metrics
//! ```
//! The text is far smaller than a socket's buffer: it is written at once or not at all, and nobody is waited for.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use daxhund_listen::{BindError, Place};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use thiserror::Error;

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

/// No socket to give them on.
#[derive(Debug, Error)]
#[error("--metrics-socket {}: can't listen there; give another path", path.display())]
pub struct MetricsSocketError {
    /// The path.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: BindError,
}

/// The socket, and what is given there.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    registry: Registry,
    /// The socket's file goes with it.
    _place: Place,
}

impl Server {
    /// Listens.
    pub fn open(path: &Path, metrics: &Arc<Metrics>) -> Result<Self, MetricsSocketError> {
        let failed = |source| MetricsSocketError {
            path: path.to_owned(),
            source,
        };
        let (listener, place) = daxhund_listen::bind(path).map_err(failed)?;
        listener
            .set_nonblocking(true)
            .map_err(|source| failed(source.into()))?;
        Ok(Self {
            listener,
            registry: registry(metrics),
            _place: place,
        })
    }

    /// Answers one that has connected, if somebody has.
    pub fn serve(&self) {
        if let Err(error) = self.answer()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::debug!(%error, "metrics can't be given");
        }
    }

    fn answer(&self) -> io::Result<()> {
        let (mut stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        let mut text = String::new();
        encode(&mut text, &self.registry).map_err(io::Error::other)?;
        stream.write_all(text.as_bytes())
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

fn registry(metrics: &Metrics) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let counters = [
        ("requests", "Requests that were answered", &metrics.requests),
        ("errors", "Requests that failed", &metrics.errors),
        (
            "read_bytes",
            "Bytes read from the disk",
            &metrics.read_bytes,
        ),
        (
            "written_bytes",
            "Bytes written to the disk",
            &metrics.written_bytes,
        ),
        ("flushes", "Flushes that were done", &metrics.flushes),
        ("sessions", "Frontends that connected", &metrics.sessions),
    ];
    for (name, help, counter) in counters {
        registry.register(name, help, counter.clone());
    }
    registry
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn whoever_connects_gets_the_counts_of_that_moment_and_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let metrics = Arc::new(Metrics::default());
        let server = Server::open(&path, &metrics).unwrap();
        server.serve();
        let ask = || {
            let mut stream = UnixStream::connect(&path).unwrap();
            server.serve();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        assert!(ask().contains("daxhund_vhost_user_blk_requests_total 0\n"));
        metrics.requests.inc_by(3);
        metrics.written_bytes.inc_by(1 << 40);
        let text = ask();
        assert!(
            text.contains("daxhund_vhost_user_blk_requests_total 3\n"),
            "{text}"
        );
        assert!(
            text.contains("daxhund_vhost_user_blk_written_bytes_total 1099511627776\n"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
        let taken = Server::open(&path, &metrics).unwrap_err();
        assert!(taken.to_string().contains("/metrics"), "{taken}");
        drop(server);
        assert!(!path.exists());
    }
}

//! Counts of what was served, as text of the `OpenMetrics` form on a unix socket: whoever connects gets it, then the end.
//!
//! ```text
//! socat - UNIX-CONNECT:PATH
//! ```
//! The text is far smaller than a socket's buffer: it is written at once or not at all, and nobody is waited for.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use daxhund_listen::{BindError, Place};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use thiserror::Error;

/// A counter that only grows, from the daemon's start on.
pub use prometheus_client::metrics::counter::Counter;

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
    /// Listens. Each counter has a name, which `prefix` comes before, and a description.
    pub fn open(
        path: &Path,
        prefix: &'static str,
        counters: &[(&'static str, &'static str, &Counter)],
    ) -> Result<Self, MetricsSocketError> {
        let failed = |source| MetricsSocketError {
            path: path.to_owned(),
            source,
        };
        let (listener, place) = daxhund_listen::bind(path).map_err(failed)?;
        listener
            .set_nonblocking(true)
            .map_err(|source| failed(source.into()))?;
        let mut registry = Registry::with_prefix(prefix);
        for (name, help, counter) in counters {
            registry.register(*name, *help, (*counter).clone());
        }
        Ok(Self {
            listener,
            registry,
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn whoever_connects_gets_the_counts_of_that_moment_and_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let (requests, written) = (Counter::default(), Counter::default());
        let counters = [
            ("requests", "Requests that were answered", &requests),
            ("written_bytes", "Bytes written", &written),
        ];
        let open = || Server::open(&path, "daxhund_test", &counters);
        let server = open().unwrap();
        server.serve();
        let ask = || {
            let mut stream = UnixStream::connect(&path).unwrap();
            server.serve();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        assert!(ask().contains("daxhund_test_requests_total 0\n"));
        requests.inc_by(3);
        written.inc_by(1 << 40);
        let text = ask();
        assert!(text.contains("daxhund_test_requests_total 3\n"), "{text}");
        assert!(
            text.contains("daxhund_test_written_bytes_total 1099511627776\n"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
        let taken = open().unwrap_err();
        assert!(taken.to_string().contains("/metrics"), "{taken}");
        drop(server);
        assert!(!path.exists());
    }
}

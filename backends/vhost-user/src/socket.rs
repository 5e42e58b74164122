//! The socket that frontends connect to: made at a path, or handed over by systemd.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use daxhund_listen::{BindError, Place};
use thiserror::Error;
use vhost::vhost_user::Listener;

/// There is nothing to listen on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another listens there.
    #[error("{} is in use: another process listens on it; end that one or give another --socket-path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A file, a directory or the like.
    #[error("{} exists and is not a socket; give a --socket-path that does not exist", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The kernel makes no socket there.
    #[error("cannot make the socket {}", path.display())]
    Make {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// systemd's descriptor is something else.
    #[error(
        "systemd handed over no listening unix stream socket (ListenStream= in the socket unit)"
    )]
    Handed(#[source] io::Error),
    /// Neither a path nor systemd.
    #[error("nowhere to listen: give --socket-path PATH, or start by a systemd socket unit")]
    Nowhere,
    /// Both.
    #[error(
        "systemd hands a socket over and --socket-path {} is given, too: leave one of them out",
        path.display()
    )]
    Both {
        /// The path.
        path: PathBuf,
    },
}

/// A listening socket that never blocks. Its path, if it was made here, goes with it.
pub struct Socket {
    listener: UnixListener,
    /// The same, as the vhost crate wants it.
    accepting: Listener,
    place: Option<Place>,
}

impl SocketError {
    fn of(path: &Path, error: BindError) -> Self {
        let path = path.to_owned();
        match error {
            BindError::InUse => Self::InUse { path },
            BindError::Exists => Self::Exists { path },
            BindError::Make(source) => Self::Make { path, source },
        }
    }
}

impl Socket {
    /// At the path, or the one that systemd hands over.
    pub fn open(path: Option<&Path>) -> Result<Self, SocketError> {
        match (path, daxhund_listen::of_systemd()) {
            (None, None) => Err(SocketError::Nowhere),
            (None, Some(handed)) => handed
                .and_then(|listener| Self::of(listener, None))
                .map_err(SocketError::Handed),
            (Some(path), None) => Self::at(path),
            (Some(path), Some(_)) => Err(SocketError::Both {
                path: path.to_owned(),
            }),
        }
    }

    fn at(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::of(path, error);
        let (listener, place) = daxhund_listen::bind(path).map_err(failed)?;
        Self::of(listener, Some(place)).map_err(|source| failed(source.into()))
    }

    fn of(listener: UnixListener, place: Option<Place>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            accepting: listener.try_clone()?.into(),
            listener,
            place,
        })
    }

    /// For the vhost crate, which accepts by itself. It never waits.
    pub fn accepting(&mut self) -> &mut Listener {
        &mut self.accepting
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("listener", &self.listener)
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn one_daemon_follows_another_but_pushes_nobody_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blk.sock");
        let first = Socket::at(&path).unwrap();
        assert!(matches!(Socket::at(&path), Err(SocketError::InUse { .. })));
        drop(first);
        assert!(!path.exists(), "it goes with its socket");
        // A daemon that was killed leaves its socket behind.
        drop(UnixListener::bind(&path).unwrap());
        drop(Socket::at(&path).unwrap());
        fs::write(&path, "mine").unwrap();
        assert!(matches!(Socket::at(&path), Err(SocketError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_path_where_nothing_can_be_made_is_named() {
        let error = Socket::at(Path::new("/nonexistent/blk.sock")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/blk.sock"));
        assert!(matches!(Socket::open(None), Err(SocketError::Nowhere)));
    }
}

//! The socket that frontends connect to: made at a path, or handed over by systemd.
//!
//! A socket that nobody listens on any more is replaced: one daemon comes after the other at the same path, and a VMM knows
//! no other. One that is listened on, and anything else that is there, stays.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

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

/// Where a socket is in the file system.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    made: (u64, u64),
}

impl Socket {
    /// At the path, or the one that systemd hands over.
    pub fn open(path: Option<&Path>) -> Result<Self, SocketError> {
        let mut handed = listenfd::ListenFd::from_env();
        match path {
            None if handed.len() == 0 => Err(SocketError::Nowhere),
            None => Self::handed(&mut handed),
            Some(path) if handed.len() == 0 => Self::at(path),
            Some(path) => Err(SocketError::Both {
                path: path.to_owned(),
            }),
        }
    }

    fn handed(handed: &mut listenfd::ListenFd) -> Result<Self, SocketError> {
        let none = || SocketError::Handed(io::ErrorKind::NotFound.into());
        let listener = handed.take_unix_listener(0).map_err(SocketError::Handed)?;
        let listener = listener.ok_or_else(none)?;
        Self::of(listener, None).map_err(SocketError::Handed)
    }

    fn at(path: &Path) -> Result<Self, SocketError> {
        let make = |source| SocketError::Make {
            path: path.to_owned(),
            source,
        };
        clear(path)?;
        let listener = UnixListener::bind(path).map_err(make)?;
        let metadata = fs::symlink_metadata(path).map_err(make)?;
        let place = Place {
            path: path.to_owned(),
            made: (metadata.dev(), metadata.ino()),
        };
        Self::of(listener, Some(place)).map_err(make)
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

/// Removes a socket that nobody listens on.
fn clear(path: &Path) -> Result<(), SocketError> {
    let make = |source| SocketError::Make {
        path: path.to_owned(),
        source,
    };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(make(error)),
    };
    let path = path.to_owned();
    if !metadata.file_type().is_socket() {
        return Err(SocketError::Exists { path });
    }
    match UnixStream::connect(&path) {
        Ok(_) => Err(SocketError::InUse { path }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(&path).map_err(make)
        }
        Err(error) => Err(make(error)),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let still =
            fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.made);
        if still && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket can't be removed");
        }
    }
}

#[cfg(test)]
mod tests {
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

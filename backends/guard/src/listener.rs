//! The daemon's socket: made at a path, or handed over by systemd.
//!
//! A socket that nobody listens on any more is replaced: one daemon comes after the other at the same path, and clients
//! know no other. One that is listened on, and anything else, stays.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Where the daemon listens when nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/daxhund/guard.sock";

/// There is nothing to listen on.
#[derive(Debug, Error)]
pub enum ListenError {
    /// A guard is there already.
    #[error("{} is in use: another guard listens on it; end that one or give another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A file, a directory or the like.
    #[error("{} exists and is not a socket; give a path that does not exist", path.display())]
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
}

/// A listening socket. Its path, if it was made here, goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    place: Option<Place>,
}

/// Where a socket is in the file system.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    made: (u64, u64),
}

impl Listener {
    /// Makes a socket at `path`, and its directory. Everybody may connect: what one may hold is proven by a descriptor.
    pub fn at(path: &Path) -> Result<Self, ListenError> {
        let make = |source| ListenError::Make {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            fs::create_dir_all(directory).map_err(make)?;
        }
        clear(path)?;
        let socket = UnixListener::bind(path).map_err(make)?;
        let metadata = fs::symlink_metadata(path).map_err(make)?;
        let place = Place {
            path: path.to_owned(),
            made: (metadata.dev(), metadata.ino()),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(make)?;
        socket.set_nonblocking(true).map_err(make)?;
        Ok(Self {
            socket,
            place: Some(place),
        })
    }

    /// Takes the one that systemd hands over; `None` without systemd's variables.
    pub fn of_systemd() -> Result<Option<Self>, ListenError> {
        let mut handed = listenfd::ListenFd::from_env();
        if handed.len() == 0 {
            return Ok(None);
        }
        let socket = handed.take_unix_listener(0).map_err(ListenError::Handed)?;
        let none = || ListenError::Handed(io::ErrorKind::NotFound.into());
        let socket = socket.ok_or_else(none)?;
        socket.set_nonblocking(true).map_err(ListenError::Handed)?;
        Ok(Some(Self {
            socket,
            place: None,
        }))
    }

    pub(crate) fn into_parts(self) -> (UnixListener, Option<Place>) {
        (self.socket, self.place)
    }
}

/// Removes a socket that nobody listens on.
fn clear(path: &Path) -> Result<(), ListenError> {
    let make = |source| ListenError::Make {
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
        return Err(ListenError::Exists { path });
    }
    match UnixStream::connect(&path) {
        Ok(_) => Err(ListenError::InUse { path }),
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
            tracing::warn!(path = %self.path.display(), %error, "the guard's socket can't be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_guard_follows_another_but_pushes_nobody_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/guard.sock");
        let first = Listener::at(&path).unwrap();
        assert!(matches!(
            Listener::at(&path),
            Err(ListenError::InUse { .. })
        ));
        let (socket, place) = first.into_parts();
        drop(socket);
        // Killed: its file is left.
        std::mem::forget(place);
        let second = Listener::at(&path).unwrap();
        drop(second);
        assert!(!path.exists(), "its file goes with it");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(
            Listener::at(&path),
            Err(ListenError::Exists { .. })
        ));
    }
}

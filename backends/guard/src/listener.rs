//! The daemon's socket: made at a path, or handed over by systemd.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use daxhund_listen::{BindError, Place};
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

impl ListenError {
    fn of(path: &Path, error: BindError) -> Self {
        let path = path.to_owned();
        match error {
            BindError::InUse => Self::InUse { path },
            BindError::Exists => Self::Exists { path },
            BindError::Make(source) => Self::Make { path, source },
        }
    }
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
        let (socket, place) =
            daxhund_listen::bind(path).map_err(|error| ListenError::of(path, error))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(make)?;
        socket.set_nonblocking(true).map_err(make)?;
        Ok(Self {
            socket,
            place: Some(place),
        })
    }

    /// Takes the one that systemd hands over; `None` without systemd's variables.
    pub fn of_systemd() -> Result<Option<Self>, ListenError> {
        let Some(socket) = daxhund_listen::of_systemd() else {
            return Ok(None);
        };
        let socket = socket.map_err(ListenError::Handed)?;
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

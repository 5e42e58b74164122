//! `vhost_user=on,socket=PATH`: a device that a vhost-user backend serves.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::MAX_SOCKET_PATH;

/// Who of the two listens at the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VhostMode {
    /// The backend; this side connects.
    #[default]
    Client,
    /// This side; the backend connects.
    Server,
}

impl VhostMode {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(super) fn is_client(&self) -> bool {
        *self == Self::Client
    }
}

/// Words about who serves a device that make no sense.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BackendError {
    /// A backend without a place to find it.
    #[error("{device}: vhost_user=on has no socket: give socket=PATH, where the backend listens")]
    NoSocket {
        /// The device.
        device: String,
    },
    /// The path is the empty text.
    #[error("{device}: socket= is empty: give socket=PATH, where the backend listens")]
    EmptySocket {
        /// The device.
        device: String,
    },
    /// The path does not fit a socket address.
    #[error(
        "{device}: socket={} has {} bytes, a socket's path can have {MAX_SOCKET_PATH}; give a shorter one",
        socket.display(), socket.as_os_str().len()
    )]
    SocketTooLong {
        /// The device.
        device: String,
        /// The path given.
        socket: PathBuf,
    },
    /// A socket that is for nothing.
    #[error("{device}: socket={} is where a vhost-user backend listens; give vhost_user=on as well, or leave it out", socket.display())]
    SocketAlone {
        /// The device.
        device: String,
        /// The socket given.
        socket: PathBuf,
    },
    /// A mode of nothing.
    #[error(
        "{device}: vhost_mode=server is for a device that a vhost-user backend serves; give vhost_user=on,socket=PATH as well, or \
         leave it out"
    )]
    ServerAlone {
        /// The device.
        device: String,
    },
    /// What the backend has to be told, not this process.
    #[error(
        "{device}: {key}= says nothing about a {what} that a vhost-user backend serves; tell the backend, and leave it out"
    )]
    NotOfBackend {
        /// The device.
        device: String,
        /// What it is.
        what: &'static str,
        /// The key given.
        key: &'static str,
    },
}

/// Checks where a backend listens.
pub(super) fn path(device: &str, socket: &Path) -> Result<PathBuf, BackendError> {
    let (device, socket) = (device.to_owned(), socket.to_owned());
    match socket.as_os_str().len() {
        0 => Err(BackendError::EmptySocket { device }),
        length if length > MAX_SOCKET_PATH => Err(BackendError::SocketTooLong { device, socket }),
        _ => Ok(socket),
    }
}

/// Where a backend listens, if one serves the device, a `what`. `told`: keys that only this process could heed, and whether they
/// were given.
pub(super) fn socket(
    (device, what): (&str, &'static str),
    vhost_user: bool,
    socket: Option<&Path>,
    told: impl IntoIterator<Item = (&'static str, bool)>,
) -> Result<Option<PathBuf>, BackendError> {
    let device = device.to_owned();
    let given = socket.filter(|socket| !socket.as_os_str().is_empty());
    match (vhost_user, given.map(Path::to_owned)) {
        (false, None) => Ok(None),
        (true, None) => Err(BackendError::NoSocket { device }),
        (false, Some(socket)) => Err(BackendError::SocketAlone { device, socket }),
        (true, Some(socket)) => match told.into_iter().find(|(_, told)| *told) {
            Some((key, _)) => Err(BackendError::NotOfBackend { device, what, key }),
            None => Ok(Some(socket)),
        },
    }
}

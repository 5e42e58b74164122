//! The unix socket that a daemon listens at: made at a path, or handed over by systemd.
//!
//! A socket that nobody listens on any more is replaced: one daemon comes after the other at the same path, and those that
//! connect know no other. One that is listened on, and anything else that is there, stays. At the end a socket's file is removed
//! if it is still the one that was made.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

/// No socket can be made at a path. What mends it is the daemon's to say.
#[derive(Debug, Error)]
pub enum BindError {
    /// Somebody listens there.
    #[error("a process listens there")]
    InUse,
    /// A file, a directory or the like.
    #[error("something is there that is not a socket")]
    Exists,
    /// The kernel makes none.
    #[error(transparent)]
    Make(#[from] io::Error),
}

/// Where a socket is in the file system. Dropped, it takes the socket's file with it.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    /// Device and inode: somebody may put another file there.
    made: (u64, u64),
}

impl Place {
    /// That of a socket that was made just now.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            made: identity(path)?,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let still = identity(&self.path).is_ok_and(|now| now == self.made);
        if still && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket can't be removed");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Makes a socket that listens at a path.
pub fn bind(path: &Path) -> Result<(UnixListener, Place), BindError> {
    clear(path)?;
    let listener = UnixListener::bind(path)?;
    Ok((listener, Place::of(path)?))
}

/// Removes a socket that nobody listens on.
fn clear(path: &Path) -> Result<(), BindError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::Exists);
    }
    // Never waits: one whose backlog is full is in use.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
    match probe.and_then(|probe| connect(probe, &address)) {
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::InUse),
        Err(Errno::CONNREFUSED) => Ok(fs::remove_file(path)?),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// The socket that systemd hands over; `None` without systemd's variables.
pub fn of_systemd() -> Option<io::Result<UnixListener>> {
    let mut handed = listenfd::ListenFd::from_env();
    if handed.len() == 0 {
        return None;
    }
    let listener = handed.take_unix_listener(0).transpose();
    Some(listener.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into())))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn nonblocking(path: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::NONBLOCK;
        let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&client, &SocketAddrUnix::new(path)?)?;
        Ok(client)
    }

    #[test]
    fn what_is_left_over_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let (listener, place) = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::InUse)));
        // As long as it does not accept, and there is no room for one more: for fewer than this process may have descriptors.
        rustix::net::listen(&listener, 3).unwrap();
        let mut clients = Vec::new();
        while let Ok(client) = nonblocking(&path) {
            clients.push(client);
        }
        assert!(matches!(bind(&path), Err(BindError::InUse)));
        drop(listener);
        // Killed: its file is left.
        std::mem::forget(place);
        let second = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(second);
        assert!(matches!(bind(&path), Err(BindError::Exists)));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        drop(bind(&path).unwrap());
        assert!(!path.exists(), "its file goes with it");
        let nowhere = bind(Path::new("/nonexistent/a.sock"));
        assert!(matches!(nowhere, Err(BindError::Make(_))));
    }
}

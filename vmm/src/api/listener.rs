//! The socket clients connect to: made at a path, or handed over by whoever started the process.
//!
//! Invariants:
//! - A socket at a path is its owner's only (mode 0600) from its first moment on.
//! - What is at the path already is never removed: it may be another VMM's. At the end the socket is removed if it is
//!   still the one that was made.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use daxhund_listen::Place;
use rustix::fs::{FileType, Mode, fchmod, lstat};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use thiserror::Error;

/// Connections the kernel holds until they are accepted.
const BACKLOG: i32 = 64;

/// There is nothing to listen on.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The path can't be the address of a socket.
    #[error(
        "{} can't be a socket's path: it has {} bytes, the kernel takes 1 to 108 without a NUL; give a shorter one",
        path.display(), path.as_os_str().len()
    )]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// A process listens there.
    #[error(
        "{} is in use: a process listens on it; end that one or give another path",
        path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A socket without a process.
    #[error(
        "{} is left over from a process that has ended: nothing listens on it; remove it with `rm {}`",
        path.display(), path.display()
    )]
    LeftOver {
        /// The path.
        path: PathBuf,
    },
    /// A file, a directory or the like.
    #[error(
        "{} exists and is not a socket; give a path that does not exist",
        path.display()
    )]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The kernel makes no socket there.
    #[error("can't make the socket {}", path.display())]
    Make {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The descriptor is something else.
    #[error("the descriptor is {what}; give a unix stream socket that is listening already")]
    NotListening {
        /// What it is.
        what: &'static str,
    },
    /// The descriptor can't be looked at or set up.
    #[error("the descriptor can't be listened on")]
    Descriptor(#[source] io::Error),
}

/// A listening socket. Its path, if it has one, goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    place: Option<Place>,
}

impl Listener {
    /// Makes a socket at `path`, where there must be nothing.
    pub fn at(path: &Path) -> Result<Self, ListenError> {
        let make = |errno: Errno| ListenError::Make {
            path: path.to_owned(),
            source: errno.into(),
        };
        if path.as_os_str().is_empty() {
            return Err(ListenError::Path {
                path: path.to_owned(),
            });
        }
        let address = SocketAddrUnix::new(path).map_err(|_| ListenError::Path {
            path: path.to_owned(),
        })?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(make)?;
        // A socket's file takes the mode the socket has when it is bound.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(make)?;
        match bind(&socket, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => return Err(occupied(path, &address)),
            Err(errno) => return Err(make(errno)),
        }
        // Removed again when it can't be listened on.
        let place = Place::of(path).map_err(|source| ListenError::Make {
            path: path.to_owned(),
            source,
        })?;
        listen(&socket, BACKLOG).map_err(make)?;
        Ok(Self {
            socket: UnixListener::from(socket),
            place: Some(place),
        })
    }

    /// Takes a socket that listens already.
    pub fn inherited(descriptor: OwnedFd) -> Result<Self, ListenError> {
        let not = |what| Err(ListenError::NotListening { what });
        match socket_domain(&descriptor) {
            Ok(AddressFamily::UNIX) => {}
            Ok(_) => return not("a socket of another family"),
            Err(Errno::NOTSOCK) => return not("no socket"),
            Err(errno) => return Err(ListenError::Descriptor(errno.into())),
        }
        let failed = |errno: Errno| ListenError::Descriptor(errno.into());
        if socket_type(&descriptor).map_err(failed)? != SocketType::STREAM {
            return not("a unix socket, but not a stream");
        }
        if !socket_acceptconn(&descriptor).map_err(failed)? {
            return not("a unix stream socket, but not listening");
        }
        let socket = UnixListener::from(descriptor);
        socket
            .set_nonblocking(true)
            .map_err(ListenError::Descriptor)?;
        Ok(Self {
            socket,
            place: None,
        })
    }

    pub(super) fn into_parts(self) -> (UnixListener, Option<Place>) {
        (self.socket, self.place)
    }
}

/// What it is that is there already.
fn occupied(path: &Path, address: &SocketAddrUnix) -> ListenError {
    let path = path.to_owned();
    let is_socket =
        lstat(&path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
    if !is_socket {
        return ListenError::Exists { path };
    }
    let probe = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        // A listener whose backlog is full must not hold this up.
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    );
    match probe.and_then(|probe| connect(probe, address)) {
        Err(Errno::CONNREFUSED) => ListenError::LeftOver { path },
        _ => ListenError::InUse { path },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    fn refused(path: &Path) -> String {
        Listener::at(path).unwrap_err().to_string()
    }

    #[test]
    fn the_socket_is_its_owners_only_and_goes_with_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = Listener::at(&path).unwrap();
        assert_eq!(path.symlink_metadata().unwrap().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_there_already_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = Listener::at(&path).unwrap();
        assert!(refused(&path).contains("a process listens on it"));
        // Its file stays when only the descriptor is closed.
        let (socket, place) = listener.into_parts();
        drop(socket);
        let words = refused(&path);
        assert!(words.contains(&format!("`rm {}`", path.display())));
        drop(place);
        assert!(!path.exists());

        std::fs::write(&path, "a file").unwrap();
        assert!(refused(&path).contains("is not a socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a file");
        let link = folder.path().join("link");
        symlink(folder.path().join("nowhere"), &link).unwrap();
        assert!(refused(&link).contains("is not a socket"));
    }

    #[test]
    fn a_socket_that_took_the_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let first = Listener::at(&path).unwrap();
        // A rename keeps the first inode alive, so its number is not used again.
        std::fs::rename(&path, folder.path().join("moved")).unwrap();
        let second = Listener::at(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn paths_no_socket_can_have() {
        let folder = tempfile::tempdir().unwrap();
        for path in [
            PathBuf::new(),
            folder.path().join("x".repeat(120)),
            PathBuf::from("/tmp/nul\0byte"),
        ] {
            let error = Listener::at(&path).unwrap_err();
            assert!(matches!(error, ListenError::Path { .. }), "{error}");
        }
        let error = Listener::at(&folder.path().join("no/such/folder")).unwrap_err();
        assert!(matches!(error, ListenError::Make { .. }), "{error}");
    }

    #[test]
    fn only_a_listening_unix_stream_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let theirs = UnixListener::bind(&path).unwrap();
        let (_socket, place) = Listener::inherited(theirs.into()).unwrap().into_parts();
        assert!(place.is_none(), "its path is not ours to remove");

        let words = |descriptor| Listener::inherited(descriptor).unwrap_err().to_string();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(words(file.into()).contains("no socket"));
        let (stream, _peer) = UnixStream::pair().unwrap();
        assert!(words(stream.into()).contains("not listening"));
        let datagram = UnixDatagram::unbound().unwrap();
        assert!(words(datagram.into()).contains("not a stream"));
        let internet = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(words(internet.into()).contains("another family"));
    }
}

//! Where this side and a backend meet: a socket at which one of the two listens and the other connects.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use daxhund_listen::{BindError, Place};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

/// Who listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The backend: it has to be there.
    Client,
    /// This side. What the device can is the backend's to say, so nobody has the device before one has connected.
    Server {
        /// How long the first one is waited for.
        patience: Duration,
    },
}

/// This side can't listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another listens there.
    #[error("{} is in use: another process listens on it; end that one or give another socket=", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A file, a directory or the like.
    #[error("{} exists and is not a socket; give a socket= that does not exist", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The kernel makes no socket there.
    #[error("can't make the socket {}: is there such a directory, and may this user write to it?", path.display())]
    Make {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A socket that backends connect to. One that connects while another serves waits for its turn. Dropped, it takes the socket's
/// file with it.
#[derive(Debug)]
pub(super) struct Listening {
    listener: UnixListener,
    _place: Place,
}

impl Listening {
    pub(super) fn at(path: &Path) -> Result<Self, ListenError> {
        let failed = |error| {
            let path = path.to_owned();
            match error {
                BindError::InUse => ListenError::InUse { path },
                BindError::Exists => ListenError::Exists { path },
                BindError::Make(source) => ListenError::Make { path, source },
            }
        };
        let (listener, place) = daxhund_listen::bind(path).map_err(failed)?;
        let ready = listener.set_nonblocking(true);
        ready.map_err(|source| failed(source.into()))?;
        Ok(Self {
            listener,
            _place: place,
        })
    }

    /// The backend that has waited longest; `None`: none waits.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for a backend, until `end` at most or until `told` is readable.
    pub(super) fn wait(&self, end: Instant, told: BorrowedFd<'_>) -> io::Result<Waited> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(told, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&left)) {
                // A terminal has got another size, for one. What ends the wait is readable.
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) if !fds[1].revents().is_empty() => return Ok(Waited::Ended),
                Ok(0) => return Ok(Waited::Nobody),
                Ok(_) => return Ok(Waited::Somebody),
            }
        }
    }
}

/// What came of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    /// Somebody has connected.
    Somebody,
    /// Nobody has in time.
    Nobody,
    /// It was to end before.
    Ended,
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Connects to a socket, at once or not at all.
pub(super) fn dial(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    // A backlog that is full is an error instead of a wait.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

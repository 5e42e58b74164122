//! The fanotify group: everybody who opens a watched file waits in the kernel until the guard has answered.
//!
//! The group is opened with `O_WRONLY` for the files of its events: the kernel opens the file anew for each event, and
//! what the guard watches can only be written. Marks are on inodes and so hold for every path and mount by which this
//! superblock of sysfs is reached, and for no other mount of sysfs.
//!
//! Closing the group lets everybody through who waits: its owner must not be the process that it protects.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags,
    Response,
};
use thiserror::Error;

/// Why there is no group.
#[derive(Debug, Error)]
pub enum GroupError {
    /// Without privilege.
    #[error(
        "holding removals needs the capability CAP_SYS_ADMIN in the first user namespace: start the guard as root, or by \
         its systemd unit (`systemctl enable --now daxhund-guardd.socket`)"
    )]
    Forbidden,
    /// The kernel has no permission events.
    #[error(
        "the kernel can't hold the opening of files: it needs CONFIG_FANOTIFY_ACCESS_PERMISSIONS"
    )]
    Unsupported,
    /// Something else.
    #[error("cannot make a fanotify group")]
    Make(#[source] io::Error),
}

/// A file can't be watched.
#[derive(Debug, Error)]
#[error("cannot watch {}", path.display())]
pub(crate) struct MarkError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Names a file whatever the path by which it is reached.
pub(crate) type Inode = (u64, u64);

/// Somebody who opens a watched file and waits for the answer.
#[derive(Debug)]
pub(crate) struct Opening {
    /// `None` in tests.
    event: Option<FanotifyEvent>,
    /// The thread that waits; 0 in another PID namespace.
    pub(crate) thread: u32,
    pub(crate) inode: Inode,
    /// The file by the path that was used.
    pub(crate) path: PathBuf,
}

/// What the server needs of the group, so that a test can be the kernel.
pub(crate) trait Gate: AsRawFd {
    /// Watches a file from now on. Again is harmless.
    fn watch(&self, path: &Path) -> Result<Inode, MarkError>;
    /// Watches nothing any more. Who waits already goes on waiting.
    fn watch_nothing(&self) -> io::Result<()>;
    /// Takes those who have come. An error is an opener that the kernel has turned away already, because its file is
    /// gone.
    fn read(&self) -> io::Result<Vec<Opening>>;
    /// Answers one that waits. It may be gone: the kernel then only forgets it.
    fn answer(&self, opening: &Opening, pass: bool) -> io::Result<()>;
}

/// The group.
#[derive(Debug)]
pub(crate) struct Group(Fanotify);

impl Group {
    pub(crate) fn new() -> Result<Self, GroupError> {
        let flags = InitFlags::FAN_CLASS_CONTENT
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS
            | InitFlags::FAN_REPORT_TID;
        let files = EventFFlags::O_WRONLY | EventFFlags::O_CLOEXEC;
        Fanotify::init(flags, files)
            .map(Self)
            .map_err(|errno| match errno {
                Errno::EPERM => GroupError::Forbidden,
                Errno::ENOSYS | Errno::EINVAL => GroupError::Unsupported,
                errno => GroupError::Make(errno.into()),
            })
    }
}

impl Gate for Group {
    fn watch(&self, path: &Path) -> Result<Inode, MarkError> {
        let failed = |source| MarkError {
            path: path.to_owned(),
            source,
        };
        self.0
            .mark(
                MarkFlags::FAN_MARK_ADD,
                MaskFlags::FAN_OPEN_PERM,
                rustix::fs::CWD,
                Some(path),
            )
            .map_err(|errno| failed(errno.into()))?;
        let metadata = std::fs::metadata(path).map_err(failed)?;
        Ok((metadata.dev(), metadata.ino()))
    }

    fn watch_nothing(&self) -> io::Result<()> {
        let nothing = MaskFlags::empty();
        let path: Option<&Path> = None;
        self.0
            .mark(MarkFlags::FAN_MARK_FLUSH, nothing, rustix::fs::CWD, path)
            .map_err(io::Error::from)
    }

    fn read(&self) -> io::Result<Vec<Opening>> {
        let events = match self.0.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        Ok(events.into_iter().filter_map(opening).collect())
    }

    fn answer(&self, opening: &Opening, pass: bool) -> io::Result<()> {
        let Some(fd) = opening.event.as_ref().and_then(FanotifyEvent::fd) else {
            return Ok(());
        };
        let response = if pass {
            Response::FAN_ALLOW
        } else {
            Response::FAN_DENY
        };
        self.0
            .write_response(FanotifyResponse::new(fd, response))
            .map_err(io::Error::from)
    }
}

#[cfg(test)]
impl Opening {
    pub(crate) fn pretended(thread: u32, inode: Inode, path: PathBuf) -> Self {
        Self {
            event: None,
            thread,
            inode,
            path,
        }
    }
}

/// `None` for a word of the kernel about its queue, which is not limited.
fn opening(event: FanotifyEvent) -> Option<Opening> {
    let fd = event.fd()?;
    let number = fd.as_raw_fd();
    // An event whose file says nothing of itself is one of no file that is watched; it is answered all the same.
    let inode = rustix::fs::fstat(fd).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino));
    let path = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
    Some(Opening {
        thread: u32::try_from(event.pid()).unwrap_or(0),
        event: Some(event),
        inode,
        path,
    })
}

impl AsRawFd for Group {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

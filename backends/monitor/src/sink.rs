//! Where events go: a descriptor that never blocks.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, ftruncate, open};
use rustix::io::{Errno, write};

#[derive(Debug)]
pub(super) struct Sink(OwnedFd);

/// What became of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It is written.
    All,
    /// The owner ended the wait for a reader.
    Ended,
}

/// Ends a wait; for good.
#[derive(Debug)]
pub(super) struct Wake(OwnedFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    pub(super) fn wake(&self) {
        // Only a full counter gives an error, and then it is readable anyway.
        let _ = write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl Sink {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        // Open for both, a FIFO needs no reader: this process could be one. For a file it makes no difference.
        let file = open(path, flags | OFlags::RDWR, mode)?;
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile => ftruncate(&file, 0)?,
            FileType::Fifo | FileType::CharacterDevice => {}
            // Above all a disk, whose contents are somebody's.
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "it is neither a FIFO nor a file; give one of them, or a path that does not exist",
                ));
            }
        }
        Ok(Self(file))
    }

    /// Fails with `EBADF` when it is open for reading only.
    pub(super) fn of(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&descriptor)?;
        if flags & OFlags::RWMODE == OFlags::RDONLY {
            return Err(Errno::BADF.into());
        }
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        Ok(Self(descriptor))
    }

    /// Writes all of `bytes`, waiting for a reader as long as `end` is not woken.
    pub(super) fn write(&mut self, mut bytes: &[u8], end: &Wake) -> io::Result<Written> {
        while !bytes.is_empty() {
            match write(&self.0, bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut fds = [
                        PollFd::new(&self.0, PollFlags::OUT),
                        PollFd::new(&end.0, PollFlags::IN),
                    ];
                    match poll(&mut fds, None) {
                        Ok(_) if !fds[1].revents().is_empty() => return Ok(Written::Ended),
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Written::All)
    }
}

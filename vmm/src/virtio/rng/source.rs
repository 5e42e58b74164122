//! Where random numbers come from: a character device, a FIFO, a file.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use thiserror::Error;
use tracing::warn;

/// A source of random numbers can't be used.
#[derive(Debug, Error)]
pub enum OpenRngError {
    /// Nothing is there.
    #[error(
        "there is no {} to take random numbers from; `--rng src=/dev/urandom` is what fits most",
        path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// It gives no bytes.
    #[error(
        "{} is {what}, which gives no random numbers; name a character device like /dev/urandom, a FIFO or a file",
        path.display()
    )]
    WrongKind {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It may not be read.
    #[error(
        "{} may not be read by this user; change its permissions or choose another source, like /dev/urandom",
        path.display()
    )]
    Forbidden {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("random numbers can't be read from {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// An open source.
#[derive(Debug)]
pub(super) struct Source {
    path: PathBuf,
    file: File,
    is_fifo: bool,
    /// An error or the end was said already; once is enough.
    said: bool,
}

/// What reading gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Got {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing yet.
    Later,
    /// An error. It may be better later.
    Failed,
    /// Nothing any more.
    Ended,
}

impl Source {
    /// Opens it so that reading never waits.
    pub(super) fn open(path: PathBuf) -> Result<Self, OpenRngError> {
        let file = match open(&path) {
            Ok(file) => file,
            Err(error) => {
                return Err(match error.kind() {
                    ErrorKind::NotFound => OpenRngError::Missing { path },
                    ErrorKind::PermissionDenied => OpenRngError::Forbidden {
                        path,
                        source: error,
                    },
                    // What opening a socket gives.
                    _ if error.raw_os_error() == Some(libc::ENXIO) => OpenRngError::WrongKind {
                        path,
                        what: "a socket or a device without a driver",
                    },
                    _ => OpenRngError::Open {
                        path,
                        source: error,
                    },
                });
            }
        };
        let kind = match rustix::fs::fstat(&file) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
            Err(error) => {
                return Err(OpenRngError::Open {
                    path,
                    source: error.into(),
                });
            }
        };
        let wrong = match kind {
            FileType::Directory => Some("a directory"),
            FileType::BlockDevice => Some("a block device"),
            _ => None,
        };
        if let Some(what) = wrong {
            return Err(OpenRngError::WrongKind { path, what });
        }
        Ok(Self {
            path,
            file,
            is_fifo: kind == FileType::Fifo,
            said: false,
        })
    }

    /// To wait on, after [`Got::Later`]. Another one after each read: take it out of the event loop before reading.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Reads what there is.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Got {
        match self.file.read(buffer) {
            Ok(0) => self.at_end(),
            Ok(n) => {
                self.said = false;
                Got::Bytes(n)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Got::Later
            }
            Err(error) => {
                self.say_once(&error);
                Got::Failed
            }
        }
    }

    /// A FIFO whose writer has gone gets the next one: opened again, it can be waited on without a writer.
    fn at_end(&mut self) -> Got {
        let again = if self.is_fifo {
            open(Path::new(&format!("/proc/self/fd/{}", self.fd())))
        } else {
            Err(ErrorKind::UnexpectedEof.into())
        };
        match again {
            Ok(file) => {
                self.file = file;
                Got::Later
            }
            Err(error) => {
                self.say_once(&error);
                Got::Ended
            }
        }
    }

    fn say_once(&mut self, error: &io::Error) {
        if !self.said {
            self.said = true;
            warn!(path = %self.path.display(), %error, "the guest gets no random numbers from here");
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

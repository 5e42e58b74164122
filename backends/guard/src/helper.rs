//! A guard of one process's own: for a VMM that may do it itself, where no daemon runs.
//!
//! The helper is a program of its own in a session of its own: it lives on when the VMM is killed, because it is then
//! that removals have to wait for what the VMM has lent. It ends by itself when nothing is held and nobody waits.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use thiserror::Error;

/// The helper could not be started.
#[derive(Debug, Error)]
#[error("cannot start the removal guard `{}`", program.display())]
pub struct SpawnError {
    /// The program.
    pub program: PathBuf,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// A helper that was started. [`crate::Guard::of_helper`] talks to it.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    stream: Option<UnixStream>,
}

impl Helper {
    /// Runs `program ARGS... --fd 0`, whose standard input is the connection, and which is to call
    /// [`crate::serve_inherited`]. Its log goes to this process's standard error, until this process has ended.
    pub fn spawn<A: AsRef<OsStr>>(
        program: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Self, SpawnError> {
        let failed = |source| SpawnError {
            program: program.to_owned(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let child = Command::new(program)
            .args(args)
            .args(["--fd", "0"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed)?;
        Ok(Self {
            child,
            stream: Some(ours),
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn take_stream(&mut self) -> Option<UnixStream> {
        self.stream.take()
    }
}

/// In the helper: the connection that [`Helper::spawn`] made its standard input, for [`crate::serve_inherited`].
pub fn connection_of_helper() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Ends by itself, when its time has come; this only takes the exit status of one that has.
        drop(self.stream.take());
        drop(self.child.try_wait());
    }
}

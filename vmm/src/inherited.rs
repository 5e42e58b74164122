//! File descriptors that whoever started the process left open for it: `fd=N` on the command line.
//!
//! Every descriptor the process opens itself is close-on-exec, and one that came through an exec can't be: so the flag
//! tells the two apart, and setting it when a descriptor is taken makes a second taking of the same number an error.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use thiserror::Error;

/// Standard input, output and error are not handed over.
const FIRST: RawFd = 3;

/// Looking at the flag and setting it is one step.
static TAKING: Mutex<()> = Mutex::new(());

/// A number that is no inherited descriptor.
#[derive(Debug, Error)]
pub enum InheritedError {
    /// Standard input, output or error, or a negative number.
    #[error("fd={fd} can't be used: give the number of a descriptor from {FIRST} on")]
    Reserved {
        /// The number.
        fd: RawFd,
    },
    /// Nothing is open there.
    #[error(
        "fd={fd} is not open: whoever starts daxhund opens it and leaves it open over the exec (no close-on-exec)"
    )]
    NotOpen {
        /// The number.
        fd: RawFd,
    },
    /// It belongs to the process already.
    #[error(
        "fd={fd} was not handed over from outside, or is used twice; give a descriptor of its own to each use"
    )]
    NotInherited {
        /// The number.
        fd: RawFd,
    },
    /// The flags can't be read or set.
    #[error("fd={fd} can't be taken over")]
    Flags {
        /// The number.
        fd: RawFd,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Takes over descriptor `fd`: from here on it is closed with its owner and at an exec.
pub fn take(fd: RawFd) -> Result<OwnedFd, InheritedError> {
    if fd < FIRST {
        return Err(InheritedError::Reserved { fd });
    }
    let _one_at_a_time = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let flags = |errno: Errno| match errno {
        Errno::BADF => InheritedError::NotOpen { fd },
        errno => InheritedError::Flags {
            fd,
            source: errno.into(),
        },
    };
    // SAFETY: the borrow ends with this function, and is used for system calls that fail when nothing is open there.
    // Nothing of this process closes it meanwhile when it is an inherited one, and when it is not it is only looked at.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let before = fcntl_getfd(borrowed).map_err(flags)?;
    if before.contains(FdFlags::CLOEXEC) {
        return Err(InheritedError::NotInherited { fd });
    }
    fcntl_setfd(borrowed, before | FdFlags::CLOEXEC).map_err(flags)?;
    // SAFETY: it is open, and it has no other owner here: what this process opens is close-on-exec from the start, and
    // what was taken before is since then.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

    use super::*;

    /// A descriptor as one that came over an exec.
    pub(crate) fn leave_open(fd: impl AsFd) -> RawFd {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, FIRST).unwrap();
        fcntl_setfd(&copy, FdFlags::empty()).unwrap();
        copy.into_raw_fd()
    }

    #[test]
    fn an_inherited_descriptor_is_taken_once() {
        let (read, _write) = io::pipe().unwrap();
        let fd = leave_open(&read);
        let taken = take(fd).unwrap();
        assert_eq!(taken.as_raw_fd(), fd);
        assert!(fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        let error = take(fd).unwrap_err();
        assert!(matches!(error, InheritedError::NotInherited { .. }));
        assert!(error.to_string().contains("used twice"), "{error}");
    }

    #[test]
    fn what_was_not_handed_over_stays_where_it_is() {
        let (read, _write) = io::pipe().unwrap();
        let error = take(read.as_raw_fd()).unwrap_err();
        assert!(matches!(error, InheritedError::NotInherited { .. }));
        for fd in [-1, 0, 2, RawFd::MIN] {
            assert!(matches!(take(fd), Err(InheritedError::Reserved { .. })));
        }
        let error = take(RawFd::MAX).unwrap_err();
        assert!(matches!(error, InheritedError::NotOpen { .. }));
        assert!(error.to_string().contains("is not open"), "{error}");
    }
}

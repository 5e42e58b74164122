//! Open-file-description byte-range locks: the two `fcntl` calls that no safe wrapper offers.
//!
//! These locks belong to the open file description, not to the process: closing another descriptor of the same
//! device does not drop them, and threads share them. They are advisory, and they live in the inode: two nodes made
//! for one device number have separate locks.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A lock request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Write,
    Read,
    Unlock,
}

/// A byte range as the kernel has it: whole bytes, of any file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    /// Zero means "to the end of the file, wherever that will be".
    pub(crate) len: u64,
}

/// Takes or releases a lock without waiting.
pub(crate) fn set(file: &File, request: Request, span: Span) -> io::Result<()> {
    let mut lock = flock(request, span)?;
    fcntl(file, libc::F_OFD_SETLK, &mut lock)
}

/// True when an error of [`set`] means that somebody else holds a part of the range.
pub(crate) fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// One lock of another open file description that stands in the way of `request`.
pub(crate) fn conflict(file: &File, request: Request, span: Span) -> io::Result<Option<Span>> {
    let mut lock = flock(request, span)?;
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    if lock.l_type == lock_type(Request::Unlock) {
        return Ok(None);
    }
    let unsigned = |value: libc::off_t| u64::try_from(value).unwrap_or(0);
    Ok(Some(Span {
        offset: unsigned(lock.l_start),
        len: unsigned(lock.l_len),
    }))
}

fn fcntl(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open because `file` is borrowed, and both commands read and write exactly one
    // `struct flock`, which `lock` points at for the whole call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn flock(request: Request, span: Span) -> io::Result<libc::flock> {
    let too_big = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    // SAFETY: `flock` consists of integers, for which zero is a value; l_pid must be zero for these commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = lock_type(request);
    lock.l_whence = 0; // SEEK_SET
    lock.l_start = span.offset.try_into().map_err(too_big)?;
    lock.l_len = span.len.try_into().map_err(too_big)?;
    Ok(lock)
}

fn lock_type(request: Request) -> libc::c_short {
    // The constants are 0, 1 and 2; libc types them differently from the field on some targets.
    #[allow(clippy::cast_possible_truncation)]
    let value = match request {
        Request::Write => libc::F_WRLCK as libc::c_short,
        Request::Read => libc::F_RDLCK as libc::c_short,
        Request::Unlock => libc::F_UNLCK as libc::c_short,
    };
    value
}

//! Children that never outlive the lab.
//!
//! The kernel sends such a child SIGKILL when the *thread* that started it ends, so whoever starts one keeps that
//! thread until the child has ended. The unsafe code is what the child does between fork and exec.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Makes the child end with the thread that spawns it. It keeps the descriptors in `inherited`, which
/// the caller holds open until the spawn is done.
pub fn die_with_parent(command: &mut Command, inherited: Vec<RawFd>) {
    let parent = getpid();
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before the request was made.
        if getppid() != Some(parent) {
            return Err(io::Error::from(rustix::io::Errno::SRCH));
        }
        for fd in &inherited {
            // SAFETY: the descriptor is open: the caller holds it for the duration of the spawn, and the child has
            // a copy of the whole table.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            fcntl_setfd(fd.as_fd(), FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a threaded process, where only async-signal-safe work is
    // allowed: it makes system calls, touches no lock and allocates nothing.
    unsafe { command.pre_exec(before_exec) };
}

//! A terminal of its own for a process.
//!
//! The process becomes the leader of a session whose controlling terminal this is, so that ^C and job control work.
//! The only unsafe code of the host's side is the closure that the child runs between fork and exec.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use lab_agent::host_protocol::TerminalSize;
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Makes `command` run on a new terminal; returns the terminal's other end.
pub(crate) fn attach(command: &mut Command, size: TerminalSize) -> io::Result<File> {
    let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&control)?;
    unlockpt(&control)?;
    resize(&control, size)?;
    let terminal = ioctl_tiocgptpeer(
        &control,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    command
        .stdin(Stdio::from(terminal.try_clone()?))
        .stdout(Stdio::from(terminal.try_clone()?))
        .stderr(Stdio::from(terminal));
    let become_leader = || {
        setsid()?;
        ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a threaded process, where only async-signal-safe work is
    // allowed: it makes two system calls, touches no lock and allocates nothing.
    unsafe { command.pre_exec(become_leader) };
    Ok(File::from(control))
}

/// Changes the size of a terminal, seen from its other end.
pub(crate) fn resize(control: &impl std::os::fd::AsFd, size: TerminalSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(control, size)?)
}

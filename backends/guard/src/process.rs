//! A process on the other end of a socket, and how one hears of its end.
//!
//! A number can be used again; a pidfd is of one process for ever. Linux 6.5 gives the peer's; before that it is opened by
//! number when the connection is accepted, and the connection that is still open then says that the number was right.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Who is connected.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    /// Readable when the process has ended.
    pub(crate) pidfd: OwnedFd,
}

impl Process {
    pub(crate) fn of_peer(stream: &UnixStream) -> io::Result<Self> {
        let who = getsockopt(stream, PeerCredentials)?;
        let pidfd = if let Ok(pidfd) = getsockopt(stream, PeerPidfd) {
            pidfd
        } else {
            let pidfd = pidfd_of(who.pid())?;
            if has_hung_up(stream)? {
                return Err(io::ErrorKind::NotConnected.into());
            }
            pidfd
        };
        let pid = u32::try_from(who.pid()).unwrap_or(0);
        if pid == 0 {
            return Err(io::Error::other("the peer is in another PID namespace"));
        }
        Ok(Self {
            pid,
            uid: who.uid(),
            pidfd,
        })
    }
}

/// Readable when the process has ended.
pub(crate) fn pidfd_of(pid: i32) -> io::Result<OwnedFd> {
    let pid =
        Pid::from_raw(pid).ok_or_else(|| io::Error::other("no process of this PID namespace"))?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

fn has_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut polled = [PollFd::new(stream, PollFlags::HUP)];
    poll(&mut polled, Some(&Timespec::default()))?;
    Ok(polled[0].revents().contains(PollFlags::HUP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (here, there) = UnixStream::pair().unwrap();
        let process = Process::of_peer(&here).unwrap();
        assert_eq!(process.pid, std::process::id());
        assert!(!has_hung_up(&here).unwrap());
        drop(there);
        assert!(has_hung_up(&here).unwrap());
    }
}

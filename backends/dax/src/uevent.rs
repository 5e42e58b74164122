//! What the kernel says of devices that come and go: `NETLINK_KOBJECT_UEVENT`.
//!
//! Late: the driver's `unbind` is sent when the memory has been gone for a while. A sign of last resort.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};

/// The kernel's own messages; udev's are of another group.
const FROM_KERNEL: u32 = 1;

/// Messages of the kernel about its devices.
#[derive(Debug)]
pub(crate) struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    pub(crate) fn listen() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, FROM_KERNEL))?;
        Ok(Self { socket })
    }

    /// Calls `of` with the name of each dax device that has lost its driver or is gone. `true`: messages were lost, any
    /// device may be among them.
    pub(crate) fn read(&self, mut of: impl FnMut(&str)) -> bool {
        let mut buffer = [0; 8192];
        let mut missed = false;
        loop {
            match recvfrom(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((length, _, from)) => {
                    // Only the kernel has port 0.
                    let kernel = from
                        .and_then(|from| SocketAddrNetlink::try_from(from).ok())
                        .is_some_and(|from| from.pid() == 0);
                    if let (true, Some(name)) = (kernel, taken_away(&buffer[..length])) {
                        of(name);
                    }
                }
                Err(rustix::io::Errno::NOBUFS) => missed = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return missed,
            }
        }
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The dax device that a message says is gone or has no driver any more: `ACTION@PATH`, then `KEY=VALUE`, each ended by
/// a zero byte.
fn taken_away(message: &[u8]) -> Option<&str> {
    let mut fields = message.split(|byte| *byte == 0);
    let (action, path) = std::str::from_utf8(fields.next()?).ok()?.split_once('@')?;
    let dax = fields.any(|field| field == b"SUBSYSTEM=dax");
    if dax && matches!(action, "unbind" | "remove") {
        path.rsplit('/').next()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dax_device_that_goes_is_heard_of() {
        let unbind = b"unbind@/devices/LNXSYSTM:00/ndbus0/region0/dax0.0/dax0.0\0ACTION=unbind\0\
            DEVPATH=/devices/LNXSYSTM:00/ndbus0/region0/dax0.0/dax0.0\0SUBSYSTEM=dax\0DEVNAME=dax0.0\0SEQNUM=9\0";
        assert_eq!(taken_away(unbind), Some("dax0.0"));
        let nd = b"unbind@/devices/ndbus0/region0/dax0.0\0ACTION=unbind\0SUBSYSTEM=nd\0";
        assert_eq!(taken_away(nd), None);
        let bind = b"bind@/devices/ndbus0/region0/dax0.0/dax0.0\0SUBSYSTEM=dax\0";
        assert_eq!(taken_away(bind), None);
        for nonsense in [
            &b""[..],
            b"unbind",
            b"\xff@\0SUBSYSTEM=dax",
            b"libudev\0\xfe\xed",
        ] {
            assert_eq!(taken_away(nonsense), None);
        }
    }

    #[test]
    fn nothing_to_hear_is_no_wait() {
        let uevents = Uevents::listen().unwrap();
        assert!(!uevents.read(|_| {}));
    }
}

//! The kernel's news of devices and drivers: what a held device stands on may have changed.
//!
//! Only the fact that there is news matters; what it is, sysfs says. Losing a message is therefore harmless as long as
//! one gets through.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// Multicast group of the kernel itself; group 2 is udev's.
const OF_THE_KERNEL: u32 = 1;
/// Whose news can matter: those a dax device stands on, and their drivers.
const SUBSYSTEMS: [&str; 8] = [
    "dax", "nd", "cxl", "acpi", "platform", "pci", "virtio", "drivers",
];

/// The kernel's messages.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

impl Uevents {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            flags,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, OF_THE_KERNEL))?;
        Ok(Self(socket))
    }

    /// Takes what is there; true when something of it can matter.
    pub(crate) fn read(&self) -> bool {
        let mut matters = false;
        let mut buffer = [0; 8192];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => matters |= can_matter(&buffer[..length]),
                // Messages were lost.
                Err(Errno::ENOBUFS) => matters = true,
                Err(Errno::EINTR) => {}
                Err(_) => return matters,
            }
        }
    }
}

impl AsRawFd for Uevents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn can_matter(message: &[u8]) -> bool {
    let mut fields = message.split(|byte| *byte == 0);
    fields.any(|field| {
        let value = field.strip_prefix(b"SUBSYSTEM=");
        value.is_some_and(|value| SUBSYSTEMS.iter().any(|name| name.as_bytes() == value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_news_of_what_memory_stands_on_matters() {
        let news =
            |subsystem| format!("bind@/devices/x\0ACTION=bind\0SUBSYSTEM={subsystem}\0SEQNUM=7\0");
        assert!(can_matter(news("dax").as_bytes()));
        assert!(can_matter(news("drivers").as_bytes()));
        assert!(!can_matter(news("net").as_bytes()));
        assert!(!can_matter(b"libudev\0\xfe\xed"));
    }

    #[test]
    fn a_socket_without_news_has_none() {
        let Ok(uevents) = Uevents::open() else {
            // A sandbox without netlink; the lab has it.
            return;
        };
        uevents.read();
    }
}

//! A link without a tap: one end of a pair of sockets, each message a frame with its header.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::{Link, NetDevice, NetSpec, Offloads, Vectors};

/// What a device asked of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// `TUNSETOFFLOAD`.
    Offloads(Offloads),
    /// This queue may get frames.
    Attach(usize),
    /// This queue may not.
    Detach(usize),
}

/// One queue of the fake.
#[derive(Debug)]
pub struct SocketLink {
    socket: OwnedFd,
    queue: usize,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// The other side.
#[derive(Debug)]
pub struct Wire {
    /// The other end of each queue.
    pub ends: Vec<OwnedFd>,
    /// What the device asked for, in order.
    pub asked: Arc<Mutex<Vec<Asked>>>,
}

impl NetDevice {
    /// A device on sockets: all that [`NetDevice::open`] does except for the tap.
    pub fn on_sockets(spec: NetSpec) -> (Self, Wire) {
        let (mut ends, asked) = (Vec::new(), Arc::<Mutex<Vec<Asked>>>::default());
        let mut links: Vec<Arc<dyn Link>> = Vec::new();
        for queue in 0..usize::from(spec.num_queues / 2) {
            let (socket, end) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )
            .expect("a pair of sockets");
            ends.push(end);
            links.push(Arc::new(SocketLink {
                socket,
                queue,
                asked: Arc::clone(&asked),
            }));
        }
        let device = Self::with_links(spec, links);
        (device, Wire { ends, asked })
    }
}

impl Wire {
    /// The next frame of the guest, if there is one.
    pub fn take(&self, queue: usize) -> Option<Vec<u8>> {
        let mut frame = vec![0; 2 * super::LARGEST_FRAME];
        let (len, _) = recv(&self.ends[queue], &mut frame[..], RecvFlags::empty()).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    /// A frame for the guest; lost when there is no room on the wire.
    pub fn try_send(&self, queue: usize, frame: &[u8]) -> bool {
        send(&self.ends[queue], frame, SendFlags::NOSIGNAL).is_ok()
    }
}

impl SocketLink {
    fn ask(&self, asked: Asked) {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(asked);
    }
}

impl Link for SocketLink {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn read_frame(&self, into: &mut Vectors<'_>, overflow: &mut [u8]) -> io::Result<usize> {
        into.read_from(self.fd(), overflow)
    }

    fn write_frame(&self, frame: &Vectors<'_>) -> io::Result<usize> {
        frame.write_to(self.fd())
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.ask(Asked::Offloads(offloads));
        Ok(())
    }

    fn attach(&self) -> io::Result<()> {
        self.ask(Asked::Attach(self.queue));
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        self.ask(Asked::Detach(self.queue));
        Ok(())
    }
}

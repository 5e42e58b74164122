//! Where frames go to and come from: a tap, or a socket in tests.

use std::io;
use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
};

use super::vectors::Vectors;

/// One queue of a network interface of the host. Each frame has the 12-byte virtio-net header before it; nothing here
/// blocks.
pub trait Link: Send + Sync {
    /// Readable when there is a frame, writable when one is taken.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Reads the next frame into guest memory and what is left of it into `overflow`; the length of the whole frame.
    /// Zero: the link is gone for good.
    fn read_frame(&self, into: &mut Vectors<'_>, overflow: &mut [u8]) -> io::Result<usize>;

    /// Sends a frame.
    fn write_frame(&self, frame: &Vectors<'_>) -> io::Result<usize>;

    /// What the frames that are read may ask the guest to do. It holds for all queues of the interface.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// The host may put frames into this queue. A queue starts like this.
    fn attach(&self) -> io::Result<()>;

    /// The undo of [`Link::attach`]: frames go to the other queues.
    fn detach(&self) -> io::Result<()>;
}

/// Work that the driver takes over for the frames it receives, as `TUNSETOFFLOAD` wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u32);

impl Offloads {
    const PAIRS: [(u32, u32); 5] = [
        (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    ];

    /// The feature bits that are about this.
    pub fn mask() -> u64 {
        Self::PAIRS
            .iter()
            .fold(0, |mask, (feature, _)| mask | 1 << feature)
    }

    /// From feature bits; others do not matter. Without checksums the rest is meaningless and left out.
    pub fn from_features(features: u64) -> Self {
        if features & (1 << VIRTIO_NET_F_GUEST_CSUM) == 0 {
            return Self::default();
        }
        let bits = Self::PAIRS
            .iter()
            .filter(|(feature, _)| features & (1 << feature) != 0)
            .fold(0, |bits, (_, tun)| bits | tun);
        Self(bits)
    }

    /// The argument of `TUNSETOFFLOAD`.
    pub fn bits(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_need_checksums() {
        let tso = 1u64 << VIRTIO_NET_F_GUEST_TSO4;
        assert_eq!(Offloads::from_features(tso), Offloads::default());
        let both = tso | 1 << VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(Offloads::from_features(both).bits(), 0b11);
        assert_eq!(Offloads::mask(), 0b111_1000_0010);
        assert_eq!(Offloads::from_features(u64::MAX).bits(), 0b1_1111);
    }
}

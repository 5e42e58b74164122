//! What a guest is offered to leave to the other end, or to have left to itself.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
};

/// Whoever serves the network may have less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offers {
    /// TCP segmentation.
    pub tso: bool,
    /// UDP fragmentation.
    pub ufo: bool,
    /// Checksums. The other two mean nothing without it.
    pub csum: bool,
}

impl Offers {
    /// As feature bits.
    pub fn features(self) -> u64 {
        if !self.csum {
            return 0;
        }
        let mut bits = vec![VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM];
        if self.tso {
            bits.extend([
                VIRTIO_NET_F_HOST_TSO4,
                VIRTIO_NET_F_HOST_TSO6,
                VIRTIO_NET_F_HOST_ECN,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
            ]);
        }
        if self.ufo {
            bits.extend([VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
        }
        bits.into_iter()
            .fold(0, |features, bit| features | 1 << bit)
    }
}

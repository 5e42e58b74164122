//! A network that a vhost-user backend serves (virtio 1.2, 5.1): what is its own.
//!
//! The backend moves frames, and nothing else. For more than one pair of queues a driver needs the control queue, by which it says
//! how many pairs it uses; no backend serves that one (DPDK and passt do not), so it is served here, and the backend is told which
//! pairs are in use (`VHOST_USER_SET_VRING_ENABLE`). Without it the driver filters addresses itself and takes the link for up.

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use super::Backend;
use super::class::{Class, Config};
use crate::virtio::device::Kind;
use crate::virtio::net::{Mac, Offers, Offloads, Orders};

/// Of each pair: one to receive and one to transmit.
pub const QUEUES: u16 = 2;

/// `struct virtio_net_config` up to the MTU.
const CONFIG_BYTES: usize = 12;
const MAC: usize = 0;
const PAIRS: usize = 8;
const MTU: usize = 10;

/// A network whose end in the guest has this address, and so many pairs of queues. The guest is offered of `offers` what the
/// backend can do.
///
/// The configuration space is this side's, because most backends (DPDK, passt) have none that could be asked for.
pub fn interface(mac: Mac, mtu: Option<u16>, offers: Offers, pairs: u16) -> Class {
    let mut config = vec![0; CONFIG_BYTES];
    config[MAC..MAC + 6].copy_from_slice(&mac.bytes());
    let mut features = offers.features() | 1 << VIRTIO_NET_F_MRG_RXBUF;
    let mut own_features = 1 << VIRTIO_NET_F_MAC;
    if let Some(mtu) = mtu {
        config[MTU..].copy_from_slice(&mtu.to_le_bytes());
        own_features |= 1 << VIRTIO_NET_F_MTU;
    }
    let several = pairs > 1;
    if several {
        config[PAIRS..PAIRS + 2].copy_from_slice(&pairs.to_le_bytes());
        features |= 1 << VIRTIO_NET_F_MQ;
        own_features |= 1 << VIRTIO_NET_F_CTRL_VQ;
    }
    Class {
        name: "vhost-user network",
        example: "passt --vhost-user --socket ...",
        kind: Kind::Net,
        features,
        own_features,
        config: Config::Own(config),
        uncounted: 0,
        always: QUEUES,
        unsaid: QUEUES,
        more_by: 1 << VIRTIO_NET_F_MQ,
        in_pairs: true,
        has_control: several,
        lends: false,
    }
}

/// What the driver gives orders to: a backend, with so many pairs that the driver has set up.
pub(super) struct Network<'a> {
    pub(super) backend: &'a Backend,
    pub(super) pairs: usize,
}

impl Orders for Network<'_> {
    fn most_pairs(&self) -> usize {
        self.pairs
    }

    /// One that is not there now is told when it comes.
    fn use_pairs(&self, wanted: usize) -> io::Result<()> {
        let queues = u16::try_from(wanted * usize::from(QUEUES)).map_err(io::Error::other)?;
        self.backend.use_queues(queues).map_err(io::Error::other)
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vhost_user::Shape;

    #[test]
    fn the_configuration_space_is_an_address_pairs_and_an_mtu() {
        let mac = Mac::new([0x52, 0x54, 0, 1, 2, 3]).unwrap();
        let none = Offers {
            tso: true,
            ufo: true,
            csum: false,
        };
        let shape = Shape::even(QUEUES, 256);
        let class = interface(mac, Some(9000), none, 1);
        let config = class.config(Vec::new(), &shape);
        assert_eq!(config[..6], [0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(config[8..10], [0, 0]);
        assert_eq!(config[10..], 9000u16.to_le_bytes());
        assert_eq!(
            class.own_features,
            1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU
        );
        assert_eq!(class.features, 1 << VIRTIO_NET_F_MRG_RXBUF);
        let plain = interface(mac, None, Offers { csum: true, ..none }, 1);
        assert_eq!(plain.own_features, 1 << VIRTIO_NET_F_MAC);
        // CSUM, GUEST_CSUM, and six of TSO with ECN, two of UFO, MRG_RXBUF.
        assert_eq!(plain.features, 0xff83);
        let several = interface(mac, None, none, 4);
        assert_eq!(several.config(Vec::new(), &shape)[8..10], [4, 0]);
        let own = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_CTRL_VQ;
        assert_eq!(several.own_features, own);
        let theirs = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_MQ;
        assert_eq!(several.features, theirs);
    }
}

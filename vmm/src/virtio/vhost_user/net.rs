//! A network that a vhost-user backend serves (virtio 1.2, 5.1): what is its own.
//!
//! One pair of queues. For more a driver needs the control queue, which would be served here and not by the backend; without it
//! the driver filters addresses itself and takes the link for up.

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};

use super::class::{Class, Config};
use crate::virtio::device::Kind;
use crate::virtio::net::{Mac, Offers};

/// One to receive and one to transmit.
pub const QUEUES: u16 = 2;

/// `struct virtio_net_config` up to the MTU.
const CONFIG_BYTES: usize = 12;
const MAC: usize = 0;
const MTU: usize = 10;

/// A network whose end in the guest has this address. The guest is offered of `offers` what the backend can do.
///
/// The configuration space is this side's, because most backends (DPDK, passt) have none that could be asked for.
pub fn interface(mac: Mac, mtu: Option<u16>, offers: Offers) -> Class {
    let mut config = vec![0; CONFIG_BYTES];
    config[MAC..MAC + 6].copy_from_slice(&mac.bytes());
    let mut own_features = 1 << VIRTIO_NET_F_MAC;
    if let Some(mtu) = mtu {
        config[MTU..].copy_from_slice(&mtu.to_le_bytes());
        own_features |= 1 << VIRTIO_NET_F_MTU;
    }
    Class {
        name: "vhost-user network",
        example: "passt --vhost-user --socket ...",
        kind: Kind::Net,
        features: offers.features() | 1 << VIRTIO_NET_F_MRG_RXBUF,
        own_features,
        config: Config::Own(config),
        uncounted: 0,
        always: QUEUES,
        lends: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vhost_user::Shape;

    #[test]
    fn the_configuration_space_is_an_address_and_an_mtu() {
        let mac = Mac::new([0x52, 0x54, 0, 1, 2, 3]).unwrap();
        let none = Offers {
            tso: true,
            ufo: true,
            csum: false,
        };
        let shape = Shape {
            queues: QUEUES,
            queue_size: 256,
        };
        let class = interface(mac, Some(9000), none);
        let config = class.config(Vec::new(), shape);
        assert_eq!(config[..6], [0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(config[10..], 9000u16.to_le_bytes());
        assert_eq!(
            class.own_features,
            1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU
        );
        assert_eq!(class.features, 1 << VIRTIO_NET_F_MRG_RXBUF);
        let plain = interface(mac, None, Offers { csum: true, ..none });
        assert_eq!(plain.own_features, 1 << VIRTIO_NET_F_MAC);
        // CSUM, GUEST_CSUM, and six of TSO with ECN, two of UFO, MRG_RXBUF.
        assert_eq!(plain.features, 0xff83);
    }
}

//! A disk served by a vhost-user backend: what is a disk's own.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::class::{Class, Config, Shape};
use crate::virtio::device::Kind;

/// `struct virtio_blk_config` up to what discarding and zeroing need (virtio 1.2, 5.2.4).
const CONFIG_BYTES: u32 = 60;
const SEG_MAX: usize = 12;
const NUM_QUEUES: usize = 34;

/// A disk. Not among the features: `CONFIG_WCE`, by which a driver switches the backend's cache with a store to the
/// configuration space; with `FLUSH` alone it takes the cache for write-back and flushes.
pub const DISK: Class = Class {
    name: "vhost-user disk",
    example: "qemu-storage-daemon --export type=vhost-user-blk,...",
    kind: Kind::Block,
    features: 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_GEOMETRY
        | 1 << VIRTIO_BLK_F_RO
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_MQ
        | 1 << VIRTIO_BLK_F_DISCARD
        | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
    own_features: 0,
    config: Config::Backend {
        bytes: CONFIG_BYTES,
        fit,
    },
    uncounted: 0,
    always: 0,
    unsaid: 1,
    more_by: 0,
    in_pairs: false,
    has_control: false,
    lends: false,
};

/// The number of queues is this side's; a request with its header and its status fits into one of them.
fn fit(config: &mut [u8], shape: &Shape) {
    if let Some(field) = config.get_mut(NUM_QUEUES..NUM_QUEUES + 2) {
        field.copy_from_slice(&shape.queues().to_le_bytes());
    }
    if let Some(field) = config.get_mut(SEG_MAX..SEG_MAX + 4) {
        let most = u32::from(shape.shortest()).saturating_sub(2).max(1);
        let theirs = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
        field.copy_from_slice(&theirs.min(most).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_side_decides_is_in_the_configuration_space() {
        let mut config = vec![0xff; CONFIG_BYTES as usize];
        let shape = Shape::even(3, 64);
        fit(&mut config, &shape);
        assert_eq!(config[SEG_MAX..SEG_MAX + 4], 62u32.to_le_bytes());
        assert_eq!(config[NUM_QUEUES..NUM_QUEUES + 2], [3, 0]);
        assert!(config[..SEG_MAX].iter().all(|byte| *byte == 0xff));
        config[SEG_MAX..SEG_MAX + 4].copy_from_slice(&7u32.to_le_bytes());
        fit(&mut config, &shape);
        assert_eq!(config[SEG_MAX], 7, "fewer is the backend's to say");
        fit(&mut [0; 4], &shape);
    }
}

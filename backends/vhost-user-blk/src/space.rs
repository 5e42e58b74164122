//! The configuration space of the disk (virtio 1.2, section 5.2.4) and the features that go with it.

#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk as spec;
use virtio_bindings::{virtio_config, virtio_ring};

use crate::disk::Disk;
use daxhund_virtio_blk::SECTOR;

use crate::request::{MOST_RANGE_SECTORS, MOST_RANGES};

const LEN: usize = 60;

/// Descriptors of the longest queue.
pub const MOST_QUEUE_SIZE: u16 = 1024;

/// What is offered of virtio itself and of the disk.
pub fn features(disk: &dyn Disk, num_queues: u16) -> u64 {
    let mut bits = vec![
        virtio_config::VIRTIO_F_VERSION_1,
        virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
        virtio_ring::VIRTIO_RING_F_EVENT_IDX,
        spec::VIRTIO_BLK_F_SEG_MAX,
        spec::VIRTIO_BLK_F_BLK_SIZE,
        spec::VIRTIO_BLK_F_TOPOLOGY,
        spec::VIRTIO_BLK_F_FLUSH,
    ];
    if num_queues > 1 {
        bits.push(spec::VIRTIO_BLK_F_MQ);
    }
    if disk.is_read_only() {
        bits.push(spec::VIRTIO_BLK_F_RO);
    } else {
        bits.push(spec::VIRTIO_BLK_F_DISCARD);
        bits.push(spec::VIRTIO_BLK_F_WRITE_ZEROES);
    }
    bits.into_iter().fold(0, |all, bit| all | 1 << bit)
}

/// All of it.
pub fn build(disk: &dyn Disk, num_queues: u16) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let (block, physical) = (SECTOR, disk.physical_block().max(SECTOR));
    put(0, &(disk.len() / u64::from(SECTOR)).to_le_bytes());
    // Header and status have a descriptor each. A queue may be shorter than the longest: the driver sees to that.
    put(12, &126u32.to_le_bytes());
    put(20, &block.to_le_bytes());
    let exponent = (physical / block).checked_ilog2().unwrap_or(0);
    put(24, &[u8::try_from(exponent).unwrap_or(0)]);
    let smallest = u16::try_from(physical / block).unwrap_or(1);
    put(26, &smallest.to_le_bytes());
    put(34, &num_queues.to_le_bytes());
    put(36, &MOST_RANGE_SECTORS.to_le_bytes());
    put(40, &MOST_RANGES.to_le_bytes());
    put(44, &(physical / block).to_le_bytes());
    put(48, &MOST_RANGE_SECTORS.to_le_bytes());
    put(52, &MOST_RANGES.to_le_bytes());
    space
}

/// A part of the space; zeroes beyond its end, where newer drivers look for what is not offered.
pub fn part(space: &[u8], offset: u32, size: u32) -> Vec<u8> {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let len = usize::try_from(size).unwrap_or(0);
    let there = space.iter().copied().skip(from);
    there.chain(std::iter::repeat(0)).take(len).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::MemoryDisk;

    #[test]
    fn the_space_says_what_the_disk_is() {
        let disk = MemoryDisk::new(1 << 20);
        let space = build(&disk, 3);
        assert_eq!(part(&space, 0, 8), 2048u64.to_le_bytes());
        assert_eq!(part(&space, 20, 4), 512u32.to_le_bytes());
        assert_eq!(part(&space, 34, 2), 3u16.to_le_bytes());
        assert_eq!(part(&space, 58, 6), [0; 6]);
        assert_eq!(part(&space, u32::MAX, 2), [0; 2]);
    }

    #[test]
    fn a_disk_that_can_t_be_changed_offers_no_change() {
        let has = |features: u64, bit: u32| features & (1 << bit) != 0;
        let disk = MemoryDisk::new(1 << 20);
        let changing = features(&disk, 1);
        assert!(has(changing, spec::VIRTIO_BLK_F_DISCARD));
        assert!(!has(changing, spec::VIRTIO_BLK_F_RO) && !has(changing, spec::VIRTIO_BLK_F_MQ));
        let read_only = features(&disk.read_only(), 2);
        assert!(has(read_only, spec::VIRTIO_BLK_F_RO) && has(read_only, spec::VIRTIO_BLK_F_MQ));
        assert!(!has(read_only, spec::VIRTIO_BLK_F_WRITE_ZEROES));
    }
}

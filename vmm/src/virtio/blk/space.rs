//! The configuration space of a disk (virtio 1.2, section 5.2.4).

use std::ops::Range;

use super::image::{Image, Topology};
use super::{DiskSpec, MOST_DISCARD_SECTORS, MOST_ZEROES_SECTORS, SECTOR};

/// Its length.
pub(super) const LEN: usize = 60;
/// In sectors: what changes with the disk, and is not in what [`build`] makes.
pub(super) const CAPACITY: Range<usize> = 0..8;
/// Where the driver turns the write cache on and off.
pub(super) const WRITEBACK: usize = 32;

/// Fewer than two descriptors of a chain are not data: the header's and the status's.
pub(super) fn most_segments(queue_size: u16) -> u32 {
    u32::from(queue_size.saturating_sub(2).clamp(1, 1022))
}

/// All that stays as it is, with the write cache on.
pub(super) fn build(image: &Image, spec: &DiskSpec) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(12, &most_segments(spec.queue_size).to_le_bytes());
    put(20, &image.block().to_le_bytes());
    let (exponent, smallest, best) = in_blocks(image.topology(), image.block());
    put(24, &[exponent]);
    put(26, &smallest.to_le_bytes());
    put(28, &best.to_le_bytes());
    put(WRITEBACK, &[1]);
    put(34, &spec.num_queues.to_le_bytes());
    // One range in a request.
    let (discard, zeroes) = (MOST_DISCARD_SECTORS, MOST_ZEROES_SECTORS);
    put(36, &discard.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &(image.block() / SECTOR).to_le_bytes());
    put(48, &zeroes.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[u8::from(image.can_discard())]);
    space
}

/// Logical blocks in a physical one as a power of two, and sizes in logical blocks.
fn in_blocks(topology: Topology, block: u32) -> (u8, u16, u32) {
    let physical = topology.physical_block / block;
    let exponent = if physical.is_power_of_two() {
        u8::try_from(physical.trailing_zeros()).unwrap_or(0)
    } else {
        0
    };
    let smallest = u16::try_from(topology.smallest / block).unwrap_or(0);
    (exponent, smallest, topology.best / block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_in_logical_blocks() {
        let topology = |physical_block, smallest, best| Topology {
            physical_block,
            smallest,
            best,
        };
        assert_eq!(in_blocks(topology(4096, 4096, 0), 512), (3, 8, 0));
        assert_eq!(in_blocks(topology(4096, 4096, 1 << 20), 4096), (0, 1, 256));
        assert_eq!(in_blocks(topology(512, 512, 0), 4096), (0, 0, 0));
        assert_eq!(in_blocks(topology(3000, u32::MAX, 0), 512), (0, 0, 0));
        assert_eq!(in_blocks(Topology::default(), 512), (0, 0, 0));
    }

    #[test]
    fn segments_leave_room_for_header_and_status() {
        assert_eq!(most_segments(128), 126);
        assert_eq!(most_segments(4), 2);
        assert_eq!(most_segments(32768), 1022);
    }
}

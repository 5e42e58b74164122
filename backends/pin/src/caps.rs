//! Reads what VFIO answers: structures that end in a chain of capabilities, or in an array.
//!
//! Pure functions over bytes. A length, an offset or a count that does not fit the bytes at hand ends the reading there,
//! and a chain is followed forward only, so that no answer can make a loop.

#![forbid(unsafe_code)]

use std::mem::{offset_of, size_of};
use std::ops::Range;

use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_PCI_HOT_RESET_FLAG_DEV_ID,
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED, VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_info_cap_header,
    vfio_iommu_type1_info, vfio_iommu_type1_info_cap_iova_range, vfio_iommu_type1_info_dma_avail,
    vfio_pci_dependent_device, vfio_pci_hot_reset_info, vfio_region_info,
    vfio_region_info_cap_sparse_mmap,
};

use crate::function::Region;
use crate::limits::{IovaRange, Limits};

/// Registers are mapped in pages of this size.
const PAGE: u64 = 4096;

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes_at(bytes, offset).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes_at(bytes, offset).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes_at(bytes, offset).map(u64::from_ne_bytes)
}

/// The capabilities of an answer: their id and the bytes from their header on.
fn chain(bytes: &[u8], first: u32) -> impl Iterator<Item = (u32, &[u8])> {
    let mut next = first as usize;
    let mut behind = 0;
    std::iter::from_fn(move || {
        if next == 0 || next < behind {
            return None;
        }
        let cap = bytes.get(next..)?;
        let id = u16_at(cap, offset_of!(vfio_info_cap_header, id))?;
        behind = next + size_of::<vfio_info_cap_header>();
        next = u32_at(cap, offset_of!(vfio_info_cap_header, next))? as usize;
        Some((u32::from(id), cap))
    })
}

/// Pairs of numbers at the end of a capability.
fn pairs(cap: &[u8], count: u32, offset: usize) -> Vec<(u64, u64)> {
    let place = |index: usize| offset.checked_add(index.checked_mul(16)?);
    (0..count as usize)
        .map_while(|index| {
            let place = place(index)?;
            Some((u64_at(cap, place)?, u64_at(cap, place.checked_add(8)?)?))
        })
        .collect()
}

/// A region of a device and where it is in the device's file. `None`: the answer is too short, or the region is empty.
pub(crate) fn region(bytes: &[u8]) -> Option<(Region, u64)> {
    let flags = u32_at(bytes, offset_of!(vfio_region_info, flags))?;
    let size = u64_at(bytes, offset_of!(vfio_region_info, size))?;
    let offset = u64_at(bytes, offset_of!(vfio_region_info, offset))?;
    if size == 0 {
        return None;
    }
    let first = if flags & VFIO_REGION_INFO_FLAG_CAPS == 0 {
        0
    } else {
        u32_at(bytes, offset_of!(vfio_region_info, cap_offset))?
    };
    let (mut sparse, mut msix_mappable) = (None, false);
    for (id, cap) in chain(bytes, first) {
        match id {
            VFIO_REGION_INFO_CAP_SPARSE_MMAP => sparse = sparse_areas(cap),
            VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => msix_mappable = true,
            _ => {}
        }
    }
    let mappable = if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        Vec::new()
    } else {
        let areas = sparse.unwrap_or_else(|| vec![(0, size)]);
        whole_pages(&areas, size)
    };
    let region = Region {
        size,
        readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
        writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        mappable,
        msix_mappable,
    };
    Some((region, offset))
}

fn sparse_areas(cap: &[u8]) -> Option<Vec<(u64, u64)>> {
    let count = u32_at(cap, offset_of!(vfio_region_info_cap_sparse_mmap, nr_areas))?;
    Some(pairs(
        cap,
        count,
        offset_of!(vfio_region_info_cap_sparse_mmap, areas),
    ))
}

/// The whole pages of areas (offset and length) that lie in a region, in ascending order, neighbours joined.
///
/// A region below a page has none: the page around it can hold something else.
fn whole_pages(areas: &[(u64, u64)], size: u64) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = areas
        .iter()
        .filter_map(|&(offset, len)| {
            let end = offset.saturating_add(len).min(size);
            let part = offset.checked_next_multiple_of(PAGE)?..end - end % PAGE;
            (part.start < part.end).then_some(part)
        })
        .collect();
    parts.sort_by_key(|part| part.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match joined.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => joined.push(part),
        }
    }
    joined
}

/// What a type1 container takes. `None`: the answer is too short.
pub(crate) fn type1_limits(bytes: &[u8]) -> Option<Limits> {
    let flags = u32_at(bytes, offset_of!(vfio_iommu_type1_info, flags))?;
    let sizes = u64_at(bytes, offset_of!(vfio_iommu_type1_info, iova_pgsizes))?;
    let mut limits = Limits {
        align_bytes: PAGE,
        ranges: None,
        entries_left: None,
    };
    if flags & VFIO_IOMMU_INFO_PGSIZES != 0 && sizes != 0 {
        // The kernel maps in pages of its own when the IOMMU's are smaller, and in the IOMMU's when those are larger.
        limits.align_bytes = PAGE.max(1 << sizes.trailing_zeros());
    }
    let first = if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        0
    } else {
        u32_at(bytes, offset_of!(vfio_iommu_type1_info, cap_offset))?
    };
    for (id, cap) in chain(bytes, first) {
        match id {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = offset_of!(vfio_iommu_type1_info_cap_iova_range, nr_iovas);
                let Some(count) = u32_at(cap, count) else {
                    continue;
                };
                let place = offset_of!(vfio_iommu_type1_info_cap_iova_range, iova_ranges);
                let ranges = pairs(cap, count, place);
                limits.ranges = Some(
                    ranges
                        .into_iter()
                        .map(|(start, last)| IovaRange { start, last })
                        .collect(),
                );
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                limits.entries_left =
                    u32_at(cap, offset_of!(vfio_iommu_type1_info_dma_avail, avail));
            }
            _ => {}
        }
    }
    Some(limits)
}

/// A function that a hot reset would reset as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dependent {
    pub(crate) domain: u16,
    pub(crate) bus: u8,
    pub(crate) devfn: u8,
    /// The group's number (type1), or who the device is to our IOMMU file descriptor (its id, 0 or -1).
    pub(crate) owner: u32,
}

/// What a hot reset reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HotReset {
    /// `owner` of each device is an id of iommufd's.
    pub(crate) by_device: bool,
    /// iommufd only: all devices are ours.
    pub(crate) all_owned: bool,
    pub(crate) devices: Vec<Dependent>,
}

/// The devices of `struct vfio_pci_hot_reset_info`. `None`: the answer is too short for what it counts.
pub(crate) fn hot_reset(bytes: &[u8]) -> Option<HotReset> {
    let flags = u32_at(bytes, offset_of!(vfio_pci_hot_reset_info, flags))?;
    let count = u32_at(bytes, offset_of!(vfio_pci_hot_reset_info, count))? as usize;
    let first = offset_of!(vfio_pci_hot_reset_info, devices);
    let size = size_of::<vfio_pci_dependent_device>();
    if count > bytes.len() / size {
        return None;
    }
    let devices = (0..count).map(|index| {
        let device = bytes.get(first + index * size..)?;
        Some(Dependent {
            owner: u32_at(device, 0)?,
            domain: u16_at(device, offset_of!(vfio_pci_dependent_device, segment))?,
            bus: *device.get(offset_of!(vfio_pci_dependent_device, bus))?,
            devfn: *device.get(offset_of!(vfio_pci_dependent_device, devfn))?,
        })
    });
    Some(HotReset {
        by_device: flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0,
        all_owned: flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED != 0,
        devices: devices.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An answer put together field by field.
    #[derive(Default)]
    struct Answer(Vec<u8>);

    impl Answer {
        fn u16(mut self, value: u16) -> Self {
            self.0.extend(value.to_ne_bytes());
            self
        }

        fn u32(mut self, value: u32) -> Self {
            self.0.extend(value.to_ne_bytes());
            self
        }

        fn u64(mut self, value: u64) -> Self {
            self.0.extend(value.to_ne_bytes());
            self
        }

        fn cap(self, id: u32, next: u32) -> Self {
            self.u16(u16::try_from(id).unwrap()).u16(1).u32(next)
        }

        fn region(flags: u32, cap_offset: u32, size: u64) -> Self {
            let answer = Self::default().u32(0).u32(flags).u32(0).u32(cap_offset);
            answer.u64(size).u64(7 << 40)
        }

        fn type1(flags: u32, sizes: u64, cap_offset: u32) -> Self {
            Self::default()
                .u32(0)
                .u32(flags)
                .u64(sizes)
                .u32(cap_offset)
                .u32(0)
        }
    }

    const RW: u32 = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    const MAP: u32 = RW | VFIO_REGION_INFO_FLAG_MMAP;
    const CAPS: u32 = MAP | VFIO_REGION_INFO_FLAG_CAPS;

    #[test]
    fn a_region_without_capabilities_is_mapped_whole_or_not_at_all() {
        let (plain, offset) = region(&Answer::region(MAP, 0, 0x4000).0).unwrap();
        assert_eq!((plain.size, offset), (0x4000, 7 << 40));
        assert_eq!(
            (plain.mappable.len(), &plain.mappable[0]),
            (1, &(0..0x4000))
        );
        assert!(plain.readable && plain.writable && !plain.msix_mappable);
        let (ports, _) = region(&Answer::region(RW, 0, 0x20).0).unwrap();
        assert!(ports.mappable.is_empty());
        assert!(region(&Answer::region(MAP, 0, 0).0).is_none());
    }

    #[test]
    fn a_region_below_a_page_is_not_mapped() {
        let (small, _) = region(&Answer::region(MAP, 0, 0x80).0).unwrap();
        assert!(small.mappable.is_empty());
    }

    #[test]
    fn sparse_areas_leave_the_msix_table_out() {
        let answer = Answer::region(CAPS, 32, 0x1_0000)
            .cap(VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 40)
            .cap(VFIO_REGION_INFO_CAP_SPARSE_MMAP, 0)
            .u32(3)
            .u32(0)
            // Out of order; the last one sticks out of the region and starts within a page.
            .u64(0x8000)
            .u64(0x1000)
            .u64(0)
            .u64(0x2000)
            .u64(0x9800)
            .u64(0x1_0000);
        let (sparse, _) = region(&answer.0).unwrap();
        assert!(sparse.msix_mappable);
        assert_eq!(
            sparse.mappable,
            [0..0x2000, 0x8000..0x9000, 0xa000..0x1_0000]
        );
    }

    #[test]
    fn a_sparse_region_of_no_areas_is_not_mapped() {
        let answer = Answer::region(CAPS, 32, 0x1_0000).cap(VFIO_REGION_INFO_CAP_SPARSE_MMAP, 0);
        let (none, _) = region(&answer.u32(0).u32(0).0).unwrap();
        assert!(none.mappable.is_empty());
    }

    #[test]
    fn a_container_tells_page_sizes_ranges_and_entries() {
        let answer = Answer::type1(
            VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS,
            0x4020_1000,
            24,
        )
        .cap(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 40)
        .u32(65535)
        .u32(0)
        .cap(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 0)
        .u32(2)
        .u32(0)
        .u64(0)
        .u64(0xfedf_ffff)
        .u64(0xfef0_0000)
        .u64((1 << 39) - 1);
        let limits = type1_limits(&answer.0).unwrap();
        assert_eq!(
            (limits.align_bytes, limits.entries_left),
            (4096, Some(65535))
        );
        let ranges = limits.ranges.unwrap();
        assert_eq!(
            ranges[0],
            IovaRange {
                start: 0,
                last: 0xfedf_ffff
            }
        );
        assert_eq!(ranges[1].last, (1 << 39) - 1);

        let old = type1_limits(&Answer::type1(0, 0, 0).0).unwrap();
        assert_eq!(
            (old.align_bytes, old.ranges, old.entries_left),
            (4096, None, None)
        );
        let large = Answer::type1(VFIO_IOMMU_INFO_PGSIZES, 1 << 16, 0);
        assert_eq!(type1_limits(&large.0).unwrap().align_bytes, 1 << 16);
    }

    #[test]
    fn a_hot_reset_lists_devices_and_owners() {
        let answer = Answer::default().u32(0).u32(1).u32(2);
        let mut bytes = answer.u32(u32::MAX).u16(0).0;
        bytes.extend([1, 0x08]);
        let mut bytes = Answer(bytes).u32(0).u16(2).0;
        bytes.extend([3, 0x09]);
        let found = hot_reset(&bytes).unwrap();
        assert!(found.by_device && !found.all_owned);
        assert_eq!(
            (found.devices[0].owner, found.devices[0].devfn),
            (u32::MAX, 8)
        );
        assert_eq!((found.devices[1].domain, found.devices[1].bus), (2, 3));
        assert!(hot_reset(&bytes[..bytes.len() - 1]).is_none());
    }

    #[test]
    fn a_chain_that_points_back_ends() {
        let answer = Answer::region(CAPS, 32, 0x1000).cap(VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 32);
        assert!(region(&answer.0).unwrap().0.msix_mappable);
        assert_eq!(chain(&answer.0, 32).count(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), cap in 0_u32..200) {
            let _ = region(&bytes);
            let _ = type1_limits(&bytes);
            let _ = hot_reset(&bytes);
            // With flags and offsets that lead into the bytes.
            for (place, value) in [(4, CAPS), (12, cap)] {
                if let Some(field) = bytes.get_mut(place..place + 4) {
                    field.copy_from_slice(&value.to_ne_bytes());
                }
            }
            let _ = region(&bytes);
            if let Some(field) = bytes.get_mut(16..20) {
                field.copy_from_slice(&cap.to_ne_bytes());
            }
            let _ = type1_limits(&bytes);
        }

        #[test]
        fn what_is_mappable_is_whole_pages_of_the_region(
            areas in prop::collection::vec((0_u64..0x2_0000, any::<u64>().prop_map(|n| n % 0x2_0000)), 0..8),
            size in 1_u64..0x1_8000,
        ) {
            let parts = whole_pages(&areas, size);
            let mut end = None;
            for part in &parts {
                prop_assert!(part.start < part.end && part.end <= size);
                prop_assert!(part.start % PAGE == 0 && part.end % PAGE == 0);
                prop_assert!(end.is_none_or(|end| part.start > end));
                end = Some(part.end);
            }
            // A page is in a part when one area covers it whole.
            for page in (0..size / PAGE).map(|n| n * PAGE) {
                let covered = areas.iter().any(|&(o, l)| o <= page && page + PAGE <= o + l);
                let mapped = parts.iter().any(|p| p.start <= page && page < p.end);
                prop_assert!(!covered || mapped);
            }
        }
    }
}

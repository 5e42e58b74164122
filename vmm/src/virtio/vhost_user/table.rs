//! The memory that a backend has: ranges of files, which it maps too.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionInfo;

/// A region of guest memory by which another process finds it.
#[derive(Debug, Clone)]
pub struct SharedRegion {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where this process has it: by this the messages of rings name places in it. Nobody reads there for it.
    pub host_address: u64,
    /// The file it is a range of.
    pub file: Arc<File>,
    /// Where the range begins. It has the alignment of the region, so that the backend gets large entries, too.
    pub offset: u64,
}

impl SharedRegion {
    pub(super) fn message(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.gpa,
            memory_size: self.size,
            userspace_addr: self.host_address,
            mmap_offset: self.offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

/// What is to be in the backend's reach, whether one is connected or not.
#[derive(Debug, Default)]
pub(super) struct Table(Vec<SharedRegion>);

impl Table {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn regions(&self) -> &[SharedRegion] {
        &self.0
    }

    pub(super) fn add(&mut self, regions: &[SharedRegion]) {
        self.0.extend_from_slice(regions);
    }

    pub(super) fn take(&mut self, gpa: u64) -> Option<SharedRegion> {
        let index = self.0.iter().position(|region| region.gpa == gpa)?;
        Some(self.0.remove(index))
    }

    pub(super) fn messages(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.0.iter().map(SharedRegion::message).collect()
    }

    /// How a backend is told of a place in guest memory; `None` when it is not in one region.
    pub(super) fn user_address(&self, gpa: u64, len: u64) -> Option<u64> {
        let within = |region: &&SharedRegion| {
            let offset = gpa.checked_sub(region.gpa);
            offset
                .and_then(|offset| offset.checked_add(len))
                .is_some_and(|end| end <= region.size)
        };
        let region = self.0.iter().find(within)?;
        Some(region.host_address + (gpa - region.gpa))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, size: u64, host_address: u64) -> SharedRegion {
        SharedRegion {
            gpa,
            size,
            host_address,
            file: Arc::new(tempfile::tempfile().unwrap()),
            offset: 0x20_0000,
        }
    }

    #[test]
    fn places_are_named_by_region_and_never_across_two() {
        let mut table = Table::default();
        table.add(&[
            region(0, 0x20_0000, 0x7000_0000),
            region(1 << 32, 0x40_0000, 0x9000_0000),
        ]);
        assert_eq!(table.user_address(0x1000, 0x1000), Some(0x7000_1000));
        assert_eq!(table.user_address((1 << 32) + 8, 8), Some(0x9000_0008));
        assert_eq!(table.user_address(0x1f_ffff, 1), Some(0x701f_ffff));
        assert_eq!(table.user_address(0x1f_ffff, 2), None);
        assert_eq!(table.user_address(0x20_0000, 1), None);
        assert_eq!(table.user_address(u64::MAX, 2), None);
        let message = table.messages()[1];
        assert_eq!(message.mmap_offset, 0x20_0000);
        assert_eq!(message.userspace_addr, 0x9000_0000);
        assert!(table.take(0).is_some() && table.take(0).is_none());
        assert_eq!((table.len(), table.regions()[0].gpa), (1, 1 << 32));
    }
}

//! Guest memory as the devices of this process see it, for one batch of work.
//!
//! Memory can go away while it is read, and then what is read is scratch ([`super::sigbus`]). Nothing of that may reach a
//! disk, a peer or the guest. Each region has two faces for that:
//!
//! | face       | who touches it               | when the memory is gone                            | when it has been found out   |
//! |------------|------------------------------|----------------------------------------------------|------------------------------|
//! | [`Bytes`], slices | loads and stores here | scratch, and the mark is set: `read_*` are errors  | every access is an error     |
//! | addresses and slices for system calls | the kernel | `EFAULT`, never scratch                   | no address, no slice         |
//!
//! So a system call may be given guest memory (`get_host_address`, [`Snapshot::system_slices`]) without a look at a mark.
//! What was loaded is looked after in one of two ways: the `read_*` methods of [`Snapshot`] itself look after the load
//! (they come before those of [`Bytes`] wherever a `Snapshot` is at hand); who reads by slices, or has `virtio-queue` do
//! it, asks `Queue::is_torn` or [`Snapshot::check`] before anything comes of it.
//!
//! Scratch is only ever seen by reads that were under way when the memory went: from then on there are no slices.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend,
    GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection,
    GuestRegionCollectionError, GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use super::loss::{LossMark, Lost};

/// What an access says.
type Result<T> = std::result::Result<T, GuestMemoryError>;

/// One region of a snapshot.
#[derive(Debug)]
pub struct SnapshotRegion {
    /// For loads and stores of this process: scratch is put here.
    loads: GuestRegionMmap,
    /// For the kernel: system calls of this process. The same memory.
    system: GuestRegionMmap,
    mark: LossMark,
    /// Not to be stored to. Who has a slice may, so there is none: such memory is the guest's alone.
    read_only: bool,
}

impl SnapshotRegion {
    /// Two mappings of one memory, at one guest address and of one size; or one mapping twice.
    pub(super) fn new(
        loads: GuestRegionMmap,
        system: GuestRegionMmap,
        mark: LossMark,
        read_only: bool,
    ) -> Self {
        debug_assert_eq!(loads.start_addr(), system.start_addr());
        debug_assert_eq!(loads.len(), system.len());
        Self {
            loads,
            system,
            mark,
            read_only,
        }
    }

    /// Whether the guest can only load from it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it is still there.
    pub fn mark(&self) -> &LossMark {
        &self.mark
    }

    fn check(&self, at: MemoryRegionAddress, len: usize) -> Result<()> {
        if self.read_only {
            return Err(efault());
        }
        self.mark.check(at.0, len as u64).map_err(lost)
    }
}

impl GuestMemoryRegion for SnapshotRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.loads.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.loads.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    /// For a system call: memory that is gone is `EFAULT` there. Never to be loaded from.
    fn get_host_address(&self, at: MemoryRegionAddress) -> Result<*mut u8> {
        self.check(at, 1)?;
        self.system.get_host_address(at)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        GuestMemoryRegion::file_offset(&self.loads)
    }

    fn get_slice(&self, at: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>> {
        self.check(at, count)?;
        self.loads.get_slice(at, count)
    }
}

impl GuestMemoryRegionBytes for SnapshotRegion {}

fn lost(_: Lost) -> GuestMemoryError {
    efault()
}

fn efault() -> GuestMemoryError {
    GuestMemoryError::IOError(io::Error::from_raw_os_error(libc::EFAULT))
}

/// All guest memory there was when it was taken.
#[derive(Debug, Clone, Default)]
pub struct Snapshot(GuestRegionCollection<SnapshotRegion>);

impl GuestMemoryBackend for Snapshot {
    type R = SnapshotRegion;

    fn find_region(&self, address: GuestAddress) -> Option<&Self::R> {
        self.0.find_region(address)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.0.iter()
    }
}

impl Snapshot {
    /// No memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// These regions, which don't overlap and come by address; none is fine.
    pub fn of(
        regions: Vec<Arc<SnapshotRegion>>,
    ) -> std::result::Result<Self, GuestRegionCollectionError> {
        if regions.is_empty() {
            return Ok(Self::new());
        }
        GuestRegionCollection::from_arc_regions(regions).map(Self)
    }

    /// An error when a byte of the range is lost or poisoned: asked after a read, it says whether what was read is what
    /// the guest has there. What is no memory at all is not lost.
    pub fn check(&self, address: GuestAddress, len: usize) -> std::result::Result<(), Lost> {
        let (start, end) = (address.0, address.0.saturating_add(len as u64));
        let mut regions = self.0.iter();
        regions.try_for_each(|region| {
            let first = region.start_addr().0;
            let (from, to) = (start.max(first), end.min(first + region.len()));
            if from < to {
                region.mark.check(from - first, to - from)
            } else {
                Ok(())
            }
        })
    }

    /// A range for system calls: memory that is gone is `EFAULT` there. Never to be loaded from.
    pub fn system_slices(
        &self,
        address: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Result<VolatileSlice<'_>>> {
        let (mut next, mut left, mut failed) = (address, len, false);
        std::iter::from_fn(move || {
            if left == 0 || failed {
                return None;
            }
            let slice = self.system_slice(next, left);
            match &slice {
                Ok(slice) => {
                    left -= slice.len();
                    let after = next.0.checked_add(slice.len() as u64);
                    // Nothing is left when it wraps: no region reaches beyond the last address.
                    next = GuestAddress(after.unwrap_or(u64::MAX));
                }
                Err(_) => failed = true,
            }
            Some(slice)
        })
    }

    fn system_slice(&self, address: GuestAddress, most: usize) -> Result<VolatileSlice<'_>> {
        let (region, at) = self
            .to_region_addr(address)
            .ok_or(GuestMemoryError::InvalidGuestAddress(address))?;
        let room = region.len() - at.0;
        let len = usize::try_from(room).map_or(most, |room| room.min(most));
        region.check(at, len)?;
        region.system.get_slice(at, len)
    }

    /// As [`Bytes::read_slice`], and an error when the memory was lost meanwhile.
    pub fn read_slice(&self, into: &mut [u8], address: GuestAddress) -> Result<()> {
        Bytes::read_slice(self, into, address)?;
        self.check(address, into.len()).map_err(lost)
    }

    /// As [`Bytes::read_obj`], and an error when the memory was lost meanwhile.
    pub fn read_obj<T: ByteValued>(&self, address: GuestAddress) -> Result<T> {
        let value = Bytes::read_obj(self, address)?;
        self.check(address, size_of::<T>()).map_err(lost)?;
        Ok(value)
    }

    /// As [`Bytes::load`], and an error when the memory was lost meanwhile.
    pub fn load<T: AtomicAccess>(
        &self,
        address: GuestAddress,
        order: std::sync::atomic::Ordering,
    ) -> Result<T> {
        let value = Bytes::load(self, address, order)?;
        self.check(address, size_of::<T>()).map_err(lost)?;
        Ok(value)
    }

    /// This and one region more, for tests.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn with(
        &self,
        region: Arc<SnapshotRegion>,
    ) -> std::result::Result<Self, GuestRegionCollectionError> {
        self.0.insert_region(region).map(Self)
    }

    /// Anonymous memory of these places and sizes, for tests.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn from_ranges(
        ranges: &[(GuestAddress, usize)],
    ) -> std::result::Result<Self, vm_memory::mmap::FromRangesError> {
        let regions = ranges.iter().map(|(address, size)| {
            let loads = GuestRegionMmap::from_range(*address, *size, None)?;
            let system = GuestRegionMmap::with_arc(loads.get_mmap(), *address)
                .ok_or(vm_memory::mmap::FromRangesError::InvalidGuestRegion)?;
            Ok(Arc::new(SnapshotRegion::new(
                loads,
                system,
                LossMark::new(),
                false,
            )))
        });
        let regions: std::result::Result<Vec<_>, vm_memory::mmap::FromRangesError> =
            regions.collect();
        Ok(Self::of(regions?)?)
    }
}

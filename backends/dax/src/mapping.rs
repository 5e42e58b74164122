//! A locked range of a device, mapped.
//!
//! The mapping owns its lock and the lock owns its share of the device, so memory is unmapped before the range is
//! let go, and the range before the device is closed.
//!
//! A device can go away at any time, also between open and map: both ends are read through the kernel before a
//! mapping is handed out, so a vanished device is an error here and not a SIGBUS later. After that, a touch can
//! still fault; that is the owner's to handle.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::device::DeviceFacts;
use crate::lock::RangeLock;
use crate::pages::{MapStep, Pages, Part};
use crate::range::DaxRange;
use crate::size::ByteSize;

/// A range of device-dax memory in this process's address space.
///
/// Shared, readable and writable, left out of core dumps and of forked children. The address is a multiple of the
/// device's alignment, and so is the offset: the host can use 2M and 1G entries.
///
/// Dropping it unmaps, then releases the range. [`DaxMapping::unmap`] does the same and says when it fails.
#[derive(Debug)]
pub struct DaxMapping {
    // Dropped in this order: munmap, unlock, close.
    pages: Pages,
    lock: RangeLock,
}

/// Whether a mapping's memory is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Both ends of the range can be read.
    Present,
    /// An end can't be read: the device is gone, or the page there is poisoned.
    Gone,
}

/// Why a probe has no answer.
#[derive(Debug, Error)]
#[error("cannot probe {range} of {}: process_vm_readv failed; is it forbidden by a seccomp filter?", path.display())]
pub struct ProbeError {
    /// The device.
    pub path: PathBuf,
    /// The range mapped.
    pub range: DaxRange,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// Why a range was not mapped.
#[derive(Debug, Error)]
pub enum MapError {
    /// No address space for the range and its alignment.
    #[error(
        "no address space for {range} of {} aligned to {align}: raise the limit (`ulimit -v unlimited`)",
        path.display()
    )]
    AddressSpace {
        /// The device.
        path: PathBuf,
        /// The range asked for.
        range: DaxRange,
        /// The device's alignment.
        align: ByteSize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device was there when it was opened and is not any more.
    #[error(
        "{} vanished while {range} of it was mapped: `daxctl list -Di` says what is left",
        path.display()
    )]
    Vanished {
        /// The device.
        path: PathBuf,
        /// The range asked for.
        range: DaxRange,
    },
    /// The kernel refused the mapping.
    #[error("cannot map {range} of {}", path.display())]
    Refused {
        /// The device.
        path: PathBuf,
        /// The range asked for.
        range: DaxRange,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The memory is mapped, but whether it is there can't be told.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// Why a mapping was not taken down.
#[derive(Debug, Error)]
#[error("cannot unmap {range} of {}", path.display())]
pub struct UnmapError {
    /// The device.
    pub path: PathBuf,
    /// The range that stays mapped.
    pub range: DaxRange,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl DaxMapping {
    pub(crate) fn new(lock: RangeLock) -> Result<Self, MapError> {
        let pages = map_pages(&lock)?;
        let (path, range) = (lock.device().path.clone(), lock.range());
        let mapping = Self { pages, lock };
        match mapping.probe()? {
            Probe::Present => Ok(mapping),
            Probe::Gone => Err(MapError::Vanished { path, range }),
        }
    }

    /// The same memory once more, at another address. Not to outlive this mapping: the range is locked only as long.
    pub fn again(&self) -> Result<Pages, MapError> {
        map_pages(&self.lock)
    }

    /// The first byte. The memory can vanish under any access; use volatile accesses only.
    pub fn as_ptr(&self) -> *mut u8 {
        self.pages.as_ptr()
    }

    /// The mapping's length in bytes, never zero.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// The range of the device that is mapped.
    pub fn range(&self) -> DaxRange {
        self.lock.range()
    }

    /// The path of the device.
    pub fn path(&self) -> &Path {
        &self.lock.device().path
    }

    /// The name of the pool that the range was taken from, if it was.
    pub fn pool(&self) -> Option<&str> {
        self.lock.pool()
    }

    /// The open device. A clone keeps the device open, and with it the range locked, when the mapping is gone.
    pub fn file(&self) -> &Arc<File> {
        &self.lock.device().file
    }

    /// Whether the memory can be stored to: not of a device that is lent for reading.
    pub fn is_writable(&self) -> bool {
        self.lock.device().writable
    }

    /// What was known of the device when it was opened.
    pub fn facts(&self) -> &DeviceFacts {
        &self.lock.device().facts
    }

    pub(crate) fn pages(&self) -> &Pages {
        &self.pages
    }

    /// The device's alignment.
    pub(crate) fn align(&self) -> usize {
        // It is mapped by it, so it fits.
        usize::try_from(self.facts().align_bytes).unwrap_or(self.len())
    }

    /// Reads the first and the last byte through the kernel, which answers where a load would get SIGBUS.
    pub fn probe(&self) -> Result<Probe, ProbeError> {
        for offset in [0, self.len() - 1] {
            match self.pages.can_read(offset) {
                Ok(true) => {}
                Ok(false) => return Ok(Probe::Gone),
                Err(source) => {
                    return Err(ProbeError {
                        path: self.lock.device().path.clone(),
                        range: self.range(),
                        source,
                    });
                }
            }
        }
        Ok(Probe::Present)
    }

    /// Enters every page into this process's page table, so that no later access faults. Changes no byte. The memory has to be
    /// writable.
    pub fn prefault(&self) -> Result<(), MapError> {
        let (path, range) = (self.lock.device().path.clone(), self.range());
        self.pages
            .populate()
            .map_err(|source| match source.raw_os_error() {
                // What a fault beyond a device that is gone, or on a poisoned page, is turned into.
                Some(libc::EFAULT | libc::EHWPOISON) => MapError::Vanished { path, range },
                _ => MapError::Refused {
                    path,
                    range,
                    source,
                },
            })
    }

    /// Takes the mapping down and gives its lock back; the range stays held until the lock is released or dropped.
    /// A failure hands the mapping back.
    pub fn unmap(self) -> Result<RangeLock, (Self, UnmapError)> {
        let Self { pages, lock } = self;
        match pages.unmap() {
            Ok(()) => Ok(lock),
            Err((pages, source)) => {
                let error = UnmapError {
                    path: lock.device().path.clone(),
                    range: lock.range(),
                    source,
                };
                Err((Self { pages, lock }, error))
            }
        }
    }
}

fn map_pages(lock: &RangeLock) -> Result<Pages, MapError> {
    let (device, range) = (lock.device(), lock.range());
    let (path, align) = (device.path.clone(), device.facts.align_bytes);
    let part = match (usize::try_from(range.len()), usize::try_from(align)) {
        (Ok(len), Ok(align)) => Part {
            offset: range.offset(),
            len,
            align,
            writable: device.writable,
        },
        (Err(_), _) | (_, Err(_)) => {
            return Err(MapError::AddressSpace {
                path,
                range,
                align: ByteSize(align),
                source: io::Error::from_raw_os_error(libc::EOVERFLOW),
            });
        }
    };
    Pages::map(&device.file, part).map_err(|step| match step {
        MapStep::Reserve(source) => MapError::AddressSpace {
            path: path.clone(),
            range,
            align: ByteSize(align),
            source,
        },
        // What device-dax answers once its driver has been unbound.
        MapStep::Map(source) if source.raw_os_error() == Some(libc::ENXIO) => MapError::Vanished {
            path: path.clone(),
            range,
        },
        MapStep::Map(source) | MapStep::Advise(source) => MapError::Refused {
            path: path.clone(),
            range,
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::DeviceFile;
    use crate::{DaxDevice, LockError, LockKind};

    const M: u64 = 1 << 20;

    fn map(device: &DaxDevice, offset: u64, size: u64) -> Result<DaxMapping, MapError> {
        let range = device.range(Some(offset), Some(size)).unwrap();
        device.lock(range, LockKind::Exclusive).unwrap().map()
    }

    #[test]
    fn a_mapping_is_aligned_shared_and_at_its_offset() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        let device = file.open();
        let mapping = map(&device, 2 * M, 4 * M).unwrap();
        assert_eq!(mapping.as_ptr() as u64 % (2 * M), 0);
        assert_eq!(mapping.len() as u64, 4 * M);
        assert_eq!(mapping.range().offset(), 2 * M);
        assert_eq!(mapping.probe().unwrap(), Probe::Present);
        file.write_at(b"guest", 2 * M);
        let mut bytes = [0; 5];
        file.read_mapped(&mapping, &mut bytes);
        assert_eq!(&bytes, b"guest");
    }

    #[test]
    fn the_range_is_held_until_after_the_unmap() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        let (device, other) = (file.open(), file.open());
        let whole = other.range(None, None).unwrap();
        let mapping = map(&device, 0, 2 * M).unwrap();
        let refused = other.lock(whole, LockKind::Exclusive).unwrap_err();
        assert!(matches!(refused, LockError::InUse { .. }));
        let lock = mapping.unmap().unwrap();
        other.lock(whole, LockKind::Exclusive).unwrap_err();
        lock.release().unwrap();
        drop(other.lock(whole, LockKind::Exclusive).unwrap());

        drop(map(&device, 0, 2 * M).unwrap());
        drop(other.lock(whole, LockKind::Exclusive).unwrap());
    }

    #[test]
    fn the_last_owner_closes_the_device() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        let device = file.open();
        let mapping = map(&device, 0, 2 * M).unwrap();
        let open = Arc::downgrade(mapping.file());
        drop(device);
        assert!(open.upgrade().is_some());
        drop(mapping);
        assert!(open.upgrade().is_none());
    }

    #[test]
    fn memory_that_vanished_between_open_and_map_is_an_error_and_frees_the_range() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        let device = file.open();
        file.truncate(4 * M);
        let error = map(&device, 2 * M, 4 * M).unwrap_err();
        assert!(matches!(error, MapError::Vanished { .. }), "{error:?}");
        assert!(error.to_string().contains("4M at offset 2M"), "{error}");
        drop(map(&device, 0, 4 * M).unwrap());
    }

    #[test]
    fn memory_that_vanishes_later_shows_in_the_probe() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        let device = file.open();
        let mapping = map(&device, 0, 8 * M).unwrap();
        file.truncate(6 * M);
        assert_eq!(mapping.probe().unwrap(), Probe::Gone);
        file.truncate(8 * M);
        assert_eq!(mapping.probe().unwrap(), Probe::Present);
    }

    #[test]
    fn mappings_can_be_shared_between_threads() {
        fn threads<T: Send + Sync>() {}
        threads::<DaxMapping>();
    }
}

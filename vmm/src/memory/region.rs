//! A range of guest-physical memory and the host memory behind it.
//!
//! A region is made once, from memory that is mapped already, and ends with [`Region::release`]. While it is attached
//! to a machine it is shared with snapshots (one more holder each); it can be released only when one holder is left.

use std::sync::Arc;

use daxhund_dax::DaxMapping;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestRegionMmap};

use super::dma::{Dma, DmaRefused};
use super::layout::Gpa;
use super::mapping::{HostMapping, MapMemoryError};

/// The host memory behind a region.
#[derive(Debug)]
pub enum Mapping {
    /// A range of a device-dax device, locked against other users.
    Dax(DaxMapping),
    /// Anything else.
    Host(HostMapping),
}

impl Mapping {
    /// First host address.
    pub fn as_ptr(&self) -> *mut u8 {
        match self {
            Self::Dax(mapping) => mapping.as_ptr(),
            Self::Host(mapping) => mapping.as_ptr(),
        }
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Dax(mapping) => mapping.len() as u64,
            Self::Host(mapping) => mapping.len() as u64,
        }
    }

    fn file_offset(&self) -> Option<FileOffset> {
        match self {
            Self::Dax(mapping) => Some(FileOffset::from_arc(
                Arc::clone(mapping.file()),
                mapping.range().offset(),
            )),
            Self::Host(mapping) => mapping
                .file()
                .map(|(file, offset)| FileOffset::from_arc(Arc::clone(file), offset)),
        }
    }

    /// Unmaps it, unlocks it and closes its file. On failure it comes back.
    pub fn release(self) -> Result<(), (Self, ReleaseError)> {
        match self {
            Self::Dax(mapping) => match mapping.unmap() {
                Err((mapping, error)) => Err((Self::Dax(mapping), ReleaseError::Dax(error))),
                // The memory is no longer ours to touch; closing the descriptor ends the lock in any case.
                Ok(lock) => {
                    if let Err((_, error)) = lock.release() {
                        tracing::warn!(error = %error, "the range's lock ends with its descriptor");
                    }
                    Ok(())
                }
            },
            Self::Host(mapping) => mapping
                .unmap()
                .map_err(|(mapping, e)| (Self::Host(mapping), ReleaseError::Host(e))),
        }
    }
}

/// A region could not be made.
#[derive(Debug, Error)]
#[error("memory zone {zone} can't be guest memory at {:#x}", gpa.0)]
pub struct RegionError {
    /// Zone the memory belongs to.
    pub zone: String,
    /// Where it was to be.
    pub gpa: Gpa,
    /// Why.
    #[source]
    pub source: vm_memory::mmap::MmapRegionError,
}

/// A region could not be given up.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// Somebody else still uses it.
    #[error("{0} other holder(s) of the region are left")]
    Held(usize),
    /// Device-dax memory could not be unmapped.
    #[error("device-dax memory can't be unmapped")]
    Dax(#[source] daxhund_dax::UnmapError),
    /// Other memory could not be unmapped.
    #[error("guest memory can't be unmapped")]
    Host(#[source] MapMemoryError),
}

/// A range of guest memory.
#[derive(Debug)]
pub struct Region {
    zone: String,
    gpa: Gpa,
    /// What devices access; does not own the mapping. Declared before it, so that it is dropped first.
    guest: Arc<GuestRegionMmap>,
    mapping: Mapping,
    dma: Dma,
}

impl Region {
    /// Places mapped memory at a guest-physical address.
    pub fn new(zone: &str, gpa: Gpa, mapping: Mapping) -> Result<Self, (Mapping, RegionError)> {
        let failed = |source| RegionError {
            zone: zone.to_owned(),
            gpa,
            source,
        };
        let Ok(size) = usize::try_from(mapping.size()) else {
            return Err((
                mapping,
                failed(vm_memory::mmap::MmapRegionError::InvalidOffsetLength),
            ));
        };
        // SAFETY: the mapping is `size` bytes long and lives in the same struct; it is unmapped only by `release`,
        // which first sees that no other holder of `guest` is left, or by dropping the struct, which drops `guest`
        // first and which `memory::Ram` does only after that check.
        let builder =
            unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(mapping.as_ptr()) };
        let dma = Dma::by_default(&mapping);
        let builder = builder
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED);
        let builder = match mapping.file_offset() {
            Some(file_offset) => builder.with_file_offset(file_offset),
            None => builder,
        };
        match builder.build() {
            Err(source) => Err((mapping, failed(source))),
            Ok(region) => match GuestRegionMmap::new(region, gpa.into()) {
                None => Err((
                    mapping,
                    failed(vm_memory::mmap::MmapRegionError::InvalidOffsetLength),
                )),
                Some(guest) => Ok(Self {
                    zone: zone.to_owned(),
                    gpa,
                    guest: Arc::new(guest),
                    mapping,
                    dma,
                }),
            },
        }
    }

    /// Id of the zone it is part of.
    pub fn zone(&self) -> &str {
        &self.zone
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// Address after the last.
    pub fn end(&self) -> Gpa {
        Gpa(self.gpa.0 + self.size())
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.mapping.size()
    }

    /// First host address.
    pub fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// The memory behind it.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// How passed-through devices and this memory stand.
    pub fn dma(&self) -> Dma {
        self.dma
    }

    /// Lets devices reach it or not; `None` is as its kind of memory wants it. Before it is attached to anything.
    pub fn with_dma(mut self, asked: Option<bool>) -> Result<Self, (Self, DmaRefused)> {
        match self.dma.as_asked(asked) {
            Ok(dma) => {
                self.dma = dma;
                Ok(self)
            }
            Err(error) => Err((self, error)),
        }
    }

    /// For a snapshot; one more holder while it lives.
    pub fn guest_region(&self) -> Arc<GuestRegionMmap> {
        Arc::clone(&self.guest)
    }

    /// How many hold the region, this value included.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.guest)
    }

    /// The undo of [`Region::new`] and of the mapping. On failure the region comes back.
    pub fn release(self) -> Result<(), Box<(Self, ReleaseError)>> {
        let others = self.holders() - 1;
        if others > 0 {
            return Err(Box::new((self, ReleaseError::Held(others))));
        }
        let Self {
            zone,
            gpa,
            guest,
            mapping,
            dma,
        } = self;
        mapping.release().map_err(|(mapping, error)| {
            let region = Self {
                zone,
                gpa,
                guest,
                mapping,
                dma,
            };
            Box::new((region, error))
        })
    }
}

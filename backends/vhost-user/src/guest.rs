//! Guest memory as the frontend has shared it, guarded: a touch of what has gone away is survived and marked.
//!
//! The vhost crate maps what the frontend hands over. Here each of those mappings is put into the table of the SIGBUS
//! handler ([`daxhund_dax::sigbus`]) for as long as it is used: a frontend's memory can be device-dax that the host takes
//! away, or a file that the frontend cuts off. From then on the range is an error to every access.

#![allow(unsafe_code, reason = "guards the mappings that the vhost crate makes")]

use std::sync::Arc;

use daxhund_dax::loss::{LossMark, Lost};
use daxhund_dax::sigbus::{Guard, GuardError, Guarded, Touch};
use thiserror::Error;
use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionCollectionError,
    GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

const PAGE: usize = 4096;

/// What the frontend shares can't be used.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The kernel or the table of mappings refuses it.
    #[error("guest memory at {at:#x} can't be guarded against going away")]
    Guard {
        /// Guest-physical address.
        at: u64,
        /// Why.
        #[source]
        source: GuardError,
    },
    /// It wraps round.
    #[error("guest memory at {at:#x} reaches beyond the last address")]
    Wraps {
        /// Guest-physical address.
        at: u64,
    },
    /// The regions make no address space.
    #[error("guest memory is no address space")]
    Space(#[source] GuestRegionCollectionError),
}

/// One range.
#[derive(Debug)]
pub struct Region {
    mark: LossMark,
    /// Declared before the mapping: dropped first.
    _guard: Guard,
    mapped: GuestRegionMmap,
}

impl Region {
    fn new(theirs: &GuestRegionMmap) -> Result<Self, ShareError> {
        let at = theirs.start_addr();
        let mapping = theirs.get_mmap();
        let mark = LossMark::new();
        let guarded = Guarded {
            start: mapping.as_ptr() as usize,
            // The kernel maps whole pages.
            len: mapping.size().next_multiple_of(PAGE),
            align: PAGE,
            touch: Touch::Cpu,
        };
        // SAFETY: the range is one mapping, made by the vhost crate and owned by `mapping`, a share of which is kept in the
        // same struct and dropped after the guard: so all of it is mapped as long as the guard is armed. Nobody makes a
        // Rust reference into guest memory, neither here nor in the vhost crates.
        let guard = unsafe { Guard::new(guarded, mark.clone()) };
        let guard = guard.map_err(|source| ShareError::Guard { at: at.0, source })?;
        let mapped =
            GuestRegionMmap::with_arc(mapping, at).ok_or(ShareError::Wraps { at: at.0 })?;
        Ok(Self {
            mark,
            _guard: guard,
            mapped,
        })
    }

    fn is(&self, theirs: &GuestRegionMmap) -> bool {
        Arc::ptr_eq(&self.mapped.get_mmap(), &theirs.get_mmap())
            && self.start_addr() == theirs.start_addr()
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapped.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapped.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapped.file_offset()
    }

    fn get_slice(
        &self,
        at: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        self.mark.check(at.0, count as u64).map_err(lost)?;
        self.mapped.get_slice(at, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

fn lost(_: Lost) -> GuestMemoryError {
    GuestMemoryError::IOError(std::io::Error::from_raw_os_error(libc::EFAULT))
}

/// All that the frontend shares at the moment.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
    space: GuestRegionCollection<Region>,
}

impl GuestMemory {
    /// What the frontend shares now, with the guards of what it shared before.
    pub fn following(before: &Self, now: &GuestMemoryMmap) -> Result<Self, ShareError> {
        let mut regions = Vec::new();
        for theirs in now.iter() {
            let kept = before.regions.iter().find(|ours| ours.is(theirs));
            regions.push(match kept {
                Some(ours) => Arc::clone(ours),
                None => Arc::new(Region::new(theirs)?),
            });
        }
        let space = if regions.is_empty() {
            GuestRegionCollection::default()
        } else {
            GuestRegionCollection::from_arc_regions(regions.clone()).map_err(ShareError::Space)?
        };
        Ok(Self { regions, space })
    }
}

impl GuestMemoryBackend for GuestMemory {
    type R = Region;

    fn find_region(&self, address: GuestAddress) -> Option<&Self::R> {
        self.space.find_region(address)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.space.iter()
    }
}

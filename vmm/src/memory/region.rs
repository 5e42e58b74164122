//! A range of guest-physical memory and the host memory behind it.
//!
//! A region is made once, from memory that is mapped already, and ends with [`Region::release`]. While it is attached
//! to a machine it is shared with snapshots (one more holder each); it can be released only when one holder is left.

use std::fs::File;
use std::sync::Arc;

use daxhund_dax::{DaxMapping, Pages};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestRegionMmap};

use super::dma::{Dma, DmaRefused};
use super::layout::Gpa;
use super::loss::LossMark;
use super::mapping::{HostMapping, MapMemoryError, Source};
use super::sigbus::{Guard, GuardError, Guarded, Touch};
use super::snapshot::SnapshotRegion;

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

    /// What it can be split at, in bytes.
    fn align(&self) -> usize {
        match self {
            Self::Dax(mapping) => {
                usize::try_from(mapping.facts().align_bytes).unwrap_or_else(|_| mapping.len())
            }
            Self::Host(mapping) => mapping.page_bytes(),
        }
    }

    /// The same memory once more, where that can be had.
    fn again(&self) -> Result<Option<Again>, UnfitMemory> {
        match self {
            Self::Dax(mapping) => {
                let again = mapping
                    .again()
                    .map_err(|e| UnfitMemory::DaxAgain(Box::new(e)))?;
                Ok(Some(Again::Dax(again)))
            }
            Self::Host(mapping) => {
                // Huge pages of any kind start at multiples of their size.
                let align = (mapping.page_bytes() as u64).max(2 << 20);
                let again = mapping
                    .again(align)
                    .map_err(|e| UnfitMemory::HostAgain(Box::new(e)))?;
                Ok(again.map(Again::Host))
            }
        }
    }

    /// Whether stores to it are errors.
    fn is_read_only(&self) -> bool {
        match self {
            Self::Dax(mapping) => !mapping.is_writable(),
            Self::Host(mapping) => mapping.is_read_only(),
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

/// A second mapping of a region's memory, for this process's own loads and stores. Scratch is put there when the memory
/// goes away: not where KVM, a device of the host or a system call could find it.
#[derive(Debug)]
enum Again {
    Dax(Pages),
    Host(HostMapping),
}

impl Again {
    fn as_ptr(&self) -> *mut u8 {
        match self {
            Self::Dax(pages) => pages.as_ptr(),
            Self::Host(mapping) => mapping.as_ptr(),
        }
    }

    fn unmap(self) -> Result<(), (Self, ReleaseError)> {
        match self {
            Self::Dax(pages) => pages
                .unmap()
                .map_err(|(pages, e)| (Self::Dax(pages), ReleaseError::Again(e))),
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
    pub source: UnfitMemory,
}

/// Why memory can't be a region.
#[derive(Debug, Error)]
pub enum UnfitMemory {
    /// The range does not fit the address space.
    #[error(transparent)]
    Range(vm_memory::mmap::MmapRegionError),
    /// Device-dax memory is not to be had a second time.
    #[error(transparent)]
    DaxAgain(Box<daxhund_dax::MapError>),
    /// Other memory is not.
    #[error(transparent)]
    HostAgain(Box<MapMemoryError>),
    /// Its loss could not be survived.
    #[error(transparent)]
    Unguarded(#[from] GuardError),
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
    /// Its second mapping could not be unmapped.
    #[error("the second mapping of device-dax memory can't be unmapped")]
    Again(#[source] std::io::Error),
    /// Other memory could not be unmapped.
    #[error("guest memory can't be unmapped")]
    Host(#[source] MapMemoryError),
}

/// A range of guest memory.
#[derive(Debug)]
pub struct Region {
    zone: String,
    gpa: Gpa,
    /// What devices access; does not own the mappings. Declared before them, so that it is dropped first.
    guest: Arc<SnapshotRegion>,
    faces: Box<Faces>,
    mapping: Mapping,
    dma: Dma,
}

/// Both mappings' guards, and the second mapping. Declared in the order in which they are to go.
#[derive(Debug)]
struct Faces {
    mark: LossMark,
    loads: Guard,
    /// `None`: there is one mapping for all.
    system: Option<Guard>,
    again: Option<Again>,
}

impl Faces {
    fn disarm(&self) {
        self.loads.disarm();
        if let Some(system) = &self.system {
            system.disarm();
        }
    }

    /// # Safety
    /// Both mappings are mapped, as they were when the guards were made.
    unsafe fn arm(&self) {
        // SAFETY: by this function's contract.
        unsafe { self.loads.arm() };
        if let Some(system) = &self.system {
            // SAFETY: as above.
            unsafe { system.arm() };
        }
    }
}

impl Region {
    /// Places mapped memory at a guest-physical address.
    pub fn new(zone: &str, gpa: Gpa, mapping: Mapping) -> Result<Self, (Mapping, RegionError)> {
        match Self::faces(gpa, &mapping) {
            Ok((guest, faces)) => Ok(Self {
                zone: zone.to_owned(),
                gpa,
                guest: Arc::new(guest),
                faces: Box::new(faces),
                dma: Dma::by_default(&mapping),
                mapping,
            }),
            Err(source) => {
                let error = RegionError {
                    zone: zone.to_owned(),
                    gpa,
                    source,
                };
                Err((mapping, error))
            }
        }
    }

    /// What devices access, and what survives its loss. Both are to go before the mapping.
    fn faces(gpa: Gpa, mapping: &Mapping) -> Result<(SnapshotRegion, Faces), UnfitMemory> {
        let invalid = || UnfitMemory::Range(vm_memory::mmap::MmapRegionError::InvalidOffsetLength);
        let size = usize::try_from(mapping.size()).map_err(|_| invalid())?;
        let again = mapping.again()?;
        let system = mapping.as_ptr();
        let loads = again.as_ref().map_or(system, Again::as_ptr);
        let face = |start: *mut u8| {
            // SAFETY: both mappings are `size` bytes long and live in the same struct as what is made here; they are
            // unmapped only by `release`, which first sees that no other holder of `guest` is left and that nobody
            // gets at it afterwards, or by dropping the struct, which drops `guest` first and which `memory::Ram` does
            // only after that check.
            let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(start) };
            let builder = builder
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED);
            let builder = match mapping.file_offset() {
                Some(file_offset) => builder.with_file_offset(file_offset),
                None => builder,
            };
            let region = builder.build().map_err(UnfitMemory::Range)?;
            GuestRegionMmap::new(region, gpa.into()).ok_or_else(invalid)
        };
        let mark = LossMark::new();
        let guest = SnapshotRegion::new(
            face(loads)?,
            face(system)?,
            mark.clone(),
            mapping.is_read_only(),
        );
        let guard = |start: *mut u8, touch| {
            let guarded = Guarded {
                start: start as usize,
                len: size,
                align: mapping.align(),
                touch,
            };
            // SAFETY: the range is one of the two mappings, which are unmapped only after the guards are disarmed
            // (`release`) or dropped (declared before them). There is never a Rust reference into guest memory.
            unsafe { Guard::new(guarded, mark.clone()) }
        };
        let loads = guard(loads, Touch::Cpu)?;
        let system = match &again {
            Some(_) => Some(guard(system, Touch::Kernel)?),
            None => None,
        };
        let faces = Faces {
            mark: mark.clone(),
            loads,
            system,
            again,
        };
        Ok((guest, faces))
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

    /// First host address, for the kernel: KVM, DMA. There is never scratch behind it where memory can go away.
    pub fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// The memory behind it.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Whether the guest can only load from it, and nobody else reaches it.
    pub fn is_read_only(&self) -> bool {
        self.mapping.is_read_only()
    }

    /// Whether it is still there.
    pub fn mark(&self) -> &LossMark {
        &self.faces.mark
    }

    /// Where in the region a host address is, if it is, by whichever of its mappings; for what the SIGBUS handler noted.
    pub fn offset_of(&self, host_address: u64) -> Option<u64> {
        let again = self.faces.again.as_ref().map(|again| again.as_ptr() as u64);
        [Some(self.host_address()), again]
            .into_iter()
            .flatten()
            .filter_map(|start| host_address.checked_sub(start))
            .find(|offset| *offset < self.size())
    }

    /// The range of a file by which another process can map this memory; `None`: it is private to this one.
    pub fn shared_file(&self) -> Option<(Arc<File>, u64)> {
        let is_private = match &self.mapping {
            Mapping::Dax(_) => false,
            Mapping::Host(host) => {
                matches!(
                    host.source(),
                    Source::Anonymous { .. } | Source::File { shared: false, .. }
                )
            }
        };
        if is_private {
            return None;
        }
        let file_offset = self.mapping.file_offset()?;
        Some((Arc::clone(file_offset.arc()), file_offset.start()))
    }

    /// How passed-through devices and this memory stand.
    pub fn dma(&self) -> Dma {
        self.dma
    }

    /// Lets devices reach it or not; `None` is as its kind of memory wants it. Before it is attached to anything.
    /// Devices write: what can only be read is never in their reach.
    pub fn with_dma(mut self, asked: Option<bool>) -> Result<Self, (Self, DmaRefused)> {
        let asked = if self.is_read_only() {
            Some(false)
        } else {
            asked
        };
        match self.dma.as_asked(asked) {
            Ok(dma) => {
                self.dma = dma;
                Ok(self)
            }
            Err(error) => Err((self, error)),
        }
    }

    /// For a snapshot; one more holder while it lives.
    pub fn guest_region(&self) -> Arc<SnapshotRegion> {
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
            mut faces,
            mapping,
            dma,
        } = self;
        faces.disarm();
        let unmapped = faces.again.take().map_or(Ok(()), Again::unmap);
        let (mapping, error) = if let Err((again, error)) = unmapped {
            faces.again = Some(again);
            // SAFETY: the second mapping is back, as it was, and the first was left alone.
            unsafe { faces.arm() };
            (mapping, error)
        } else {
            // Nobody gets at it any more: where loads went is gone, whatever comes of the rest.
            faces.mark.lose();
            match mapping.release() {
                Ok(()) => return Ok(()),
                Err(failed) => failed,
            }
        };
        let region = Self {
            zone,
            gpa,
            guest,
            faces,
            mapping,
            dma,
        };
        Err(Box::new((region, error)))
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

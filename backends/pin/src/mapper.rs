//! One trait for "make this memory reachable by devices and hold it".

use std::fmt;
use std::io;
use std::time::Duration;

use thiserror::Error;

/// What kind of memory is to be reached. It decides what the kernel charges and whether it can be held at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaMemory {
    /// device-dax: pinned and never charged by type1, charged by iommufd.
    DeviceDax,
    /// Anonymous memory and memfds.
    Anonymous,
    /// hugetlb pages.
    Hugetlb,
    /// A file on a file system, shared.
    File,
    /// A file on a file system mounted with DAX: cannot be held.
    FsDax,
    /// Registers of another device (a BAR): nothing is pinned, and the IOMMU may refuse.
    Registers,
}

/// Memory that devices are to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaRequest<'a> {
    /// Name in messages.
    pub name: &'a str,
    /// First I/O virtual address: guest-physical.
    pub iova: u64,
    /// First host address.
    pub host_address: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub memory: DmaMemory,
}

/// Proof that a range is reachable; goes back to [`DmaMapper::unmap`].
#[derive(Debug)]
#[must_use = "a lease that is forgotten leaves the memory reachable by devices"]
pub struct DmaLease {
    /// First I/O virtual address.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
    /// What it is.
    pub memory: DmaMemory,
    /// How long the map took.
    pub took: Duration,
}

/// What devices reach now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DmaFacts {
    /// Ranges that are mapped.
    pub ranges: usize,
    /// Bytes of memory, registers not counted.
    pub pinned_bytes: u64,
    /// Of them, bytes charged against RLIMIT_MEMLOCK.
    pub charged_bytes: u64,
}

/// Memory can't be made reachable.
#[derive(Debug, Error)]
pub enum MapError {
    /// The kernel refused.
    #[error("the IOMMU does not take {name} at {iova:#x} ({size:#x} bytes)")]
    Refused {
        /// Name of the memory.
        name: String,
        /// Where it was to be.
        iova: u64,
        /// Length in bytes.
        size: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Memory that devices still reach.
#[derive(Debug, Error)]
pub enum UnmapError {
    /// The kernel refused.
    #[error("the IOMMU does not let go of {iova:#x} ({size:#x} bytes)")]
    Refused {
        /// First address.
        iova: u64,
        /// Length in bytes.
        size: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Less was unmapped than was mapped.
    #[error("the IOMMU let go of {unmapped:#x} bytes at {iova:#x} instead of {size:#x}")]
    Short {
        /// First address.
        iova: u64,
        /// Length in bytes.
        size: u64,
        /// What it let go of.
        unmapped: u64,
    },
}

/// An address space of devices. Thread-safe: maps may run in parallel where the kernel lets them.
pub trait DmaMapper: fmt::Debug + Send + Sync {
    /// Makes memory reachable, and pins it. On an error nothing of it is.
    ///
    /// The caller keeps the host memory mapped until [`DmaMapper::unmap`] has succeeded.
    fn map(&self, request: &DmaRequest<'_>) -> Result<DmaLease, MapError>;
    /// The undo. On an error the lease comes back and the memory counts as reachable.
    fn unmap(&self, lease: DmaLease) -> Result<(), (DmaLease, UnmapError)>;
    /// What is mapped now.
    fn facts(&self) -> DmaFacts;
}

//! One trait for "make this memory reachable by devices and hold it".

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

use crate::limits::{Hole, IovaRange};
use crate::memlock::{AccountError, Shortage};
use crate::size::ByteSize;
use crate::space::SpaceKind;

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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DmaFacts {
    /// Ranges that are mapped.
    pub ranges: usize,
    /// Bytes of memory, registers not counted.
    pub pinned_bytes: u64,
    /// Of them, bytes charged against `RLIMIT_MEMLOCK`.
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
    /// The kernel never holds memory of this kind for devices.
    #[error(
        "{name} is a file on an fs-dax file system, which devices can't reach: the kernel refuses to pin it for long \
         (EOPNOTSUPP); make the namespace a device (`ndctl create-namespace -f -e NAMESPACE -m devdax`, which erases it) \
         or run the guest without passed-through devices"
    )]
    FsDax {
        /// Name of the memory.
        name: String,
    },
    /// The file system of a file does not let the kernel hold its pages.
    #[error(
        "{name} is a file that the kernel does not pin for devices (since Linux 6.5: a shared file on a file system that \
         tracks dirty pages): use device-dax, hugetlbfs, or a file on tmpfs (`mount -t tmpfs tmpfs DIR`)"
    )]
    FileNotPinned {
        /// Name of the memory.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The memory went away while it was pinned.
    #[error(
        "{name} vanished while it was pinned for devices: `daxctl list -Di` says what is left of it"
    )]
    Vanished {
        /// Name of the memory.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Registers of another device are out of this address space's reach. The guest works without: only transfers from
    /// device to device fail.
    #[error(
        "the registers {name} at {iova:#x} can't be reached by other devices: the kernel refuses to map them with \
         {kind}{}", without_iommufd(*kind)
    )]
    Registers {
        /// Name of the registers.
        name: String,
        /// Where they were to be.
        iova: u64,
        /// Kind of the address space.
        kind: SpaceKind,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is no address space before there is a device.
    #[error(
        "{name} can't be mapped for devices: there is none yet; attach a device first, its IOMMU decides what can be \
         mapped"
    )]
    NoDevice {
        /// Name of the memory.
        name: String,
    },
    /// A size of nothing, or addresses that wrap around.
    #[error("{name}: {size:#x} bytes at {iova:#x} are no range of addresses: ask for one that is")]
    NoRange {
        /// Name of the memory.
        name: String,
        /// Where it was to be.
        iova: u64,
        /// Length in bytes.
        size: u64,
    },
    /// The IOMMU maps in larger steps.
    #[error(
        "{name}: its {what} {value:#x} is not a multiple of {align}, the page size of the IOMMU: place it at a multiple"
    )]
    Misaligned {
        /// Name of the memory.
        name: String,
        /// Which number.
        what: &'static str,
        /// The number.
        value: u64,
        /// What it has to be a multiple of.
        align: ByteSize,
    },
    /// A part of the range can't be mapped.
    #[error("{name} can't be mapped for devices at {range}: {hole}")]
    Hole {
        /// Name of the memory.
        name: String,
        /// The range asked for.
        range: IovaRange,
        /// What is in the way.
        hole: Hole,
    },
    /// All entries are taken.
    #[error(
        "{name} can't be mapped for devices at {iova:#x}: the container is full; raise its limit with `echo N > \
         /sys/module/vfio_iommu_type1/parameters/dma_entry_limit` before the devices are attached, or use fewer, larger \
         ranges"
    )]
    NoEntries {
        /// Name of the memory.
        name: String,
        /// Where it was to be.
        iova: u64,
    },
    /// Something is there already.
    #[error(
        "{name} can't be mapped for devices at {iova:#x} ({size:#x} bytes): a part of this range is mapped already; unmap \
         that first"
    )]
    Taken {
        /// Name of the memory.
        name: String,
        /// Where it was to be.
        iova: u64,
        /// Length in bytes.
        size: u64,
    },
    /// More memory than this process, or its user, may hold.
    #[error("{name} can't be pinned: {shortage}")]
    Memlock {
        /// Name of the memory.
        name: String,
        /// The account.
        shortage: Shortage,
    },
    /// The kernel has no memory for it, or the pages' counts of their users are full.
    #[error(
        "{name} can't be pinned: the kernel is out of memory, or this device-dax memory was mapped thousands of times: \
         type1 does not give such pages back before the device is set up anew (`daxctl disable-device daxX.Y`, then \
         `daxctl enable-device daxX.Y`)"
    )]
    DaxReferences {
        /// Name of the memory.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The account of locked memory can't be read.
    #[error("{name} is not pinned")]
    Account {
        /// Name of the memory.
        name: String,
        /// Why.
        #[source]
        source: AccountError,
    },
    /// What can be mapped can't be told.
    #[error("{name} is not mapped for devices: the kernel does not say what can be")]
    Limits {
        /// Name of the memory.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn without_iommufd(kind: SpaceKind) -> &'static str {
    match kind {
        SpaceKind::Type1 => "",
        SpaceKind::Iommufd => "; transfers from device to device need type1 instead of iommufd",
    }
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
    /// Whether all of these can be mapped, as far as it can be told without mapping them: nobody waits for a long pin to
    /// hear that the next one is too much.
    fn check(&self, requests: &[DmaRequest<'_>]) -> Result<(), MapError> {
        let _ = requests;
        Ok(())
    }
    /// Whether maps made by several threads at once are faster than one after the other.
    fn parallel(&self) -> bool {
        false
    }
    /// Bytes that the kernel counts as held by this process, while a map is under way; `None`: it does not tell.
    fn counted_bytes(&self) -> Option<u64> {
        None
    }
}

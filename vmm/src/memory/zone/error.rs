//! Why a zone can't be opened or mapped.

use std::io;
use std::path::PathBuf;

use daxhund_dax::{LockError, MapError, OpenError, RangeError, ZeroError};
use thiserror::Error;

use crate::memory::dma::DmaRefused;
use crate::memory::mapping::MapMemoryError;
use crate::memory::pools::TakeError;
use crate::memory::region::RegionError;

/// A zone's backing can't be used.
#[derive(Debug, Error)]
pub enum ZoneOpenError {
    /// It is no usable device-dax device.
    #[error("memory zone {id}")]
    Dax {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// The range asked for is not one of the device.
    #[error("memory zone {id}")]
    Range {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: RangeError,
    },
    /// A pool does not give it.
    #[error("memory zone {id}")]
    Pool {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: TakeError,
    },
    /// device-dax is always shared.
    #[error(
        "memory zone {id}: {} is device-dax, whose mappings are always shared; leave shared= out or give shared=on",
        path.display()
    )]
    DaxNotShared {
        /// Which zone.
        id: String,
        /// The device.
        path: PathBuf,
    },
    /// device-dax memory is on the node of its device.
    #[error(
        "memory zone {id}: {} is memory of host node {}, not of node {asked}; leave host_numa_node= out or choose another device",
        path.display(),
        found.map_or("unknown".to_owned(), |n| n.to_string())
    )]
    DaxNode {
        /// Which zone.
        id: String,
        /// The device.
        path: PathBuf,
        /// Node asked for.
        asked: u32,
        /// Node of the device.
        found: Option<u32>,
    },
    /// A file can't be opened.
    #[error("memory zone {id}: {} can't be opened for reading and writing", path.display())]
    File {
        /// Which zone.
        id: String,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file has not what the zone asks for.
    #[error(
        "memory zone {id}: bytes {offset:#x} to {:#x} are past the end of {} ({len:#x} bytes): it would be SIGBUS on access; \
         make the file larger (`truncate -s`) or the zone smaller",
        offset.saturating_add(*size), path.display()
    )]
    FileTooShort {
        /// Which zone.
        id: String,
        /// The file.
        path: PathBuf,
        /// First byte of the zone.
        offset: u64,
        /// Its length.
        size: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// A directory has no size to go by.
    #[error("memory zone {id}: {} is a directory, so the zone needs size=", path.display())]
    DirectorySize {
        /// Which zone.
        id: String,
        /// The directory.
        path: PathBuf,
    },
    /// The zone is not in whole pages of its backing.
    #[error(
        "memory zone {id}: {what} {value:#x} is not a multiple of the huge page size {page:#x}"
    )]
    HugePageMultiple {
        /// Which zone.
        id: String,
        /// Size or offset.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Huge page size in bytes.
        page: u64,
    },
    /// The host has no default huge page size to go by.
    #[error(
        "memory zone {id}: the host has no huge pages of {page:#x} bytes; see `ls /sys/kernel/mm/hugepages`"
    )]
    NoHugePages {
        /// Which zone.
        id: String,
        /// Huge page size in bytes, 0 for the default.
        page: u64,
    },
}

/// A zone's memory can't be mapped.
#[derive(Debug, Error)]
pub enum ZoneMapError {
    /// The device's range.
    #[error("memory zone {id}")]
    Range {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: RangeError,
    },
    /// Somebody has it.
    #[error("memory zone {id}")]
    Lock {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: LockError,
    },
    /// The device does not let itself be mapped.
    #[error("memory zone {id}")]
    Dax {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: MapError,
    },
    /// It can't be zeroed.
    #[error("memory zone {id}")]
    Zero {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: ZeroError,
    },
    /// Other memory.
    #[error("memory zone {id}")]
    Host {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: MapMemoryError,
    },
    /// Not enough huge pages.
    #[error(
        "memory zone {id} needs {needed} huge pages of {page_kib} KiB, the host has {free} free; \
         `echo N > /sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages` reserves them"
    )]
    HugePages {
        /// Which zone.
        id: String,
        /// Pages it takes.
        needed: u64,
        /// Pages that are free.
        free: u64,
        /// Page size.
        page_kib: u64,
        /// What the kernel said.
        #[source]
        source: MapMemoryError,
    },
    /// The region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Devices can't reach it.
    #[error("memory zone {id}")]
    Dma {
        /// Which zone.
        id: String,
        /// Why.
        #[source]
        source: DmaRefused,
    },
}

//! Why a backing of persistent memory can't be used.

use std::io;
use std::path::PathBuf;

use daxhund_dax::{
    ByteSize, FileLockError, FlusherError, LockError, MapError, OpenError, RangeError,
};
use thiserror::Error;

use crate::memory::dma::DmaRefused;
use crate::memory::mapping::MapMemoryError;
use crate::memory::region::RegionError;

/// A backing can't be used.
#[derive(Debug, Error)]
pub enum PmemOpenError {
    /// Nothing is there.
    #[error(
        "pmem {id}: {} does not exist: `daxctl list -Di` shows the dax devices, `truncate -s 1G {}` makes a file of 1 GiB",
        file.display(), file.display()
    )]
    Missing {
        /// Which device.
        id: String,
        /// The path.
        file: PathBuf,
    },
    /// A directory is no memory.
    #[error(
        "pmem {id}: {} is a directory: name a /dev/daxX.Y or a file in it (`truncate -s 1G {}/pmem` makes one)",
        file.display(), file.display()
    )]
    Directory {
        /// Which device.
        id: String,
        /// The path.
        file: PathBuf,
    },
    /// Neither a usable device-dax device nor a file.
    #[error("pmem {id}")]
    Dax {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// The range asked for is not one of the device.
    #[error("pmem {id}")]
    Range {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: RangeError,
    },
    /// What a flush of the device is can't be told or done.
    #[error("pmem {id}")]
    Flusher {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: FlusherError,
    },
    /// device-dax has no private mappings.
    #[error(
        "pmem {id}: {} is device-dax, whose mappings are always shared: discard_writes=on can't be had; leave it out, or \
         give a file",
        file.display()
    )]
    DaxNotPrivate {
        /// Which device.
        id: String,
        /// The device.
        file: PathBuf,
    },
    /// The file can be read only.
    #[error(
        "pmem {id}: {} can't be opened for writing: `chmod u+w` it, or give discard_writes=on for a guest whose writes \
         are not kept",
        file.display()
    )]
    ReadOnly {
        /// Which device.
        id: String,
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file can't be opened or looked at.
    #[error("pmem {id}: {} can't be opened", file.display())]
    File {
        /// Which device.
        id: String,
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is nothing to be memory.
    #[error(
        "pmem {id}: nothing of {} is left from offset {offset}, its size is {len}: `truncate -s` makes a file larger, or \
         give another offset= or size=",
        file.display()
    )]
    Empty {
        /// Which device.
        id: String,
        /// The file.
        file: PathBuf,
        /// Where it was to begin.
        offset: ByteSize,
        /// Bytes in the file.
        len: ByteSize,
    },
    /// More is asked for than the file has.
    #[error(
        "pmem {id}: {size} from offset {offset} are past the end of {}, which has {len}: it is never made larger for you; \
         `truncate -s` it, or give a smaller size=",
        file.display()
    )]
    TooShort {
        /// Which device.
        id: String,
        /// The file.
        file: PathBuf,
        /// Where it was to begin.
        offset: ByteSize,
        /// Bytes asked for.
        size: ByteSize,
        /// Bytes in the file.
        len: ByteSize,
    },
    /// Not in whole units.
    #[error(
        "pmem {id}: the {what} {value} of {} is not a multiple of {unit}, and a guest takes persistent memory in such \
         pieces; give a multiple with {what}= (a file: `truncate -s %{unit} {}` rounds it up)",
        file.display(), file.display()
    )]
    Misaligned {
        /// Which device.
        id: String,
        /// The backing.
        file: PathBuf,
        /// Size or offset.
        what: &'static str,
        /// Its value.
        value: ByteSize,
        /// What it has to be a multiple of.
        unit: ByteSize,
    },
    /// Somebody uses the file.
    #[error("pmem {id}")]
    Lock {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: FileLockError,
    },
}

/// A backing can't be mapped.
#[derive(Debug, Error)]
pub enum PmemMapError {
    /// Somebody has the range of the device.
    #[error("pmem {id}")]
    Lock {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: LockError,
    },
    /// The device does not let itself be mapped.
    #[error("pmem {id}")]
    Dax {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: MapError,
    },
    /// The file does not.
    #[error("pmem {id}")]
    Host {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: MapMemoryError,
    },
    /// The region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Devices can't reach it.
    #[error("pmem {id}")]
    Dma {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: DmaRefused,
    },
}

//! What a disk's bytes are on, as requests see it.
//!
//! Offsets and lengths come checked: within the disk, multiples of a sector, not empty ([`crate::request`]).

mod dax;
mod file;
#[allow(unsafe_code, reason = "copies to and from memory that can go away")]
mod mapped;
#[cfg(test)]
pub(crate) mod testing;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use daxhund_dax::Host;
use thiserror::Error;
use vm_memory::VolatileSlice;

pub use dax::{DaxDisk, OpenDaxError};
pub use file::{FileDisk, OpenFileError};

use crate::config::{Config, DiskSource};

/// Length of the disk's name as the guest is told it.
pub const ID_LEN: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// A disk.
#[allow(clippy::len_without_is_empty, reason = "never empty")]
pub trait Disk: Debug + Send + Sync {
    /// Bytes it has: a multiple of a sector, not 0.
    fn len(&self) -> u64;

    /// Writes are refused before they come here.
    fn is_read_only(&self) -> bool;

    /// What is best written at once, in bytes: a power of two.
    fn physical_block(&self) -> u32;

    /// How many bytes are best moved at a time: a multiple of a sector.
    fn chunk(&self) -> usize;

    /// What the guest sees as its name.
    fn serial(&self) -> [u8; ID_LEN];

    /// Fills the slices in order. `scratch` has a chunk's length.
    fn read(&self, offset: u64, into: &[VolatileSlice<'_>], scratch: &mut [u8]) -> io::Result<()>;

    /// Writes all of it.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// The range reads as zeroes from now on.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The range is of no use to the guest any more.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// What was written before is durable when this returns.
    fn flush(&self) -> io::Result<()>;
}

/// There is no disk.
#[derive(Debug, Error)]
pub enum OpenDiskError {
    /// Device-dax.
    #[error(transparent)]
    Dax(#[from] OpenDaxError),
    /// A file or a block device.
    #[error(transparent)]
    File(#[from] OpenFileError),
}

/// A disk that is open, mapped and locked.
#[derive(Clone, Debug)]
pub enum OpenDisk {
    /// Its memory can go away.
    Dax(Arc<DaxDisk>),
    /// It can't.
    File(Arc<FileDisk>),
}

impl OpenDisk {
    /// As the configuration says.
    pub fn open(host: &Host, config: &Config) -> Result<Self, OpenDiskError> {
        Ok(match &config.disk {
            DiskSource::Dax { path, offset, size } => {
                let disk = DaxDisk::open(host, path, (*offset, *size), config.read_only)?;
                Self::Dax(Arc::new(disk))
            }
            DiskSource::File(path) => {
                Self::File(Arc::new(FileDisk::open(host, path, config.read_only)?))
            }
        })
    }

    /// For the workers.
    pub fn shared(&self) -> Arc<dyn Disk> {
        match self {
            Self::Dax(disk) => disk.clone(),
            Self::File(disk) => disk.clone(),
        }
    }
}

/// The text as the guest is told it.
fn serial(text: &str) -> [u8; ID_LEN] {
    let mut serial = [0; ID_LEN];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

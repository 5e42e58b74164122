//! A raw image, open and locked: a regular file or a block device.
//!
//! Invariants: it is as long for the guest as it was when it was opened; nothing outside of that is read or written;
//! it is never made longer or shorter. A sync that failed is never forgotten: the kernel takes a page it could not
//! write for clean after it has told so once, so no later success can speak for that page.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use daxhund_dax::{Host, LockKind};

use super::error::{DiskOpenError, DiskResizeError};
use super::{DiskSpec, SECTOR};

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// Direct I/O to a file needs whole blocks of what is below the file system; this is enough where that can't be told.
const CAUTIOUS_BLOCK: u32 = 4096;
/// No storage of Linux has a larger one.
const LARGEST_BLOCK: u32 = 64 << 10;

/// What the guest is told of how the storage likes to be used, in bytes; 0: it does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Topology {
    /// What is written at once.
    pub(super) physical_block: u32,
    /// What a request should have at least.
    pub(super) smallest: u32,
    /// What a request should have.
    pub(super) best: u32,
}

/// What the bytes are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Storage {
    /// A file system on a disk.
    File,
    /// A file system in memory: nothing that is done to the image waits.
    Memory,
    /// A disk.
    BlockDevice,
}

/// An image.
#[derive(Debug)]
pub(super) struct Image {
    file: Arc<File>,
    /// Bytes the guest has, a multiple of the block. It grows only.
    len: AtomicU64,
    /// Bytes in a logical block: 512 to 4096, a power of two.
    block: u32,
    topology: Topology,
    storage: Storage,
    can_discard: bool,
    direct: bool,
    serial: [u8; 20],
    sync_failed: AtomicBool,
}

impl Image {
    pub(super) fn open(spec: &DiskSpec) -> Result<Self, DiskOpenError> {
        let failed = |source| DiskOpenError::File {
            id: spec.id.clone(),
            path: spec.path.clone(),
            source,
        };
        // Looked at before it is opened: opening a FIFO would wait, and opening a device can do things.
        let metadata = match std::fs::metadata(&spec.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DiskOpenError::Missing {
                    id: spec.id.clone(),
                    path: spec.path.clone(),
                });
            }
            Err(source) => return Err(failed(source)),
        };
        see_that_it_is_a_disk(spec, &metadata)?;
        let file = open_file(spec)?;
        let metadata = file.metadata().map_err(failed)?;
        see_that_it_is_a_disk(spec, &metadata)?;
        let is_block_device = metadata.file_type().is_block_device();
        let bytes = if is_block_device {
            (&file).seek(SeekFrom::End(0)).map_err(failed)?
        } else {
            metadata.len()
        };
        let queue = queue_directory(if is_block_device {
            metadata.rdev()
        } else {
            metadata.dev()
        });
        let block = if is_block_device {
            rustix::fs::ioctl_blksszget(&file).map_err(|error| failed(error.into()))?
        } else if spec.direct {
            attribute(queue.as_deref(), "logical_block_size").unwrap_or(CAUTIOUS_BLOCK)
        } else {
            SECTOR
        };
        let block = block.clamp(SECTOR, LARGEST_BLOCK).next_power_of_two();
        let len = bytes - bytes % u64::from(block);
        if len == 0 {
            return Err(DiskOpenError::Empty {
                id: spec.id.clone(),
                path: spec.path.clone(),
                len: bytes,
                block,
            });
        }
        if len != bytes {
            tracing::warn!(
                disk = spec.id, path = %spec.path.display(),
                "the last {} bytes are no whole block and are not part of the disk", bytes - len
            );
        }
        let kind = if spec.readonly {
            LockKind::Shared
        } else {
            LockKind::Exclusive
        };
        Host::system()
            .lock_file(&file, &spec.path, kind, None)
            .map_err(|source| DiskOpenError::Lock {
                id: spec.id.clone(),
                source,
            })?;
        let topology = if is_block_device {
            let physical = rustix::fs::ioctl_blkpbszget(&file).unwrap_or(block);
            Topology {
                physical_block: physical,
                smallest: attribute(queue.as_deref(), "minimum_io_size").unwrap_or(0),
                best: attribute(queue.as_deref(), "optimal_io_size").unwrap_or(0),
            }
        } else {
            let unit = u32::try_from(metadata.blksize()).unwrap_or(block);
            Topology {
                physical_block: unit,
                smallest: unit,
                best: 0,
            }
        };
        let discards = if is_block_device {
            attribute(queue.as_deref(), "discard_max_bytes").unwrap_or(0u64) > 0
        } else {
            true
        };
        let storage = if is_block_device {
            Storage::BlockDevice
        } else if is_in_memory(&file).map_err(failed)? {
            Storage::Memory
        } else {
            Storage::File
        };
        Ok(Self {
            file: Arc::new(file),
            len: AtomicU64::new(len),
            block,
            topology,
            storage,
            can_discard: discards && spec.sparse && !spec.readonly,
            direct: spec.direct,
            serial: serial(spec, &metadata)?,
            sync_failed: AtomicBool::new(false),
        })
    }

    /// The same, but its bytes are another file's: one that fails.
    #[cfg(test)]
    pub(super) fn with_file(self, file: File) -> Self {
        Self {
            file: Arc::new(file),
            ..self
        }
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    /// Gives the guest so many bytes; a file that has fewer gets a hole at its end.
    pub(super) fn resize(&self, bytes: u64, readonly: bool) -> Result<(), DiskResizeError> {
        let (now, block) = (self.len(), u64::from(self.block));
        if bytes < now {
            return Err(DiskResizeError::Shrinks { bytes, now });
        }
        if !bytes.is_multiple_of(block) {
            return Err(DiskResizeError::NotBlocks { bytes, block });
        }
        let there = if self.storage == Storage::BlockDevice {
            self.file.as_ref().seek(SeekFrom::End(0))
        } else {
            self.file.metadata().map(|metadata| metadata.len())
        };
        let there = there.map_err(DiskResizeError::File)?;
        if bytes > there {
            if readonly || self.storage == Storage::BlockDevice {
                return Err(DiskResizeError::HasFewer { bytes, there });
            }
            self.file.set_len(bytes).map_err(DiskResizeError::File)?;
        }
        self.len.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn block(&self) -> u32 {
        self.block
    }

    pub(super) fn topology(&self) -> Topology {
        self.topology
    }

    pub(super) fn storage(&self) -> Storage {
        self.storage
    }

    /// Whether blocks may be given back.
    pub(super) fn can_discard(&self) -> bool {
        self.can_discard
    }

    /// What direct I/O asks of addresses and lengths; `None` through the page cache.
    pub(super) fn memory_align(&self) -> Option<usize> {
        self.direct.then_some(self.block as usize)
    }

    pub(super) fn serial(&self) -> &[u8; 20] {
        &self.serial
    }

    /// A sync failed. Around the page cache nothing is lost by it: it can be tried again.
    pub(super) fn remember_failed_sync(&self) {
        if !self.direct {
            self.sync_failed.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a sync may be believed.
    pub(super) fn has_lost_writes(&self) -> bool {
        self.sync_failed.load(Ordering::Relaxed)
    }
}

fn see_that_it_is_a_disk(spec: &DiskSpec, metadata: &Metadata) -> Result<(), DiskOpenError> {
    let kind = metadata.file_type();
    let (kind, mend) = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        ("a directory", "name an image file or a block device")
    } else if kind.is_char_device() {
        (
            "a character device",
            "name an image file or a block device; a /dev/daxX.Y can be a --pmem or a --memory-zone",
        )
    } else {
        (
            "a socket or FIFO",
            "name an image file or a block device; a vhost-user disk needs vhost_user=on,socket=PATH",
        )
    };
    Err(DiskOpenError::NotADisk {
        id: spec.id.clone(),
        path: spec.path.clone(),
        kind,
        mend,
    })
}

fn open_file(spec: &DiskSpec) -> Result<File, DiskOpenError> {
    let open = |write: bool, flags: i32| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(&spec.path)
    };
    let direct = if spec.direct { libc::O_DIRECT } else { 0 };
    open(!spec.readonly, direct).map_err(|source| {
        let (id, path) = (spec.id.clone(), spec.path.clone());
        if spec.direct && source.raw_os_error() == Some(libc::EINVAL) {
            DiskOpenError::NotDirect { id, path, source }
        } else if !spec.readonly && open(false, 0).is_ok() {
            DiskOpenError::ReadOnly { id, path, source }
        } else {
            DiskOpenError::File { id, path, source }
        }
    })
}

/// What the guest sees as the disk's name.
fn serial(spec: &DiskSpec, metadata: &Metadata) -> Result<[u8; 20], DiskOpenError> {
    let text = match &spec.serial {
        Some(serial) if serial.is_ascii() && serial.len() <= 20 => serial.clone(),
        Some(serial) => {
            return Err(DiskOpenError::Serial {
                id: spec.id.clone(),
                serial: serial.clone(),
            });
        }
        // The same for the same image, whatever its path.
        None => format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino()),
    };
    let mut serial = [0; 20];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    Ok(serial)
}

/// The block layer's attributes of a device, or of the disk a partition is of.
fn queue_directory(device: u64) -> Option<std::path::PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("/sys/dev/block/{major}:{minor}");
    [
        Path::new(&device).join("queue"),
        Path::new(&device).join("../queue"),
    ]
    .into_iter()
    .find(|path| path.is_dir())
}

fn attribute<T: std::str::FromStr>(queue: Option<&Path>, name: &str) -> Option<T> {
    let text = std::fs::read_to_string(queue?.join(name)).ok()?;
    text.trim().parse().ok()
}

fn is_in_memory(file: &File) -> io::Result<bool> {
    // f_type's width and sign differ between targets; the magics are 32-bit values.
    #[allow(clippy::cast_sign_loss)]
    let magic = rustix::fs::fstatfs(file)?.f_type as u64 & 0xffff_ffff;
    Ok(matches!(magic, TMPFS_MAGIC | RAMFS_MAGIC))
}

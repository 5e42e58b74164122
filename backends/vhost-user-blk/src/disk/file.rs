//! An image file or a block device as a disk, through the page cache.

#![forbid(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use daxhund_dax::{FileLockError, Host, LockKind};
use daxhund_virtio_blk::SECTOR;
use rustix::fs::FallocateFlags;
use thiserror::Error;
use vm_memory::VolatileSlice;

use super::{Disk, ID_LEN, serial};

const CHUNK: usize = 256 << 10;

/// A file is no disk.
#[derive(Debug, Error)]
pub enum OpenFileError {
    /// Something else.
    #[error("{} is {kind}: {mend}", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// What to do.
        mend: &'static str,
    },
    /// It has no sector.
    #[error(
        "{} has {len} bytes, less than a sector: make it larger (`truncate -s 1G {}`)",
        path.display(), path.display()
    )]
    Empty {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// It can't be opened so.
    #[error("cannot open {}{}", path.display(), if *read_only { "" } else { " for writing (--read-only needs less)" })]
    Open {
        /// The path.
        path: PathBuf,
        /// For reading only.
        read_only: bool,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(transparent)]
    Lock(#[from] FileLockError),
}

/// A disk.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    len: u64,
    read_only: bool,
    physical_block: u32,
    serial: [u8; ID_LEN],
    /// A sync has failed: the kernel tells once and takes the pages for clean then, so no later one can be believed.
    sync_failed: AtomicBool,
}

impl FileDisk {
    /// Opens and locks. A disk that is only read shares it with others that only read.
    pub fn open(host: &Host, path: &Path, read_only: bool) -> Result<Self, OpenFileError> {
        let failed = |source| OpenFileError::Open {
            path: path.to_owned(),
            read_only,
            source,
        };
        // Looked at before it is opened: opening a FIFO would wait, and opening a device can do things.
        see_that_it_is_a_disk(path, &std::fs::metadata(path).map_err(failed)?)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        see_that_it_is_a_disk(path, &metadata)?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let len = bytes - bytes % u64::from(SECTOR);
        if len == 0 {
            return Err(OpenFileError::Empty {
                path: path.to_owned(),
                len: bytes,
            });
        }
        if len != bytes {
            tracing::warn!(
                path = %path.display(),
                "the last {} bytes are no whole sector and are not part of the disk", bytes - len
            );
        }
        let kind = if read_only {
            LockKind::Shared
        } else {
            LockKind::Exclusive
        };
        host.lock_file(&file, path, kind, None)?;
        let name = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
        let unit = u32::try_from(metadata.blksize()).unwrap_or(SECTOR);
        Ok(Self {
            file,
            len,
            read_only,
            physical_block: unit.clamp(SECTOR, 64 << 10).next_power_of_two(),
            serial: serial(&name),
            sync_failed: AtomicBool::new(false),
        })
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<(), io::Error> {
        let flags = flags | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }
}

fn see_that_it_is_a_disk(path: &Path, metadata: &Metadata) -> Result<(), OpenFileError> {
    let kind = metadata.file_type();
    let (kind, mend) = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        ("a directory", "name an image file or a block device")
    } else if kind.is_char_device() {
        (
            "a character device",
            "name an image file or a block device; a /dev/daxX.Y is given by --dax",
        )
    } else {
        (
            "a socket or FIFO",
            "name an image file or a block device; where to listen is --socket-path",
        )
    };
    Err(OpenFileError::NotADisk {
        path: path.to_owned(),
        kind,
        mend,
    })
}

/// The file system, or the device, has no such thing.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

impl Disk for FileDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn physical_block(&self) -> u32 {
        self.physical_block
    }

    fn chunk(&self) -> usize {
        CHUNK
    }

    fn serial(&self) -> [u8; ID_LEN] {
        self.serial
    }

    fn read(&self, offset: u64, into: &[VolatileSlice<'_>], scratch: &mut [u8]) -> io::Result<()> {
        let len: usize = into.iter().map(VolatileSlice::len).sum();
        let mut rest = into.iter().copied();
        let mut room = rest.next();
        let mut done = 0;
        while done < len {
            let most = scratch.len().min(len - done);
            let mut bytes = &mut scratch[..most];
            self.file.read_exact_at(bytes, offset + done as u64)?;
            while let Some(slice) = room.filter(|_| !bytes.is_empty()) {
                let now = slice.len().min(bytes.len());
                slice.copy_from(&bytes[..now]);
                bytes = &mut bytes[now..];
                room = match slice.offset(now) {
                    Ok(left) if !left.is_empty() => Some(left),
                    _ => rest.next(),
                };
            }
            done += most;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::ZERO_RANGE, offset, len) {
            Err(error) if is_unsupported(&error) => {}
            done => return done,
        }
        let zeroes = vec![0; 64 << 10];
        let mut done = 0;
        while done < len {
            let now = usize::try_from(len - done).map_or(zeroes.len(), |n| n.min(zeroes.len()));
            self.file.write_all_at(&zeroes[..now], offset + done)?;
            done += now as u64;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE, offset, len) {
            // It is a hint.
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done,
        }
    }

    fn flush(&self) -> io::Result<()> {
        let failed = || io::Error::other("an earlier sync of the disk has failed");
        if self.sync_failed.load(Ordering::SeqCst) {
            return Err(failed());
        }
        let synced = rustix::fs::fdatasync(&self.file);
        if synced.is_err() {
            self.sync_failed.store(true, Ordering::SeqCst);
        }
        Ok(synced?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::slices;
    use super::*;

    fn open(path: &Path, read_only: bool) -> Result<FileDisk, OpenFileError> {
        FileDisk::open(&Host::system(), path, read_only)
    }

    #[test]
    fn a_file_is_read_and_written_in_pieces_of_any_length() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((1 << 20) + 100).unwrap();
        let disk = open(file.path(), false).unwrap();
        assert_eq!(disk.len(), 1 << 20, "whole sectors");
        let bytes: Vec<u8> = (0..8192u32).map(|n| n.to_le_bytes()[0] | 1).collect();
        disk.write(512, &bytes).unwrap();
        let mut memory = vec![0; 8192];
        let parts = slices(&mut memory, &[1, 700, 2, 4000]);
        disk.read(512, &parts, &mut [0; 512]).unwrap();
        assert_eq!(memory, bytes);
        disk.zero(512, 1024).unwrap();
        disk.discard(4096, 4096).unwrap();
        disk.flush().unwrap();
        let parts = slices(&mut memory, &[]);
        disk.read(512, &parts, &mut [0; 4096]).unwrap();
        assert_eq!(memory[..1024], [0; 1024]);
        assert_eq!(memory[1024..3584], bytes[1024..3584]);
        // Cut off by somebody.
        file.as_file().set_len(512).unwrap();
        let parts = slices(&mut memory, &[]);
        disk.read(512, &parts, &mut [0; 4096]).unwrap_err();
    }

    #[test]
    fn one_writes_or_several_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let writer = open(file.path(), false).unwrap();
        let error = open(file.path(), true).unwrap_err();
        assert!(error.to_string().contains("in use by"), "{error}");
        drop(writer);
        let _readers = [open(file.path(), true), open(file.path(), true)].map(Result::unwrap);
        open(file.path(), false).unwrap_err();
    }

    #[test]
    fn what_is_no_disk_is_named() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        for (path, expected) in [
            (Path::new("/"), "is a directory"),
            (Path::new("/dev/zero"), "is given by --dax"),
            (Path::new("/nonexistent"), "cannot open /nonexistent"),
            (empty.path(), "has 0 bytes"),
        ] {
            let error = open(path, false).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

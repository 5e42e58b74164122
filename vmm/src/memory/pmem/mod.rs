//! What backs a virtio-pmem device, opened: how large it is, what alignment it wants, what a flush of it is.
//!
//! The memory becomes a [`Region`] like any RAM and is attached to the same consumers. What is particular is here:
//! - device-dax: sizes from sysfs, the range locked when it is mapped; a flush is what its region asks for.
//! - a file, on fs-dax or any other file system: mapped shared, a flush is a real `fdatasync`.
//! - a file with `discard_writes`: mapped copy-on-write, a flush is nothing.
//!
//! - a range of a pool of the host: device-dax that is locked already, with what its last user left in it.
//!
//! Invariants: no byte of the backing is written, and no file is made longer or shorter. Everything that can be wrong
//! with a backing is found by [`PmemBacking::open`], but for a device-dax range that somebody holds:
//! [`PmemBacking::map`] finds that.

mod error;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use daxhund_dax::{
    ByteSize, DaxDevice, DaxRange, FileBacking, Flusher, Host, LockKind, NotDaxKind, OpenError,
    RangeLock, Wanted, is_for_writing,
};

use super::layout::Gpa;
use super::mapping::{HostMapping, Source};
use super::region::{Mapping, Region};

pub use error::{PmemMapError, PmemOpenError};

const MIB: u64 = 1 << 20;
/// Linux takes memory of a virtio-pmem device in subsections of this size, and so does the host's page table.
const UNIT: u64 = 2 * MIB;
/// Linux puts the page array of persistent memory up in sections of this size.
const SECTION: u64 = 128 * MIB;

/// One `--pmem`, checked for shape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PmemSpec {
    /// The device's name.
    pub id: String,
    /// What backs it.
    pub file: PathBuf,
    /// Size in bytes; absent means from `offset` to the end of `file`.
    pub size: Option<u64>,
    /// Where in `file` it begins, in bytes.
    pub offset: u64,
    /// The guest's writes are its own and gone with the VMM.
    pub discard_writes: bool,
    /// Whether passed-through devices reach it; absent is as its kind of memory wants it.
    pub dma: Option<bool>,
}

/// Makes what the guest has stored durable.
pub trait Flush: Send + Sync {
    /// What was stored and written back from the guest's caches before this call is durable when it returns `Ok`. Can
    /// take as long as the storage takes.
    fn flush(&self) -> io::Result<()>;
}

enum Memory {
    Dax {
        device: DaxDevice,
        range: DaxRange,
        /// The range, locked already; until it is mapped.
        held: Option<RangeLock>,
    },
    File(Source),
}

/// What backs one virtio-pmem device, open and (a file) locked.
///
/// Holds the device or file open: let go of it when the memory is to leave.
pub struct PmemBacking {
    id: String,
    memory: Memory,
    size: u64,
    align: u64,
    flusher: Arc<dyn Flush>,
    dma: Option<bool>,
}

impl PmemBacking {
    /// Opens what a specification names and sees that it can be what is asked for.
    pub fn open(host: &Host, spec: &PmemSpec) -> Result<Self, PmemOpenError> {
        let (id, file) = (spec.id.clone(), spec.file.clone());
        // Tried as device-dax first: the refusal says what else it is.
        match host.open(&spec.file) {
            Ok(device) => Self::of_device(spec, device, None),
            Err(OpenError::FsDaxFile { .. }) => Self::of_file(host, spec, FileBacking::FsDax),
            Err(OpenError::NotDax {
                kind: NotDaxKind::File(kind),
                ..
            }) => Self::of_file(host, spec, kind),
            Err(OpenError::Missing { .. }) => Err(PmemOpenError::Missing { id, file }),
            Err(OpenError::NotDax {
                kind: NotDaxKind::Directory,
                ..
            }) => Err(PmemOpenError::Directory { id, file }),
            Err(source) => Err(PmemOpenError::Dax { id, source }),
        }
    }

    /// What a backing of this size wants of a pool.
    pub fn wanted(size: u64) -> Wanted {
        Wanted {
            align: UNIT,
            ..Wanted::bytes(size)
        }
    }

    /// A range that was taken of a pool.
    pub fn of_range(id: &str, lock: RangeLock, dma: Option<bool>) -> Result<Self, PmemOpenError> {
        let device = lock.opened();
        let spec = PmemSpec {
            id: id.to_owned(),
            file: device.path().to_owned(),
            size: Some(lock.range().len()),
            offset: lock.range().offset(),
            discard_writes: false,
            dma,
        };
        Self::of_device(&spec, device, Some(lock))
    }

    /// Takes what somebody else has opened, and lends, for what a specification names; its `file` is for messages. The lender
    /// is not believed: what it is, where it ends and who else has it is seen by the descriptor.
    pub fn lent(host: &Host, spec: &PmemSpec, file: File) -> Result<Self, PmemOpenError> {
        let opened = file.try_clone().map_err(|source| PmemOpenError::File {
            id: spec.id.clone(),
            file: spec.file.clone(),
            source,
        })?;
        match host.adopt(file, &spec.file) {
            Ok(device) => Self::of_device(spec, device, None),
            Err(OpenError::FsDaxFile { .. }) => {
                Self::of_opened(host, spec, FileBacking::FsDax, opened)
            }
            Err(OpenError::NotDax {
                kind: NotDaxKind::File(kind),
                ..
            }) => Self::of_opened(host, spec, kind, opened),
            Err(source) => Err(PmemOpenError::Dax {
                id: spec.id.clone(),
                source,
            }),
        }
    }

    /// `held`: the lock on the very range, if there is one already.
    fn of_device(
        spec: &PmemSpec,
        device: DaxDevice,
        held: Option<RangeLock>,
    ) -> Result<Self, PmemOpenError> {
        let id = || spec.id.clone();
        if spec.discard_writes {
            return Err(PmemOpenError::DaxNotPrivate {
                id: id(),
                file: spec.file.clone(),
            });
        }
        let facts = device.facts();
        let align = facts.align_bytes;
        // A device with 4K alignment can end inside a unit; "the whole device" stops before that.
        let size = spec.size.or_else(|| {
            let rest = facts.size_bytes.saturating_sub(spec.offset);
            let whole = rest - rest % UNIT.max(align);
            (whole > 0).then_some(whole)
        });
        let range = device
            .range(Some(spec.offset), size)
            .map_err(|source| PmemOpenError::Range { id: id(), source })?;
        check_units(spec, UNIT, range.offset(), range.len())?;
        let flusher =
            Flusher::new(&device).map_err(|source| PmemOpenError::Flusher { id: id(), source })?;
        if let Some(warning) = flusher.warning() {
            tracing::warn!(pmem = spec.id, "{warning}");
        }
        Ok(Self {
            id: id(),
            memory: Memory::Dax {
                device,
                range,
                held,
            },
            size: range.len(),
            align,
            flusher: Arc::new(flusher),
            dma: spec.dma,
        })
    }

    fn of_file(host: &Host, spec: &PmemSpec, kind: FileBacking) -> Result<Self, PmemOpenError> {
        Self::of_opened(host, spec, kind, open_file(spec)?)
    }

    fn of_opened(
        host: &Host,
        spec: &PmemSpec,
        kind: FileBacking,
        file: File,
    ) -> Result<Self, PmemOpenError> {
        let failed = |source| PmemOpenError::File {
            id: spec.id.clone(),
            file: spec.file.clone(),
            source,
        };
        let metadata = file.metadata().map_err(failed)?;
        let (len, offset) = (metadata.len(), spec.offset);
        let rest = len.saturating_sub(offset);
        let size = spec.size.unwrap_or(rest);
        if rest == 0 || size == 0 {
            return Err(PmemOpenError::Empty {
                id: spec.id.clone(),
                file: spec.file.clone(),
                offset: ByteSize(offset),
                len: ByteSize(len),
            });
        }
        if size > rest {
            return Err(PmemOpenError::TooShort {
                id: spec.id.clone(),
                file: spec.file.clone(),
                offset: ByteSize(offset),
                size: ByteSize(size),
                len: ByteSize(len),
            });
        }
        // Of hugetlbfs, the block size is the page size.
        let align = match kind {
            FileBacking::Hugetlbfs => metadata.blksize().max(UNIT),
            _ => UNIT,
        };
        check_units(spec, align, offset, size)?;
        // What is lent for reading is shared with others who read.
        let lock = if spec.discard_writes || !is_for_writing(&file) {
            LockKind::Shared
        } else {
            LockKind::Exclusive
        };
        host.lock_file(&file, &spec.file, lock, Some(offset..offset + size))
            .map_err(|source| PmemOpenError::Lock {
                id: spec.id.clone(),
                source,
            })?;
        if !spec.discard_writes {
            warn_of(spec, kind, metadata.blocks().saturating_mul(512) < len);
        }
        let file = Arc::new(file);
        let flusher: Arc<dyn Flush> = if spec.discard_writes {
            Arc::new(Discarded)
        } else {
            Arc::new(FileFlush::new(Arc::clone(&file)))
        };
        let source = if kind == FileBacking::FsDax && !spec.discard_writes {
            Source::DaxFile { file, offset }
        } else {
            Source::File {
                file,
                offset,
                shared: !spec.discard_writes,
            }
        };
        Ok(Self {
            id: spec.id.clone(),
            memory: Memory::File(source),
            size,
            align,
            flusher,
            dma: spec.dma,
        })
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes, a multiple of 2 MiB.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What its host address and its offset in the backing are a multiple of.
    pub fn align(&self) -> u64 {
        self.align
    }

    /// What its guest-physical address has to be a multiple of: Linux's section, and the largest page the host can map
    /// it with. The offset in the backing is a multiple of that page too, so the two are congruent.
    pub fn placement_align(&self) -> u64 {
        self.align.max(SECTION)
    }

    /// Maps it, a device's range being locked first, for this guest-physical address.
    pub fn map(&mut self, gpa: Gpa) -> Result<Region, PmemMapError> {
        let id = || self.id.clone();
        let mapping = match &mut self.memory {
            Memory::Dax {
                device,
                range,
                held,
            } => {
                let kind = if device.is_writable() {
                    LockKind::Exclusive
                } else {
                    LockKind::Shared
                };
                let lock = held
                    .take()
                    .map_or_else(|| device.lock(*range, kind), Ok)
                    .map_err(|source| PmemMapError::Lock { id: id(), source })?;
                Mapping::Dax(
                    lock.map()
                        .map_err(|source| PmemMapError::Dax { id: id(), source })?,
                )
            }
            Memory::File(source) => Mapping::Host(
                HostMapping::new(source.clone(), self.size, self.align)
                    .map_err(|source| PmemMapError::Host { id: id(), source })?,
            ),
        };
        let region = Region::new(&self.id, gpa, mapping).map_err(|(_, error)| error)?;
        region
            .with_dma(self.dma)
            .map_err(|(_, source)| PmemMapError::Dma { id: id(), source })
    }

    /// What the guest's flush requests have to do.
    pub fn flusher(&self) -> Arc<dyn Flush> {
        Arc::clone(&self.flusher)
    }
}

impl std::fmt::Debug for PmemBacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PmemBacking")
            .field("id", &self.id)
            .field("size", &self.size)
            .field("align", &self.align)
            .finish_non_exhaustive()
    }
}

impl Flush for Flusher {
    fn flush(&self) -> io::Result<()> {
        Flusher::flush(self)
    }
}

/// Writes go nowhere: there is nothing to make durable.
struct Discarded;

impl Flush for Discarded {
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file's own way. The kernel tells of a page it could not write once and then takes it for clean; so an error
/// stays, as no later success could speak for that page.
struct FileFlush {
    file: Arc<File>,
    failed: AtomicI32,
}

impl FileFlush {
    fn new(file: Arc<File>) -> Self {
        Self {
            file,
            failed: AtomicI32::new(0),
        }
    }
}

impl Flush for FileFlush {
    fn flush(&self) -> io::Result<()> {
        let result = self.file.sync_data();
        if let Err(error) = &result {
            self.failed
                .store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
        }
        match self.failed.load(Ordering::Relaxed) {
            0 => result,
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

fn open_file(spec: &PmemSpec) -> Result<File, PmemOpenError> {
    let open = |write: bool| OpenOptions::new().read(true).write(write).open(&spec.file);
    open(!spec.discard_writes).map_err(|source| {
        let (id, file) = (spec.id.clone(), spec.file.clone());
        if !spec.discard_writes && open(false).is_ok() {
            PmemOpenError::ReadOnly { id, file, source }
        } else {
            PmemOpenError::File { id, file, source }
        }
    })
}

fn check_units(spec: &PmemSpec, unit: u64, offset: u64, size: u64) -> Result<(), PmemOpenError> {
    for (what, value) in [("offset", offset), ("size", size)] {
        if !value.is_multiple_of(unit) {
            return Err(PmemOpenError::Misaligned {
                id: spec.id.clone(),
                file: spec.file.clone(),
                what,
                value: ByteSize(value),
                unit: ByteSize(unit),
            });
        }
    }
    Ok(())
}

/// Says what the user may not expect of the file.
fn warn_of(spec: &PmemSpec, kind: FileBacking, sparse: bool) {
    let (pmem, path) = (&spec.id, spec.file.display());
    match kind {
        FileBacking::Tmpfs | FileBacking::Hugetlbfs => tracing::warn!(
            pmem, %path,
            "the file is in memory: its contents survive the guest, but no reboot of the host"
        ),
        FileBacking::FsDax => tracing::warn!(
            pmem, %path,
            "a file on fs-dax can be guest memory, but no device can do DMA to it: the kernel refuses to pin it for long"
        ),
        FileBacking::PageCache => {}
    }
    if sparse {
        tracing::warn!(
            pmem, %path,
            "the file has holes: a guest's store to one fails hard when the file system is full; `fallocate -l SIZE {}` \
             fills them", Path::new(&spec.file).display()
        );
    }
}

#[cfg(test)]
mod tests;

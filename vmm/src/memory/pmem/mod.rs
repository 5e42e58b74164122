//! What backs a virtio-pmem device, opened: how large it is, what alignment it wants, what a flush of it is.
//!
//! The memory becomes a [`Region`] like any RAM and is attached to the same consumers. What is particular is here:
//! - device-dax: sizes from sysfs, the range locked when it is mapped; a flush is what its region asks for.
//! - a file, on fs-dax or any other file system: mapped shared, a flush is a real `fdatasync`.
//! - a file with `discard_writes`: mapped copy-on-write, a flush is nothing.
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
    Dax { device: DaxDevice, range: DaxRange },
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
            Ok(device) => Self::of_device(spec, device),
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

    fn of_device(spec: &PmemSpec, device: DaxDevice) -> Result<Self, PmemOpenError> {
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
            memory: Memory::Dax { device, range },
            size: range.len(),
            align,
            flusher: Arc::new(flusher),
            dma: spec.dma,
        })
    }

    fn of_file(host: &Host, spec: &PmemSpec, kind: FileBacking) -> Result<Self, PmemOpenError> {
        let failed = |source| PmemOpenError::File {
            id: spec.id.clone(),
            file: spec.file.clone(),
            source,
        };
        let file = open_file(spec)?;
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
        let lock = if spec.discard_writes {
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
    pub fn map(&self, gpa: Gpa) -> Result<Region, PmemMapError> {
        let id = || self.id.clone();
        let mapping = match &self.memory {
            Memory::Dax { device, range } => {
                let lock = device
                    .lock(*range, LockKind::Exclusive)
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
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, symlink};

    use tempfile::{NamedTempFile, TempDir};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::snapshot::Snapshot;

    const GIB: u64 = 1 << 30;

    fn file(len: u64) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    fn spec(file: &Path) -> PmemSpec {
        PmemSpec {
            id: "p0".into(),
            file: file.to_owned(),
            ..PmemSpec::default()
        }
    }

    fn open(spec: &PmemSpec) -> Result<PmemBacking, PmemOpenError> {
        PmemBacking::open(&Host::system(), spec)
    }

    fn refusal(spec: &PmemSpec) -> String {
        let error = open(spec).unwrap_err();
        let source = std::error::Error::source(&error);
        let text = format!(
            "{error}: {}",
            source.map(ToString::to_string).unwrap_or_default()
        );
        assert!(text.starts_with("pmem p0"), "{text}");
        text
    }

    fn guest(region: &Region) -> Snapshot {
        Snapshot::of(vec![region.guest_region()]).unwrap()
    }

    /// A host with one dax device, whose memory is `/dev/zero`.
    fn dax_host(align: u64, size: u64, nd: bool) -> (TempDir, Host, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let (sys, dev) = (root.path().join("sys"), root.path().join("dev"));
        let parent = if nd {
            "devices/ndbus0/region0/dax0.0"
        } else {
            "devices/platform/hmem.0"
        };
        let device = sys.join(parent).join("dax0.0");
        fs::create_dir_all(&dev).unwrap();
        fs::create_dir_all(sys.join("dev/char")).unwrap();
        fs::create_dir_all(&device).unwrap();
        let region = sys.join(parent).join("dax_region");
        fs::create_dir_all(&region).unwrap();
        for (dir, name, text) in [
            (&device, "dev", "1:5".to_owned()),
            (&device, "size", size.to_string()),
            (&device, "align", align.to_string()),
            (&region, "id", "0".to_owned()),
            (&region, "size", size.to_string()),
        ] {
            fs::write(dir.join(name), text + "\n").unwrap();
        }
        if nd {
            let nd_region = sys.join("devices/ndbus0/region0");
            symlink(sys.join("bus/nd"), nd_region.join("subsystem")).unwrap();
            fs::write(nd_region.join("persistence_domain"), "memory_controller\n").unwrap();
            fs::write(nd_region.join("deep_flush"), "1\n").unwrap();
        }
        symlink(sys.join("bus/dax"), device.join("subsystem")).unwrap();
        symlink(
            sys.join("bus/dax/drivers/device_dax"),
            device.join("driver"),
        )
        .unwrap();
        symlink(&device, sys.join("dev/char/1:5")).unwrap();
        let node = dev.join("dax0.0");
        symlink("/dev/zero", &node).unwrap();
        let host = Host::at(sys, dev, "/proc");
        (root, host, node)
    }

    #[test]
    fn a_file_is_guest_memory_and_keeps_what_the_guest_wrote() {
        let file = file(4 * MIB);
        let backing = open(&PmemSpec {
            offset: 2 * MIB,
            ..spec(file.path())
        })
        .unwrap();
        assert_eq!((backing.size(), backing.align()), (2 * MIB, 2 * MIB));
        assert_eq!(backing.placement_align(), 128 * MIB);
        let region = backing.map(Gpa(4 * GIB)).unwrap();
        assert_eq!((region.zone(), region.gpa()), ("p0", Gpa(4 * GIB)));
        assert_eq!(region.host_address() % (2 * MIB), 0);
        let written = b"acknowledged";
        guest(&region)
            .write_slice(written, GuestAddress(4 * GIB + 4096))
            .unwrap();
        backing.flusher().flush().unwrap();
        let mut found = [0; 12];
        file.as_file()
            .read_exact_at(&mut found, 2 * MIB + 4096)
            .unwrap();
        assert_eq!(&found, written);
        region.release().unwrap();
    }

    #[test]
    fn discarded_writes_do_not_reach_the_file() {
        let file = file(2 * MIB);
        let backing = open(&PmemSpec {
            discard_writes: true,
            ..spec(file.path())
        })
        .unwrap();
        let region = backing.map(Gpa(GIB)).unwrap();
        guest(&region).write_obj(7u8, GuestAddress(GIB)).unwrap();
        backing.flusher().flush().unwrap();
        let mut found = [0xff];
        file.as_file().read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, [0]);
    }

    #[test]
    fn a_file_has_one_writer_or_several_that_discard() {
        let file = file(8 * MIB);
        let half = |offset| PmemSpec {
            size: Some(4 * MIB),
            offset,
            ..spec(file.path())
        };
        let discarding = PmemSpec {
            discard_writes: true,
            ..half(0)
        };
        let writer = open(&half(0)).unwrap();
        assert!(refusal(&half(0)).contains("in use by process"));
        assert!(refusal(&discarding).contains("in use by process"));
        let _other_half = open(&half(4 * MIB)).unwrap();
        drop(writer);
        let _one = open(&discarding).unwrap();
        let _two = open(&discarding).unwrap();
        assert!(refusal(&half(0)).contains("in use"));
    }

    #[test]
    fn the_lock_lives_as_long_as_the_mapping() {
        let file = file(2 * MIB);
        let backing = open(&spec(file.path())).unwrap();
        let region = backing.map(Gpa(GIB)).unwrap();
        drop(backing);
        refusal(&spec(file.path()));
        region.release().unwrap();
        open(&spec(file.path())).unwrap();
    }

    #[test]
    fn a_file_of_memory_works_too() {
        let memfd = super::super::mapping::memfd(2 * MIB, None).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
        let backing = open(&spec(Path::new(&path))).unwrap();
        backing.map(Gpa(GIB)).unwrap().release().unwrap();
        backing.flusher().flush().unwrap();
    }

    #[test]
    fn what_is_not_memory_is_named_with_what_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let missing = refusal(&spec(&dir.path().join("none")));
        assert!(missing.contains("does not exist"), "{missing}");
        assert!(missing.contains("truncate -s 1G"), "{missing}");
        let directory = refusal(&spec(dir.path()));
        assert!(directory.contains("is a directory"), "{directory}");
        let other = refusal(&spec(Path::new("/dev/null")));
        assert!(
            other.contains("another driver's character device"),
            "{other}"
        );
    }

    #[test]
    fn sizes_and_offsets_that_can_not_be_are_refused() {
        let (empty, odd, good) = (file(0), file(3 * MIB), file(4 * MIB));
        let text = refusal(&spec(empty.path()));
        assert!(text.contains("nothing of"), "{text}");
        let text = refusal(&spec(odd.path()));
        assert!(
            text.contains("the size 3M") && text.contains("truncate -s %2M"),
            "{text}"
        );
        for (size, offset, says) in [
            (Some(0), 0, "nothing of"),
            (None, 4 * MIB, "nothing of"),
            (None, u64::MAX, "nothing of"),
            (Some(6 * MIB), 0, "past the end"),
            (Some(4 * MIB), 2 * MIB, "past the end"),
            (Some(u64::MAX), 2 * MIB, "past the end"),
            (Some(MIB), 0, "the size 1M"),
            (Some(2 * MIB), MIB, "the offset 1M"),
        ] {
            let text = refusal(&PmemSpec {
                size,
                offset,
                ..spec(good.path())
            });
            assert!(text.contains(says), "size {size:?} offset {offset}: {text}");
            assert_eq!(good.as_file().metadata().unwrap().len(), 4 * MIB);
        }
    }

    #[test]
    fn a_file_that_can_not_be_written_is_for_discarding_guests() {
        // Read-only for root too.
        let file = Path::new("/sys/kernel/uevent_seqnum");
        let text = refusal(&spec(file));
        assert!(text.contains("give discard_writes=on"), "{text}");
        // Taken for what it is: its size is the next complaint.
        let text = refusal(&PmemSpec {
            discard_writes: true,
            ..spec(file)
        });
        assert!(text.contains("the size 4K"), "{text}");
    }

    #[test]
    fn device_dax_is_mapped_with_its_alignment_and_flushed_deep() {
        for (align, placement) in [(2 * MIB, 128 * MIB), (4096, 128 * MIB), (GIB, GIB)] {
            let (root, host, node) = dax_host(align, 3 * GIB, true);
            let part = PmemSpec {
                size: Some(GIB),
                ..spec(&node)
            };
            let backing = PmemBacking::open(&host, &part).unwrap();
            assert_eq!((backing.size(), backing.align()), (GIB, align));
            assert_eq!(backing.placement_align(), placement);
            let region = backing.map(Gpa(4 * GIB)).unwrap();
            assert!(matches!(region.mapping(), Mapping::Dax(_)));
            assert_eq!(region.host_address() % align, 0);
            let attribute = root.path().join("sys/devices/ndbus0/region0/deep_flush");
            fs::write(&attribute, "?").unwrap();
            backing.flusher().flush().unwrap();
            assert_eq!(fs::read_to_string(&attribute).unwrap(), "1");
            region.release().unwrap();
        }
    }

    #[test]
    fn a_whole_device_is_as_many_units_as_it_has() {
        let (_root, host, node) = dax_host(4096, 64 * MIB + 4096, true);
        let backing = PmemBacking::open(&host, &spec(&node)).unwrap();
        assert_eq!(backing.size(), 64 * MIB);
    }

    #[test]
    fn a_range_of_a_device_is_had_once() {
        let (_root, host, node) = dax_host(2 * MIB, GIB, false);
        let backing = PmemBacking::open(&host, &spec(&node)).unwrap();
        let _region = backing.map(Gpa(4 * GIB)).unwrap();
        let error = backing.map(Gpa(8 * GIB)).unwrap_err();
        assert!(matches!(error, PmemMapError::Lock { .. }), "{error:?}");
    }

    #[test]
    fn ranges_a_device_can_not_give_are_refused() {
        let (_root, host, node) = dax_host(4096, GIB, false);
        let refused = |spec: PmemSpec| PmemBacking::open(&host, &spec).unwrap_err();
        let error = refused(PmemSpec {
            discard_writes: true,
            ..spec(&node)
        });
        assert!(error.to_string().contains("always shared"), "{error}");
        for (size, offset) in [
            (Some(2 * GIB), 0),
            (Some(0), 0),
            (None, GIB),
            (None, u64::MAX - 4095),
            (Some(2 * MIB), 100),
        ] {
            let error = refused(PmemSpec {
                size,
                offset,
                ..spec(&node)
            });
            assert!(matches!(error, PmemOpenError::Range { .. }), "{error:?}");
        }
        // What the device could give, but no guest takes.
        let error = refused(PmemSpec {
            size: Some(2 * MIB + 4096),
            ..spec(&node)
        });
        assert!(
            error.to_string().contains("not a multiple of 2M"),
            "{error}"
        );
        let error = refused(PmemSpec {
            size: Some(2 * MIB),
            offset: 4096,
            ..spec(&node)
        });
        assert!(error.to_string().contains("the offset 4K"), "{error}");
    }

    #[test]
    fn an_fsync_error_is_reported_and_stays() {
        // A write to /dev/full fails, and it has no fsync: EINVAL, as a device-dax device would answer.
        let full = Arc::new(File::options().write(true).open("/dev/full").unwrap());
        let flush = FileFlush::new(full);
        let error = flush.flush().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let mended = FileFlush {
            file: Arc::new(tempfile::tempfile().unwrap()),
            failed: flush.failed,
        };
        let error = mended.flush().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}

//! Host memory that is not device-dax: anonymous, memfd, huge pages, files.
//!
//! Invariants: a mapping starts at a multiple of its alignment, so that KVM can map guest memory with entries of that
//! size; it is unmapped exactly once; nothing is written to it here except by `prefault`, which only faults pages in.
//! Device-dax memory is mapped by `daxhund-dax`, which has rules of its own; the aligned addresses come from there too.

use std::fs::File;
use std::io;
use std::sync::Arc;

use daxhund_dax::{Pages, is_for_writing};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use thiserror::Error;

const PAGE: u64 = 4096;

/// `f_type` of hugetlbfs, memfds from its pool included (linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What to map.
#[derive(Debug, Clone)]
pub enum Source {
    /// Private anonymous memory; huge page size in bytes, or `None` for ordinary pages.
    Anonymous {
        /// Huge page size (hugetlb pool).
        huge_bytes: Option<u64>,
        /// Ask for transparent huge pages.
        thp: bool,
    },
    /// A range of a file, shared or copy-on-write.
    File {
        /// The file; kept open while the mapping lives.
        file: Arc<File>,
        /// Offset of the range in bytes.
        offset: u64,
        /// Whether stores reach the file.
        shared: bool,
    },
    /// A range of a file on an fs-dax file system, shared, with `MAP_SYNC` where the file system has it: a block is
    /// the file's for good before the first store to it.
    DaxFile {
        /// The file; kept open while the mapping lives.
        file: Arc<File>,
        /// Offset of the range in bytes.
        offset: u64,
    },
}

/// Memory could not be mapped, populated or unmapped.
#[derive(Debug, Error)]
#[error("can't {what} {size:#x} bytes of {kind} memory")]
pub struct MapMemoryError {
    /// The step.
    pub what: &'static str,
    /// How many bytes.
    pub size: u64,
    /// What kind of memory.
    pub kind: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// A mapped range of host memory.
#[derive(Debug)]
pub struct HostMapping {
    pages: Pages,
    source: Source,
}

impl HostMapping {
    /// Maps `size` bytes at a multiple of `align` (a power of two, at least the page size of the source).
    pub fn new(source: Source, size: u64, align: u64) -> Result<Self, MapMemoryError> {
        let kind = source.kind();
        let failed = |what| {
            move |e: io::Error| MapMemoryError {
                what,
                size,
                kind,
                source: e,
            }
        };
        let too_large = || failed("address")(io::Error::from_raw_os_error(libc::EOVERFLOW));
        let len = usize::try_from(size).map_err(|_| too_large())?;
        let align = usize::try_from(align).map_err(|_| too_large())?;
        let pages = Pages::reserve(len, align).map_err(failed("reserve addresses for"))?;
        let mapping = Self { pages, source };
        mapping.place().map_err(failed("map"))?;
        if let Source::Anonymous {
            huge_bytes: None,
            thp: true,
        } = mapping.source
        {
            mapping
                .advise(Advice::LinuxHugepage)
                .map_err(failed("ask for huge pages in"))?;
        }
        // A child must not keep guest memory alive or copy it, and a core dump must not hold it.
        mapping
            .advise(Advice::LinuxDontFork)
            .map_err(failed("keep from children"))?;
        mapping
            .advise(Advice::LinuxDontDump)
            .map_err(failed("keep out of core dumps"))?;
        Ok(mapping)
    }

    /// The same memory once more, at another address; `None` where there is no other way to it.
    pub fn again(&self, align: u64) -> Result<Option<Self>, MapMemoryError> {
        match &self.source {
            Source::File { shared: true, .. } | Source::DaxFile { .. } => {
                Self::new(self.source.clone(), self.pages.len() as u64, align).map(Some)
            }
            Source::File { shared: false, .. } | Source::Anonymous { .. } => Ok(None),
        }
    }

    /// Replaces the reservation by the memory itself.
    fn place(&self) -> io::Result<()> {
        let (address, len) = (self.pages.as_ptr().cast(), self.pages.len());
        let prot = if self.is_read_only() {
            ProtFlags::READ
        } else {
            ProtFlags::READ | ProtFlags::WRITE
        };
        match &self.source {
            Source::Anonymous { huge_bytes, .. } => {
                // Ordinary anonymous memory is not charged up front, a huge page pool is: better an error now than
                // SIGBUS later.
                let flags = match huge_bytes {
                    None => MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                    Some(bytes) => MapFlags::PRIVATE | MapFlags::FIXED | huge_flags(*bytes)?,
                };
                // SAFETY: MAP_FIXED replaces exactly the reservation that `self.pages` owns, which
                // nothing else refers to.
                unsafe { rustix::mm::mmap_anonymous(address, len, prot, flags) }?;
            }
            Source::File {
                file,
                offset,
                shared,
            } => {
                let visibility = if *shared {
                    MapFlags::SHARED
                } else {
                    MapFlags::PRIVATE
                };
                // SAFETY: as above.
                unsafe {
                    rustix::mm::mmap(
                        address,
                        len,
                        prot,
                        visibility | MapFlags::FIXED,
                        file,
                        *offset,
                    )
                }?;
            }
            Source::DaxFile { file, offset } => {
                let sync = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
                let map = |visibility| {
                    // SAFETY: as above.
                    unsafe {
                        let flags = visibility | MapFlags::FIXED;
                        rustix::mm::mmap(address, len, prot, flags, file, *offset)
                    }
                };
                map(sync).or_else(|_| map(MapFlags::SHARED))?;
            }
        }
        Ok(())
    }

    /// First host address.
    pub fn as_ptr(&self) -> *mut u8 {
        self.pages.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Never: an empty range can't be mapped.
    pub fn is_empty(&self) -> bool {
        self.pages.len() == 0
    }

    /// Whether it can't be stored to: shared with a file that is open for reading only.
    pub fn is_read_only(&self) -> bool {
        let (Source::File {
            file, shared: true, ..
        }
        | Source::DaxFile { file, .. }) = &self.source
        else {
            return false;
        };
        !is_for_writing(file)
    }

    /// What it is a mapping of.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// What it can be split at, in bytes: the page size of what is behind it.
    pub fn page_bytes(&self) -> usize {
        let bytes = match &self.source {
            Source::Anonymous { huge_bytes, .. } => huge_bytes.unwrap_or(PAGE),
            // The block size of hugetlbfs is its page size; all others map by ordinary pages.
            Source::File { file, .. } | Source::DaxFile { file, .. } => rustix::fs::fstatfs(file)
                .ok()
                .filter(|fs| fs.f_type == HUGETLBFS_MAGIC)
                .and_then(|fs| u64::try_from(fs.f_bsize).ok())
                .unwrap_or(PAGE),
        };
        usize::try_from(bytes).unwrap_or_else(|_| self.len())
    }

    /// The file and offset behind the range, where there is one that others can map too.
    pub fn file(&self) -> Option<(&Arc<File>, u64)> {
        match &self.source {
            Source::File { file, offset, .. } | Source::DaxFile { file, offset } => {
                Some((file, *offset))
            }
            Source::Anonymous { .. } => None,
        }
    }

    /// Faults every page in, writable, without changing a byte (`MADV_POPULATE_WRITE`).
    pub fn prefault(&self) -> Result<(), MapMemoryError> {
        self.pages.populate().map_err(|e| self.error("prefault", e))
    }

    /// Takes the pages from one NUMA node of the host only.
    pub fn bind_to_node(&self, node: u32) -> Result<(), MapMemoryError> {
        const MPOL_BIND: libc::c_long = 2;
        const BITS: usize = 1024;
        let mut mask = [0u64; BITS / 64];
        let Some(word) = mask.get_mut(node as usize / 64) else {
            return Err(self.error("bind to a node", io::Error::from_raw_os_error(libc::EINVAL)));
        };
        *word = 1 << (node % 64);
        // SAFETY: the range is mapped and owned by `self`; the mask outlives the call and has BITS bits; mbind reads
        // nothing else.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.pages.as_ptr(),
                self.pages.len(),
                MPOL_BIND,
                mask.as_ptr(),
                BITS + 1,
                0,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(self.error("bind to its node", io::Error::last_os_error()))
        }
    }

    /// The undo of [`HostMapping::new`]. On failure the mapping comes back.
    pub fn unmap(self) -> Result<(), (Self, MapMemoryError)> {
        let Self { pages, source } = self;
        pages.unmap().map_err(|(pages, e)| {
            let mapping = Self { pages, source };
            let error = mapping.error("unmap", e);
            (mapping, error)
        })
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is mapped and owned by `self`; none of the advices used here changes its contents.
        unsafe { rustix::mm::madvise(self.pages.as_ptr().cast(), self.pages.len(), advice) }
            .map_err(io::Error::from)
    }

    fn error(&self, what: &'static str, source: io::Error) -> MapMemoryError {
        MapMemoryError {
            what,
            size: self.pages.len() as u64,
            kind: self.source.kind(),
            source,
        }
    }
}

impl Source {
    fn kind(&self) -> &'static str {
        match self {
            Self::Anonymous {
                huge_bytes: None, ..
            } => "anonymous",
            Self::Anonymous {
                huge_bytes: Some(_),
                ..
            } => "anonymous huge page",
            Self::File { shared: true, .. } => "shared file",
            Self::File { shared: false, .. } => "private file",
            Self::DaxFile { .. } => "fs-dax file",
        }
    }
}

fn huge_flags(bytes: u64) -> io::Result<MapFlags> {
    match bytes.trailing_zeros() {
        21 => Ok(MapFlags::HUGETLB | MapFlags::HUGE_2MB),
        30 => Ok(MapFlags::HUGETLB | MapFlags::HUGE_1GB),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// An unnamed file for shared guest memory, `size` bytes long, from the huge page pool where asked.
pub fn memfd(size: u64, huge_bytes: Option<u64>) -> io::Result<File> {
    use rustix::fs::MemfdFlags;
    let huge = match huge_bytes.map(u64::trailing_zeros) {
        None => MemfdFlags::empty(),
        Some(21) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(30) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        Some(_) => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    let file = File::from(rustix::fs::memfd_create(
        "daxhund-ram",
        MemfdFlags::CLOEXEC | huge,
    )?);
    file.set_len(size)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn addresses_are_aligned() {
        for align in [4096, 2 * MIB, 1 << 30] {
            let mapping = HostMapping::new(
                Source::Anonymous {
                    huge_bytes: None,
                    thp: false,
                },
                4 * MIB,
                align,
            )
            .unwrap();
            assert_eq!(mapping.as_ptr() as u64 % align, 0);
            assert_eq!(mapping.len() as u64, 4 * MIB);
            mapping.unmap().unwrap();
        }
    }

    #[test]
    fn two_mappings_of_one_memfd_are_one_memory() {
        let file = Arc::new(memfd(4 * MIB, None).unwrap());
        let map = |offset| {
            let source = Source::File {
                file: Arc::clone(&file),
                offset,
                shared: true,
            };
            HostMapping::new(source, 2 * MIB, 2 * MIB).unwrap()
        };
        let (first, again, second) = (map(0), map(0), map(2 * MIB));
        // SAFETY: mapped, at least one byte long, and nobody else accesses it.
        unsafe { first.as_ptr().write_volatile(0x5a) };
        // SAFETY: as above.
        assert_eq!(unsafe { again.as_ptr().read_volatile() }, 0x5a);
        // SAFETY: as above.
        assert_eq!(unsafe { second.as_ptr().read_volatile() }, 0);
        assert_eq!(Arc::strong_count(&file), 4);
        first.unmap().unwrap();
        assert_eq!(Arc::strong_count(&file), 3);
    }

    #[test]
    fn a_dax_file_is_shared_even_where_the_file_system_has_no_sync() {
        let file = Arc::new(memfd(2 * MIB, None).unwrap());
        let map = || {
            let source = Source::DaxFile {
                file: Arc::clone(&file),
                offset: 0,
            };
            HostMapping::new(source, 2 * MIB, 2 * MIB).unwrap()
        };
        let (first, again) = (map(), map());
        // SAFETY: mapped, at least one byte long, and nobody else accesses it.
        unsafe { first.as_ptr().write_volatile(0x5a) };
        // SAFETY: as above.
        assert_eq!(unsafe { again.as_ptr().read_volatile() }, 0x5a);
    }

    #[test]
    fn prefault_leaves_the_contents() {
        let mapping = HostMapping::new(
            Source::Anonymous {
                huge_bytes: None,
                thp: false,
            },
            MIB,
            4096,
        )
        .unwrap();
        // SAFETY: mapped and ours.
        unsafe { mapping.as_ptr().write_volatile(7) };
        mapping.prefault().unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { mapping.as_ptr().read_volatile() }, 7);
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let source = Source::Anonymous {
            huge_bytes: None,
            thp: false,
        };
        assert!(HostMapping::new(source, !0xfff, 4096).is_err());
    }
}

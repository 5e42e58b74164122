//! A configured memory zone, opened: what is behind it, how large it is and what alignment it wants.
//!
//! Everything that can be wrong with a backing is found here, before a VM exists. Nothing is mapped yet and no byte
//! of the backing is read or written.
//!
//! A zone that names neither a file nor a pool is of the pool that the host has for RAM, if it has one; it is locked from
//! the moment it was chosen. Of a pool, memory is zeroed when it is mapped, unless the pool says otherwise: its last user
//! may have been another guest. No other memory is.

mod error;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use daxhund_dax::{
    DaxDevice, DaxRange, FileBacking, Host, LockKind, NotDaxKind, OpenError, RangeLock, Wanted,
};
use rustix::fs::{Mode, OFlags};

use super::layout::{FileOffset, MIN_ALIGN, RamRange, ZoneRequest};
use super::mapping::{self, HostMapping, Source};
use super::pools;
use super::region::{Mapping, Region};
use crate::config::{Backing, ByteSize, HostConfig, HugePageSize, Zero, ZoneSpec};

pub use error::{ZoneMapError, ZoneOpenError};

const MIB: u64 = 1 << 20;
/// Largest page the host maps ordinary memory with.
const THP: u64 = 2 * MIB;

#[derive(Debug)]
enum Memory {
    Dax {
        device: DaxDevice,
        /// What of the range is locked already, and not mapped yet.
        held: Option<RangeLock>,
        zero: Zero,
    },
    File {
        file: Arc<File>,
        shared: bool,
        huge_bytes: Option<u64>,
    },
    Anonymous {
        huge_bytes: Option<u64>,
        thp: bool,
    },
}

/// A zone whose backing is open.
#[derive(Debug)]
pub struct Zone {
    request: ZoneRequest,
    memory: Memory,
    prefault: bool,
    node: Option<u32>,
    dma: Option<bool>,
}

impl Zone {
    /// Opens the backing of a zone and sees that it can be what the zone asks for.
    pub fn open(host: &Host, pools: &HostConfig, spec: &ZoneSpec) -> Result<Self, ZoneOpenError> {
        let opened = match open_by_default(host, pools, spec)? {
            Some(opened) => opened,
            None => Self::open_backing(host, pools, spec)?,
        };
        let (memory, size, align, offset) = opened;
        let request = ZoneRequest {
            id: spec.id.clone(),
            size,
            align,
            file_offset: FileOffset(offset),
        };
        Ok(Self {
            request,
            memory,
            prefault: spec.prefault,
            node: spec.host_numa_node,
            dma: spec.dma,
        })
    }

    fn open_backing(
        host: &Host,
        pools: &HostConfig,
        spec: &ZoneSpec,
    ) -> Result<Opened, ZoneOpenError> {
        let id = spec.id.clone();
        Ok(match &spec.backing {
            Backing::Anonymous {
                size,
                shared: false,
                thp,
            } => {
                let memory = Memory::Anonymous {
                    huge_bytes: None,
                    thp: *thp,
                };
                (memory, size.bytes(), natural_align(size.bytes()), 0)
            }
            Backing::Anonymous {
                size, shared: true, ..
            } => (
                unnamed_file(&id, *size, None)?,
                size.bytes(),
                natural_align(size.bytes()),
                0,
            ),
            Backing::HugeTlb { size, shared, page } => {
                let page = huge_page_bytes(&id, *page)?;
                check_multiple(&id, "size", size.bytes(), page)?;
                let memory = if *shared {
                    unnamed_file(&id, *size, Some(page))?
                } else {
                    Memory::Anonymous {
                        huge_bytes: Some(page),
                        thp: false,
                    }
                };
                (memory, size.bytes(), page, 0)
            }
            Backing::File {
                path,
                offset,
                size,
                shared,
            } => {
                let place = FilePlace {
                    path,
                    offset: offset.bytes(),
                    size: size.map(ByteSize::bytes),
                    shared: *shared,
                };
                open_path(host, spec, &place)?
            }
            Backing::Pool { pool, size } => open_pool(host, pools, spec, pool, *size)?,
        })
    }

    /// What the layout needs to know.
    pub fn request(&self) -> &ZoneRequest {
        &self.request
    }

    /// Locks and maps one range of the zone where the layout put it.
    pub fn map(&mut self, range: &RamRange) -> Result<Region, ZoneMapError> {
        let id = || self.request.id.clone();
        let mapping = match &mut self.memory {
            Memory::Dax { device, held, zero } => {
                let dax = device
                    .range(Some(range.file_offset.0), Some(range.size))
                    .map_err(|source| ZoneMapError::Range { id: id(), source })?;
                let lock = part_of(held, dax)
                    .map_or_else(|| device.lock(dax, LockKind::Exclusive), Ok)
                    .map_err(|source| ZoneMapError::Lock { id: id(), source })?;
                let mapping = lock
                    .map()
                    .map_err(|source| ZoneMapError::Dax { id: id(), source })?;
                if *zero == Zero::Before {
                    let start = Instant::now();
                    mapping
                        .zero()
                        .map_err(|source| ZoneMapError::Zero { id: id(), source })?;
                    tracing::info!(
                        zone = self.request.id, size = %format_args!("{:#x}", range.size),
                        elapsed_ms = start.elapsed().as_millis(), "memory of a pool zeroed"
                    );
                }
                Mapping::Dax(mapping)
            }
            Memory::File {
                file,
                shared,
                huge_bytes,
            } => {
                let huge_bytes = *huge_bytes;
                let source = Source::File {
                    file: Arc::clone(file),
                    offset: range.file_offset.0,
                    shared: *shared,
                };
                Mapping::Host(self.map_host(source, range.size, huge_bytes)?)
            }
            Memory::Anonymous { huge_bytes, thp } => {
                let (huge_bytes, thp) = (*huge_bytes, *thp);
                let source = Source::Anonymous { huge_bytes, thp };
                Mapping::Host(self.map_host(source, range.size, huge_bytes)?)
            }
        };
        self.prepare(&mapping)?;
        let region =
            Region::new(&self.request.id, range.gpa, mapping).map_err(|(_, error)| error)?;
        region
            .with_dma(self.dma)
            .map_err(|(_, source)| ZoneMapError::Dma { id: id(), source })
    }

    fn map_host(
        &self,
        source: Source,
        size: u64,
        huge_bytes: Option<u64>,
    ) -> Result<HostMapping, ZoneMapError> {
        let id = self.request.id.clone();
        HostMapping::new(source, size, self.request.align).map_err(|source| match huge_bytes {
            Some(page) => ZoneMapError::HugePages {
                id,
                needed: size / page,
                free: free_huge_pages(page),
                page_kib: page / 1024,
                source,
            },
            None => ZoneMapError::Host { id, source },
        })
    }

    /// Node first: it decides where `prefault` takes its pages from.
    fn prepare(&self, mapping: &Mapping) -> Result<(), ZoneMapError> {
        match mapping {
            Mapping::Dax(mapping) if self.prefault => {
                mapping.prefault().map_err(|source| ZoneMapError::Dax {
                    id: self.request.id.clone(),
                    source,
                })
            }
            Mapping::Dax(_) => Ok(()),
            Mapping::Host(mapping) => {
                let failed = |source| ZoneMapError::Host {
                    id: self.request.id.clone(),
                    source,
                };
                if let Some(node) = self.node {
                    mapping.bind_to_node(node).map_err(failed)?;
                }
                if self.prefault {
                    mapping.prefault().map_err(failed)
                } else {
                    Ok(())
                }
            }
        }
    }
}

/// The front of what is held, or all of it; `None` when that is not what is asked for.
fn part_of(held: &mut Option<RangeLock>, asked: DaxRange) -> Option<RangeLock> {
    let lock = held.as_mut()?;
    if lock.range() == asked {
        return held.take();
    }
    if lock.range().offset() != asked.offset() {
        return None;
    }
    lock.split_off_front(asked.len())
}

/// For a zone that says nothing of where its memory is to come from: the pool that the host has for RAM. `None` when it has
/// none, or when that can't give it and need not.
fn open_by_default(
    host: &Host,
    pools: &HostConfig,
    spec: &ZoneSpec,
) -> Result<Option<Opened>, ZoneOpenError> {
    let (Some(ram), Backing::Anonymous { size, .. } | Backing::HugeTlb { size, .. }) =
        (pools.ram(), &spec.backing)
    else {
        return Ok(None);
    };
    match open_pool(host, pools, spec, &ram.pool, *size) {
        Ok(opened) => Ok(Some(opened)),
        Err(error) if ram.required => Err(error),
        Err(error) => {
            tracing::warn!(
                error = crate::chain(&error),
                "RAM is not of the host's pool for it, and is not required to be"
            );
            Ok(None)
        }
    }
}

fn open_pool(
    host: &Host,
    pools: &HostConfig,
    spec: &ZoneSpec,
    name: &str,
    size: ByteSize,
) -> Result<Opened, ZoneOpenError> {
    let wanted = Wanted {
        node: spec.host_numa_node,
        ..Wanted::bytes(size.bytes())
    };
    let taken = pools::take(host, pools, name, wanted).map_err(|source| ZoneOpenError::Pool {
        id: spec.id.clone(),
        source,
    })?;
    let (device, range) = (taken.lock.opened(), taken.lock.range());
    tracing::info!(
        zone = spec.id, pool = name, device = %device.path().display(),
        offset = %format_args!("{:#x}", range.offset()), "memory taken of a pool"
    );
    let align = device.facts().align_bytes;
    let memory = Memory::Dax {
        device,
        held: Some(taken.lock),
        zero: taken.zero,
    };
    Ok((memory, range.len(), align, range.offset()))
}

struct FilePlace<'a> {
    path: &'a Path,
    offset: u64,
    size: Option<u64>,
    shared: Option<bool>,
}

type Opened = (Memory, u64, u64, u64);

fn open_path(host: &Host, spec: &ZoneSpec, place: &FilePlace<'_>) -> Result<Opened, ZoneOpenError> {
    let id = || spec.id.clone();
    let path = place.path.to_owned();
    // Tried as device-dax first, which is what it should be: the refusal says what else it is.
    match host.open(&path) {
        Ok(device) => open_dax(spec, place, device),
        Err(OpenError::FsDaxFile { .. }) => open_named_file(spec, place, FileBacking::FsDax),
        Err(OpenError::NotDax {
            kind: NotDaxKind::File(kind @ (FileBacking::Hugetlbfs | FileBacking::Tmpfs)),
            ..
        }) => open_named_file(spec, place, kind),
        Err(OpenError::NotDax {
            kind: NotDaxKind::Directory,
            ..
        }) => open_directory(spec, place),
        Err(source) => Err(ZoneOpenError::Dax { id: id(), source }),
    }
}

fn open_named_file(
    spec: &ZoneSpec,
    place: &FilePlace<'_>,
    kind: FileBacking,
) -> Result<Opened, ZoneOpenError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(place.path)
        .map_err(|source| ZoneOpenError::File {
            id: spec.id.clone(),
            path: place.path.to_owned(),
            source,
        })?;
    open_file(spec, place, file, kind)
}

fn open_dax(
    spec: &ZoneSpec,
    place: &FilePlace<'_>,
    device: DaxDevice,
) -> Result<Opened, ZoneOpenError> {
    let id = || spec.id.clone();
    if place.shared == Some(false) {
        return Err(ZoneOpenError::DaxNotShared {
            id: id(),
            path: place.path.to_owned(),
        });
    }
    let facts = device.facts();
    if let Some(asked) = spec.host_numa_node
        && facts.target_node != Some(asked)
        && facts.numa_node != Some(asked)
    {
        let found = facts.target_node;
        return Err(ZoneOpenError::DaxNode {
            id: id(),
            path: place.path.to_owned(),
            asked,
            found,
        });
    }
    let range = device
        .range(Some(place.offset), place.size)
        .map_err(|source| ZoneOpenError::Range { id: id(), source })?;
    let align = device.facts().align_bytes;
    let memory = Memory::Dax {
        device,
        held: None,
        zero: Zero::Never,
    };
    Ok((memory, range.len(), align, range.offset()))
}

fn open_file(
    spec: &ZoneSpec,
    place: &FilePlace<'_>,
    file: File,
    kind: FileBacking,
) -> Result<Opened, ZoneOpenError> {
    let id = || spec.id.clone();
    let failed = |source| ZoneOpenError::File {
        id: id(),
        path: place.path.to_owned(),
        source,
    };
    let len = file.metadata().map_err(failed)?.len();
    let size = place.size.unwrap_or(len.saturating_sub(place.offset));
    if size == 0 || place.offset.checked_add(size).is_none_or(|end| end > len) {
        let path = place.path.to_owned();
        return Err(ZoneOpenError::FileTooShort {
            id: id(),
            path,
            offset: place.offset,
            size,
            len,
        });
    }
    let (huge_bytes, align) = match kind {
        FileBacking::Hugetlbfs => {
            let page = block_size(&file).map_err(failed)?;
            check_multiple(&spec.id, "size", size, page)?;
            check_multiple(&spec.id, "offset", place.offset, page)?;
            (Some(page), page)
        }
        _ => (None, natural_align(size | place.offset)),
    };
    if kind == FileBacking::FsDax {
        tracing::warn!(
            zone = spec.id, path = %place.path.display(),
            "a file on fs-dax can be guest memory, but no device can do DMA to it: the kernel refuses to pin it for long"
        );
    }
    // As Cloud Hypervisor: a file is copy-on-write unless shared=on. Not so fs-dax, whose point is the file itself.
    let shared = place.shared.unwrap_or(kind == FileBacking::FsDax);
    Ok((
        Memory::File {
            file: Arc::new(file),
            shared,
            huge_bytes,
        },
        size,
        align,
        place.offset,
    ))
}

/// A directory of a memory file system: an unnamed file in it, gone with the VMM.
fn open_directory(spec: &ZoneSpec, place: &FilePlace<'_>) -> Result<Opened, ZoneOpenError> {
    let id = || spec.id.clone();
    let path = place.path;
    let failed = |source: io::Error| ZoneOpenError::File {
        id: id(),
        path: path.to_owned(),
        source,
    };
    let Some(kind) = directory_backing(path).map_err(failed)? else {
        let source = OpenError::NotDax {
            path: path.to_owned(),
            kind: NotDaxKind::Directory,
        };
        return Err(ZoneOpenError::Dax { id: id(), source });
    };
    let size = place.size.ok_or_else(|| ZoneOpenError::DirectorySize {
        id: id(),
        path: path.to_owned(),
    })?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file =
        rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    let file = File::from(file);
    file.set_len(place.offset.saturating_add(size))
        .map_err(failed)?;
    open_file(spec, place, file, kind)
}

fn directory_backing(path: &Path) -> io::Result<Option<FileBacking>> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    Ok(match rustix::fs::statfs(path)?.f_type {
        HUGETLBFS_MAGIC => Some(FileBacking::Hugetlbfs),
        TMPFS_MAGIC => Some(FileBacking::Tmpfs),
        _ => None,
    })
}

/// On hugetlbfs this is the huge page size of the mount.
fn block_size(file: impl AsFd) -> io::Result<u64> {
    let size = rustix::fs::fstatfs(file)?.f_bsize;
    u64::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn unnamed_file(
    id: &str,
    size: ByteSize,
    huge_bytes: Option<u64>,
) -> Result<Memory, ZoneOpenError> {
    let file = mapping::memfd(size.bytes(), huge_bytes).map_err(|source| match huge_bytes {
        Some(page) => ZoneOpenError::NoHugePages {
            id: id.to_owned(),
            page,
        },
        None => ZoneOpenError::File {
            id: id.to_owned(),
            path: "memfd".into(),
            source,
        },
    })?;
    Ok(Memory::File {
        file: Arc::new(file),
        shared: true,
        huge_bytes,
    })
}

/// The largest page the host could use without making the zone larger.
fn natural_align(size: u64) -> u64 {
    if size.is_multiple_of(THP) {
        THP
    } else {
        MIN_ALIGN
    }
}

fn check_multiple(
    id: &str,
    what: &'static str,
    value: u64,
    page: u64,
) -> Result<(), ZoneOpenError> {
    if value.is_multiple_of(page) {
        Ok(())
    } else {
        Err(ZoneOpenError::HugePageMultiple {
            id: id.to_owned(),
            what,
            value,
            page,
        })
    }
}

fn huge_page_bytes(id: &str, page: HugePageSize) -> Result<u64, ZoneOpenError> {
    let bytes = match page.bytes() {
        Some(size) => size.bytes(),
        None => default_huge_page().unwrap_or(0),
    };
    if Path::new(&pool(bytes)).exists() {
        Ok(bytes)
    } else {
        Err(ZoneOpenError::NoHugePages {
            id: id.to_owned(),
            page: bytes,
        })
    }
}

fn pool(page: u64) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page / 1024)
}

fn free_huge_pages(page: u64) -> u64 {
    let read = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("{}/{name}", pool(page)))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    read("free_hugepages")
        .unwrap_or(0)
        .saturating_sub(read("resv_hugepages").unwrap_or(0))
}

/// `Hugepagesize:` of /proc/meminfo, in bytes.
fn default_huge_page() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests;

//! Whether passed-through devices reach a region.
//!
//! A device reaches memory by a long-term pin of its pages (`FOLL_LONGTERM`, Linux mm/gup.c). What a pin means depends on
//! what the pages are:
//! - device-dax, anonymous memory, memfds, tmpfs and huge pages can be pinned: devices reach them unless told not to.
//! - a file on an ordinary file system, and a copy-on-write mapping of any file: the kernel may pin it, but the pages
//!   a device writes need not be the ones the file gets. Devices don't reach them unless told to.
//! - a file on fs-dax can't be pinned for long: its blocks may move. Devices never reach it.

use std::fs::File;

use daxhund_pin::DmaMemory;
use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, fstatfs, statx};
use thiserror::Error;

use super::mapping::Source;
use super::region::Mapping;

/// How passed-through devices and a region stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dma {
    memory: DmaMemory,
    reachable: bool,
    /// `None`: nobody said anything.
    asked: Option<bool>,
}

/// A region that devices are to reach, and can't.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "dma=on is asked for, but the memory is a file on fs-dax, which the kernel does not pin for long (EOPNOTSUPP): leave \
     dma= out, or use the device in devdax mode (`ndctl create-namespace -f -e NAMESPACE -m devdax`)"
)]
pub struct DmaRefused;

impl Dma {
    /// What becomes of a mapping when nobody says anything.
    pub(super) fn by_default(mapping: &Mapping) -> Self {
        let (memory, reachable) = classify(mapping);
        Self {
            memory,
            reachable,
            asked: None,
        }
    }

    /// As somebody wants it.
    pub(super) fn as_asked(self, asked: Option<bool>) -> Result<Self, DmaRefused> {
        if asked == Some(true) && self.memory == DmaMemory::FsDax {
            return Err(DmaRefused);
        }
        Ok(Self {
            reachable: asked.unwrap_or(self.reachable),
            asked,
            ..self
        })
    }

    /// What it is to those who pin it.
    pub fn memory(self) -> DmaMemory {
        self.memory
    }

    /// Whether devices reach it.
    pub fn is_reachable(self) -> bool {
        self.reachable
    }

    /// Why devices don't reach it though nobody has said so; something to tell the user once.
    pub fn unasked_exclusion(self) -> Option<&'static str> {
        if self.reachable || self.asked.is_some() {
            return None;
        }
        Some(match self.memory {
            DmaMemory::FsDax => "the kernel does not pin fs-dax memory for long",
            _ => {
                "it is a file, and what a device writes to pinned pages need not reach it; dma=on says it is wanted"
            }
        })
    }
}

fn classify(mapping: &Mapping) -> (DmaMemory, bool) {
    match mapping {
        Mapping::Dax(_) => (DmaMemory::DeviceDax, true),
        Mapping::Host(host) => match host.source() {
            Source::Anonymous {
                huge_bytes: Some(_),
                ..
            } => (DmaMemory::Hugetlb, true),
            Source::Anonymous { .. } => (DmaMemory::Anonymous, true),
            Source::DaxFile { .. } => (DmaMemory::FsDax, false),
            Source::File { file, shared, .. } => {
                let memory = of_file(file, *shared);
                let of_memory = matches!(memory, DmaMemory::Anonymous | DmaMemory::Hugetlb);
                (memory, *shared && of_memory)
            }
        },
    }
}

fn of_file(file: &File, shared: bool) -> DmaMemory {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    match fstatfs(file).map(|system| system.f_type) {
        Ok(HUGETLBFS_MAGIC) => DmaMemory::Hugetlb,
        Ok(TMPFS_MAGIC) => DmaMemory::Anonymous,
        _ if shared && is_fs_dax(file) => DmaMemory::FsDax,
        _ => DmaMemory::File,
    }
}

/// `STATX_ATTR_DAX`: accesses go to the memory itself.
fn is_fs_dax(file: &File) -> bool {
    statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .is_ok_and(|facts| facts.stx_attributes.contains(StatxAttributes::DAX))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::mapping::{HostMapping, memfd};

    const SIZE: u64 = 0x1000;

    fn of(source: Source) -> Dma {
        let mapping = Mapping::Host(HostMapping::new(source, SIZE, 4096).unwrap());
        Dma::by_default(&mapping)
    }

    fn of_file(file: File, shared: bool) -> Dma {
        of(Source::File {
            file: Arc::new(file),
            offset: 0,
            shared,
        })
    }

    #[test]
    fn memory_is_reached_and_files_are_not() {
        let anonymous = of(Source::Anonymous {
            huge_bytes: None,
            thp: false,
        });
        assert!(anonymous.is_reachable());
        assert!(of_file(memfd(SIZE, None).unwrap(), true).is_reachable());
        assert!(!of_file(memfd(SIZE, None).unwrap(), false).is_reachable());
        // A temporary directory may be on tmpfs, the sources are not.
        let directory = env!("CARGO_MANIFEST_DIR");
        let file = tempfile::tempfile_in(directory).unwrap();
        file.set_len(SIZE).unwrap();
        let plain = of_file(file, true);
        assert_eq!(plain.memory(), DmaMemory::File);
        assert!(!plain.is_reachable());
        assert!(plain.unasked_exclusion().unwrap().contains("dma=on"));
        let asked = plain.as_asked(Some(true)).unwrap();
        assert!(asked.is_reachable() && asked.unasked_exclusion().is_none());
        let off = anonymous.as_asked(Some(false)).unwrap();
        assert!(!off.is_reachable() && off.unasked_exclusion().is_none());
    }

    #[test]
    fn fs_dax_is_refused_by_kind() {
        let dma = Dma {
            memory: DmaMemory::FsDax,
            reachable: false,
            asked: None,
        };
        assert!(dma.as_asked(None).is_ok());
        let error = dma.as_asked(Some(true)).unwrap_err().to_string();
        assert!(
            error.contains("fs-dax") && error.contains("ndctl"),
            "{error}"
        );
    }
}

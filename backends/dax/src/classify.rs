//! What a path is, found out without opening it.
//!
//! Opening an unknown character device can have side effects, so everything is read from the path's metadata and
//! sysfs: a character device belongs to dax when `/sys/dev/char/MAJ:MIN/subsystem` says so, whatever its name is.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statfs, statx};
use thiserror::Error;

use crate::device::{DeviceFacts, DeviceNumber, Driver};
use crate::host::Host;
use crate::sysfs::{Sysfs, SysfsError};

/// What a path leads to, symbolic links followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// A dax device that can be opened and mapped.
    DeviceDax(Box<DeviceFacts>),
    /// A dax device whose memory the kernel owns.
    SystemRam(Box<DeviceFacts>),
    /// A dax device without a driver, or with one that does not let it be mapped.
    Unbound(Box<DeviceFacts>),
    /// A regular file.
    File(FileBacking),
    /// Anything else that is not memory.
    NotDax(NotDaxKind),
    /// Nothing is there.
    Missing,
}

/// What holds a regular file's bytes, as far as memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileBacking {
    /// A file system that maps persistent memory directly (fs-dax).
    FsDax,
    /// hugetlbfs.
    Hugetlbfs,
    /// tmpfs.
    Tmpfs,
    /// The page cache of an ordinary file system.
    PageCache,
}

/// What something that is not a dax device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotDaxKind {
    /// A character device of another driver.
    CharDevice(DeviceNumber),
    /// A block device; `/dev/pmemX` is one.
    BlockDevice(DeviceNumber),
    /// A directory.
    Directory,
    /// A regular file.
    File(FileBacking),
    /// A socket, FIFO or the like.
    Special,
}

impl std::fmt::Display for NotDaxKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CharDevice(number) => {
                write!(f, "another driver's character device ({number})")
            }
            Self::BlockDevice(number) => write!(f, "a block device ({number})"),
            Self::Directory => f.write_str("a directory"),
            Self::File(FileBacking::FsDax) => f.write_str("a file on an fs-dax file system"),
            Self::File(FileBacking::Hugetlbfs) => f.write_str("a file on hugetlbfs"),
            Self::File(FileBacking::Tmpfs) => f.write_str("a file on tmpfs"),
            Self::File(FileBacking::PageCache) => f.write_str("a plain file"),
            Self::Special => f.write_str("a socket or FIFO"),
        }
    }
}

/// Why a path could not be classified.
#[derive(Debug, Error)]
pub enum ClassifyError {
    /// The path's metadata could not be read.
    #[error("cannot look at {}", path.display())]
    Stat {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device's facts could not be read.
    #[error("cannot read the facts of {}", path.display())]
    Facts {
        /// The path.
        path: PathBuf,
        /// The attribute and why.
        #[source]
        source: SysfsError,
    },
}

impl Host {
    /// Says what `path` is. Nothing is opened.
    pub fn classify(&self, path: &Path) -> Result<PathKind, ClassifyError> {
        let stat_error = |source| ClassifyError::Stat {
            path: path.to_owned(),
            source,
        };
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(PathKind::Missing),
            Err(error) => return Err(stat_error(error)),
        };
        let kind = metadata.file_type();
        let number = DeviceNumber::from_rdev(metadata.rdev());
        Ok(if kind.is_char_device() {
            match self.facts_of(number) {
                Ok(Some(facts)) => of_driver(facts),
                Ok(None) => PathKind::NotDax(NotDaxKind::CharDevice(number)),
                Err(source) => {
                    return Err(ClassifyError::Facts {
                        path: path.to_owned(),
                        source,
                    });
                }
            }
        } else if kind.is_file() {
            PathKind::File(file_backing(path).map_err(stat_error)?)
        } else if kind.is_dir() {
            PathKind::NotDax(NotDaxKind::Directory)
        } else if kind.is_block_device() {
            PathKind::NotDax(NotDaxKind::BlockDevice(number))
        } else {
            PathKind::NotDax(NotDaxKind::Special)
        })
    }

    /// The facts of the dax device with this number; `None` when the number is not dax's.
    pub(crate) fn facts_of(&self, number: DeviceNumber) -> Result<Option<DeviceFacts>, SysfsError> {
        let device = self.dax_directory(number)?;
        device.as_ref().map(DeviceFacts::read).transpose()
    }

    /// Where sysfs has the dax device with this number; `None` when the number is not dax's.
    pub(crate) fn dax_directory(&self, number: DeviceNumber) -> Result<Option<Sysfs>, SysfsError> {
        let device = self.sys().join("dev/char").join(number.to_string());
        let is_dax = device.link_name("subsystem")?.as_deref() == Some("dax");
        Ok(is_dax.then_some(device))
    }
}

fn of_driver(facts: DeviceFacts) -> PathKind {
    let facts = Box::new(facts);
    match facts.driver {
        Driver::DeviceDax => PathKind::DeviceDax(facts),
        Driver::Kmem => PathKind::SystemRam(facts),
        Driver::Other(_) | Driver::None => PathKind::Unbound(facts),
    }
}

// linux/magic.h
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

fn file_backing(path: &Path) -> io::Result<FileBacking> {
    // f_type's width and sign differ between targets; the magics are 32-bit values.
    #[allow(clippy::cast_sign_loss)]
    let magic = statfs(path)?.f_type as u64 & 0xffff_ffff;
    Ok(match magic {
        HUGETLBFS_MAGIC => FileBacking::Hugetlbfs,
        TMPFS_MAGIC => FileBacking::Tmpfs,
        _ if is_fs_dax(path)? => FileBacking::FsDax,
        _ => FileBacking::PageCache,
    })
}

fn is_fs_dax(path: &Path) -> io::Result<bool> {
    let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::TYPE)?;
    let known_and_set = stat.stx_attributes_mask & stat.stx_attributes;
    Ok(known_and_set.contains(StatxAttributes::DAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeDevice, FakeHost};

    fn classify(fake: &FakeHost, path: impl AsRef<Path>) -> PathKind {
        fake.host().classify(path.as_ref()).unwrap()
    }

    #[test]
    fn a_dax_device_is_told_by_its_number_whatever_its_name() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::pmem("dax0.0"));
        let alias = fake.dev().join("memory-for-guests");
        std::os::unix::fs::symlink(fake.dev().join("dax0.0"), &alias).unwrap();
        let PathKind::DeviceDax(facts) = classify(&fake, &alias) else {
            panic!("{:?}", classify(&fake, &alias))
        };
        assert_eq!(facts.name.to_string(), "dax0.0");
    }

    #[test]
    fn modes_are_told_apart() {
        for (driver, expected) in [
            (Some("kmem"), "SystemRam"),
            (None, "Unbound"),
            (Some("fsdev_dax"), "Unbound"),
        ] {
            let fake = FakeHost::new();
            fake.add(&FakeDevice {
                driver,
                ..FakeDevice::hmem("dax1.0")
            });
            let kind = format!("{:?}", classify(&fake, fake.dev().join("dax1.0")));
            assert!(kind.starts_with(expected), "{driver:?}: {kind}");
        }
    }

    #[test]
    fn other_things_are_named() {
        let fake = FakeHost::new();
        let null = DeviceNumber { major: 1, minor: 3 };
        assert_eq!(
            classify(&fake, "/dev/null"),
            PathKind::NotDax(NotDaxKind::CharDevice(null))
        );
        assert_eq!(
            classify(&fake, fake.dev()),
            PathKind::NotDax(NotDaxKind::Directory)
        );
        assert_eq!(
            classify(&fake, fake.dev().join("nothing")),
            PathKind::Missing
        );
        let socket = fake.dev().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(
            classify(&fake, socket),
            PathKind::NotDax(NotDaxKind::Special)
        );
    }

    #[test]
    fn regular_files_are_told_by_their_file_system() {
        let fake = FakeHost::new();
        // A memfd is a file on the kernel's own tmpfs mount, reachable by path through procfs.
        let memfd = rustix::fs::memfd_create("tmpfs", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
        assert_eq!(classify(&fake, path), PathKind::File(FileBacking::Tmpfs));
        // Not tmpfs, hugetlbfs or fs-dax anywhere: procfs.
        assert_eq!(
            classify(&fake, "/proc/self/status"),
            PathKind::File(FileBacking::PageCache)
        );
    }

    #[test]
    fn a_path_below_a_file_is_an_error_with_the_path() {
        let fake = FakeHost::new();
        let file = fake.dev().join("file");
        fs::write(&file, "").unwrap();
        let error = fake.host().classify(&file.join("below")).unwrap_err();
        assert!(error.to_string().contains("file/below"), "{error}");
    }
}

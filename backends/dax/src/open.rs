//! From a path to a checked, open device.
//!
//! Whether something can be memory is decided from its metadata and sysfs, before it is opened: each wrong thing
//! gets its own error, and no unknown character device is poked. The device can change between that look and the
//! open, so its facts are those of what was opened. The look before is a glance, as every attribute of sysfs costs a start
//! some hundred microseconds; only what is not usable is looked at in full, to say why.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{OFlags, fcntl_getfl};
use thiserror::Error;

use crate::classify::{ClassifyError, FileBacking, NotDaxKind, PathKind};
use crate::device::{DeviceFacts, DeviceName, DeviceNumber, Driver, RegionKind};
use crate::host::Host;
use crate::range::{Bounds, DaxRange, RangeError};
use crate::size::ByteSize;
use crate::sysfs::SysfsError;

/// An open dax device in devdax mode.
#[derive(Clone, Debug)]
pub struct DaxDevice {
    shared: Arc<Shared>,
}

/// What the locks and mappings of one open device have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<File>,
    pub(crate) facts: DeviceFacts,
    pub(crate) proc: PathBuf,
    /// The ranges handed out of this open file description, whose locks don't conflict with one another.
    pub(crate) claims: Mutex<Vec<DaxRange>>,
    /// Others have this open file description, too: its locks are theirs as well and end with its last descriptor.
    pub(crate) in_common: bool,
    /// Whether the descriptor is for writing, too: one that is lent may not be.
    pub(crate) writable: bool,
}

/// Why a path is not a usable dax device.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Nothing is there.
    #[error("{} does not exist: `daxctl list -Di` shows the dax devices, `ndctl create-namespace -m devdax` makes one", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A plain file, a directory, another device.
    #[error("{} is {kind}, not a dax device: name a /dev/daxX.Y (`daxctl list -D` shows them)", path.display())]
    NotDax {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: NotDaxKind,
    },
    /// A file on fs-dax: its memory may be used, but not for DMA.
    #[error(
        "{} is a file on an fs-dax file system, not a dax device: it can be guest memory without DMA only, because the \
         kernel refuses to pin it for long (EOPNOTSUPP); for memory that devices reach, make the namespace a device \
         (`ndctl create-namespace -f -e NAMESPACE -m devdax`, which erases it)",
        path.display()
    )]
    FsDaxFile {
        /// The path.
        path: PathBuf,
    },
    /// The kernel owns the memory.
    #[error(
        "{} is in system-ram mode, its memory belongs to the kernel: `daxctl reconfigure-device -m devdax {device}` \
         (add -f to take its memory offline first)",
        path.display()
    )]
    SystemRam {
        /// The path.
        path: PathBuf,
        /// The device.
        device: DeviceName,
    },
    /// No driver is bound.
    #[error(
        "{} has no driver: `daxctl enable-device {device}`, or without daxctl `modprobe device_dax` and \
         `echo {device} > /sys/bus/dax/drivers/device_dax/new_id`",
        path.display()
    )]
    NoDriver {
        /// The path.
        path: PathBuf,
        /// The device.
        device: DeviceName,
    },
    /// A driver is bound that does not let the device be mapped.
    #[error(
        "{} is bound to the driver {driver}, which can't be mapped: `daxctl disable-device {device}`, then \
         `daxctl enable-device {device}`",
        path.display()
    )]
    OtherDriver {
        /// The path.
        path: PathBuf,
        /// The device.
        device: DeviceName,
        /// The driver's name.
        driver: String,
    },
    /// The device has no memory.
    #[error(
        "{} has size 0: `daxctl create-device -r {}` makes a device of the region's free memory ({free})",
        path.display(), device.region
    )]
    ZeroSize {
        /// The path.
        path: PathBuf,
        /// The device.
        device: DeviceName,
        /// What the region has left to make a device of.
        free: ByteSize,
    },
    /// The node's owner and mode do not let this user in.
    #[error(
        "no permission to open {} for reading and writing as uid {uid}: it belongs to {owner}:{group} with mode {mode:04o}; \
         `chgrp kvm {0} && chmod g+rw {0}` and join that group, or for good a udev rule \
         `SUBSYSTEM==\"dax\", GROUP=\"kvm\", MODE=\"0660\"`",
        path.display()
    )]
    NoPermission {
        /// The path.
        path: PathBuf,
        /// The caller's effective user id.
        uid: u32,
        /// The node's owner.
        owner: u32,
        /// The node's group.
        group: u32,
        /// The node's permission bits.
        mode: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something other than the node's mode forbids it.
    #[error(
        "opening {} is forbidden, whatever its mode: a device cgroup or security module denies it; allow `c {number} rw` \
         for this service (systemd: `DeviceAllow={} rw`)",
        path.display(), path.display()
    )]
    Forbidden {
        /// The path.
        path: PathBuf,
        /// The device number to allow.
        number: DeviceNumber,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device was there when it was looked at and is not any more.
    #[error("{} vanished or changed while it was opened: `daxctl list -Di` says what is left", path.display())]
    Vanished {
        /// The path.
        path: PathBuf,
    },
    /// What the path is could not be found out.
    #[error(transparent)]
    Classify(#[from] ClassifyError),
    /// The open failed in another way.
    #[error("cannot open {}", path.display())]
    Refused {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Host {
    /// Opens a dax device for mapping. Symbolic links are followed; the name does not matter, the device number does.
    pub fn open(&self, path: &Path) -> Result<DaxDevice, OpenError> {
        let seen = match self.glance(path) {
            Some(number) => number,
            None => usable(path, self.classify(path)?)?.number,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| open_error(path, seen, source))?;
        self.opened(path, file, seen, false)
    }

    /// Takes what another process has opened for a device, or this one for another: a range that is lent. `path` is for
    /// messages. What is locked of it stays locked until the last of those who have it has closed it.
    pub fn adopt(&self, file: File, path: &Path) -> Result<DaxDevice, OpenError> {
        let descriptor = self
            .proc()
            .join("self/fd")
            .join(file.as_raw_fd().to_string());
        let seen = usable(path, self.classify(&descriptor)?)?.number;
        self.opened(path, file, seen, true)
    }

    /// A file that should be the device that was `seen`. `in_common`: others have the same open file description.
    fn opened(
        &self,
        path: &Path,
        file: File,
        seen: DeviceNumber,
        in_common: bool,
    ) -> Result<DaxDevice, OpenError> {
        let facts = self.facts_of_opened(path, &file, seen)?;
        let writable = is_for_writing(&file);
        Ok(DaxDevice::assemble(Shared {
            path: path.to_owned(),
            file: Arc::new(file),
            facts,
            proc: self.proc().to_owned(),
            claims: Mutex::default(),
            in_common,
            writable,
        }))
    }

    /// The number of what looks like a usable device; `None` when it doesn't, or can't be told.
    fn glance(&self, path: &Path) -> Option<DeviceNumber> {
        let metadata = path.metadata().ok()?;
        if !metadata.file_type().is_char_device() {
            return None;
        }
        let number = DeviceNumber::from_rdev(metadata.rdev());
        let device = self.dax_directory(number).ok()??;
        let driver = DeviceFacts::driver_of(&device).ok()?;
        let size = device.number::<u64>("size").ok()?;
        (driver == Driver::DeviceDax && size != 0).then_some(number)
    }

    /// The facts of what was really opened, which must be the usable device that was looked at.
    fn facts_of_opened(
        &self,
        path: &Path,
        file: &File,
        seen: DeviceNumber,
    ) -> Result<DeviceFacts, OpenError> {
        let vanished = || OpenError::Vanished {
            path: path.to_owned(),
        };
        let metadata = file.metadata().map_err(|source| OpenError::Refused {
            path: path.to_owned(),
            source,
        })?;
        if !metadata.file_type().is_char_device()
            || DeviceNumber::from_rdev(metadata.rdev()) != seen
        {
            return Err(vanished());
        }
        match self.facts_of(seen) {
            Ok(Some(facts)) if facts.driver == Driver::DeviceDax && facts.size_bytes != 0 => {
                Ok(facts)
            }
            Ok(_) => Err(vanished()),
            Err(error) if SysfsError::is_missing(&error) => Err(vanished()),
            Err(source) => Err(OpenError::Classify(ClassifyError::Facts {
                path: path.to_owned(),
                source,
            })),
        }
    }
}

impl DaxDevice {
    pub(crate) fn assemble(shared: Shared) -> Self {
        Self::of(Arc::new(shared))
    }

    pub(crate) fn of(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether it is open for writing; one that another process has opened, and lends, may not be.
    pub fn is_writable(&self) -> bool {
        self.shared.writable
    }

    /// The device's facts as of its opening.
    pub fn facts(&self) -> &DeviceFacts {
        &self.shared.facts
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Checks a range against the device. Without an offset it starts at 0; without a size it runs to the end.
    pub fn range(&self, offset: Option<u64>, size: Option<u64>) -> Result<DaxRange, RangeError> {
        let bounds = Bounds {
            path: &self.shared.path,
            len: self.shared.facts.size_bytes,
            align: self.shared.facts.align_bytes,
        };
        DaxRange::checked(&bounds, offset, size)
    }
}

/// The facts of a device that can be opened, or the error that says why not.
fn usable(path: &Path, kind: PathKind) -> Result<DeviceFacts, OpenError> {
    let path = path.to_owned();
    match kind {
        PathKind::DeviceDax(facts) if facts.size_bytes != 0 => Ok(*facts),
        // A device without memory has no driver either; its size is what to mend first.
        PathKind::DeviceDax(facts) | PathKind::Unbound(facts) if facts.size_bytes == 0 => {
            Err(OpenError::ZeroSize {
                path,
                device: facts.name,
                free: match facts.region.kind {
                    RegionKind::Dynamic { available_size } => ByteSize(available_size),
                    RegionKind::Static => ByteSize(0),
                },
            })
        }
        PathKind::DeviceDax(facts) | PathKind::Unbound(facts) => Err(match facts.driver {
            Driver::Other(driver) => OpenError::OtherDriver {
                path,
                device: facts.name,
                driver,
            },
            Driver::DeviceDax | Driver::Kmem | Driver::None => OpenError::NoDriver {
                path,
                device: facts.name,
            },
        }),
        PathKind::SystemRam(facts) => Err(OpenError::SystemRam {
            path,
            device: facts.name,
        }),
        PathKind::File(FileBacking::FsDax) => Err(OpenError::FsDaxFile { path }),
        PathKind::File(backing) => Err(OpenError::NotDax {
            path,
            kind: NotDaxKind::File(backing),
        }),
        PathKind::NotDax(kind) => Err(OpenError::NotDax { path, kind }),
        PathKind::Missing => Err(OpenError::Missing { path }),
    }
}

fn open_error(path: &Path, number: DeviceNumber, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENXIO | libc::ENODEV | libc::ENOENT) => OpenError::Vanished { path },
        Some(libc::EPERM) => OpenError::Forbidden {
            path,
            number,
            source,
        },
        Some(libc::EACCES) => match path.metadata() {
            Ok(metadata) => OpenError::NoPermission {
                uid: rustix::process::geteuid().as_raw(),
                owner: metadata.uid(),
                group: metadata.gid(),
                mode: metadata.mode() & 0o7777,
                path,
                source,
            },
            Err(_) => OpenError::Vanished { path },
        },
        _ => OpenError::Refused { path, source },
    }
}

/// Whether a file, or a device, can be stored to by this descriptor once it is mapped.
pub fn is_for_writing(file: &File) -> bool {
    // The flags of a descriptor that is open can always be had.
    let flags = fcntl_getfl(file);
    flags.is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeDevice, FakeHost};

    fn message(fake: &FakeHost, path: &Path) -> String {
        fake.host().open(path).unwrap_err().to_string()
    }

    #[test]
    fn a_usable_device_opens_and_maps() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::pmem("dax0.0"));
        let path = fake.dev().join("dax0.0");
        let device = fake.host().open(&path).unwrap();
        assert_eq!(device.facts().name.to_string(), "dax0.0");
        assert_eq!(device.path(), path);
        let range = device.range(None, Some(4 << 20)).unwrap();
        let lock = device.lock(range, crate::LockKind::Shared).unwrap();
        let mapping = lock.map().unwrap();
        assert_eq!(mapping.as_ptr() as usize % (2 << 20), 0);
        assert_eq!(mapping.facts().name, device.facts().name);
        let openers = fake.host().openers(device.facts());
        assert!(openers.iter().any(|o| o.pid == std::process::id()));
        mapping.unmap().unwrap().release().unwrap();
    }

    #[test]
    fn a_descriptor_that_is_lent_is_a_device_and_nothing_else() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::pmem("dax0.0"));
        let node = fake.dev().join("dax0.0");
        let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
        let device = fake.host().adopt(open(&node), Path::new("lent")).unwrap();
        let range = device.range(Some(2 << 20), Some(4 << 20)).unwrap();
        let lock = device.lock(range, crate::LockKind::Shared).unwrap();
        lock.release().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        for (path, expected) in [
            (file.path(), "lent is a "),
            (Path::new("/dev/null"), "another driver's character device"),
        ] {
            let error = fake
                .host()
                .adopt(open(path), Path::new("lent"))
                .unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn wrong_drivers_name_the_mending_command() {
        for (driver, mends) in [
            (Some("kmem"), "daxctl reconfigure-device -m devdax dax1.0"),
            (None, "daxctl enable-device dax1.0"),
            (Some("fsdev_dax"), "daxctl disable-device dax1.0"),
        ] {
            let fake = FakeHost::new();
            fake.add(&FakeDevice {
                driver,
                ..FakeDevice::hmem("dax1.0")
            });
            let path = fake.dev().join("dax1.0");
            let text = message(&fake, &path);
            assert!(text.contains(mends), "{text}");
            assert!(text.starts_with(path.to_str().unwrap()), "{text}");
        }
    }

    #[test]
    fn no_driver_gives_the_sysfs_way_too() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice {
            driver: None,
            ..FakeDevice::hmem("dax1.0")
        });
        let text = message(&fake, &fake.dev().join("dax1.0"));
        let sysfs = "echo dax1.0 > /sys/bus/dax/drivers/device_dax/new_id";
        assert!(text.contains(sysfs), "{text}");
    }

    #[test]
    fn a_device_without_memory_is_told_so_with_or_without_a_driver() {
        for driver in [None, Some("device_dax")] {
            let fake = FakeHost::new();
            let device = fake.add(&FakeDevice {
                driver,
                ..FakeDevice::hmem("dax3.1")
            });
            std::fs::write(device.join("size"), "0\n").unwrap();
            let text = message(&fake, &fake.dev().join("dax3.1"));
            assert!(
                text.contains("size 0: `daxctl create-device -r 3`"),
                "{text}"
            );
            assert!(text.ends_with("(768M)"), "{text}");
        }
    }

    #[test]
    fn things_that_are_not_dax_are_named() {
        let fake = FakeHost::new();
        let file = fake.dev().join("file");
        std::fs::write(&file, "x").unwrap();
        for (path, what) in [
            (fake.dev(), "is a directory, not a dax device"),
            (
                Path::new("/dev/null"),
                "is another driver's character device (1:3), not a dax device",
            ),
            (&fake.dev().join("dax9.9"), "does not exist"),
            (Path::new("/proc/self/status"), "is a plain file"),
        ] {
            let text = message(&fake, path);
            assert!(text.contains(what), "{text}");
        }
        let error = fake.host().open(&file).unwrap_err();
        assert!(matches!(
            error,
            OpenError::NotDax {
                kind: NotDaxKind::File(_),
                ..
            }
        ));
    }

    #[test]
    fn an_fs_dax_file_is_told_what_it_can_not_do() {
        let path = Path::new("/mnt/pmem/guest");
        let error = usable(path, PathKind::File(FileBacking::FsDax)).unwrap_err();
        assert!(matches!(error, OpenError::FsDaxFile { .. }));
        let text = error.to_string();
        assert!(
            text.contains("without DMA") && text.contains("EOPNOTSUPP"),
            "{text}"
        );
    }

    #[test]
    fn block_devices_are_named() {
        let number = DeviceNumber {
            major: 259,
            minor: 0,
        };
        let kind = PathKind::NotDax(NotDaxKind::BlockDevice(number));
        let text = usable(Path::new("/dev/pmem0"), kind)
            .unwrap_err()
            .to_string();
        assert!(text.contains("a block device (259:0)"), "{text}");
    }

    #[test]
    fn refusals_of_the_kernel_are_told_apart() {
        let path = Path::new("/dev/zero");
        let number = DeviceNumber {
            major: 252,
            minor: 1,
        };
        let error = |errno| open_error(path, number, io::Error::from_raw_os_error(errno));
        let text = error(libc::EACCES).to_string();
        assert!(text.contains("0:0 with mode 0666"), "{text}");
        assert!(
            text.contains("chgrp kvm /dev/zero && chmod g+rw /dev/zero"),
            "{text}"
        );
        assert!(text.contains("SUBSYSTEM==\"dax\""), "{text}");
        assert!(error(libc::EPERM).to_string().contains("`c 252:1 rw`"));
        assert!(matches!(error(libc::ENXIO), OpenError::Vanished { .. }));
        assert!(matches!(error(libc::ENOENT), OpenError::Vanished { .. }));
        assert!(matches!(error(libc::EMFILE), OpenError::Refused { .. }));
    }

    #[test]
    fn a_device_that_changed_between_look_and_open_has_vanished() {
        let fake = FakeHost::new();
        let dir = fake.add(&FakeDevice::pmem("dax0.0"));
        let path = fake.dev().join("dax0.0");
        let (host, file) = (fake.host(), File::open("/dev/zero").unwrap());
        let zero = DeviceNumber { major: 1, minor: 5 };
        host.facts_of_opened(&path, &file, zero).unwrap();
        let null = File::open("/dev/null").unwrap();
        let other = host.facts_of_opened(&path, &null, zero);
        assert!(matches!(other, Err(OpenError::Vanished { .. })));
        std::fs::remove_file(dir.join("driver")).unwrap();
        let unbound = host.facts_of_opened(&path, &file, zero);
        assert!(matches!(unbound, Err(OpenError::Vanished { .. })));
        std::fs::remove_dir_all(&dir).unwrap();
        let gone = host.facts_of_opened(&path, &file, zero);
        assert!(matches!(gone, Err(OpenError::Vanished { .. })), "{gone:?}");
    }

    #[test]
    fn a_sysfs_that_makes_no_sense_is_an_error_that_names_the_attribute() {
        let fake = FakeHost::new();
        let dir = fake.add(&FakeDevice::pmem("dax0.0"));
        std::fs::write(dir.join("align"), "7\n").unwrap();
        let error = fake.host().open(&fake.dev().join("dax0.0")).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("/align says \"7\""), "{source}");
    }
}

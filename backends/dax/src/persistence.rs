//! What makes stores to a device-dax range durable.
//!
//! A device-dax device has no fsync: the character device answers EINVAL. Whoever writes through a mapping writes
//! its own cache lines back; what must follow is a property of the memory, which the nd region's
//! `persistence_domain` tells (`Documentation/ABI/testing/sysfs-bus-nvdimm`):
//!
//! | `persistence_domain` | on power loss the platform saves       | a flush is                    |
//! |----------------------|----------------------------------------|-------------------------------|
//! | `cpu_cache`          | the caches too                         | a store fence                 |
//! | `memory_controller`  | what the memory controller has         | a fence and the deep flush    |
//! | empty or absent      | it is not said                         | the same, and a warning       |
//! | no nd region         | nothing: hmem and CXL volatile memory  | a fence, and a warning        |
//!
//! `deep_flush` reads 1 where the region has flush hints, and writing 1 drains the controller's queues through them.
//! It reads 0, and can't be written, where there are none: then the platform drains by itself and a fence is enough.
//!
//! Nothing here writes cache lines back: the writer is a guest, which does that for itself.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;

use crate::open::DaxDevice;
use crate::sysfs::{Sysfs, SysfsError};

/// How far a store must have come to survive power loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PersistenceDomain {
    /// Visible to other processors: the platform saves the caches (eADR).
    CpuCache,
    /// Accepted by the memory controller (ADR).
    MemoryController,
    /// The platform does not say.
    Unknown,
    /// Nowhere is far enough: the memory is volatile.
    Volatile,
}

/// Why a flush of a device can't be made.
#[derive(Debug, Error)]
pub enum FlusherError {
    /// The region's attributes could not be read.
    #[error("cannot tell what makes stores to {} durable", path.display())]
    Facts {
        /// The device.
        path: PathBuf,
        /// The attribute and why.
        #[source]
        source: SysfsError,
    },
    /// The region asks for a deep flush and this user may not do one.
    #[error(
        "a flush of {} has to write {}, which uid {uid} may not: `chgrp kvm {} && chmod g+w {}`, or run as root",
        path.display(), attribute.display(), attribute.display(), attribute.display()
    )]
    Forbidden {
        /// The device.
        path: PathBuf,
        /// The region's `deep_flush`.
        attribute: PathBuf,
        /// The caller's effective user id.
        uid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Makes stores to a device durable, once the writer has written its cache lines back.
#[derive(Debug)]
pub struct Flusher {
    path: PathBuf,
    domain: PersistenceDomain,
    /// Open for writing as long as the value lives: who flushes may have given its privileges up by then. It holds no
    /// removal back; after one, writing is an error.
    deep: Option<File>,
}

impl Flusher {
    /// For a device, by what its region says.
    pub fn new(device: &DaxDevice) -> Result<Self, FlusherError> {
        let path = device.path().to_owned();
        let facts = |source| FlusherError::Facts {
            path: path.clone(),
            source,
        };
        let region = nd_region(&Sysfs::new(&device.facts().path)).map_err(facts)?;
        let Some(region) = region else {
            return Ok(Self {
                path,
                domain: PersistenceDomain::Volatile,
                deep: None,
            });
        };
        let domain = domain(&region).map_err(facts)?;
        let wants_deep = match domain {
            PersistenceDomain::CpuCache | PersistenceDomain::Volatile => false,
            PersistenceDomain::MemoryController | PersistenceDomain::Unknown => {
                // Absent where the kernel can't say whether there are hints.
                let hints = Sysfs::optional(region.number::<u32>(DEEP_FLUSH)).map_err(facts)?;
                hints.is_some_and(|hints| hints != 0)
            }
        };
        let deep = if wants_deep {
            let attribute = region.join(DEEP_FLUSH).path().to_owned();
            match OpenOptions::new().write(true).open(&attribute) {
                Ok(file) => Some(file),
                Err(source) => {
                    return Err(FlusherError::Forbidden {
                        path,
                        attribute,
                        uid: rustix::process::geteuid().as_raw(),
                        source,
                    });
                }
            }
        } else {
            None
        };
        Ok(Self { path, domain, deep })
    }

    /// What the region says.
    pub fn domain(&self) -> PersistenceDomain {
        self.domain
    }

    /// Whether a flush goes beyond a fence.
    pub fn is_deep(&self) -> bool {
        self.deep.is_some()
    }

    /// What the user must know before trusting a flush; to be said once, when the device is taken.
    pub fn warning(&self) -> Option<String> {
        let path = self.path.display();
        match self.domain {
            PersistenceDomain::CpuCache | PersistenceDomain::MemoryController => None,
            PersistenceDomain::Unknown => Some(format!(
                "the platform does not say what makes stores to {path} durable (its region has no persistence_domain): \
                 whether flushed data survives power loss is not known"
            )),
            PersistenceDomain::Volatile => Some(format!(
                "{path} is volatile memory: its contents survive the guest and a restart of the VMM, but no power loss \
                 and no reboot of the host"
            )),
        }
    }

    /// What the writer has written back before this call is durable when it returns `Ok`, as far as the memory can.
    pub fn flush(&self) -> io::Result<()> {
        // Orders the stores that were seen before the flush was asked for; the processor that made them has fenced its
        // own already.
        fence(Ordering::SeqCst);
        match &self.deep {
            Some(attribute) => attribute.write_all_at(b"1", 0),
            None => Ok(()),
        }
    }
}

const DEEP_FLUSH: &str = "deep_flush";

/// The nd region that a device was cut from: the `regionN` on the nd bus above it.
fn nd_region(device: &Sysfs) -> Result<Option<Sysfs>, SysfsError> {
    let mut dir = device.parent();
    while let Some(at) = dir {
        let is_region = at.file_name().is_some_and(|name| {
            name.strip_prefix("region")
                .is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()))
        });
        // A CXL region has such a name too, on the cxl bus.
        if is_region && at.link_name("subsystem")?.as_deref() == Some("nd") {
            return Ok(Some(at));
        }
        dir = at.parent();
    }
    Ok(None)
}

fn domain(region: &Sysfs) -> Result<PersistenceDomain, SysfsError> {
    // An nd region can be of volatile memory (NFIT has such ranges); only its device type says so.
    let uevent = Sysfs::optional(region.text("uevent"))?.unwrap_or_default();
    if uevent.lines().any(|line| line == "DEVTYPE=nd_volatile") {
        return Ok(PersistenceDomain::Volatile);
    }
    let domain = Sysfs::optional(region.text("persistence_domain"))?;
    Ok(match domain.as_deref() {
        Some("cpu_cache") => PersistenceDomain::CpuCache,
        Some("memory_controller") => PersistenceDomain::MemoryController,
        _ => PersistenceDomain::Unknown,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::testing::{FakeDevice, FakeHost};

    /// A pmem device whose region has these attributes; the directory is the region's.
    fn region(attributes: &[(&str, &str)]) -> (FakeHost, DaxDevice, PathBuf) {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::pmem("dax0.0"));
        let region = fake.sys().join("devices/ndbus0/region0");
        for (name, text) in attributes {
            fs::write(region.join(name), format!("{text}\n")).unwrap();
        }
        let device = fake.host().open(&fake.dev().join("dax0.0")).unwrap();
        (fake, device, region)
    }

    fn deep_flush(region: &Path) -> String {
        fs::read_to_string(region.join(DEEP_FLUSH)).unwrap()
    }

    #[test]
    fn saved_caches_need_a_fence_only() {
        let (_fake, device, region) =
            region(&[("persistence_domain", "cpu_cache"), (DEEP_FLUSH, "1")]);
        fs::write(region.join(DEEP_FLUSH), "1 untouched").unwrap();
        let flusher = Flusher::new(&device).unwrap();
        assert_eq!(flusher.domain(), PersistenceDomain::CpuCache);
        assert_eq!(flusher.warning(), None);
        flusher.flush().unwrap();
        assert_eq!(deep_flush(&region), "1 untouched");
    }

    #[test]
    fn a_memory_controller_with_flush_hints_is_flushed_deep() {
        let (_fake, device, region) = region(&[
            ("persistence_domain", "memory_controller"),
            (DEEP_FLUSH, "1"),
        ]);
        let flusher = Flusher::new(&device).unwrap();
        assert_eq!(flusher.domain(), PersistenceDomain::MemoryController);
        assert!(flusher.is_deep());
        assert_eq!(flusher.warning(), None);
        // So that what a flush writes can be told from what was there.
        fs::write(region.join(DEEP_FLUSH), "?").unwrap();
        flusher.flush().unwrap();
        assert_eq!(deep_flush(&region), "1");
    }

    #[test]
    fn without_flush_hints_the_attribute_is_left_alone() {
        let (_fake, device, region) = region(&[
            ("persistence_domain", "memory_controller"),
            (DEEP_FLUSH, "0"),
        ]);
        let flusher = Flusher::new(&device).unwrap();
        assert!(!flusher.is_deep());
        flusher.flush().unwrap();
        assert_eq!(deep_flush(&region), "0\n");
    }

    #[test]
    fn an_unknown_domain_does_what_it_can_and_warns() {
        for attributes in [
            &[("persistence_domain", ""), (DEEP_FLUSH, "1")][..],
            &[(DEEP_FLUSH, "1")],
        ] {
            let (_fake, device, region) = region(attributes);
            let flusher = Flusher::new(&device).unwrap();
            assert_eq!(flusher.domain(), PersistenceDomain::Unknown);
            let warning = flusher.warning().unwrap();
            assert!(warning.contains("persistence_domain"), "{warning}");
            fs::write(region.join(DEEP_FLUSH), "?").unwrap();
            flusher.flush().unwrap();
            assert_eq!(deep_flush(&region), "1");
        }
        let (_fake, device, _) = region(&[]);
        let flusher = Flusher::new(&device).unwrap();
        assert_eq!(flusher.domain(), PersistenceDomain::Unknown);
        flusher.flush().unwrap();
    }

    #[test]
    fn volatile_memory_is_told_so() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::hmem("dax1.0"));
        let device = fake.host().open(&fake.dev().join("dax1.0")).unwrap();
        let flusher = Flusher::new(&device).unwrap();
        assert_eq!(flusher.domain(), PersistenceDomain::Volatile);
        assert!(flusher.warning().unwrap().contains("no power loss"));
        flusher.flush().unwrap();

        let (_fake, device, _) = region(&[
            ("uevent", "DEVTYPE=nd_volatile\nMODALIAS=nd:t4"),
            ("persistence_domain", "memory_controller"),
        ]);
        let flusher = Flusher::new(&device).unwrap();
        assert_eq!(flusher.domain(), PersistenceDomain::Volatile);
    }

    #[test]
    fn a_region_of_another_bus_is_not_taken_for_an_nd_region() {
        let fake = FakeHost::new();
        let dir = fake
            .sys()
            .join("devices/ACPI0017:00/root0/region0/dax_region0/dax0.0");
        fs::create_dir_all(&dir).unwrap();
        let bus = fake.sys().join("bus/cxl");
        let region = dir.ancestors().nth(2).unwrap();
        std::os::unix::fs::symlink(bus, region.join("subsystem")).unwrap();
        assert!(nd_region(&Sysfs::new(dir)).unwrap().is_none());
    }

    #[test]
    fn a_flush_that_fails_is_an_error() {
        let (_fake, device, region) = region(&[
            ("persistence_domain", "memory_controller"),
            (DEEP_FLUSH, "1"),
        ]);
        // Accepts the open and refuses the write, as the attribute of a region that is gone does.
        fs::remove_file(region.join(DEEP_FLUSH)).unwrap();
        let mut flusher = Flusher::new(&device).unwrap();
        assert!(!flusher.is_deep());
        flusher.deep = Some(OpenOptions::new().write(true).open("/dev/full").unwrap());
        let error = flusher.flush().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn an_attribute_that_makes_no_sense_is_named() {
        let (_fake, device, _) = region(&[
            ("persistence_domain", "memory_controller"),
            (DEEP_FLUSH, "maybe"),
        ]);
        let error = Flusher::new(&device).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("deep_flush says \"maybe\""), "{source}");
    }

    #[test]
    fn a_deep_flush_that_is_forbidden_names_the_way_out() {
        let error = FlusherError::Forbidden {
            path: "/dev/dax0.0".into(),
            attribute: "/sys/devices/ndbus0/region0/deep_flush".into(),
            uid: 1000,
            source: io::Error::from_raw_os_error(libc::EACCES),
        };
        let text = error.to_string();
        let mends = "chmod g+w /sys/devices/ndbus0/region0/deep_flush";
        assert!(text.contains(mends) && text.contains("uid 1000"), "{text}");
    }
}

//! iommufd: address spaces that are objects of their own, and devices that are opened one by one.
//!
//! One I/O address space (IOAS) is shared by all devices. Memory is pinned once however many devices there are; a second
//! address space is filled by copying ([`Iommufd::copy_into`]), which shares the pins.
//!
//! # Invariants
//! - A function holds its address space, and that its descriptor: both outlive the device file.
//! - Each map is one call at a fixed address; unmapping takes the same range.
//!
//! The kernel pins device-dax like other memory here: charged to the user, and unpinned again. Several maps at once hold
//! the address space's lock for reading only, so they can be faster than one after the other. It counts a map's pages when
//! all of them are pinned, so nothing shows how far a single map is.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use iommufd_bindings::{
    iommu_ioas_copy, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};

use crate::address::PciAddress;
use crate::attach::{AttachError, Claims, DetachError};
use crate::checks::Asked;
use crate::holder;
use crate::host::Host;
use crate::ledger::Ledger;
use crate::limits::{IovaRange, Limits};
use crate::locate::PciFunction;
use crate::mapper::{DmaFacts, DmaLease, DmaMapper, DmaRequest, MapError, UnmapError};
use crate::memlock;
use crate::node::{Node, NodeError};
use crate::space::{OpenError, SpaceKind};
use crate::sys;
use crate::vfio::{Owner, VfioFunction};

const KIND: SpaceKind = SpaceKind::Iommufd;
const PAGE: u64 = 4096;

/// An address space of devices behind an IOMMU file descriptor.
pub struct Iommufd {
    host: Host,
    ioas: Arc<IommufdIoas>,
    descriptor: Arc<IommuFd>,
    ledger: Ledger,
    claims: Claims,
}

impl fmt::Debug for Iommufd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommufd")
            .field("ioas", &self.ioas.id())
            .field("ledger", &self.ledger)
            .field("claims", &self.claims)
            .finish_non_exhaustive()
    }
}

impl Iommufd {
    /// An address space on this host.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_on(Host::system())
    }

    /// An address space whose nodes are found on `host`.
    pub fn open_on(host: Host) -> Result<Self, OpenError> {
        let path = host.dev().join("iommu");
        let node = Node {
            path: &path,
            mend: "`modprobe iommufd`; a kernel without CONFIG_IOMMUFD has none: use type1 there",
            rule: "SUBSYSTEM==\"misc\", KERNEL==\"iommu\"",
        };
        let file = node.open(&host)?;
        Self::from_file(host, file)
    }

    /// An address space behind a descriptor of /dev/iommu that somebody else has opened.
    pub fn from_fd(host: Host, iommufd: OwnedFd) -> Result<Self, OpenError> {
        Self::from_file(host, File::from(iommufd))
    }

    fn from_file(host: Host, file: File) -> Result<Self, OpenError> {
        Self::on_descriptor(host, Arc::new(IommuFd::new_from_fd(file)))
    }

    fn on_descriptor(host: Host, iommufd: Arc<IommuFd>) -> Result<Self, OpenError> {
        let ioas = IommufdIoas::new(Arc::clone(&iommufd)).map_err(|error| OpenError::Refused {
            kind: KIND,
            source: reason(error),
        })?;
        Ok(Self {
            host,
            ioas: Arc::new(ioas),
            descriptor: iommufd,
            ledger: Ledger::default(),
            claims: Claims::default(),
        })
    }

    /// A second, empty address space behind the same descriptor: for [`Iommufd::copy_into`].
    pub fn second(&self) -> Result<Self, OpenError> {
        Self::on_descriptor(self.host.clone(), Arc::clone(&self.descriptor))
    }

    /// Makes a function this process's, and what is mapped here reachable by it.
    pub fn attach(&self, function: &PciFunction) -> Result<VfioFunction, AttachError> {
        let address = function.address;
        let path = function
            .cdev
            .as_deref()
            .ok_or(AttachError::NoCdev { address })?;
        let file = node(path)
            .open(&self.host)
            .map_err(|source| AttachError::Node { address, source })?;
        self.attach_file(file, function)
    }

    /// The same for a device file (/dev/vfio/devices/vfioN) that somebody else has opened and not bound yet.
    pub fn attach_fd(&self, device: OwnedFd) -> Result<VfioFunction, AttachError> {
        let function = self.host.locate_fd(device.as_fd())?;
        self.attach_file(File::from(device), &function)
    }

    /// The undo of [`Iommufd::attach`]. What is mapped stays mapped, for devices to come.
    pub fn detach(&self, function: VfioFunction) -> Result<(), DetachError> {
        function.close()
    }

    /// Has memory that is mapped here in another address space of the same descriptor too, at the same addresses and
    /// without pinning it again. The copy is unmapped first: it is not charged as long as this one is.
    pub fn copy_into(
        &self,
        other: &Self,
        name: &str,
        lease: &DmaLease,
    ) -> Result<DmaLease, MapError> {
        let DmaLease {
            iova, size, memory, ..
        } = *lease;
        let request = DmaRequest {
            name,
            iova,
            host_address: 0,
            size,
            memory,
        };
        if !Arc::ptr_eq(&self.descriptor, &other.descriptor) {
            return Err(MapError::Refused {
                name: name.to_owned(),
                iova,
                size,
                source: io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the address spaces belong to different IOMMU file descriptors",
                ),
            });
        }
        other.limits_for(name)?.check(&request)?;
        let start = Instant::now();
        let mut copy = iommu_ioas_copy {
            flags: FIXED | READABLE | WRITEABLE,
            dst_ioas_id: other.ioas.id(),
            src_ioas_id: self.ioas.id(),
            length: size,
            dst_iova: iova,
            src_iova: iova,
            ..Default::default()
        };
        sys::ioas_copy(&*self.descriptor, &mut copy)
            .map_err(|source| other.asked().refused(&request, source))?;
        // The pin is the first address space's.
        other.ledger.insert(&request, false);
        Ok(DmaLease {
            iova,
            size,
            memory,
            took: start.elapsed(),
        })
    }

    /// What can be mapped now.
    pub fn limits(&self) -> io::Result<Limits> {
        let (ranges, align) = sys::ioas_ranges(&*self.descriptor, self.ioas.id())?;
        Ok(Limits {
            // Memory is pinned in pages, whatever the IOMMU could do.
            align_bytes: align.checked_next_power_of_two().unwrap_or(PAGE).max(PAGE),
            ranges: Some(
                ranges
                    .iter()
                    .map(|range| IovaRange {
                        start: range.start,
                        last: range.last,
                    })
                    .collect(),
            ),
            entries_left: None,
        })
    }

    /// The functions that are attached.
    pub fn attached(&self) -> Vec<PciAddress> {
        self.claims.all()
    }

    /// Without a device nothing would be pinned, and nothing be known of what its IOMMU takes.
    fn limits_with_devices(&self, name: &str) -> Result<Limits, MapError> {
        if self.claims.all().is_empty() {
            return Err(MapError::NoDevice {
                name: name.to_owned(),
            });
        }
        self.limits_for(name)
    }

    fn limits_for(&self, name: &str) -> Result<Limits, MapError> {
        self.limits().map_err(|source| MapError::Limits {
            name: name.to_owned(),
            source,
        })
    }

    fn attach_file(&self, file: File, function: &PciFunction) -> Result<VfioFunction, AttachError> {
        let address = function.address;
        let claim = self.claims.claim(address)?;
        // On an error the file is closed before the claim ends.
        let file = file;
        sys::bind_iommufd(&file, &*self.descriptor)
            .map_err(|source| self.bind_error(function, source))?;
        // From here on closing the file undoes all of it.
        sys::attach_ioas(&file, self.ioas.id()).map_err(|source| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => AttachError::Conflict {
                address,
                group: function.group,
                source,
            },
            Some(libc::ENOMEM | libc::EFAULT) => AttachError::Pin { address, source },
            _ => AttachError::Step {
                address,
                what: "put into the address space",
                source,
            },
        })?;
        let owner = Owner::Ioas(Arc::clone(&self.ioas));
        VfioFunction::new(file, owner, claim, function.clone())
    }

    fn bind_error(&self, function: &PciFunction, source: io::Error) -> AttachError {
        let address = function.address;
        let holder = function
            .cdev
            .as_deref()
            .and_then(|path| Some((path, holder::other_of_node(self.host.proc(), path)?)));
        match (source.raw_os_error(), holder, function.siblings.first()) {
            (Some(libc::EPERM), _, None) => AttachError::UnsafeInterrupts {
                address,
                kind: KIND,
                source,
            },
            (Some(libc::EPERM), _, Some(sibling)) => AttachError::GroupOrInterrupts {
                address,
                sibling: sibling.address,
                source,
            },
            // The kernel lets any number open the file, and one bind it.
            (Some(libc::EINVAL | libc::EBUSY), Some((path, holder)), _) => AttachError::Node {
                address,
                source: NodeError::Busy {
                    path: path.to_owned(),
                    holder: Some(holder),
                    source,
                },
            },
            _ => AttachError::Step {
                address,
                what: "bind to the IOMMU file descriptor",
                source,
            },
        }
    }

    fn asked(&self) -> Asked<'_> {
        Asked {
            kind: KIND,
            proc: self.host.proc(),
            charged_bytes: self.ledger.facts().charged_bytes,
        }
    }
}

/// A device's own file.
fn node(path: &Path) -> Node<'_> {
    Node {
        path,
        mend: "`modprobe vfio-pci`, and bind the function to it",
        rule: "SUBSYSTEM==\"vfio-dev\"",
    }
}

/// What the kernel said.
fn reason(error: IommufdError) -> io::Error {
    match error {
        IommufdError::OpenIommufd(source) => source,
        IommufdError::IommuIoasAlloc(errno)
        | IommufdError::IommuIoasMap(errno)
        | IommufdError::IommuIoasUnmap(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other),
    }
}

/// The length of a structure, which is its first field.
fn size_field<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

impl DmaMapper for Iommufd {
    fn map(&self, request: &DmaRequest<'_>) -> Result<DmaLease, MapError> {
        Asked::check_kind(request)?;
        let limits = self.limits_with_devices(request.name)?;
        let is_charged = self.asked().check(&limits, request)?;
        let start = Instant::now();
        let map = iommu_ioas_map {
            size: size_field::<iommu_ioas_map>(),
            flags: FIXED | READABLE | WRITEABLE,
            ioas_id: self.ioas.id(),
            user_va: request.host_address,
            length: request.size,
            iova: request.iova,
            ..Default::default()
        };
        self.descriptor
            .map_iommu_ioas(&map)
            .map_err(|error| self.asked().refused(request, reason(error)))?;
        self.ledger.insert(request, is_charged);
        Ok(DmaLease {
            iova: request.iova,
            size: request.size,
            memory: request.memory,
            took: start.elapsed(),
        })
    }

    fn unmap(&self, lease: DmaLease) -> Result<(), (DmaLease, UnmapError)> {
        let (iova, size) = (lease.iova, lease.size);
        let mut unmap = iommu_ioas_unmap {
            size: size_field::<iommu_ioas_unmap>(),
            ioas_id: self.ioas.id(),
            iova,
            length: size,
        };
        match self.descriptor.unmap_iommu_ioas(&mut unmap) {
            Ok(()) if unmap.length == size => {
                self.ledger.remove(iova);
                Ok(())
            }
            Ok(()) => Err((
                lease,
                UnmapError::Short {
                    iova,
                    size,
                    unmapped: unmap.length,
                },
            )),
            Err(error) => Err((
                lease,
                UnmapError::Refused {
                    iova,
                    size,
                    source: reason(error),
                },
            )),
        }
    }

    fn facts(&self) -> DmaFacts {
        self.ledger.facts()
    }

    fn check(&self, requests: &[DmaRequest<'_>]) -> Result<(), MapError> {
        let Some(first) = requests.first() else {
            return Ok(());
        };
        let limits = self.limits_with_devices(first.name)?;
        self.asked().check_all(&limits, requests)
    }

    /// The kernel lets maps run side by side, and nothing was gained by it. Two threads took, against one, 1.02 (0.68 to 1.31)
    /// of the time for 4 GiB of device-dax in 8 parts, 2.16 (1.43 to 2.74) for 2 GiB of hugetlb and 1.63 (1.30 to 1.65) for
    /// 2 GiB of anonymous memory (median, least and greatest of 3 rounds of `cargo lab bench pin --only parts`, Linux 6.12
    /// emulated with two processors, on a machine that was busy besides).
    fn parallel(&self) -> bool {
        false
    }

    fn counted_bytes(&self) -> Option<u64> {
        memlock::counted_bytes(self.host.proc(), KIND)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn open(node: Option<&str>) -> OpenError {
        let dev = tempfile::tempdir().unwrap();
        if let Some(target) = node {
            symlink(target, dev.path().join("iommu")).unwrap();
        }
        Iommufd::open_on(Host::at("/sys", dev.path(), "/proc")).unwrap_err()
    }

    #[test]
    fn a_kernel_without_iommufd_is_named() {
        let text = open(None).to_string();
        assert!(
            text.contains("iommu is not there: `modprobe iommufd`"),
            "{text}"
        );
    }

    #[test]
    fn a_node_that_is_something_else_is_refused() {
        let error = open(Some("/dev/zero"));
        let OpenError::Refused { kind, source } = &error else {
            panic!("{error:?}");
        };
        assert_eq!((*kind, source.raw_os_error()), (KIND, Some(libc::ENOTTY)));
    }
}

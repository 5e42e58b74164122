//! VFIO's own IOMMU interface: a container of groups.
//!
//! The container and its maps are vfio-ioctls'; groups and devices are opened here, because that crate opens them only
//! together with a device whose drop can panic.
//!
//! ```text
//! Type1 ---> Container <--- Group <--- VfioFunction
//!            /dev/vfio/vfio  /dev/vfio/N   device file
//! ```
//! Each holds what it points at, so the container is closed last.
//!
//! # Invariants
//! - A group is in the container from its first device to its last.
//! - The kernel forgets all maps when the last group leaves, and so does the ledger.
//! - Each map is one call: the kernel takes any size, and unmaps only what was mapped with one call.
//!
//! The kernel holds one lock for each container while it pins, so parallel maps gain nothing: two threads took, against one,
//! 1.43 (0.97 to 1.85) of the time for 4 GiB of device-dax in 8 parts, 1.30 (1.18 to 1.78) for 2 GiB of hugetlb and 1.03 (0.92 to
//! 2.14) for 2 GiB of anonymous memory (median, least and greatest of 3 rounds of `cargo lab bench pin --only parts`, Linux 6.12
//! emulated with two processors, on a machine that was busy besides). It counts pages as it pins them, which shows how far a
//! map is; device-dax pages are not counted.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;
use vfio_ioctls::{VfioContainer, VfioError};

use crate::address::PciAddress;
use crate::attach::{AttachError, Claims, DetachError};
use crate::caps;
use crate::checks::Asked;
use crate::host::Host;
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::locate::PciFunction;
use crate::mapper::{DmaFacts, DmaLease, DmaMapper, DmaRequest, MapError, UnmapError};
use crate::memlock;
use crate::node::Node;
use crate::space::{OpenError, SpaceKind};
use crate::sys;
use crate::vfio::{Owner, VfioFunction};

const KIND: SpaceKind = SpaceKind::Type1;
const CONTAINER: &str = "/dev/vfio/vfio";

/// An address space of devices behind a VFIO container.
#[derive(Debug)]
pub struct Type1 {
    host: Host,
    container: Arc<Container>,
    claims: Claims,
}

pub(crate) struct Container {
    vfio: VfioContainer,
    /// Groups by their number. Locked while one comes or goes.
    groups: Mutex<HashMap<u32, Weak<Group>>>,
    /// Groups that are in the container.
    live: AtomicUsize,
    ledger: Ledger,
}

/// A group that is in the container. Dropped, it leaves.
#[derive(Debug)]
pub(crate) struct Group {
    file: File,
    id: u32,
    has_left: bool,
    container: Arc<Container>,
}

impl Type1 {
    /// A container on this host.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_on(Host::system())
    }

    /// A container whose functions are found on `host`. The container's own node is always /dev/vfio/vfio.
    pub fn open_on(host: Host) -> Result<Self, OpenError> {
        let vfio = VfioContainer::new(None).map_err(|error| match error {
            VfioError::OpenContainer(source) => OpenError::Node(
                Node {
                    path: CONTAINER.as_ref(),
                    mend: "`modprobe vfio-pci`, which brings it",
                    rule: "SUBSYSTEM==\"misc\", KERNEL==\"vfio\"",
                }
                .error(&host, source),
            ),
            VfioError::VfioExtension => OpenError::NoType1,
            other => OpenError::Refused {
                kind: KIND,
                source: io::Error::other(other),
            },
        })?;
        let container = Container {
            vfio,
            groups: Mutex::default(),
            live: AtomicUsize::new(0),
            ledger: Ledger::default(),
        };
        Ok(Self {
            host,
            container: Arc::new(container),
            claims: Claims::default(),
        })
    }

    /// Makes a function this process's, and what is mapped here reachable by it.
    pub fn attach(&self, function: &PciFunction) -> Result<VfioFunction, AttachError> {
        let address = function.address;
        let claim = self.claims.claim(address)?;
        let step = |what| {
            move |source| AttachError::Step {
                address,
                what,
                source,
            }
        };
        let name = CString::new(address.to_string())
            .map_err(|error| step("name")(io::Error::other(error)))?;
        let mut groups = self.container.groups();
        let group = match groups.get(&function.group).and_then(Weak::upgrade) {
            Some(group) => group,
            None => Arc::new(self.join(function)?),
        };
        let device = sys::group_device(&group.file, &name).map_err(step("open the device of"))?;
        groups.insert(function.group, Arc::downgrade(&group));
        drop(groups);
        VfioFunction::new(
            File::from(device),
            Owner::Group(group),
            claim,
            function.clone(),
        )
    }

    /// Always refused: an open device belongs to the container it was opened through, and can't change it.
    pub fn attach_fd(&self, _device: OwnedFd) -> Result<VfioFunction, AttachError> {
        Err(AttachError::NoDescriptors)
    }

    /// The undo of [`Type1::attach`]. With the last function the kernel unmaps everything: unmap first.
    pub fn detach(&self, function: VfioFunction) -> Result<(), DetachError> {
        function.close()
    }

    /// What can be mapped now.
    pub fn limits(&self) -> io::Result<Limits> {
        let bytes = sys::type1_info(&self.container.vfio)?;
        caps::type1_limits(&bytes)
            .ok_or_else(|| io::Error::other("VFIO's description of the IOMMU is cut off"))
    }

    /// The functions that are attached.
    pub fn attached(&self) -> Vec<PciAddress> {
        self.claims.all()
    }

    /// Puts a group into the container. Called with the groups locked.
    fn join(&self, function: &PciFunction) -> Result<Group, AttachError> {
        let (address, id) = (function.address, function.group);
        let path = self.host.dev().join("vfio").join(id.to_string());
        let node = Node {
            path: &path,
            mend: "`modprobe vfio-pci`, and bind every function of the group to it",
            rule: "SUBSYSTEM==\"vfio\"",
        };
        let file = node
            .open(&self.host)
            .map_err(|source| AttachError::Node { address, source })?;
        let step = |what, source| AttachError::Step {
            address,
            what,
            source,
        };
        let flags = sys::group_flags(&file)
            .map_err(|source| step("ask after the IOMMU group of", source))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            // Names the function and its driver, if it is still so.
            self.host.locate(&function.sysfs_path)?;
            return Err(AttachError::NotViable { address, group: id });
        }
        let is_first = self.container.live.load(Ordering::Acquire) == 0;
        let has_maps = self.container.ledger.facts().ranges != 0;
        sys::group_set_container(&file, &self.container.vfio).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EPERM) if is_first => AttachError::NotViable { address, group: id },
                // Viable and not the first: what is left is the IOMMU's say.
                Some(libc::EPERM) => unsafe_interrupts(address, source),
                Some(libc::EINVAL) if has_maps => AttachError::Conflict {
                    address,
                    group: id,
                    source,
                },
                _ => step("put into the container the IOMMU group of", source),
            }
        })?;
        if is_first {
            // On an error the file is closed, which takes the group out again.
            sys::set_type1(&self.container.vfio).map_err(|source| match source.raw_os_error() {
                Some(libc::EPERM) => unsafe_interrupts(address, source),
                _ => step("choose type1 for the IOMMU of", source),
            })?;
        }
        self.container.live.fetch_add(1, Ordering::AcqRel);
        Ok(Group {
            file,
            id,
            has_left: false,
            container: Arc::clone(&self.container),
        })
    }

    fn limits_for(&self, name: &str) -> Result<Limits, MapError> {
        let name = name.to_owned();
        if self.container.live.load(Ordering::Acquire) == 0 {
            return Err(MapError::NoDevice { name });
        }
        self.limits()
            .map_err(|source| MapError::Limits { name, source })
    }

    fn asked(&self) -> Asked<'_> {
        Asked {
            kind: KIND,
            proc: self.host.proc(),
            charged_bytes: self.container.ledger.facts().charged_bytes,
        }
    }
}

fn unsafe_interrupts(address: PciAddress, source: io::Error) -> AttachError {
    AttachError::UnsafeInterrupts {
        address,
        kind: KIND,
        source,
    }
}

impl DmaMapper for Type1 {
    fn map(&self, request: &DmaRequest<'_>) -> Result<DmaLease, MapError> {
        Asked::check_kind(request)?;
        let limits = self.limits_for(request.name)?;
        let is_charged = self.asked().check(&limits, request)?;
        let start = Instant::now();
        let DmaRequest {
            iova,
            host_address,
            size,
            memory,
            ..
        } = *request;
        sys::type1_map(&self.container.vfio, iova, host_address, size)
            .map_err(|source| self.asked().refused(request, source))?;
        self.container.ledger.insert(request, is_charged);
        Ok(DmaLease {
            iova,
            size,
            memory,
            took: start.elapsed(),
        })
    }

    fn unmap(&self, lease: DmaLease) -> Result<(), (DmaLease, UnmapError)> {
        let (iova, size) = (lease.iova, lease.size);
        if !self.container.ledger.holds(iova) {
            // It went with the last group.
            return Ok(());
        }
        match sys::type1_unmap(&self.container.vfio, iova, size) {
            Ok(unmapped) if unmapped == size => {
                self.container.ledger.remove(iova);
                Ok(())
            }
            Ok(unmapped) => Err((
                lease,
                UnmapError::Short {
                    iova,
                    size,
                    unmapped,
                },
            )),
            Err(source) => Err((lease, UnmapError::Refused { iova, size, source })),
        }
    }

    fn facts(&self) -> DmaFacts {
        self.container.ledger.facts()
    }

    fn check(&self, requests: &[DmaRequest<'_>]) -> Result<(), MapError> {
        let Some(first) = requests.first() else {
            return Ok(());
        };
        let limits = self.limits_for(first.name)?;
        self.asked().check_all(&limits, requests)
    }

    fn counted_bytes(&self) -> Option<u64> {
        memlock::counted_bytes(self.host.proc(), KIND)
    }
}

impl Container {
    fn groups(&self) -> MutexGuard<'_, HashMap<u32, Weak<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container")
            .field("live", &self.live)
            .field("ledger", &self.ledger)
            .finish_non_exhaustive()
    }
}

impl Group {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A group of the same container.
    pub(crate) fn neighbour(&self, id: u32) -> Option<Arc<Self>> {
        self.container.groups().get(&id).and_then(Weak::upgrade)
    }

    /// Closes a device of the group, and the group with its last one.
    pub(crate) fn close_device(group: Arc<Self>, device: File) -> io::Result<()> {
        let container = Arc::clone(&group.container);
        // Held until the group is closed: nobody opens it in between.
        let mut groups = container.groups();
        drop(device);
        let Some(mut last) = Arc::into_inner(group) else {
            return Ok(());
        };
        groups.remove(&last.id);
        last.leave()
    }

    fn leave(&mut self) -> io::Result<()> {
        if self.has_left {
            return Ok(());
        }
        self.has_left = true;
        match sys::group_unset_container(&self.file) {
            Ok(()) => {}
            // A group whose last device was taken away has been taken out by the kernel.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
        if self.container.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.container.ledger.clear();
        }
        Ok(())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            tracing::warn!(group = self.id, %error, "an IOMMU group does not leave its container");
        }
    }
}

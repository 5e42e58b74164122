//! A function of the host that becomes a device of the guest: taken from the host, and given back.
//!
//! ```text
//!   path ─▶ located, checked ─▶ in the address space ─▶ reset ─▶ notices on ─▶ PassedThrough
//!            (nothing touched)     (DmaDomain)                                     │
//!     out of the address space ◀─ memory let go, if it was the last ◀─ reset ◀─ notices off
//! ```
//! The function stays ours over resets of the guest; each machine builds the guest-visible side of it anew.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use daxhund_pin::{
    AddressSpace, AttachError, Host, HostFunction, IrqKind, LocateError, OpenError, VfioFunction,
};
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;
use tracing::{debug, error, info, warn};

use super::devices::{HostDevice, HostKind};
use super::dma::{self, DaxInReach, DmaDomain};
use super::host_devices::OpenedDevice;
use super::resources::HostResources;
use crate::config::{DeviceSource, ValidDevice};
use crate::inherited::{self, InheritedError};
use crate::kvm::VfioRegistry;
use crate::memory::ram::{JoinError, Ram};

/// From one try to have memory let go of to the next.
const KEPT_PAUSE: Duration = Duration::from_secs(1);

/// A function of the host can't be had.
#[derive(Debug, Error)]
pub enum OpenPassthroughError {
    /// It is not there, or not in a state to be passed through.
    #[error("device {id}")]
    Locate {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: LocateError,
    },
    /// No address space.
    #[error("device {id}")]
    Space {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// It does not join the address space.
    #[error("device {id}")]
    Attach {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: Box<AttachError>,
    },
    /// A descriptor that was to be inherited.
    #[error("device {id}")]
    Inherited {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: InheritedError,
    },
    /// No way to hear what the host tells of it.
    #[error(
        "device {id}: the host's notices can't be listened to; `ulimit -n` raises how many descriptors a process may have"
    )]
    Notices {
        /// Which device.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Memory is still mapped for one that is gone.
    #[error(
        "device {id}: guest memory is still mapped for device {kept}, which was removed; it is let go of again every second: try \
         again when vm.info has no devices_kept any more"
    )]
    Kept {
        /// Which device.
        id: String,
        /// The one before.
        kept: String,
    },
    /// It fails to be reset.
    #[error(
        "device {id} does not come out of a reset: it may hold what its last user left in it, so the guest does not get it; \
         unbind and bind it again (`echo BDF > /sys/bus/pci/drivers/vfio-pci/unbind`), or power the host off and on"
    )]
    Reset {
        /// Which device.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What the host tells of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// The host wants it back (VFIO `REQ`), and asks again every ten seconds.
    Request,
    /// The device has met an error that it can't mend (VFIO `ERR`, from AER).
    Error,
}

impl Notice {
    const ALL: [(Self, IrqKind); 2] = [
        (Self::Request, IrqKind::Request),
        (Self::Error, IrqKind::Error),
    ];
}

/// A function in our hands.
pub(super) struct PassedThrough {
    id: String,
    function: Arc<VfioFunction>,
    exclude_mmap_bars: Vec<u8>,
    peers: Option<Arc<AddressSpace>>,
    /// What VFIO writes when it has something to tell.
    notices: Vec<(Notice, OwnedFd)>,
}

impl PassedThrough {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// For the guest-visible side.
    pub(super) fn function(&self) -> Arc<dyn HostFunction> {
        Arc::clone(&self.function) as Arc<_>
    }

    pub(super) fn exclude_mmap_bars(&self) -> Vec<u8> {
        self.exclude_mmap_bars.clone()
    }

    /// The events by which the host tells of it.
    pub(super) fn notices(&self) -> impl Iterator<Item = (Notice, &OwnedFd)> {
        self.notices.iter().map(|(notice, event)| (*notice, event))
    }

    /// The space in which other devices are to reach its registers, if they are.
    pub(super) fn registers_in_reach_of(&self) -> Option<Arc<AddressSpace>> {
        self.peers.clone()
    }

    pub(super) fn register(&self, registry: &VfioRegistry) -> io::Result<()> {
        registry.add(self.function.kvm_file())
    }

    /// The undo of [`PassedThrough::register`].
    pub(super) fn unregister(&self, registry: &VfioRegistry) -> io::Result<()> {
        registry.remove(self.function.kvm_file())
    }

    /// Has the device forget what its guest asked of it. One that is gone has nothing to forget.
    pub(super) fn quiesce(&self) {
        if self.function.can_reset()
            && let Err(error) = self.function.reset()
        {
            warn!(id = self.id, %error, "a passed-through device could not be reset");
        }
    }

    /// Has the host write an event for each kind of notice that it has.
    fn connect_notices(function: &VfioFunction) -> io::Result<Vec<(Notice, OwnedFd)>> {
        let mut notices = Vec::new();
        for (notice, kind) in Notice::ALL {
            if function.irq(kind).count > 0 {
                let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                function.set_irqs(kind, 0, &[Some(event.as_fd())])?;
                notices.push((notice, event));
            }
        }
        Ok(notices)
    }

    /// The undo. A device that is gone tells nothing any more.
    fn disconnect_notices(&self) {
        for (notice, kind) in Notice::ALL {
            if self
                .notices
                .iter()
                .any(|(connected, _)| *connected == notice)
                && let Err(error) = self.function.disable_irqs(kind)
            {
                info!(id = self.id, %error, ?notice, "the host's notices stay connected");
            }
        }
    }
}

impl HostResources {
    /// Takes a function from the host. `dax`: the device-dax memory that devices are to reach.
    pub(super) fn open_passthrough(
        &mut self,
        valid: &ValidDevice,
        dax: DaxInReach,
    ) -> Result<OpenedDevice, OpenPassthroughError> {
        let id = || valid.id.clone();
        // What has been let go of by then would be missing for a newcomer.
        if let Some(kept) = self.kept().next() {
            let kept = kept.to_owned();
            return Err(OpenPassthroughError::Kept { id: id(), kept });
        }
        let host = Host::system();
        let may_use_iommufd = dma::may_use_iommufd();
        let (space, attached) = match &valid.source {
            DeviceSource::Path(path) => {
                let located = host
                    .locate(path)
                    .map_err(|source| OpenPassthroughError::Locate { id: id(), source })?;
                let kind = dma::choose(self.iommufd, Some(&located), dax, may_use_iommufd);
                let space = self.domain(kind, host, valid)?;
                let attached = space.attach(&located);
                (space, attached)
            }
            DeviceSource::Descriptor(number) => {
                let fd = inherited::take(*number)
                    .map_err(|source| OpenPassthroughError::Inherited { id: id(), source })?;
                let kind = dma::choose(self.iommufd, None, dax, may_use_iommufd);
                let space = self.domain(kind, host, valid)?;
                let attached = space.attach_fd(fd);
                (space, attached)
            }
        };
        let function = match attached {
            Ok(function) => function,
            Err(source) => {
                self.drop_idle_domain();
                let source = Box::new(source);
                return Err(OpenPassthroughError::Attach { id: id(), source });
            }
        };
        let notices = match prepare(&function, valid) {
            Ok(notices) => notices,
            Err(error) => {
                detach(&space, &valid.id, function);
                self.drop_idle_domain();
                return Err(error);
            }
        };
        if let Some(domain) = &mut self.dma {
            domain.devices += 1;
        }
        info!(
            id = valid.id, address = %function.address(), group = function.facts().group,
            space = %space.kind(), "a device of the host is ours"
        );
        let device = Arc::new(PassedThrough {
            id: valid.id.clone(),
            function: Arc::new(function),
            exclude_mmap_bars: valid.exclude_mmap_bars.clone(),
            peers: self.p2p.then(|| Arc::clone(&space)),
            notices,
        });
        self.notices.watch(&device);
        Ok(OpenedDevice {
            device: HostDevice {
                id: valid.id.clone(),
                segment: valid.place.segment,
                slot: valid.place.device,
                kind: HostKind::Passthrough(device),
                memory: None,
            },
            region: None,
        })
    }

    /// The address space, made for the first device.
    fn domain(
        &mut self,
        kind: daxhund_pin::SpaceKind,
        host: Host,
        valid: &ValidDevice,
    ) -> Result<Arc<AddressSpace>, OpenPassthroughError> {
        if let Some(domain) = &self.dma {
            return Ok(Arc::clone(&domain.space));
        }
        let space =
            AddressSpace::open(kind, host).map_err(|source| OpenPassthroughError::Space {
                id: valid.id.clone(),
                source,
            })?;
        let space = Arc::new(space);
        self.dma = Some(DmaDomain {
            space: Arc::clone(&space),
            member: None,
            devices: 0,
            monitor: self.monitor.clone(),
            metrics: self.metrics.clone(),
            kept: Vec::new(),
            ask_again: None,
            _no_discard: self.discard.forbid(),
        });
        Ok(space)
    }

    fn drop_idle_domain(&mut self) {
        self.dma
            .take_if(|domain| domain.devices == 0 && domain.member.is_none());
    }

    /// Has the devices reach guest memory, if there are any and they don't yet.
    pub(super) fn join_dma(&mut self, ram: &mut Ram) -> Result<(), JoinError> {
        let Some(domain) = self.dma.as_mut().filter(|domain| domain.member.is_none()) else {
            return Ok(());
        };
        let started = Instant::now();
        match ram.join(domain.consumer()) {
            Ok(member) => {
                domain.member = Some(member);
                let facts = daxhund_pin::DmaMapper::facts(domain.space.as_ref());
                info!(
                    ranges = facts.ranges,
                    pinned_bytes = facts.pinned_bytes,
                    charged_bytes = facts.charged_bytes,
                    elapsed_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
                    "guest memory is in reach of devices"
                );
                Ok(())
            }
            Err(failure) => {
                domain.member = failure.stays;
                Err(failure)
            }
        }
    }

    /// Devices that could not be given back because memory is still mapped for them.
    pub(super) fn kept(&self) -> impl Iterator<Item = &str> {
        let kept = self.dma.iter().flat_map(|domain| &domain.kept);
        kept.map(|device| device.id.as_str())
    }

    /// All of them, when the machine is gone and memory has been taken from them.
    pub(super) fn close_devices(&mut self, ram: &mut Ram) {
        for device in std::mem::take(&mut self.devices) {
            self.close_device(device, ram);
        }
    }

    /// The undo of [`HostResources::open_passthrough`] and, for the last device, of [`HostResources::join_dma`]: memory
    /// first. When memory is not let go the device is kept, because giving it back would not end its reach.
    pub(super) fn close_passthrough(&mut self, device: Arc<PassedThrough>, ram: &mut Ram) {
        device.disconnect_notices();
        self.notices.forget(&device);
        device.quiesce();
        let Some(domain) = &mut self.dma else { return };
        domain.devices = domain.devices.saturating_sub(1);
        if domain.devices == 0
            && let Some(member) = domain.member
        {
            if let Err(error) = ram.leave(member) {
                error!(id = device.id, %error, "the device is kept: memory is still mapped for it");
                domain.kept.push(device);
                domain.ask_again = Some(Instant::now() + KEPT_PAUSE);
                return;
            }
            domain.member = None;
        }
        give_back(&domain.space, device);
        self.drop_idle_domain();
    }

    /// Has memory let go of once more for devices that are kept; at most every second.
    pub(super) fn ask_for_kept(&mut self, ram: &mut Ram) {
        let now = Instant::now();
        let is_due = |domain: &&mut DmaDomain| domain.ask_again.is_some_and(|again| now >= again);
        let Some(domain) = self.dma.as_mut().filter(is_due) else {
            return;
        };
        domain.ask_again = Some(now + KEPT_PAUSE);
        if let Some(member) = domain.member {
            if ram.leave(member).is_err() {
                return;
            }
            domain.member = None;
        }
        domain.ask_again = None;
        for device in std::mem::take(&mut domain.kept) {
            warn!(id = device.id, "the device that was kept has gone");
            give_back(&domain.space, device);
        }
        self.drop_idle_domain();
    }
}

fn give_back(space: &AddressSpace, device: Arc<PassedThrough>) {
    let id = device.id.clone();
    let function = Arc::into_inner(device).and_then(|d| Arc::into_inner(d.function));
    if let Some(function) = function {
        detach(space, &id, function);
    } else {
        error!(
            id,
            "a device is given back only when its last user lets go of it"
        );
    }
}

/// What it takes before a guest may have it. A second reset would bring nothing and take a tenth of a second, which is what a
/// function is given for it (PCI Express 6.0, 6.6.2).
fn prepare(
    function: &VfioFunction,
    valid: &ValidDevice,
) -> Result<Vec<(Notice, OwnedFd)>, OpenPassthroughError> {
    if function.was_reset() {
        debug!(
            id = valid.id,
            "the host has reset the device when it gave it out"
        );
    } else if function.can_reset() {
        function
            .reset()
            .map_err(|source| OpenPassthroughError::Reset {
                id: valid.id.clone(),
                source,
            })?;
    } else {
        warn!(
            id = valid.id, address = %function.address(),
            "the device can't be reset: what its last user left in it, the guest finds"
        );
    }
    PassedThrough::connect_notices(function).map_err(|source| OpenPassthroughError::Notices {
        id: valid.id.clone(),
        source,
    })
}

fn detach(space: &AddressSpace, id: &str, function: VfioFunction) {
    if let Err(error) = space.detach(function) {
        error!(id, %error, "a device is not given back before the process ends");
    }
}

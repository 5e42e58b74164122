//! From a device's configuration to what it takes from the host, and back; one step each, side by side with its undo.
//!
//! What is opened here outlives resets of the guest: files, taps, sockets, terminals, and mapped memory.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tracing::info;

use super::devices::{HostDevice, HostKind};
use super::passthrough::OpenPassthroughError;
use super::resources::HostResources;
use super::vm::release_one;
use crate::config::{
    ByteSize, DiskSource, MacAddr, NetSource, Place, PmemSource, Tap, ValidBalloon, ValidConsole,
    ValidDisk, ValidFs, ValidGenericVhostUser, ValidNet, ValidPmem, ValidRng, ValidVsock,
    VhostMode,
};
use crate::devices::console::{Console, OpenConsoleError};
use crate::inherited::{self, InheritedError};
use crate::memory::layout::Gpa;
use crate::memory::pmem::{PmemBacking, PmemMapError, PmemOpenError, PmemSpec};
use crate::memory::pools::{self, TakeError};
use crate::memory::ram::Ram;
use crate::memory::region::Region;
use crate::pci::NoPlace;
use crate::virtio::Device;
use crate::virtio::balloon::{BalloonDevice, BalloonSizeError, BalloonSpec};
use crate::virtio::blk::{Disk, DiskOpenError, DiskSpec};
use crate::virtio::console::ConsoleDevice;
use crate::virtio::net::{Mac, MacError, NetDevice, NetOpenError, NetSpec, Offers};
use crate::virtio::pmem::PmemDevice;
use crate::virtio::rng::{OpenRngError, RngDevice, RngSpec};
use crate::virtio::vhost_user::{self, Mode, pmem::LentPmem};
use crate::virtio::vsock::{VsockDevice, VsockOpenError, VsockSpec};

/// What a device needs of the host can't be had.
#[derive(Debug, Error)]
pub enum OpenDeviceError {
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemOpenError),
    /// Its mapping.
    #[error(transparent)]
    PmemMap(#[from] PmemMapError),
    /// A pool does not give it.
    #[error("pmem {id}")]
    Pool {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: TakeError,
    },
    /// Its place in the guest.
    #[error("pmem {id}")]
    Room {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: NoPlace,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskOpenError),
    /// A vhost-user backend.
    #[error(transparent)]
    Backend(#[from] vhost_user::OpenError),
    /// A network device.
    #[error(transparent)]
    Net(#[from] NetOpenError),
    /// An Ethernet address that no interface can have.
    #[error("network device {id}")]
    Mac {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: MacError,
    },
    /// A descriptor that was to be inherited.
    #[error("network device {id}")]
    Inherited {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: InheritedError,
    },
    /// Descriptors that a client has handed over.
    #[error(
        "network device {id}: the descriptors of its tap can't be duplicated; `ulimit -n` raises how many there may be"
    )]
    Tap {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Sockets.
    #[error(transparent)]
    Vsock(#[from] VsockOpenError),
    /// Random numbers.
    #[error(transparent)]
    Rng(#[from] OpenRngError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonSizeError),
    /// A function of the host.
    #[error(transparent)]
    Passthrough(#[from] OpenPassthroughError),
    /// The console's other end.
    #[error("console {id}")]
    Console {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: OpenConsoleError,
    },
}

/// A device, taken from the host.
pub(super) struct OpenedDevice {
    pub(super) device: HostDevice,
    /// The memory that it brings: mapped, placed, and nobody's yet.
    pub(super) region: Option<Region>,
}

impl OpenedDevice {
    fn new(id: &str, place: Place, device: Arc<dyn Device>) -> Self {
        Self {
            device: HostDevice {
                id: id.to_owned(),
                segment: place.segment,
                slot: place.device,
                kind: HostKind::Virtio(device),
                memory: None,
            },
            region: None,
        }
    }
}

impl HostResources {
    /// Opens, places and maps persistent memory, or has it lent and maps that.
    pub(super) fn open_pmem(&mut self, valid: &ValidPmem) -> Result<OpenedDevice, OpenDeviceError> {
        let mut backing = match &valid.source {
            PmemSource::Lent { socket } => return self.open_lent_pmem(valid, socket),
            PmemSource::Pool { pool, size } => {
                let wanted = PmemBacking::wanted(size.bytes());
                let taken =
                    pools::take(&self.dax, &self.pools, pool, wanted).map_err(|source| {
                        OpenDeviceError::Pool {
                            id: valid.id.clone(),
                            source,
                        }
                    })?;
                PmemBacking::of_range(&valid.id, taken.lock, valid.dma)?
            }
            PmemSource::File {
                file,
                size,
                offset,
                discard_writes,
            } => {
                let spec = PmemSpec {
                    id: valid.id.clone(),
                    file: file.clone(),
                    size: size.map(ByteSize::bytes),
                    offset: offset.bytes(),
                    discard_writes: *discard_writes,
                    dma: valid.dma,
                };
                PmemBacking::open(&self.dax, &spec)?
            }
        };
        let region = self.map_pmem(&mut backing)?;
        let device = PmemDevice::new(&valid.id, region.gpa(), region.size(), backing.flusher())
            .with_mark(region.mark().clone());
        let mut opened = OpenedDevice::new(&valid.id, valid.place, Arc::new(device));
        opened.region = Some(region);
        Ok(opened)
    }

    fn open_lent_pmem(
        &mut self,
        valid: &ValidPmem,
        socket: &Path,
    ) -> Result<OpenedDevice, OpenDeviceError> {
        let backend = self.backends.find(vhost_user::Spec {
            id: valid.id.clone(),
            socket: socket.to_owned(),
            mode: Mode::Client,
            class: vhost_user::pmem::PMEM,
            shape: vhost_user::pmem::shape(),
        })?;
        match self.map_lent(valid, &backend) {
            Ok(region) => {
                let device = match LentPmem::new(backend, region.gpa(), region.size()) {
                    Ok(device) => device,
                    Err(source) => {
                        self.unmap_pmem(region);
                        self.backends.lose_sight_of(&valid.id);
                        let id = valid.id.clone();
                        return Err(vhost_user::OpenError::Host { id, source }.into());
                    }
                };
                let mut opened = OpenedDevice::new(&valid.id, valid.place, Arc::new(device));
                opened.region = Some(region);
                Ok(opened)
            }
            Err(error) => {
                self.backends.lose_sight_of(&valid.id);
                Err(error)
            }
        }
    }

    /// Maps what a backend lends, and tells it when that is so.
    fn map_lent(
        &mut self,
        valid: &ValidPmem,
        backend: &vhost_user::Backend,
    ) -> Result<Region, OpenDeviceError> {
        let id = || valid.id.clone();
        let socket = || backend.socket().display().to_string();
        let silent = || vhost_user::OpenError::Silent {
            id: id(),
            socket: socket(),
        };
        let loan = backend.take_loan().ok().flatten().ok_or_else(silent)?;
        let number = loan.file.as_raw_fd();
        let file = std::fs::read_link(format!("/proc/self/fd/{number}"));
        let spec = PmemSpec {
            id: id(),
            file: file.unwrap_or_else(|_| "what is lent".into()),
            size: Some(loan.size),
            offset: loan.offset,
            discard_writes: false,
            dma: valid.dma,
        };
        let mut backing = PmemBacking::lent(&self.dax, &spec, loan.file)?;
        let region = self.map_pmem(&mut backing)?;
        if backend.loan_is_mapped().is_err() {
            self.unmap_pmem(region);
            return Err(silent().into());
        }
        Ok(region)
    }

    fn map_pmem(&mut self, backing: &mut PmemBacking) -> Result<Region, OpenDeviceError> {
        let (size, align) = (backing.size(), backing.placement_align());
        let gpa = self
            .device_memory
            .place(size, align)
            .map(Gpa)
            .map_err(|source| OpenDeviceError::Room {
                id: backing.id().to_owned(),
                source,
            })?;
        let region = match backing.map(gpa) {
            Ok(region) => region,
            Err(error) => {
                self.device_memory.free(gpa.0);
                return Err(error.into());
            }
        };
        self.tombstones.give_way(gpa, size);
        info!(
            id = backing.id(), gpa = %gpa, size = %format_args!("{size:#x}"),
            host = %format_args!("{:#x}", region.host_address()), "persistent memory mapped"
        );
        Ok(region)
    }

    /// The undo of all that open a device here, but for its memory, which has a life of its own.
    pub(super) fn close_device(&mut self, device: HostDevice, ram: &mut Ram) {
        self.backends.close(&device.id, ram);
        if let HostKind::Passthrough(passed) = device.kind {
            self.close_passthrough(passed, ram);
        }
    }

    /// The undo of [`HostResources::open_pmem`] for the memory, while it is nobody's.
    pub(super) fn unmap_pmem(&mut self, region: Region) {
        let gpa = region.gpa();
        release_one(region);
        self.device_memory.free(gpa.0);
    }

    /// Opens a disk's file, or finds the backend that serves it.
    pub(super) fn open_disk(&mut self, valid: &ValidDisk) -> Result<OpenedDevice, OpenDeviceError> {
        let device: Arc<dyn Device> = match &valid.source {
            DiskSource::Image(image) => Arc::new(Disk::open(&DiskSpec {
                readonly: image.readonly,
                direct: image.direct,
                num_queues: valid.num_queues,
                queue_size: valid.queue_size,
                serial: image.serial.clone(),
                ..DiskSpec::new(&valid.id, &image.path)
            })?),
            DiskSource::VhostUser { socket } => Arc::new(self.backends.open(vhost_user::Spec {
                id: valid.id.clone(),
                socket: socket.clone(),
                mode: Mode::Client,
                class: vhost_user::blk::DISK,
                shape: vhost_user::Shape::even(valid.num_queues, valid.queue_size),
            })?),
        };
        Ok(OpenedDevice::new(&valid.id, valid.place, device))
    }

    /// Opens or takes a tap, or finds the backend that serves the network. `fds` came with the request; a backend
    /// that is to connect is waited for by `patience`.
    pub(super) fn open_net(
        &mut self,
        valid: &ValidNet,
        fds: Vec<OwnedFd>,
        patience: Duration,
    ) -> Result<OpenedDevice, OpenDeviceError> {
        let device: Arc<dyn Device> = match &valid.source {
            NetSource::VhostUser { socket, mode } => {
                Arc::new(self.backends.open(vhost_user::Spec {
                    id: valid.id.clone(),
                    socket: socket.clone(),
                    mode: match mode {
                        VhostMode::Client => Mode::Client,
                        VhostMode::Server => Mode::Server { patience },
                    },
                    class: vhost_user::net::interface(
                        mac_of(valid, valid.mac)?.unwrap_or_else(Mac::random),
                        valid.mtu,
                        Offers {
                            tso: valid.offloads.tso,
                            ufo: valid.offloads.ufo,
                            csum: valid.offloads.csum,
                        },
                        valid.queue_pairs,
                    ),
                    shape: vhost_user::Shape::even(
                        valid.queue_pairs * vhost_user::net::QUEUES,
                        valid.queue_size,
                    ),
                })?)
            }
            NetSource::Tap(tap) => Arc::new(NetDevice::open(net_spec(valid, tap, fds)?)?),
        };
        Ok(OpenedDevice::new(&valid.id, valid.place, device))
    }

    /// Finds the backend that serves a directory.
    pub(super) fn open_fs(&mut self, valid: &ValidFs) -> Result<OpenedDevice, OpenDeviceError> {
        let queues = valid.num_queues + vhost_user::fs::HIGH_PRIORITY_QUEUES;
        let shape = vhost_user::Shape::even(queues, valid.queue_size);
        let device = self.backends.open(vhost_user::Spec {
            id: valid.id.clone(),
            socket: valid.socket.clone(),
            mode: Mode::Client,
            class: vhost_user::fs::file_system(&valid.tag, &shape),
            shape,
        })?;
        Ok(OpenedDevice::new(&valid.id, valid.place, Arc::new(device)))
    }

    /// Finds the backend that serves a device of whatever type.
    pub(super) fn open_generic_vhost_user(
        &mut self,
        valid: &ValidGenericVhostUser,
    ) -> Result<OpenedDevice, OpenDeviceError> {
        let device = self.backends.open(vhost_user::Spec {
            id: valid.id.clone(),
            socket: valid.socket.clone(),
            mode: Mode::Client,
            class: vhost_user::generic::device(valid.device_type),
            shape: vhost_user::Shape::of(valid.queue_sizes.clone()),
        })?;
        Ok(OpenedDevice::new(&valid.id, valid.place, Arc::new(device)))
    }

    /// A balloon takes nothing from the host: it gives.
    pub(super) fn open_balloon(
        &mut self,
        valid: &ValidBalloon,
    ) -> Result<OpenedDevice, OpenDeviceError> {
        let spec = BalloonSpec {
            id: valid.id.clone(),
            size: valid.size.bytes(),
            deflate_on_oom: valid.deflate_on_oom,
            free_page_reporting: valid.free_page_reporting,
        };
        let device = Arc::new(BalloonDevice::new(spec, self.discard.clone())?);
        self.balloon = Some(Arc::clone(&device));
        Ok(OpenedDevice::new(&valid.id, valid.place, device))
    }
}

/// Makes the socket that the host's programs connect to.
pub(super) fn open_vsock(valid: &ValidVsock) -> Result<OpenedDevice, OpenDeviceError> {
    let device = VsockDevice::open(VsockSpec {
        id: valid.id.clone(),
        cid: valid.cid.into(),
        socket: valid.socket.clone(),
    })?;
    Ok(OpenedDevice::new(&valid.id, valid.place, Arc::new(device)))
}

/// Opens the source of random numbers.
pub(super) fn open_rng(valid: &ValidRng) -> Result<OpenedDevice, OpenDeviceError> {
    let device = RngDevice::open(RngSpec {
        id: valid.id.clone(),
        src: valid.src.clone(),
    })?;
    Ok(OpenedDevice::new(&valid.id, valid.place, Arc::new(device)))
}

/// Opens the other end of the virtio console, and tells the name of a pseudo terminal.
pub(super) fn open_console(
    valid: &ValidConsole,
) -> Result<(OpenedDevice, Option<String>), OpenDeviceError> {
    let console = Console::open(&valid.output).map_err(|source| OpenDeviceError::Console {
        id: valid.id.clone(),
        source,
    })?;
    let pty = console.input.pty_name().map(str::to_owned);
    if let Some(name) = &pty {
        eprintln!("console: {name}");
    }
    let device = ConsoleDevice::new(&valid.id, console);
    let opened = OpenedDevice::new(&valid.id, valid.place, Arc::new(device));
    Ok((opened, pty))
}

/// An Ethernet address as the device has it.
fn mac_of(valid: &ValidNet, mac: Option<MacAddr>) -> Result<Option<Mac>, OpenDeviceError> {
    let mac = mac.map(|mac| Mac::new(mac.0)).transpose();
    mac.map_err(|source| OpenDeviceError::Mac {
        id: valid.id.clone(),
        source,
    })
}

/// The configuration's words for a network device as the device has them.
fn net_spec(valid: &ValidNet, tap: &Tap, fds: Vec<OwnedFd>) -> Result<NetSpec, OpenDeviceError> {
    let id = || valid.id.clone();
    let mut spec = NetSpec {
        id: id(),
        mac: mac_of(valid, valid.mac)?,
        mtu: valid.mtu,
        num_queues: valid.queue_pairs * 2,
        queue_size: valid.queue_size,
        offload_tso: valid.offloads.tso,
        offload_ufo: valid.offloads.ufo,
        offload_csum: valid.offloads.csum,
        ..NetSpec::default()
    };
    match tap {
        Tap::Interface {
            name,
            address,
            mac: host_mac,
        } => {
            spec.tap.clone_from(name);
            (spec.ip, spec.mask) =
                address.map_or((None, None), |(ip, mask)| (Some(ip), Some(mask)));
            spec.host_mac = mac_of(valid, *host_mac)?;
        }
        // They came beside the request.
        Tap::Descriptors(_) if !fds.is_empty() => spec.fds = fds,
        Tap::Descriptors(numbers) => {
            for number in numbers {
                let fd = inherited::take(*number)
                    .map_err(|source| OpenDeviceError::Inherited { id: id(), source })?;
                spec.fds.push(fd);
            }
        }
    }
    Ok(spec)
}

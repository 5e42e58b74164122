//! What a machine takes from the host before it is built, each checked where it is taken.
//!
//! Nothing here is changed by the guest; a reset builds the next VM on the same resources. Whatever fails, everything
//! taken so far is given back by going out of scope: locks, mappings, terminal mode, socket path.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use daxhund_dax::Host;
use thiserror::Error;
use tracing::info;

use super::backends::Backends;
use super::devices::HostDevice;
use super::dma::{DaxInReach, DmaDomain};
use super::guard::Removals;
use super::host_devices::{self, OpenDeviceError, OpenedDevice};
use super::notices::Notices;
use super::taps::HandedTaps;
use crate::boot::{Initramfs, InitramfsError, Kernel, KernelError, Payload};
use crate::config::{ConsoleConfig, HostConfig, ValidConfig};
use crate::devices::console::{Console, ConsoleInput, ConsoleOutput, OpenConsoleError};
use crate::kvm::{CpuidError, CpuidTemplate, Hypervisor, OpenError, Topology, TopologyError};
use crate::memory::discard::DiscardTable;
use crate::memory::layout::{LayoutError, RamLayout};
use crate::memory::poison::Poison;
use crate::memory::region::Region;
use crate::memory::tombstones::Tombstones;
use crate::memory::zone::{Zone, ZoneMapError, ZoneOpenError};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::pci::{self, LayoutRequest, MemoryArea, PciLayout};
use crate::virtio::balloon::BalloonDevice;
use crate::virtio::vhost_user;

/// Something of the host is not there, not permitted, in use or not what was asked for.
#[derive(Debug, Error)]
pub enum PrepareError {
    /// KVM.
    #[error(transparent)]
    Hypervisor(#[from] OpenError),
    /// What KVM offers a vCPU.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// More vCPUs than the host can give one VM.
    #[error("--cpus asks for {asked} vCPUs, this host's KVM allows {max} per VM")]
    TooManyVcpus {
        /// vCPUs asked for.
        asked: u32,
        /// What KVM allows.
        max: usize,
    },
    /// Their APIC ids.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs file.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// A zone's backing.
    #[error(transparent)]
    ZoneOpen(#[from] ZoneOpenError),
    /// The zones together.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A zone's memory.
    #[error(transparent)]
    ZoneMap(#[from] ZoneMapError),
    /// Addresses of PCI.
    #[error(transparent)]
    Pci(#[from] pci::LayoutError),
    /// A device.
    #[error(transparent)]
    Device(Box<OpenDeviceError>),
    /// No descriptor to hear of devices by.
    #[error("no event descriptor could be made; `ulimit -n` raises how many a process may have")]
    Notices(#[source] std::io::Error),
    /// The serial port's other end.
    #[error("serial port")]
    Serial(#[source] OpenConsoleError),
}

impl From<OpenDeviceError> for PrepareError {
    fn from(error: OpenDeviceError) -> Self {
        Self::Device(Box::new(error))
    }
}

/// What machines are built on.
pub struct HostResources {
    /// Where device-dax devices are looked for.
    pub(super) dax: Host,
    /// What the host has pools of.
    pub(super) pools: Arc<HostConfig>,
    pub(super) hypervisor: Hypervisor,
    pub(super) cpuid: CpuidTemplate,
    pub(super) payload: Payload,
    pub(super) layout: RamLayout,
    /// Zone of each range of `layout`, by its id.
    pub(super) zone_ids: Vec<String>,
    /// `None`: the guest has no serial port.
    pub(super) serial: Option<ConsoleOutput>,
    pub(super) serial_input: ConsoleInput,
    /// Name of the pseudo terminal that the virtio console is, if it is one.
    pub(super) console_pty: Option<String>,
    /// Addresses of PCI segments and device memory.
    pub(super) pci: PciLayout,
    /// Guest addresses for memory that devices bring.
    pub(super) device_memory: MemoryArea,
    /// Where the guest had memory that the host has taken back.
    pub(super) tombstones: Arc<Tombstones>,
    /// What of guest memory is poisoned.
    pub(super) poison: Arc<Poison>,
    /// Which guest memory can be given back to the host.
    pub(super) discard: Arc<DiscardTable>,
    /// By when they were opened.
    pub(super) devices: Vec<HostDevice>,
    /// The balloon among them.
    pub(super) balloon: Option<Arc<BalloonDevice>>,
    /// Where it is told how far a long pin is.
    pub(super) monitor: Monitor,
    /// Where exits and pins are counted.
    pub(super) metrics: Metrics,
    /// What the host tells of passed-through devices.
    pub(super) notices: Notices,
    /// vhost-user backends that serve devices.
    pub(super) backends: Backends,
    /// Which way passed-through devices are to reach memory, if somebody said.
    pub(super) iommufd: Option<bool>,
    /// Whether they are to reach each other's registers.
    pub(super) p2p: bool,
    /// The memory that they reach. Declared last: the devices go before it.
    pub(super) dma: Option<DmaDomain>,
}

impl HostResources {
    /// Takes everything a configuration names. The regions are guest memory, mapped and not yet anybody's.
    pub(super) fn open(
        config: &ValidConfig,
        pools: Arc<HostConfig>,
        (monitor, metrics): (&Monitor, &Metrics),
        removals: &mut Removals,
        told: Arc<UnixStream>,
        taps: &HandedTaps,
    ) -> Result<(Self, Vec<Region>), PrepareError> {
        let hypervisor = Hypervisor::open()?;
        let asked = config.cpus().max_vcpus;
        let max = hypervisor.max_vcpus();
        let cpus = u8::try_from(asked)
            .ok()
            .filter(|cpus| usize::from(*cpus) <= max)
            .ok_or(PrepareError::TooManyVcpus { asked, max })?;
        let nodes: Vec<Vec<u8>> = config
            .numa()
            .iter()
            .map(|node| {
                node.cpus
                    .iter()
                    .filter_map(|cpu| u8::try_from(*cpu).ok())
                    .collect()
            })
            .collect();
        let cpuid = CpuidTemplate::new(&hypervisor, Topology::new(cpus, &nodes)?)?
            .limited_to(config.cpus().max_phys_bits);
        let payload = Payload {
            kernel: Kernel::open(config.kernel())?,
            initramfs: config.initramfs().map(Initramfs::open).transpose()?,
            cmdline: config.cmdline().to_owned(),
        };

        let host = Host::system();
        let mut zones = config
            .zones()
            .iter()
            .map(|spec| Zone::open(&host, &pools, spec))
            .collect::<Result<Vec<_>, _>>()?;
        let requests: Vec<_> = zones.iter().map(|zone| zone.request().clone()).collect();
        let layout = RamLayout::place(&requests, cpuid.address_bits())?;
        let mut regions = Vec::new();
        for range in layout.ranges() {
            let region = zones[range.zone].map(range)?;
            info!(
                zone = region.zone(), gpa = %format_args!("{:#x}", region.gpa().0),
                size = %format_args!("{:#x}", region.size()), host = %format_args!("{:#x}", region.host_address()),
                "guest memory mapped"
            );
            regions.push(region);
        }

        let pci = PciLayout::new(LayoutRequest {
            segments: config.segments(),
            address_bits: cpuid.address_bits(),
            ram_end: layout.ram_end().0,
        })?;
        let mut resources = Self {
            dax: host,
            pools,
            hypervisor,
            cpuid,
            payload,
            layout,
            zone_ids: requests.into_iter().map(|request| request.id).collect(),
            serial: None,
            serial_input: ConsoleInput::None,
            console_pty: None,
            device_memory: MemoryArea::new(pci.device_memory),
            pci,
            tombstones: Arc::default(),
            poison: Arc::default(),
            discard: DiscardTable::new(),
            devices: Vec::new(),
            balloon: None,
            monitor: monitor.clone(),
            metrics: metrics.clone(),
            notices: Notices::new().map_err(PrepareError::Notices)?,
            backends: Backends::new(told).map_err(PrepareError::Notices)?,
            iommufd: config.iommufd(),
            p2p: config.vfio_p2p_dma(),
            dma: None,
        };
        resources.open_devices(config, &mut regions, removals, taps)?;
        // Last, so that no other error is printed on a terminal in raw mode.
        let console = Console::open(config.serial()).map_err(PrepareError::Serial)?;
        if let Some(name) = console.input.pty_name() {
            eprintln!("serial port: {name}");
        }
        resources.serial = (*config.serial() != ConsoleConfig::Off).then_some(console.output);
        resources.serial_input = console.input;
        Ok((resources, regions))
    }

    /// The devices a guest starts with; the memory that they bring joins the other regions.
    fn open_devices(
        &mut self,
        config: &ValidConfig,
        regions: &mut Vec<Region>,
        removals: &mut Removals,
        taps: &HandedTaps,
    ) -> Result<(), OpenDeviceError> {
        let mut take = |this: &mut Self, opened: OpenedDevice| {
            this.devices.push(opened.device);
            regions.extend(opened.region);
        };
        for disk in config.disks() {
            let opened = self.open_disk(disk)?;
            take(self, opened);
        }
        for net in config.net() {
            let tap = taps.of(&net.id).map_err(|source| OpenDeviceError::Tap {
                id: net.id.clone(),
                source,
            })?;
            let opened = self.open_net(net, tap, vhost_user::AT_START)?;
            take(self, opened);
        }
        for generic in config.generic_vhost_user() {
            let opened = self.open_generic_vhost_user(generic)?;
            take(self, opened);
        }
        for fs in config.fs() {
            let opened = self.open_fs(fs)?;
            take(self, opened);
        }
        for pmem in config.pmem() {
            let opened = self.open_pmem(pmem)?;
            take(self, opened);
        }
        if let Some(vsock) = config.vsock() {
            let opened = host_devices::open_vsock(vsock)?;
            take(self, opened);
        }
        let opened = host_devices::open_rng(config.rng())?;
        take(self, opened);
        if let Some(balloon) = config.balloon() {
            let opened = self.open_balloon(balloon)?;
            take(self, opened);
        }
        if let Some(console) = config.console() {
            let (opened, pty) = host_devices::open_console(console)?;
            self.console_pty = pty;
            take(self, opened);
        }
        for device in config.passthrough() {
            let dax = DaxInReach::of(regions.iter(), removals);
            let opened = self.open_passthrough(device, dax)?;
            self.devices.push(opened.device);
        }
        // Those that want a certain slot come first.
        self.devices.sort_by_key(|device| device.slot.is_none());
        Ok(())
    }
}

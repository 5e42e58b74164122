//! The step from what somebody wrote to what a machine can be built from.
//!
//! Invariant: a [`ValidConfig`] exists only when every rule held that can be told without looking at
//! the host. What is left optional in [`VmConfig`] is resolved here once: RAM is a list of zones,
//! and each zone has exactly one kind of backing with the settings that kind has.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::device::check_places;
use super::devices::Devices;
use super::files;
use super::memory::{check_pages, huge_pages};
use super::{
    BalloonError, ByteSize, ConsoleConfig, ConsoleError, CpusConfig, CpusError, DeviceError,
    DiskError, FileError, FsError, GenericVhostUserError, IdAllocator, IdError, MemoryConfig,
    MemoryError, MemoryZoneConfig, NetError, NumaConfig, NumaError, PayloadError, PlaceError,
    PlatformError, PmemError, RngError, ValidBalloon, ValidConsole, ValidDevice, ValidDisk,
    ValidFs, ValidGenericVhostUser, ValidNet, ValidPmem, ValidRng, ValidVsock, VcpusOutOfLimits,
    VirtioConsoleConfig, VmConfig, VsockError, ZoneError, numa, topology,
};

/// Name of the zone that `--memory size=` stands for.
pub const DEFAULT_ZONE_ID: &str = "mem0";

/// A configuration that contradicts itself or asks for what is not built.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The vCPUs.
    #[error(transparent)]
    Cpus(#[from] CpusError),
    /// RAM as a whole, or a setting that zones share with it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// One zone, or two of them.
    #[error(transparent)]
    Zone(#[from] ZoneError),
    /// The NUMA nodes.
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// What to boot.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The machine as a whole.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The virtio console, or both consoles.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The random number generator.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// A device that another process serves.
    #[error(transparent)]
    GenericVhostUser(#[from] GenericVhostUserError),
    /// A directory of the host.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// Sockets between guest and host.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A passed-through device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A zone's name that something else has.
    #[error(transparent)]
    Id(#[from] IdError),
    /// Two devices in one place.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Two users of the same bytes.
    #[error(transparent)]
    File(Box<FileError>),
}

impl ConfigError {
    /// Whether it is what somebody else has: a name, or a function of the host.
    pub fn is_taken(&self) -> bool {
        let id = match self {
            Self::Device(DeviceError::Twice { .. }) => return true,
            Self::Console(ConsoleError::Id(id))
            | Self::Disk(DiskError::Id(id))
            | Self::Net(NetError::Id(id))
            | Self::Rng(RngError::Id(id))
            | Self::GenericVhostUser(GenericVhostUserError::Id(id))
            | Self::Fs(FsError::Id(id))
            | Self::Pmem(PmemError::Id(id))
            | Self::Vsock(VsockError::Id(id))
            | Self::Balloon(BalloonError::Id(id))
            | Self::Device(DeviceError::Id(id))
            | Self::Id(id) => id,
            _ => return false,
        };
        matches!(id, IdError::Duplicate { .. })
    }
}

impl From<FileError> for ConfigError {
    fn from(error: FileError) -> Self {
        Self::File(Box::new(error))
    }
}

/// A checked configuration; made by [`VmConfig::validate`] only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidConfig {
    config: VmConfig,
    kernel: PathBuf,
    zones: Vec<ZoneSpec>,
    devices: Devices,
    ids: IdAllocator,
}

/// One piece of guest RAM, resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneSpec {
    /// The zone's name.
    pub id: String,
    /// What backs it.
    pub backing: Backing,
    /// Whether every page is faulted in before the guest starts.
    pub prefault: bool,
    /// The host NUMA node to take the memory from.
    pub host_numa_node: Option<u32>,
    /// Whether passed-through devices can reach it; `None` is yes, unless it can't or shouldn't be pinned.
    pub dma: Option<bool>,
}

/// What backs a zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// The host's own memory in base pages.
    Anonymous {
        /// Size in bytes, whole pages.
        size: ByteSize,
        /// Whether another process can map it (a memfd).
        shared: bool,
        /// Whether the host may use transparent huge pages.
        thp: bool,
    },
    /// The host's reserved huge pages.
    HugeTlb {
        /// Size in bytes; a multiple of `page` when that is not the host's default.
        size: ByteSize,
        /// Whether another process can map it (a memfd).
        shared: bool,
        /// Which huge pages.
        page: HugePageSize,
    },
    /// A range of some device of a pool of the host.
    Pool {
        /// The pool's name.
        pool: String,
        /// Size in bytes, whole pages.
        size: ByteSize,
    },
    /// A device-dax device or a file.
    File {
        /// The path as given.
        path: PathBuf,
        /// Where the zone begins in it, whole pages.
        offset: ByteSize,
        /// Size in bytes, whole pages; `None` is up to the end.
        size: Option<ByteSize>,
        /// Whether sharing was asked for (`Some(true)`), refused (`Some(false)`) or left open.
        shared: Option<bool>,
    },
}

impl Backing {
    /// Size in bytes; `None` is as much as the file has.
    pub fn size(&self) -> Option<ByteSize> {
        match self {
            Self::Anonymous { size, .. } | Self::HugeTlb { size, .. } | Self::Pool { size, .. } => {
                Some(*size)
            }
            Self::File { size, .. } => *size,
        }
    }
}

/// Size of the host's huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePageSize {
    /// The size the host has as its default.
    HostDefault,
    /// 2 MiB.
    TwoMiB,
    /// 1 GiB.
    OneGiB,
}

impl HugePageSize {
    /// The size in bytes; `None` when only the host knows.
    pub fn bytes(self) -> Option<ByteSize> {
        match self {
            Self::HostDefault => None,
            Self::TwoMiB => Some(ByteSize::from_mib(2)),
            Self::OneGiB => Some(ByteSize::from_mib(1024)),
        }
    }
}

impl VmConfig {
    /// Checks every rule that needs no host and resolves what was left to defaults.
    ///
    /// The configuration that comes with the result names every device's id, and the console if none was named.
    pub fn validate(mut self) -> Result<ValidConfig, ConfigError> {
        let kernel = self.payload.check()?;
        self.cpus.check()?;
        self.memory.check()?;
        let zones = zones(&self.memory)?;
        numa::check(&self.numa, &self.cpus, &self.memory)?;
        topology::check(&self.cpus, &self.numa).map_err(CpusError::from)?;
        self.platform.check()?;
        self.console
            .get_or_insert_with(|| VirtioConsoleConfig::beside(&self.serial));
        let mut ids = IdAllocator::default();
        ids.keep(self.ids_asked_for());
        for zone in &self.memory.zones {
            ids.take_named(&zone.flag(), &zone.id)?;
        }
        let devices = self.devices(&mut ids)?;
        if let (Some(balloon), Some(ram)) = (&self.balloon, total(&zones)) {
            balloon.check_ram(ram)?;
        }
        check_places(devices.places())?;
        files::check(&devices.file_uses(&zones))?;
        self.name(&devices);
        Ok(ValidConfig {
            config: self,
            kernel,
            zones,
            devices,
            ids,
        })
    }
}

/// RAM of the guest; `None` when a zone is as big as its file.
fn total(zones: &[ZoneSpec]) -> Option<ByteSize> {
    let mut bytes = 0_u64;
    for zone in zones {
        bytes = bytes.saturating_add(zone.backing.size()?.bytes());
    }
    Some(ByteSize::from_bytes(bytes))
}

impl ValidConfig {
    /// The configuration as asked for, with the ids that devices got.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The kernel to boot.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The initial RAM file system, if there is one.
    pub fn initramfs(&self) -> Option<&Path> {
        self.config.payload.initramfs.as_deref()
    }

    /// The kernel's command line; empty when none was given.
    pub fn cmdline(&self) -> &str {
        self.config.payload.cmdline.as_deref().unwrap_or_default()
    }

    /// The vCPUs: at least one, at most [`super::MAX_VCPUS`].
    pub fn cpus(&self) -> &CpusConfig {
        &self.config.cpus
    }

    /// Another number of vCPUs from now on, and whenever the guest starts anew.
    pub fn resize_cpus(&mut self, asked: u32) -> Result<(), VcpusOutOfLimits> {
        self.config.cpus = self.config.cpus.resized(asked)?;
        Ok(())
    }

    /// All guest RAM in guest order; never empty.
    pub fn zones(&self) -> &[ZoneSpec] {
        &self.zones
    }

    /// The guest's NUMA nodes; when there are any, every zone is in exactly one.
    pub fn numa(&self) -> &[NumaConfig] {
        &self.config.numa
    }

    /// The serial port.
    pub fn serial(&self) -> &ConsoleConfig {
        &self.config.serial
    }

    /// How many PCI segments there are: 1 to [`super::MAX_PCI_SEGMENTS`].
    pub fn segments(&self) -> u16 {
        self.config.platform.num_pci_segments
    }

    /// The virtio console, if there is one.
    pub fn console(&self) -> Option<&ValidConsole> {
        self.devices.console.as_ref()
    }

    /// The disks.
    pub fn disks(&self) -> &[ValidDisk] {
        &self.devices.disks
    }

    /// The network interfaces.
    pub fn net(&self) -> &[ValidNet] {
        &self.devices.net
    }

    /// The random number generator; every guest has it.
    pub fn rng(&self) -> &ValidRng {
        &self.devices.rng
    }

    /// Devices of whatever type that other processes serve.
    pub fn generic_vhost_user(&self) -> &[ValidGenericVhostUser] {
        &self.devices.generic_vhost_user
    }

    /// Directories of the host.
    pub fn fs(&self) -> &[ValidFs] {
        &self.devices.fs
    }

    /// Persistent memory.
    pub fn pmem(&self) -> &[ValidPmem] {
        &self.devices.pmem
    }

    /// Sockets between guest and host, if there are any.
    pub fn vsock(&self) -> Option<&ValidVsock> {
        self.devices.vsock.as_ref()
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&ValidBalloon> {
        self.devices.balloon.as_ref()
    }

    /// PCI functions of the host.
    pub fn passthrough(&self) -> &[ValidDevice] {
        &self.devices.passthrough
    }

    /// Which way passed-through devices reach memory; `None` is the machine's choice.
    pub fn iommufd(&self) -> Option<bool> {
        self.config.platform.iommufd
    }

    /// Whether passed-through devices reach each other's registers.
    pub fn vfio_p2p_dma(&self) -> bool {
        self.config.platform.vfio_p2p_dma
    }

    /// The ids in use, for the devices that come and go later.
    pub fn ids(&self) -> &IdAllocator {
        &self.ids
    }
}

fn zones(memory: &MemoryConfig) -> Result<Vec<ZoneSpec>, ConfigError> {
    if memory.zones.is_empty() {
        let host = HostMemory {
            flag: MemoryConfig::WORD.flag,
            size: memory.size,
            shared: memory.shared,
            hugepages: memory.hugepages,
            hugepage_size: memory.hugepage_size,
            thp: memory.thp,
        };
        return Ok(vec![ZoneSpec {
            id: DEFAULT_ZONE_ID.to_owned(),
            backing: host.backing()?,
            prefault: memory.prefault,
            host_numa_node: None,
            dma: None,
        }]);
    }
    memory
        .zones
        .iter()
        .enumerate()
        .map(|(at, zone)| {
            zone.check(at + 1)?;
            for earlier in &memory.zones[..at] {
                zone.check_against(earlier)?;
            }
            Ok(ZoneSpec {
                id: zone.id.clone(),
                backing: zone_backing(zone, memory.thp)?,
                prefault: zone.prefault,
                host_numa_node: zone.host_numa_node,
                dma: zone.dma,
            })
        })
        .collect()
}

fn zone_backing(zone: &MemoryZoneConfig, thp: bool) -> Result<Backing, ConfigError> {
    let flag = zone.flag();
    if zone.mergeable {
        return Err(MemoryError::Mergeable { flag }.into());
    }
    if let Some(size) = zone.size {
        check_pages(&flag, "size", size)?;
    }
    if let Some(path) = &zone.file {
        if let Some(size) = zone.hugepage_size {
            return Err(MemoryError::HugePageSizeAlone { flag, size }.into());
        }
        let offset = zone.offset.unwrap_or_default();
        check_pages(&flag, "offset", offset)?;
        return Ok(Backing::File {
            path: path.clone(),
            offset,
            size: zone.size,
            shared: zone.shared,
        });
    }
    let size = zone.size.ok_or_else(|| ZoneError::NoSize {
        id: zone.id.clone(),
    })?;
    if let Some(pool) = zone.pool.clone() {
        return Ok(Backing::Pool { pool, size });
    }
    let host = HostMemory {
        flag: &flag,
        size,
        shared: zone.shared.unwrap_or(false),
        hugepages: zone.hugepages,
        hugepage_size: zone.hugepage_size,
        thp,
    };
    Ok(host.backing()?)
}

/// What `--memory` and a zone without a file have in common.
struct HostMemory<'a> {
    flag: &'a str,
    size: ByteSize,
    shared: bool,
    hugepages: bool,
    hugepage_size: Option<ByteSize>,
    thp: bool,
}

impl HostMemory<'_> {
    fn backing(self) -> Result<Backing, MemoryError> {
        let Self {
            size, shared, thp, ..
        } = self;
        let page = huge_pages(self.flag, size, self.hugepages, self.hugepage_size)?;
        Ok(match page {
            Some(page) => Backing::HugeTlb { size, shared, page },
            None => Backing::Anonymous { size, shared, thp },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PayloadConfig, WordError, from_json};

    fn config(memory: Option<&str>, zones: &[&str]) -> VmConfig {
        VmConfig {
            memory: MemoryConfig::parse(memory, zones).unwrap(),
            payload: PayloadConfig {
                kernel: Some("/boot/vmlinuz".into()),
                ..PayloadConfig::default()
            },
            ..VmConfig::default()
        }
    }

    #[test]
    fn what_somebody_else_has_is_told_from_what_can_not_be() {
        for (words, taken) in [
            (
                r#""disks":[{"path":"/d","id":"a"},{"path":"/e","id":"a"}]"#,
                true,
            ),
            (
                r#""net":[{"id":"a"}],"pmem":[{"file":"/p","id":"a"}]"#,
                true,
            ),
            (r#""devices":[{"path":"/f"},{"path":"/f"}]"#, true),
            (
                r#""rng":{"src":"/r","id":"a"},"fs":[{"tag":"t","socket":"/s","id":"a"}]"#,
                true,
            ),
            (r#""disks":[{"path":"/d","id":"__a"}]"#, false),
            (r#""disks":[{"path":"/d"},{"path":"/d"}]"#, false),
            (r#""pmem":[{"file":"/p","pci_device_id":0}]"#, false),
        ] {
            let json = format!(r#"{{"payload":{{"kernel":"/k"}},{words}}}"#);
            let config: VmConfig = from_json(json.as_bytes()).unwrap();
            let error = config.validate().unwrap_err();
            assert_eq!(error.is_taken(), taken, "{json}: {error}");
        }
    }

    #[test]
    fn memory_without_zones_is_one_anonymous_zone() {
        let valid = config(None, &[]).validate().unwrap();
        assert_eq!(
            valid.zones(),
            [ZoneSpec {
                id: "mem0".into(),
                backing: Backing::Anonymous {
                    size: ByteSize::from_mib(512),
                    shared: false,
                    thp: true,
                },
                prefault: false,
                host_numa_node: None,
                dma: None,
            }]
        );
        assert_eq!(valid.kernel(), Path::new("/boot/vmlinuz"));
        assert_eq!((valid.initramfs(), valid.cmdline()), (None, ""));
        assert_eq!(valid.cpus().boot_vcpus, 1);
        assert_eq!(valid.serial(), &ConsoleConfig::Tty);
        assert!(valid.numa().is_empty());

        let valid = config(Some("size=1G,hugepages=on,shared=on,prefault=on"), &[]);
        let zone = valid.validate().unwrap().zones()[0].clone();
        assert!(zone.prefault);
        assert_eq!(
            zone.backing,
            Backing::HugeTlb {
                size: ByteSize::from_mib(1024),
                shared: true,
                page: HugePageSize::HostDefault,
            }
        );
    }

    #[test]
    fn each_zone_gets_the_backing_it_asks_for() {
        let valid = config(
            Some("size=0,thp=off"),
            &[
                "id=dax,file=/dev/dax0.0,offset=2M",
                "id=huge,size=2G,hugepages=on,hugepage_size=1G,shared=on",
                "id=anon,size=512M,host_numa_node=1,prefault=on",
                "id=pool,size=1G,pool=cxl",
            ],
        )
        .validate()
        .unwrap();
        let backings: Vec<&Backing> = valid.zones().iter().map(|zone| &zone.backing).collect();
        assert_eq!(
            backings,
            [
                &Backing::File {
                    path: "/dev/dax0.0".into(),
                    offset: ByteSize::from_mib(2),
                    size: None,
                    shared: None,
                },
                &Backing::HugeTlb {
                    size: ByteSize::from_mib(2048),
                    shared: true,
                    page: HugePageSize::OneGiB,
                },
                &Backing::Anonymous {
                    size: ByteSize::from_mib(512),
                    shared: false,
                    thp: false,
                },
                &Backing::Pool {
                    pool: "cxl".into(),
                    size: ByteSize::from_mib(1024),
                },
            ]
        );
        assert_eq!(valid.zones()[2].host_numa_node, Some(1));
        assert!(valid.zones()[2].prefault);
    }

    #[test]
    fn zones_are_checked_and_named() {
        for (zones, words) in [
            (&["id=a,size=1G", "id=a,size=1G"][..], "used for two zones"),
            (&["id=a"], "neither size= nor file="),
            (
                &["id=a,size=4097"],
                "--memory-zone id=a: size=4097 is not a multiple of 4K",
            ),
            (
                &["id=a,file=/d,offset=1"],
                "--memory-zone id=a: offset=1 is not a multiple of 4K",
            ),
            (
                &["id=a,pool=p,size=4097"],
                "--memory-zone id=a: size=4097 is not a multiple of 4K",
            ),
            (
                &["id=a,size=1G,mergeable=on"],
                "not supported by daxhund: --memory-zone id=a mergeable=on",
            ),
            (
                &["id=a,size=1G,hugepage_size=2M"],
                "id=a: hugepage_size=2M without hugepages=on",
            ),
            (
                &["id=a,file=/d,hugepage_size=2M"],
                "id=a: hugepage_size=2M without hugepages=on",
            ),
            (
                &["id=a,size=3M,hugepages=on,hugepage_size=2M"],
                "size=3M is not a multiple of 2M",
            ),
            (&["id=a,file=/d", "id=b,file=/d,offset=1G"], "overlap in /d"),
        ] {
            let error = config(None, zones).validate().unwrap_err();
            assert!(error.to_string().contains(words), "{zones:?}: {error}");
        }
    }

    #[test]
    fn every_part_is_checked() {
        let mut vm = config(None, &[]);
        vm.payload.kernel = None;
        assert!(matches!(
            vm.validate(),
            Err(ConfigError::Payload(PayloadError::NoKernel))
        ));

        let mut vm = config(None, &[]);
        vm.cpus.boot_vcpus = 0;
        assert!(matches!(
            vm.validate(),
            Err(ConfigError::Cpus(CpusError::NoVcpus))
        ));

        let vm = config(Some("size=0"), &[]);
        assert!(matches!(
            vm.validate(),
            Err(ConfigError::Memory(MemoryError::NoMemory))
        ));

        let mut vm = config(None, &[]);
        vm.numa = vec![NumaConfig::default()];
        assert!(matches!(
            vm.validate(),
            Err(ConfigError::Numa(NumaError::NoZones))
        ));
    }

    #[test]
    fn word_errors_are_values_that_can_be_compared() {
        let error = MemoryConfig::parse(Some("size=1X"), &[] as &[&str]).unwrap_err();
        assert!(matches!(error, WordError::Value { key: "size", ref value, .. } if value == "1X"));
    }
}

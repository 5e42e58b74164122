//! What a guest is asked to be: plain data, one type per command-line word.
//!
//! Each type is the whole truth about its word. The same fields are filled by the command line
//! (a table of keys beside the type), by JSON (serde, with Cloud Hypervisor's field names) and
//! printed by `--help`, so the three cannot drift apart.
//!
//! Invariants:
//! - A [`VmConfig`] is only what somebody wrote. [`VmConfig::validate`] is the one way to a
//!   [`ValidConfig`], which is the only thing a machine is built from.
//! - Nothing is ignored: an unknown key, a key given twice and a key that is not built yet are
//!   errors that name it. JSON comes in through [`from_json`], which takes a field that is not built
//!   while it asks for nothing.
//! - A device is checked by the `validate` of its own type, at start and when it is added to a
//!   running guest alike; it leaves with a `Valid` type and an id that nothing else has.
//!
//! Not done here: no file is opened and no device looked at. Whether `/dev/dax0.0` exists, how big
//! it is and whether the host has the huge pages is for those who open them.

#![forbid(unsafe_code)]

mod backend;
mod balloon;
mod console;
mod cpus;
mod device;
mod devices;
mod disk;
mod files;
mod fs;
mod generic_vhost_user;
mod host;
mod json;
mod keyvalue;
mod mac;
mod memory;
mod net;
mod numa;
#[cfg(test)]
mod orchestrators;
mod passthrough;
mod payload;
mod platform;
mod pmem;
mod queues;
mod removal;
mod rng;
mod schema;
mod size;
#[cfg(test)]
mod tests;
mod topology;
mod valid;
mod vsock;
mod zone;

pub use backend::{BackendError, VhostMode};
pub use balloon::{BalloonConfig, BalloonError, ValidBalloon};
pub use console::{
    ConsoleConfig, ConsoleError, ConsoleFieldsError, ValidConsole, VirtioConsoleConfig,
};
pub use cpus::{CpusConfig, CpusError, MAX_VCPUS, VcpusOutOfLimits};
pub use device::{DEVICES_PER_SEGMENT, IdAllocator, IdError, MAX_PCI_SEGMENTS, Place, PlaceError};
pub use disk::{
    DiskConfig, DiskError, DiskSource, ImageType, MAX_DISK_SERIAL, ValidDisk, ValidImage,
};
pub use files::{Extent, FileError};
pub use fs::{FsConfig, FsError, MAX_FS_TAG, ValidFs};
pub use generic_vhost_user::{
    GenericVhostUserConfig, GenericVhostUserError, MAX_DEVICE_TYPE, ValidGenericVhostUser,
};
pub use host::{HostConfig, HostConfigError, PoolConfig, RamConfig, UnknownPool, Zero};
pub use json::{JsonError, JsonObject, Shape, from_json};
pub use keyvalue::WordError;
pub(crate) use keyvalue::{Expected, Key, Value, Word};
pub use mac::{MacAddr, MacAddrError};
pub use memory::{DEFAULT_MEMORY_SIZE, HotplugMethod, MemoryConfig, MemoryError};
pub use net::{
    MAX_INTERFACE_NAME, MIN_MTU, NetConfig, NetError, NetSource, Offloads, Tap, ValidNet,
};
pub use numa::{MAX_NUMA_NODES, NumaConfig, NumaDistance, NumaError};
pub use passthrough::{DeviceConfig, DeviceError, DeviceSource, ValidDevice};
pub use payload::{PayloadConfig, PayloadError};
pub use platform::{PlatformConfig, PlatformError};
pub use pmem::{PmemConfig, PmemError, PmemSource, ValidPmem};
pub use queues::{MAX_QUEUE_SIZE, MAX_QUEUES, QueuesError};
pub use removal::{
    DEFAULT_REMOVAL_TIMEOUT, LONGEST_REMOVAL_TIMEOUT, OnLoss, OnRemoval, RemovalGuard,
    RemovalGuardError, RemovalTimeout, TimeoutTooLong,
};
pub use rng::{DEFAULT_RNG_SOURCE, RngConfig, RngError, ValidRng};
pub(crate) use schema::{NOT_BUILT, as_sent};
pub use size::ByteSize;
pub use topology::{CpuTopology, TopologyError};
pub use valid::{Backing, ConfigError, DEFAULT_ZONE_ID, HugePageSize, ValidConfig, ZoneSpec};
pub use vsock::{MAX_SOCKET_PATH, MIN_GUEST_CID, ValidVsock, VsockConfig, VsockError};
pub use zone::{MemoryZoneConfig, ZoneError};

use json::NotBuilt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Size of an x86-64 base page; every piece of guest memory is a multiple of it.
pub const PAGE_SIZE: u64 = 4096;

/// Everything one guest is made of, as asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct VmConfig {
    /// Virtual processors (`--cpus`).
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest RAM (`--memory` and `--memory-zone`).
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the guest boots (`--kernel`, `--initramfs`, `--cmdline`).
    pub payload: PayloadConfig,
    /// The 16550 serial port (`--serial`).
    #[serde(default = "ConsoleConfig::serial_json_default")]
    pub serial: ConsoleConfig,
    /// The virtio console (`--console`); absent is the VMM's terminal, unless the serial port has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<VirtioConsoleConfig>,
    /// Disks (`--disk`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces (`--net`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// The random number generator (`--rng`).
    #[serde(default)]
    pub rng: RngConfig,
    /// Devices of whatever type that another process serves (`--generic-vhost-user`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub generic_vhost_user: Vec<GenericVhostUserConfig>,
    /// Directories of the host (`--fs`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<FsConfig>,
    /// Persistent memory (`--pmem`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemConfig>,
    /// Sockets between guest and host (`--vsock`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory that the guest lends back (`--balloon`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// PCI functions of the host (`--device`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceConfig>,
    /// The machine as a whole (`--platform`).
    #[serde(default)]
    pub platform: PlatformConfig,
    /// Guest NUMA nodes (`--numa`); empty when the guest has no NUMA topology.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa: Vec<NumaConfig>,
}

impl JsonObject for VmConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::empty("rate_limit_groups"),
            NotBuilt::object(
                "debug_console",
                &[
                    NotBuilt::text("mode", "Off"),
                    NotBuilt::empty("file"),
                    NotBuilt::number("iobase", 0xe9),
                ],
            ),
            NotBuilt::empty("user_devices"),
            NotBuilt::empty("vdpa"),
            NotBuilt::presence("pvmemcontrol"),
            NotBuilt::switch("pvpanic", false),
            NotBuilt::switch("iommu", false),
            NotBuilt::switch("watchdog", false),
            NotBuilt::presence("rtc"),
            NotBuilt::switch("gdb", false),
            NotBuilt::empty("pci_segments"),
            NotBuilt::presence("tpm"),
            NotBuilt::switch("landlock_enable", false),
            NotBuilt::empty("landlock_rules"),
            NotBuilt::presence("ivshmem"),
        ],
        nested: &[
            ("cpus", CpusConfig::SHAPE),
            ("memory", MemoryConfig::SHAPE),
            ("payload", PayloadConfig::SHAPE),
            ("serial", ConsoleConfig::SHAPE),
            ("console", VirtioConsoleConfig::SHAPE),
            ("disks", DiskConfig::SHAPE),
            ("net", NetConfig::SHAPE),
            ("rng", RngConfig::SHAPE),
            ("generic_vhost_user", GenericVhostUserConfig::SHAPE),
            ("fs", FsConfig::SHAPE),
            ("pmem", PmemConfig::SHAPE),
            ("vsock", VsockConfig::SHAPE),
            ("balloon", BalloonConfig::SHAPE),
            ("devices", DeviceConfig::SHAPE),
            ("platform", PlatformConfig::SHAPE),
            ("numa", NumaConfig::SHAPE),
        ],
        ..Shape::WHOLE
    };
}

impl VmConfig {
    /// Takes a device out that can come and go; `false` when there is none of that name.
    pub fn remove_device(&mut self, id: &str) -> bool {
        let is = |other: &Option<String>| other.as_deref() == Some(id);
        let count = |this: &Self| {
            let served = this.disks.len() + this.net.len() + this.fs.len();
            let served = served + this.generic_vhost_user.len();
            served + this.pmem.len() + this.devices.len()
        };
        let before = count(self);
        self.disks.retain(|disk| !is(&disk.id));
        self.net.retain(|net| !is(&net.id));
        self.generic_vhost_user.retain(|device| !is(&device.id));
        self.fs.retain(|fs| !is(&fs.id));
        self.pmem.retain(|pmem| !is(&pmem.id));
        self.devices.retain(|device| !is(&device.id));
        let gone = before != count(self);
        let vsock = self.vsock.take_if(|vsock| is(&vsock.id)).is_some();
        gone || vsock
    }
}

/// What the command line has when nothing is said.
impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: PayloadConfig::default(),
            serial: ConsoleConfig::Tty,
            console: Some(VirtioConsoleConfig::default()),
            disks: Vec::new(),
            net: Vec::new(),
            rng: RngConfig::default(),
            generic_vhost_user: Vec::new(),
            fs: Vec::new(),
            pmem: Vec::new(),
            vsock: None,
            balloon: None,
            devices: Vec::new(),
            platform: PlatformConfig::default(),
            numa: Vec::new(),
        }
    }
}

/// For serde: a switch that is on unless said otherwise.
fn on() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_on(switch: &bool) -> bool {
    *switch
}

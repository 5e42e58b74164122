//! What sysfs says about one dax device and the region it was cut from.
//!
//! Facts are a snapshot: they are read once and never refreshed behind the caller's back. What only root may read
//! (`resource`, `mapping*`, a region's `align`) is optional. Field meanings: Documentation/ABI/testing/sysfs-bus-dax.
//!
//! A device's parent directory in the device tree is its region. For persistent memory the parent is also the nd
//! device that holds the namespace, so it tells where the page array lives.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::ser::{Serialize, SerializeStruct, Serializer};

use crate::sysfs::{Sysfs, SysfsError, parse_number};

/// A dax device's name: `dax<region>.<instance>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName {
    /// The region the device was cut from.
    pub region: u32,
    /// The device's number within the region.
    pub instance: u32,
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dax{}.{}", self.region, self.instance)
    }
}

/// The text is not `dax<region>.<instance>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a dax device name: expected dax<region>.<instance>, such as dax0.0")]
pub struct BadDeviceName;

impl FromStr for DeviceName {
    type Err = BadDeviceName;

    fn from_str(text: &str) -> Result<Self, BadDeviceName> {
        let (region, instance) = text
            .strip_prefix("dax")
            .and_then(|rest| rest.split_once('.'))
            .ok_or(BadDeviceName)?;
        let decimal = |digits: &str| digits.parse::<u32>().map_err(|_| BadDeviceName);
        let name = Self {
            region: decimal(region)?,
            instance: decimal(instance)?,
        };
        // "+1" and "01" parse but are nobody's name.
        if name.to_string() == text {
            Ok(name)
        } else {
            Err(BadDeviceName)
        }
    }
}

impl Serialize for DeviceName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A character device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct DeviceNumber {
    /// Names the driver's number range.
    pub major: u32,
    /// Names the device within it.
    pub minor: u32,
}

impl DeviceNumber {
    pub(crate) fn from_rdev(rdev: u64) -> Self {
        Self {
            major: rustix::fs::major(rdev),
            minor: rustix::fs::minor(rdev),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(Self {
            major: parse_number(major)?,
            minor: parse_number(minor)?,
        })
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The driver bound to a dax device.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// `device_dax`: the device can be opened and mapped.
    DeviceDax,
    /// `kmem`: the memory was given to the kernel's page allocator.
    Kmem,
    /// Some other driver, such as one for a file system.
    Other(String),
    /// No driver: opening the device fails with ENXIO.
    None,
}

impl Driver {
    fn named(name: Option<String>) -> Self {
        match name {
            None => Self::None,
            Some(name) => match name.as_str() {
                "device_dax" => Self::DeviceDax,
                "kmem" => Self::Kmem,
                _ => Self::Other(name),
            },
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DeviceDax => "device_dax",
            Self::Kmem => "kmem",
            Self::Other(name) => name,
            Self::None => "none",
        })
    }
}

/// The mode as `daxctl list` reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A device to map, or one that would be if it had a driver.
    Devdax,
    /// Memory of the kernel.
    SystemRam,
}

/// One contiguous physical range of a device; a device of a dynamic region can have several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysRange {
    /// Where the range begins within the device, in 4 KiB pages.
    pub page_offset: u64,
    /// The first host-physical address.
    pub start: u64,
    /// The last host-physical address (inclusive).
    pub end: u64,
}

impl PhysRange {
    /// The bytes in the range.
    pub fn size_bytes(&self) -> u64 {
        self.end.saturating_sub(self.start).saturating_add(1)
    }
}

/// `daxctl list -M`'s fields and names.
impl Serialize for PhysRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("PhysRange", 4)?;
        out.serialize_field("page_offset", &self.page_offset)?;
        out.serialize_field("start", &self.start)?;
        out.serialize_field("end", &self.end)?;
        out.serialize_field("size", &self.size_bytes())?;
        out.end()
    }
}

/// Where the page array of a persistent-memory device lives, in `ndctl list`'s words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MapLocation {
    /// In ordinary memory.
    Mem,
    /// On the device itself (altmap).
    Dev,
}

/// Whether devices of a region can be created, resized and deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionKind {
    /// One device whose bounds a namespace sets (persistent memory).
    Static,
    /// Devices come and go (soft-reserved memory, CXL).
    Dynamic {
        /// Bytes that no device has taken yet.
        available_size: u64,
    },
}

/// A dax region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionFacts {
    /// The region's id: X in daxX.Y.
    pub id: u32,
    /// Bytes in the region.
    pub size_bytes: u64,
    /// The region's alignment; readable by root only.
    pub align_bytes: Option<u64>,
    /// Static or dynamic.
    pub kind: RegionKind,
    /// The bus the region's device sits on: `nd`, `platform` (hmem), `cxl`.
    pub provider: Option<String>,
    /// The region's directory in sysfs, links resolved.
    pub path: PathBuf,
}

/// A dax device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The name, also of the node in /dev.
    pub name: DeviceName,
    /// The character device number.
    pub number: DeviceNumber,
    /// Bytes in the device; a fresh device of a dynamic region has none.
    pub size_bytes: u64,
    /// What every offset, length and address of a mapping must be a multiple of: 4K, 2M or 1G, a power of two.
    pub align_bytes: u64,
    /// The node the memory would be in if the kernel owned it.
    pub target_node: Option<u32>,
    /// The nearest node with CPUs.
    pub numa_node: Option<u32>,
    /// The first host-physical address; readable by root only.
    pub resource: Option<u64>,
    /// The physical ranges, by page offset; `None` when not permitted to read them.
    pub mappings: Option<Vec<PhysRange>>,
    /// The driver bound.
    pub driver: Driver,
    /// Whether the page array goes on the device when the kernel takes it as memory (Linux 6.8 and later).
    pub memmap_on_memory: Option<bool>,
    /// Where the page array is (persistent memory only).
    pub map: Option<MapLocation>,
    /// The namespace behind the device (persistent memory only).
    pub namespace: Option<String>,
    /// The region the device was cut from.
    pub region: RegionFacts,
    /// The device's directory in sysfs, links resolved.
    pub path: PathBuf,
}

impl DeviceFacts {
    /// The mode in daxctl's sense: a device without a driver counts as devdax (and `disabled`).
    pub fn mode(&self) -> Mode {
        if self.driver == Driver::Kmem {
            Mode::SystemRam
        } else {
            Mode::Devdax
        }
    }

    pub(crate) fn driver_of(device: &Sysfs) -> Result<Driver, SysfsError> {
        Ok(Driver::named(device.link_name("driver")?))
    }

    pub(crate) fn read(device: &Sysfs) -> Result<Self, SysfsError> {
        let device = device.resolve()?;
        let name = device
            .file_name()
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| SysfsError::Malformed {
                path: device.path().to_owned(),
                text: device.file_name().unwrap_or_default().to_owned(),
                expected: "a dax device name",
            })?;
        let parent = device.parent().unwrap_or_else(|| device.clone());
        Ok(Self {
            name,
            number: device.parsed("dev", "a device number", DeviceNumber::parse)?,
            size_bytes: device.number("size")?,
            align_bytes: device.parsed("align", ALIGN, parse_align)?,
            target_node: node(&device, "target_node")?,
            numa_node: node(&device, "numa_node")?,
            resource: Sysfs::optional(device.number("resource"))?,
            mappings: mappings(&device)?,
            driver: Self::driver_of(&device)?,
            memmap_on_memory: Sysfs::optional(device.parsed(
                "memmap_on_memory",
                "0 or 1",
                parse_flag,
            ))?,
            map: Sysfs::optional(device_map(&parent))?.flatten(),
            namespace: Sysfs::optional(parent.text("namespace"))?.filter(|name| !name.is_empty()),
            region: RegionFacts::read(&parent)?,
            path: device.path().to_owned(),
        })
    }
}

impl RegionFacts {
    fn read(dir: &Sysfs) -> Result<Self, SysfsError> {
        let region = dir.join("dax_region");
        let kind = match Sysfs::optional(region.number("available_size"))? {
            Some(available_size) => RegionKind::Dynamic { available_size },
            None => RegionKind::Static,
        };
        Ok(Self {
            id: region.number("id")?,
            size_bytes: region.number("size")?,
            align_bytes: Sysfs::optional(region.parsed("align", ALIGN, parse_align))?,
            kind,
            provider: dir.link_name("subsystem")?,
            path: dir.path().to_owned(),
        })
    }
}

const ALIGN: &str = "a power of two of at least 4096";

fn parse_align(text: &str) -> Option<u64> {
    parse_number(text).filter(|align: &u64| align.is_power_of_two() && *align >= 4096)
}

fn parse_flag(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// The kernel prints -1 for "no node" and hides `target_node` altogether when there is none.
fn node(device: &Sysfs, name: &str) -> Result<Option<u32>, SysfsError> {
    let node = Sysfs::optional(device.number::<i32>(name))?;
    Ok(node.and_then(|node| u32::try_from(node).ok()))
}

/// An nd dax device calls its page-array location `ram`, `pmem` or `none`.
fn device_map(parent: &Sysfs) -> Result<Option<MapLocation>, SysfsError> {
    parent.parsed("mode", "ram, pmem or none", |text| match text {
        "ram" => Some(Some(MapLocation::Mem)),
        "pmem" => Some(Some(MapLocation::Dev)),
        "none" => Some(None),
        _ => None,
    })
}

fn mappings(device: &Sysfs) -> Result<Option<Vec<PhysRange>>, SysfsError> {
    let is_range = |name: &String| {
        name.strip_prefix("mapping")
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
    };
    let mut ranges = Vec::new();
    for name in device.entries()?.into_iter().filter(is_range) {
        let dir = device.join(&name);
        let range = dir.number("start").and_then(|start| {
            Ok(PhysRange {
                page_offset: dir.number("page_offset")?,
                start,
                end: dir.number("end")?,
            })
        });
        match Sysfs::optional(range)? {
            Some(range) => ranges.push(range),
            None => return Ok(None),
        }
    }
    ranges.sort_by_key(|range| range.page_offset);
    Ok(Some(ranges))
}

/// `daxctl list -DM`'s fields first and under daxctl's names, then what daxctl does not show.
impl Serialize for DeviceFacts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("DeviceFacts", 15)?;
        out.serialize_field("chardev", &self.name)?;
        out.serialize_field("size", &self.size_bytes)?;
        match &self.target_node {
            Some(node) => out.serialize_field("target_node", node)?,
            None => out.skip_field("target_node")?,
        }
        out.serialize_field("align", &self.align_bytes)?;
        out.serialize_field("mode", &self.mode())?;
        if self.driver == Driver::None {
            out.serialize_field("state", "disabled")?;
        } else {
            out.skip_field("state")?;
        }
        match &self.mappings {
            Some(mappings) => out.serialize_field("mappings", mappings)?,
            None => out.skip_field("mappings")?,
        }
        out.serialize_field("driver", &self.driver.to_string())?;
        out.serialize_field("dev", &self.number.to_string())?;
        out.serialize_field("numa_node", &self.numa_node)?;
        out.serialize_field("resource", &self.resource)?;
        out.serialize_field("memmap_on_memory", &self.memmap_on_memory)?;
        out.serialize_field("map", &self.map)?;
        out.serialize_field("namespace", &self.namespace)?;
        out.serialize_field("region", &self.region)?;
        out.end()
    }
}

/// `daxctl list -R`'s fields and names, then the kind and the provider.
impl Serialize for RegionFacts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("RegionFacts", 7)?;
        out.serialize_field("path", &self.path)?;
        out.serialize_field("id", &self.id)?;
        out.serialize_field("size", &self.size_bytes)?;
        let kind = match &self.kind {
            RegionKind::Dynamic { available_size } => {
                out.serialize_field("available_size", available_size)?;
                "dynamic"
            }
            RegionKind::Static => {
                out.skip_field("available_size")?;
                "static"
            }
        };
        match &self.align_bytes {
            Some(align) => out.serialize_field("align", align)?,
            None => out.skip_field("align")?,
        }
        out.serialize_field("kind", kind)?;
        out.serialize_field("provider", &self.provider)?;
        out.end()
    }
}

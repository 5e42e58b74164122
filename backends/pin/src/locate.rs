//! From a path in sysfs to a PCI function that VFIO can lend to this process.
//!
//! VFIO answers a function it can't have with one of a few bare numbers. Here sysfs is asked first, so that each reason
//! has a name: whose it is, what its group is, and which command mends it.
//!
//! Reads only: no driver is bound or unbound. What is true now can be false at the next step, where the kernel decides;
//! `attach` names those refusals.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

use crate::address::PciAddress;
use crate::host::Host;

/// Base class of bridges.
const BRIDGE: u32 = 0x06;
/// Class of bridges from PCI to PCI: root ports, ports of switches.
const PCI_BRIDGE: u32 = 0x0604;

/// A function that shares an IOMMU group with another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sibling {
    /// Where it is.
    pub address: PciAddress,
    /// Its driver.
    pub driver: Option<String>,
}

/// A PCI function of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PciFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Its directory in sysfs, links resolved.
    pub sysfs_path: PathBuf,
    /// Number of its IOMMU group.
    pub group: u32,
    /// Its driver.
    pub driver: Option<String>,
    /// Its VFIO device file; `None`: the driver is not VFIO's, or the kernel has only groups.
    pub cdev: Option<PathBuf>,
    /// The other endpoints of its group; bridges from PCI to PCI are left out.
    pub siblings: Vec<Sibling>,
    /// Vendor.
    pub vendor_id: u16,
    /// Device.
    pub device_id: u16,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// NUMA node of the host, where it has one.
    pub numa_node: Option<u32>,
    /// Registered with VFIO.
    #[serde(skip)]
    pub is_vfio: bool,
}

/// A path that leads to no function that can be passed through.
#[derive(Debug, Error)]
pub enum LocateError {
    /// Nothing is there.
    #[error(
        "{} does not exist: `lspci -D` shows the PCI functions of this host, each is /sys/bus/pci/devices/ADDRESS",
        path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error(
        "{} is not a PCI function{}: name one as in /sys/bus/pci/devices/0000:01:00.0 (`lspci -D`)",
        path.display(), subsystem.as_ref().map(|name| format!(" but one of {name}")).unwrap_or_default()
    )]
    NotPci {
        /// The path.
        path: PathBuf,
        /// What the device belongs to, when it is one.
        subsystem: Option<String>,
    },
    /// A descriptor that is no VFIO device file.
    #[error(
        "file descriptor {fd} is not an open VFIO device file: hand over one of /dev/vfio/devices/vfioN (a device file \
         that came from a group can't be handed over)"
    )]
    NotCdev {
        /// The descriptor.
        fd: RawFd,
    },
    /// A bridge.
    #[error(
        "{address} is a bridge, which can't be passed through: name a function behind it (`lspci -D -t` shows the tree)"
    )]
    Bridge {
        /// Which function.
        address: PciAddress,
    },
    /// The IOMMU does not translate for it.
    #[error(
        "{address} has no IOMMU group: the host's IOMMU is off or does not reach it; switch VT-d or AMD-Vi on in the \
         firmware and boot Intel hosts with the kernel parameter intel_iommu=on (`dmesg | grep -e DMAR -e AMD-Vi` says \
         what was found)"
    )]
    NoGroup {
        /// Which function.
        address: PciAddress,
    },
    /// The host uses it.
    #[error("{address} is in use by the host's driver {driver}: {}", rebind(*address))]
    HostDriver {
        /// Which function.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// Nobody uses it, VFIO neither.
    #[error("{address} has no driver: {}", bind(*address))]
    NoDriver {
        /// Which function.
        address: PciAddress,
    },
    /// The host uses another function that the IOMMU can't tell from it.
    #[error(
        "{address} shares IOMMU group {group} with {}, which is in use by the host's driver {driver}: a group belongs to \
         the host or to guests as a whole; {}",
        sibling, rebind(*sibling)
    )]
    Sibling {
        /// Which function.
        address: PciAddress,
        /// Their group.
        group: u32,
        /// The other function.
        sibling: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// sysfs does not answer: the function may be on its way out.
    #[error("can't read {}", path.display())]
    Sysfs {
        /// What was read.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The commands that give a function with a driver to VFIO.
fn rebind(address: PciAddress) -> String {
    let dir = format!("/sys/bus/pci/devices/{address}");
    format!(
        "`driverctl set-override {address} vfio-pci`, or without driverctl `modprobe vfio-pci`, \
         `echo vfio-pci > {dir}/driver_override`, `echo {address} > {dir}/driver/unbind`, \
         `echo {address} > /sys/bus/pci/drivers_probe`"
    )
}

/// The commands that give a function without a driver to VFIO.
fn bind(address: PciAddress) -> String {
    format!(
        "`driverctl set-override {address} vfio-pci`, or without driverctl `modprobe vfio-pci`, \
         `echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override`, \
         `echo {address} > /sys/bus/pci/drivers_probe`"
    )
}

impl Host {
    /// A function that can be passed through. The path is its directory in sysfs, or a link to it.
    pub fn locate(&self, path: &Path) -> Result<PciFunction, LocateError> {
        let function = self.inspect(path)?;
        function.check()?;
        Ok(function)
    }

    /// The facts of a function, whoever has it.
    pub fn inspect(&self, path: &Path) -> Result<PciFunction, LocateError> {
        let dir = fs::canonicalize(path).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => LocateError::Missing {
                path: path.to_owned(),
            },
            _ => unread(path, source),
        })?;
        let not_pci = |subsystem| LocateError::NotPci {
            path: path.to_owned(),
            subsystem,
        };
        let subsystem = link_name(&dir, "subsystem")?;
        if subsystem.as_deref() != Some("pci") {
            return Err(not_pci(subsystem));
        }
        let name = dir.file_name().and_then(|name| name.to_str());
        let address: PciAddress = name
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| not_pci(None))?;
        let class = number(&dir, "class")?;
        if class >> 16 == BRIDGE {
            return Err(LocateError::Bridge { address });
        }
        let group = group_of(&dir, address)?;
        let driver = link_name(&dir, "driver")?;
        let vfio = vfio_device(&dir)?;
        Ok(PciFunction {
            address,
            group,
            is_vfio: vfio.is_some() || driver.as_deref().is_some_and(is_vfio_driver),
            driver,
            cdev: vfio
                .filter(|device| device.has_node)
                .map(|device| self.dev().join("vfio/devices").join(device.name)),
            siblings: siblings(&dir, address)?,
            vendor_id: number(&dir, "vendor")?.try_into().unwrap_or(u16::MAX),
            device_id: number(&dir, "device")?.try_into().unwrap_or(u16::MAX),
            class,
            numa_node: text(&dir, "numa_node").ok().and_then(|n| n.parse().ok()),
            sysfs_path: dir,
        })
    }

    /// The function whose VFIO device file is open.
    pub fn locate_fd(&self, fd: BorrowedFd<'_>) -> Result<PciFunction, LocateError> {
        let not_cdev = || LocateError::NotCdev { fd: fd.as_raw_fd() };
        let stat = rustix::fs::fstat(fd).map_err(|_| not_cdev())?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode)
            != rustix::fs::FileType::CharacterDevice
        {
            return Err(not_cdev());
        }
        let (major, minor) = (
            rustix::fs::major(stat.st_rdev),
            rustix::fs::minor(stat.st_rdev),
        );
        let link = self.sys().join(format!("dev/char/{major}:{minor}"));
        // DEVICE/vfio-dev/vfioN
        let node = fs::canonicalize(link).map_err(|_| not_cdev())?;
        let class = node.parent().ok_or_else(not_cdev)?;
        if class.file_name().is_none_or(|name| name != "vfio-dev") {
            return Err(not_cdev());
        }
        self.locate(class.parent().ok_or_else(not_cdev)?)
    }
}

impl PciFunction {
    /// Whether VFIO has the function and nothing of its group is the host's.
    pub fn check(&self) -> Result<(), LocateError> {
        let address = self.address;
        match &self.driver {
            _ if self.is_vfio => {}
            Some(driver) => {
                return Err(LocateError::HostDriver {
                    address,
                    driver: driver.clone(),
                });
            }
            None => return Err(LocateError::NoDriver { address }),
        }
        for sibling in &self.siblings {
            if let Some(driver) = sibling.driver.as_ref().filter(|name| !leaves_group(name)) {
                return Err(LocateError::Sibling {
                    address,
                    group: self.group,
                    sibling: sibling.address,
                    driver: driver.clone(),
                });
            }
        }
        Ok(())
    }
}

/// `vfio-pci` and its variants: `mlx5_vfio_pci`, `nvgrace-gpu-vfio-pci`.
fn is_vfio_driver(name: &str) -> bool {
    name.ends_with("vfio-pci") || name.ends_with("vfio_pci")
}

/// Drivers that never start a transfer, so that their function's group can still be a guest's.
fn leaves_group(driver: &str) -> bool {
    is_vfio_driver(driver) || matches!(driver, "pci-stub" | "pcieport")
}

fn group_of(dir: &Path, address: PciAddress) -> Result<u32, LocateError> {
    let Some(name) = link_name(dir, "iommu_group")? else {
        return Err(LocateError::NoGroup { address });
    };
    // VFIO without an IOMMU makes groups too; nothing is translated for them.
    if text(&dir.join("iommu_group"), "name").is_ok_and(|name| name == "vfio-noiommu") {
        return Err(LocateError::NoGroup { address });
    }
    name.parse().map_err(|_| {
        let path = dir.join("iommu_group");
        unread(&path, io::ErrorKind::InvalidData.into())
    })
}

/// The other endpoints of a function's group, in order of their addresses.
fn siblings(dir: &Path, address: PciAddress) -> Result<Vec<Sibling>, LocateError> {
    let members = dir.join("iommu_group/devices");
    let entries = fs::read_dir(&members).map_err(|source| unread(&members, source))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| unread(&members, source))?;
        // Members that are no PCI function have a name of another form.
        let name = entry.file_name();
        let Some(other) = name.to_str().and_then(|n| n.parse::<PciAddress>().ok()) else {
            continue;
        };
        if other == address || number(&entry.path(), "class")? >> 8 == PCI_BRIDGE {
            continue;
        }
        found.push(Sibling {
            address: other,
            driver: link_name(&entry.path(), "driver")?,
        });
    }
    found.sort_by_key(|sibling| sibling.address);
    Ok(found)
}

/// What VFIO made of a function.
struct VfioDevice {
    name: String,
    /// It has a device file of its own (`CONFIG_VFIO_DEVICE_CDEV`).
    has_node: bool,
}

fn vfio_device(dir: &Path) -> Result<Option<VfioDevice>, LocateError> {
    let class = dir.join("vfio-dev");
    let entries = match fs::read_dir(&class) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(unread(&class, source)),
    };
    let name = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with("vfio"));
    Ok(name.map(|name| VfioDevice {
        has_node: class.join(&name).join("dev").exists(),
        name,
    }))
}

/// The last component of a link; `None` without the link.
fn link_name(dir: &Path, name: &str) -> Result<Option<String>, LocateError> {
    let link = dir.join(name);
    match fs::read_link(&link) {
        Ok(target) => Ok(target
            .file_name()
            .map(|base| base.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(unread(&link, source)),
    }
}

fn text(dir: &Path, name: &str) -> Result<String, LocateError> {
    let path = dir.join(name);
    let text = fs::read_to_string(&path).map_err(|source| unread(&path, source))?;
    Ok(text.trim_end().to_owned())
}

/// A number that sysfs prints as `0x...`.
fn number(dir: &Path, name: &str) -> Result<u32, LocateError> {
    let text = text(dir, name)?;
    let digits = text
        .strip_prefix("0x")
        .map(|hex| u32::from_str_radix(hex, 16));
    match digits {
        Some(Ok(number)) => Ok(number),
        _ => Err(unread(&dir.join(name), io::ErrorKind::InvalidData.into())),
    }
}

fn unread(path: &Path, source: io::Error) -> LocateError {
    LocateError::Sysfs {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeFunction, FakeHost};
    use std::os::fd::AsFd;

    const NIC: &str = "0000:01:00.0";

    fn message(host: &FakeHost, address: &str) -> String {
        host.host()
            .locate(&host.path(address))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_function_of_vfio_is_described() {
        let fake = FakeHost::new();
        fake.add(
            &FakeFunction::vfio("0000:00:01.0", 5)
                .class(0x06_0400)
                .driver(Some("pcieport")),
        );
        fake.add(&FakeFunction::vfio(NIC, 5));
        let found = fake.host().locate(&fake.path(NIC)).unwrap();
        assert_eq!(found.address.to_string(), NIC);
        assert_eq!(
            (found.group, found.vendor_id, found.device_id),
            (5, 0x8086, 0x10d3)
        );
        assert_eq!((found.class, found.numa_node), (0x02_0000, Some(0)));
        assert_eq!(found.driver.as_deref(), Some("vfio-pci"));
        assert!(
            found
                .sysfs_path
                .ends_with("devices/pci0000:00/0000:01:00.0")
        );
        assert!(found.cdev.unwrap().ends_with("dev/vfio/devices/vfio5"));
        assert!(found.siblings.is_empty(), "the root port is no sibling");
    }

    #[test]
    fn the_path_can_be_any_that_leads_there() {
        let fake = FakeHost::new();
        let dir = fake.add(&FakeFunction::vfio(NIC, 5));
        assert_eq!(fake.host().locate(&dir).unwrap().address.to_string(), NIC);
        let slash = PathBuf::from(format!("{}/", dir.display()));
        fake.host().locate(&slash).unwrap();
    }

    #[test]
    fn a_kernel_with_groups_only_has_no_device_file() {
        let fake = FakeHost::new();
        let dir = fake.add(&FakeFunction::vfio(NIC, 5));
        fs::remove_file(dir.join("vfio-dev/vfio5/dev")).unwrap();
        assert_eq!(fake.host().locate(&dir).unwrap().cdev, None);
        fs::remove_dir_all(dir.join("vfio-dev")).unwrap();
        assert_eq!(fake.host().locate(&dir).unwrap().cdev, None);
    }

    #[test]
    fn what_is_no_pci_function_is_told_apart() {
        let fake = FakeHost::new();
        assert!(message(&fake, NIC).contains("does not exist: `lspci -D`"));
        let mdev = fake.add_other("mdev", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001");
        let error = fake.host().locate(&mdev).unwrap_err().to_string();
        assert!(
            error.contains("is not a PCI function but one of mdev"),
            "{error}"
        );
        let error = fake
            .host()
            .locate(Path::new("/etc"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/etc is not a PCI function: name one"),
            "{error}"
        );
    }

    #[test]
    fn a_bridge_is_refused() {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::vfio(NIC, 5).class(0x06_0400));
        let text = message(&fake, NIC);
        assert!(text.starts_with("0000:01:00.0 is a bridge"), "{text}");
    }

    #[test]
    fn without_a_group_the_iommu_is_named() {
        let fake = FakeHost::new();
        let dir = fake.add(&FakeFunction::vfio(NIC, 5));
        let group = fs::canonicalize(dir.join("iommu_group")).unwrap();
        fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
        assert!(message(&fake, NIC).contains("intel_iommu=on"));
        fs::remove_file(dir.join("iommu_group")).unwrap();
        assert!(message(&fake, NIC).contains("has no IOMMU group"));
    }

    #[test]
    fn a_host_s_driver_is_named_with_the_commands() {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::host(NIC, 5, "e1000e"));
        assert_eq!(
            message(&fake, NIC),
            "0000:01:00.0 is in use by the host's driver e1000e: `driverctl set-override 0000:01:00.0 vfio-pci`, or \
             without driverctl `modprobe vfio-pci`, `echo vfio-pci > \
             /sys/bus/pci/devices/0000:01:00.0/driver_override`, `echo 0000:01:00.0 > \
             /sys/bus/pci/devices/0000:01:00.0/driver/unbind`, `echo 0000:01:00.0 > /sys/bus/pci/drivers_probe`"
        );
        let inspected = fake.host().inspect(&fake.path(NIC)).unwrap();
        assert_eq!(inspected.driver.as_deref(), Some("e1000e"));
    }

    #[test]
    fn no_driver_needs_no_unbind() {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::host(NIC, 5, "e1000e").driver(None));
        let text = message(&fake, NIC);
        assert!(
            text.starts_with("0000:01:00.0 has no driver: `driverctl"),
            "{text}"
        );
        assert!(!text.contains("unbind"), "{text}");
    }

    #[test]
    fn a_sibling_of_the_host_is_named() {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::vfio(NIC, 5));
        fake.add(&FakeFunction::host("0000:01:00.1", 5, "snd_hda_intel"));
        let text = message(&fake, NIC);
        assert!(
            text.starts_with(
                "0000:01:00.0 shares IOMMU group 5 with 0000:01:00.1, which is in use by the host's driver snd_hda_intel"
            ),
            "{text}"
        );
        assert!(
            text.contains("`driverctl set-override 0000:01:00.1 vfio-pci`"),
            "{text}"
        );
    }

    #[test]
    fn siblings_that_leave_the_group_alone_are_fine() {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::vfio(NIC, 5));
        fake.add(&FakeFunction::vfio("0000:01:00.3", 5));
        fake.add(&FakeFunction::host("0000:01:00.1", 5, "pci-stub"));
        fake.add(&FakeFunction::host("0000:01:00.2", 5, "x").driver(None));
        fake.add(&FakeFunction::host("0000:02:00.0", 6, "nvme"));
        let found = fake.host().locate(&fake.path(NIC)).unwrap();
        let names: Vec<_> = found
            .siblings
            .iter()
            .map(|s| s.address.to_string())
            .collect();
        assert_eq!(names, ["0000:01:00.1", "0000:01:00.2", "0000:01:00.3"]);
    }

    #[test]
    fn variants_of_vfio_pci_are_vfio() {
        for driver in ["vfio-pci", "mlx5_vfio_pci", "nvgrace-gpu-vfio-pci"] {
            assert!(is_vfio_driver(driver));
        }
        for driver in ["vfio-platform", "e1000e", "vfio-pci-not"] {
            assert!(!is_vfio_driver(driver));
        }
        // Whatever its name, a driver that has registered the function with VFIO is one.
        let fake = FakeHost::new();
        fake.add(&FakeFunction::vfio(NIC, 5).driver(Some("acme-migrate")));
        fake.host().locate(&fake.path(NIC)).unwrap();
    }

    #[test]
    fn a_descriptor_leads_to_its_function() {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::vfio(NIC, 5));
        let node = fake.node_of(NIC);
        let found = fake.host().locate_fd(node.as_fd()).unwrap();
        assert_eq!(found.address.to_string(), NIC);
        let file = tempfile::tempfile().unwrap();
        let error = fake.host().locate_fd(file.as_fd()).unwrap_err();
        assert!(matches!(error, LocateError::NotCdev { .. }), "{error:?}");
        let null = fs::File::open("/dev/null").unwrap();
        fake.host().locate_fd(null.as_fd()).unwrap_err();
    }

    #[test]
    fn attributes_that_make_no_sense_are_named() {
        let fake = FakeHost::new();
        let dir = fake.add(&FakeFunction::vfio(NIC, 5));
        fs::write(dir.join("class"), "network\n").unwrap();
        assert!(message(&fake, NIC).ends_with("class"));
    }
}

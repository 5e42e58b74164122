//! Fakes for unit tests: a host in a temporary directory.
//!
//! A fake device file is a link to `/dev/zero`: a real character device that any user can open, made VFIO's by the fake
//! sysfs.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::host::Host;

pub(crate) struct FakeHost {
    root: TempDir,
}

/// A function to add to a [`FakeHost`].
pub(crate) struct FakeFunction {
    address: &'static str,
    group: u32,
    driver: Option<&'static str>,
    class: u32,
    vfio: bool,
}

impl FakeFunction {
    pub(crate) fn vfio(address: &'static str, group: u32) -> Self {
        Self {
            address,
            group,
            driver: Some("vfio-pci"),
            class: 0x02_0000,
            vfio: true,
        }
    }

    pub(crate) fn host(address: &'static str, group: u32, driver: &'static str) -> Self {
        Self {
            vfio: false,
            ..Self::vfio(address, group).driver(Some(driver))
        }
    }

    pub(crate) fn class(self, class: u32) -> Self {
        Self { class, ..self }
    }

    pub(crate) fn driver(self, driver: Option<&'static str>) -> Self {
        Self { driver, ..self }
    }
}

impl FakeHost {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("sys/dev/char")).unwrap();
        fs::create_dir_all(root.path().join("sys/bus/pci/devices")).unwrap();
        fs::create_dir_all(root.path().join("dev/vfio/devices")).unwrap();
        Self { root }
    }

    pub(crate) fn host(&self) -> Host {
        Host::at(self.sys(), self.root.path().join("dev"), "/proc")
    }

    fn sys(&self) -> PathBuf {
        self.root.path().join("sys")
    }

    /// The path by which a function is asked for.
    pub(crate) fn path(&self, address: &str) -> PathBuf {
        self.sys().join("bus/pci/devices").join(address)
    }

    /// Adds a function as the kernel shows it.
    pub(crate) fn add(&self, function: &FakeFunction) -> PathBuf {
        let sys = self.sys();
        let group = function.group.to_string();
        let dir = sys.join("devices/pci0000:00").join(function.address);
        let members = sys.join("kernel/iommu_groups").join(&group).join("devices");
        fs::create_dir_all(&dir).unwrap();
        fs::create_dir_all(&members).unwrap();
        write(&dir, "class", &format!("{:#08x}", function.class));
        write(&dir, "vendor", "0x8086");
        write(&dir, "device", "0x10d3");
        write(&dir, "numa_node", "0");
        link(&sys.join("bus/pci"), &dir.join("subsystem"));
        link(members.parent().unwrap(), &dir.join("iommu_group"));
        link(&dir, &members.join(function.address));
        link(&dir, &self.path(function.address));
        if let Some(driver) = function.driver {
            link(
                &sys.join("bus/pci/drivers").join(driver),
                &dir.join("driver"),
            );
        }
        if function.vfio {
            let name = format!("vfio{group}");
            let device = dir.join("vfio-dev").join(&name);
            fs::create_dir_all(&device).unwrap();
            write(&device, "dev", "1:5");
            link(&device, &sys.join("dev/char/1:5"));
            let node = self.root.path().join("dev/vfio/devices").join(name);
            link(Path::new("/dev/zero"), &node);
        }
        dir
    }

    /// Adds a device that is no PCI function.
    pub(crate) fn add_other(&self, bus: &str, name: &str) -> PathBuf {
        let dir = self.sys().join("devices/virtual").join(name);
        fs::create_dir_all(&dir).unwrap();
        link(&self.sys().join("bus").join(bus), &dir.join("subsystem"));
        dir
    }

    /// The open device file of a function.
    pub(crate) fn node_of(&self, address: &str) -> File {
        let cdev = self.host().inspect(&self.path(address)).unwrap().cdev;
        File::open(cdev.unwrap()).unwrap()
    }
}

fn write(dir: &Path, name: &str, text: &str) {
    fs::write(dir.join(name), format!("{text}\n")).unwrap();
}

fn link(target: &Path, link: &Path) {
    if fs::symlink_metadata(link).is_err() {
        symlink(target, link).unwrap();
    }
}

//! A fake host in a temporary directory, and fake answers of the kernel.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::report::Row;
use super::roots::{Daemon, Live, Roots};
use crate::config::HostConfig;
use crate::host_config::ReadError;
use crate::kvm::OpenError;

/// The only row of this check.
pub(super) fn row<'a>(rows: &'a [Row], check: &str) -> &'a Row {
    let found: Vec<_> = rows.iter().filter(|row| row.check == check).collect();
    let [row] = found[..] else {
        panic!("{} rows for {check} in {rows:#?}", found.len())
    };
    row
}

/// A kernel that lets every node that exists be opened, but for one.
pub(super) struct FakeLive {
    refused: Option<&'static str>,
    daemon: Daemon,
    /// The text of the host's configuration, if it has one.
    config: Option<String>,
}

impl FakeLive {
    pub(super) fn allowing() -> Self {
        Self {
            refused: None,
            daemon: Daemon::Answers,
            config: None,
        }
    }

    pub(super) fn refusing(node: &'static str) -> Self {
        Self {
            refused: Some(node),
            ..Self::allowing()
        }
    }

    pub(super) fn with_config(text: &str) -> Self {
        Self {
            config: Some(text.to_owned()),
            ..Self::allowing()
        }
    }

    pub(super) fn with_daemon(daemon: Daemon) -> Self {
        Self {
            daemon,
            ..Self::allowing()
        }
    }
}

impl Live for FakeLive {
    fn kvm(&self, node: &Path) -> Result<usize, OpenError> {
        let path = node.to_owned();
        if !node.exists() {
            Err(OpenError::Missing { path })
        } else if self.may_open(node) {
            Ok(1024)
        } else {
            Err(OpenError::NotPermitted {
                path,
                uid: 1000,
                owner: 0,
                group: 104,
                mode: 0o660,
            })
        }
    }

    fn may_open(&self, node: &Path) -> bool {
        node.exists() && !self.refused.is_some_and(|refused| node.ends_with(refused))
    }

    fn guard_daemon(&self) -> Daemon {
        self.daemon.clone()
    }

    fn host_config(&self) -> Result<HostConfig, ReadError> {
        match &self.config {
            None => Ok(HostConfig::default()),
            Some(text) => Ok(HostConfig::parse(Path::new("/c.toml"), text)?),
        }
    }
}

pub(super) struct FakeHost {
    _dir: TempDir,
    roots: Roots,
}

impl FakeHost {
    pub(super) fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            sys: dir.path().join("sys"),
            proc: dir.path().join("proc"),
            dev: dir.path().join("dev"),
        };
        for root in [&roots.sys, &roots.proc, &roots.dev] {
            fs::create_dir(root).unwrap();
        }
        Self { _dir: dir, roots }
    }

    /// KVM with nested paging, one 2M-aligned device of persistent memory, an IOMMU, one device bound to VFIO.
    pub(super) fn healthy() -> Self {
        let host = Self::empty();
        for node in ["kvm", "vfio/vfio", "vfio/7"] {
            write(&host.roots.dev.join(node), "");
        }
        host.write_sys("module/kvm_amd/parameters/npt", "Y");
        host.add_device("dax0.0", "devices/ndbus0/region0/dax0.0", "nd");
        host.write_sys("devices/ndbus0/region0/dax0.0/mode", "ram");
        host.write_sys("devices/ndbus0/region0/dax0.0/namespace", "namespace0.0");
        host.add_namespace("namespace0.0", "dax", 2 << 30);
        let node = |name: &str| format!("devices/system/node/{name}");
        host.write_sys(&node("node0/cpulist"), "0-1");
        host.write_sys(&node("node0/meminfo"), "Node 0 MemTotal:  8167424 kB");
        host.write_sys(&node("node1/cpulist"), "");
        host.write_sys(&node("node1/meminfo"), "Node 1 MemTotal:  2095104 kB");
        for (size, all, free) in [(2048, "64", "48"), (1_048_576, "0", "0")] {
            let dir = format!("kernel/mm/hugepages/hugepages-{size}kB");
            host.write_sys(&format!("{dir}/nr_hugepages"), all);
            host.write_sys(&format!("{dir}/free_hugepages"), free);
        }
        let thp = "kernel/mm/transparent_hugepage/enabled";
        host.write_sys(thp, "always [madvise] never");
        host.write_proc(
            "self/limits",
            "Max locked memory  unlimited  unlimited  bytes",
        );
        host.write_proc("self/status", "CapEff:\t0000000000000000");
        host.write_proc("interrupts", " 24:  1  IR-IO-APIC  5-edge  ACPI:Ged");
        host.write_sys("class/iommu/dmar0/version", "1:0");
        host.write_sys("kernel/iommu_groups/7/type", "DMA");
        let function = host.roots.sys.join("devices/pci0000:00/0000:01:00.0");
        fs::create_dir_all(&function).unwrap();
        let groups = host.roots.sys.join("kernel/iommu_groups/7");
        symlink(groups, function.join("iommu_group")).unwrap();
        host.link_sys(&function, "bus/pci/drivers/vfio-pci/0000:01:00.0");
        host
    }

    pub(super) fn roots(&self) -> &Roots {
        &self.roots
    }

    pub(super) fn write_sys(&self, path: &str, text: &str) {
        write(&self.roots.sys.join(path), text);
    }

    pub(super) fn write_proc(&self, path: &str, text: &str) {
        write(&self.roots.proc.join(path), text);
    }

    pub(super) fn remove_sys(&self, path: &str) {
        fs::remove_dir_all(self.roots.sys.join(path)).unwrap();
    }

    pub(super) fn remove_dev(&self, path: &str) {
        fs::remove_file(self.roots.dev.join(path)).unwrap();
    }

    /// A device of a dynamic region with free memory.
    pub(super) fn add_hmem(&self, name: &str) {
        let region = "devices/platform/hmem.1";
        self.add_device(name, region, "platform");
        let available = format!("{region}/dax_region/available_size");
        self.write_sys(&available, &(768_u64 << 20).to_string());
    }

    pub(super) fn add_namespace(&self, name: &str, mode: &str, size: u64) {
        self.write_sys(&format!("bus/nd/devices/{name}/mode"), mode);
        self.write_sys(&format!("bus/nd/devices/{name}/size"), &size.to_string());
    }

    pub(super) fn set_driver(&self, device: &str, driver: Option<&str>) {
        let link = self.device(device).join("driver");
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link).unwrap();
        }
        if let Some(driver) = driver {
            symlink(format!("../../bus/dax/drivers/{driver}"), link).unwrap();
        }
    }

    fn device(&self, name: &str) -> PathBuf {
        self.roots.sys.join("bus/dax/devices").join(name)
    }

    fn add_device(&self, name: &str, region: &str, provider: &str) {
        let size = (2046_u64 << 20).to_string();
        let (id, _) = name[3..].split_once('.').unwrap();
        for (attribute, value) in [
            ("dax_region/id", id),
            ("dax_region/size", &size),
            (&format!("{name}/dev"), "252:0"),
            (&format!("{name}/size"), &size),
            (&format!("{name}/align"), "2097152"),
            (&format!("{name}/numa_node"), "0"),
            (&format!("{name}/target_node"), "1"),
        ] {
            self.write_sys(&format!("{region}/{attribute}"), value);
        }
        let region = self.roots.sys.join(region);
        symlink(format!("/sys/bus/{provider}"), region.join("subsystem")).unwrap();
        self.link_sys(&region.join(name), &format!("bus/dax/devices/{name}"));
        self.set_driver(name, Some("device_dax"));
        write(&self.roots.dev.join(name), "");
    }

    fn link_sys(&self, target: &Path, link: &str) {
        let link = self.roots.sys.join(link);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(target, link).unwrap();
    }
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{text}\n")).unwrap();
}

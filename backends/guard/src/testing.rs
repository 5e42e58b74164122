//! A host in a temporary directory for unit tests: sysfs as Linux 6.12 has it, as far as the guard looks.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::host::Host;
use crate::lineage::Lineage;

pub(crate) struct FakeHost {
    root: TempDir,
    host: Host,
}

impl FakeHost {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = |name| root.path().join(name);
        for dir in ["sys/devices", "sys/bus", "dev", "proc"] {
            fs::create_dir_all(path(dir)).unwrap();
        }
        let host = Host::at(path("sys"), path("dev"), path("proc"));
        Self { root, host }
    }

    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    pub(crate) fn lineage(&self, device: &str) -> Lineage {
        Lineage::read(&self.host, &device.parse().unwrap()).unwrap()
    }

    pub(crate) fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn add_driver(&self, bus: &str, driver: &str) -> PathBuf {
        let unbind = self.write(&format!("sys/bus/{bus}/drivers/{driver}/unbind"), "");
        unbind.parent().unwrap().to_owned()
    }

    /// Gives a dax device the number of `/dev/zero`, which everybody can open.
    pub(crate) fn make_openable(&self, device: &str) {
        let link = self.host.sys().join("bus/dax/devices").join(device);
        fs::write(fs::canonicalize(link).unwrap().join("dev"), "1:5\n").unwrap();
    }

    /// A device at a path below `sys/devices`.
    fn add(&self, bus: &str, path: &str, driver: Option<&str>) -> PathBuf {
        let dir = self.root.path().join("sys/devices").join(path);
        fs::create_dir_all(&dir).unwrap();
        self.list(bus, &dir);
        if let Some(driver) = driver {
            symlink(self.add_driver(bus, driver), dir.join("driver")).unwrap();
        }
        dir
    }

    fn list(&self, bus: &str, dir: &Path) {
        let devices = self.root.path().join(format!("sys/bus/{bus}/devices"));
        fs::create_dir_all(&devices).unwrap();
        let link = devices.join(dir.file_name().unwrap());
        if !link.exists() {
            symlink(dir, link).unwrap();
        }
    }

    /// Device daxN.0 on namespaceN.0 of regionN.
    pub(crate) fn add_pmem(&self, n: u32) {
        let nfit = "LNXSYSTM:00/LNXSYBUS:00/ACPI0012:00";
        if !self.root.path().join("sys/devices").join(nfit).exists() {
            self.add("acpi", nfit, Some("nfit"));
            let bus = self.add("nd", &format!("{nfit}/ndbus0"), None);
            fs::write(bus.join("provider"), "ACPI.NFIT\n").unwrap();
        }
        let region = format!("{nfit}/ndbus0/region{n}");
        self.add("nd", &region, Some("nd_region"));
        self.add("nd", &format!("{region}/namespace{n}.0"), None);
        let nd_dax = self.add("nd", &format!("{region}/dax{n}.0"), Some("dax_pmem"));
        fs::write(nd_dax.join("namespace"), format!("namespace{n}.0\n")).unwrap();
        let dax = self.add(
            "dax",
            &format!("{region}/dax{n}.0/dax{n}.0"),
            Some("device_dax"),
        );
        fs::write(dax.join("dev"), format!("250:{n}\n")).unwrap();
    }

    /// Device dax5.0 on CXL region5: mem0 on 0000:35:00.0 behind decoder3.0 of endpoint3.
    pub(crate) fn add_cxl(&self) {
        let root = "platform/ACPI0017:00/root0";
        let decoder = self.add("cxl", &format!("{root}/decoder0.0"), None);
        fs::write(decoder.join("delete_region"), "").unwrap();
        let region = format!("{root}/decoder0.0/region5");
        let dir = self.add("cxl", &region, Some("cxl_region"));
        fs::write(dir.join("commit"), "1\n").unwrap();
        fs::write(dir.join("target0"), "decoder3.0\n").unwrap();
        let dax_region = self.add(
            "cxl",
            &format!("{region}/dax_region5"),
            Some("cxl_dax_region"),
        );
        fs::create_dir(dax_region.join("dax_region")).unwrap();
        fs::write(dax_region.join("dax_region/delete"), "").unwrap();
        let dax = self.add(
            "dax",
            &format!("{region}/dax_region5/dax5.0"),
            Some("device_dax"),
        );
        fs::write(dax.join("dev"), "250:5\n").unwrap();
        let card = self.add("pci", "pci0000:34/0000:35:00.0", Some("cxl_pci"));
        fs::write(card.join("remove"), "").unwrap();
        let memory = self.add("cxl", "pci0000:34/0000:35:00.0/mem0", Some("cxl_mem"));
        let port = self.add("cxl", &format!("{root}/port1/endpoint3"), Some("cxl_port"));
        symlink(memory, port.join("uport")).unwrap();
        self.add("cxl", &format!("{root}/port1/endpoint3/decoder3.0"), None);
    }
}

//! Fakes for unit tests: a host in a temporary directory, and a device whose memory is a file.
//!
//! A fake device's node is a link to `/dev/zero`: a real character device that any user can open and map, made a dax
//! device by the fake sysfs. Where contents or a vanishing device matter, a [`DeviceFile`] stands in: a file that
//! can be truncated under its mappings.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tempfile::{NamedTempFile, TempDir};

use crate::open::Shared;
use crate::{DaxDevice, DaxMapping, DeviceFacts, Host};

pub(crate) struct FakeHost {
    root: TempDir,
    dev: PathBuf,
}

/// A device to add to a [`FakeHost`].
pub(crate) struct FakeDevice {
    pub(crate) name: &'static str,
    pub(crate) driver: Option<&'static str>,
    pub(crate) region: Region,
}

pub(crate) enum Region {
    Nd,
    Hmem,
}

impl FakeDevice {
    pub(crate) fn pmem(name: &'static str) -> Self {
        Self {
            name,
            driver: Some("device_dax"),
            region: Region::Nd,
        }
    }

    pub(crate) fn hmem(name: &'static str) -> Self {
        Self {
            name,
            driver: Some("device_dax"),
            region: Region::Hmem,
        }
    }
}

impl FakeHost {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dev = root.path().join("dev");
        fs::create_dir_all(&dev).unwrap();
        fs::create_dir_all(root.path().join("sys/dev/char")).unwrap();
        Self { root, dev }
    }

    pub(crate) fn host(&self) -> Host {
        Host::at(self.sys(), self.dev(), "/proc")
    }

    pub(crate) fn sys(&self) -> PathBuf {
        self.root.path().join("sys")
    }

    pub(crate) fn dev(&self) -> &Path {
        &self.dev
    }

    /// Adds a device as the kernel shows it; the first one added is the one its node leads to.
    pub(crate) fn add(&self, device: &FakeDevice) -> PathBuf {
        let sys = self.sys();
        let (id, _) = device.name[3..].split_once('.').unwrap();
        let size: u64 = 2046 << 20;
        let (region, provider) = match device.region {
            Region::Nd => (
                sys.join(format!("devices/ndbus0/region{id}/dax{id}.0")),
                "nd",
            ),
            Region::Hmem => (sys.join(format!("devices/platform/hmem.{id}")), "platform"),
        };
        let nd_region = region.parent().unwrap().to_owned();
        let dir = region.join(device.name);
        let attributes = region.join("dax_region");
        for dir in [
            &dir.join("mapping0"),
            &attributes,
            &sys.join("bus/dax/devices"),
        ] {
            fs::create_dir_all(dir).unwrap();
        }
        write(&attributes, "id", id);
        write(&attributes, "size", &size.to_string());
        write(&attributes, "align", "2097152");
        link(&sys.join("bus").join(provider), &region.join("subsystem"));
        match device.region {
            Region::Nd => {
                link(&sys.join("bus/nd"), &nd_region.join("subsystem"));
                write(&nd_region, "uevent", "DEVTYPE=nd_pmem");
                write(&region, "mode", "ram");
                write(&region, "namespace", &format!("namespace{id}.0"));
            }
            Region::Hmem => write(&attributes, "available_size", &(768_u64 << 20).to_string()),
        }
        write(&dir, "dev", "1:5");
        write(&dir, "size", &size.to_string());
        write(&dir, "align", "2097152");
        write(&dir, "resource", "0x140200000");
        write(&dir, "target_node", "1");
        write(&dir, "numa_node", "0");
        write(&dir.join("mapping0"), "start", "0x140200000");
        write(&dir.join("mapping0"), "end", "0x1bfffffff");
        write(&dir.join("mapping0"), "page_offset", "0x0");
        link(&sys.join("bus/dax"), &dir.join("subsystem"));
        if let Some(driver) = device.driver {
            link(
                &sys.join("bus/dax/drivers").join(driver),
                &dir.join("driver"),
            );
        }
        link(&dir, &sys.join("bus/dax/devices").join(device.name));
        link(&dir, &sys.join("dev/char/1:5"));
        link(Path::new("/dev/zero"), &self.dev().join(device.name));
        dir
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

/// A file that plays the device, opened by several "processes" at once: each open has its own description.
pub(crate) struct DeviceFile {
    file: NamedTempFile,
    facts: DeviceFacts,
}

impl DeviceFile {
    pub(crate) fn new(len: u64) -> Self {
        Self::with_align(len, 4096)
    }

    pub(crate) fn with_align(len: u64, align: u64) -> Self {
        let host = FakeHost::new();
        host.add(&FakeDevice::pmem("dax0.0"));
        let mut facts = host.host().devices().unwrap().remove(0);
        facts.size_bytes = len;
        facts.align_bytes = align;
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        Self { file, facts }
    }

    pub(crate) fn on_node(mut self, node: u32) -> Self {
        self.facts.target_node = Some(node);
        self
    }

    pub(crate) fn open(&self) -> DaxDevice {
        let path = self.file.path().to_owned();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        DaxDevice::assemble(Shared {
            path,
            file: Arc::new(file),
            facts: self.facts.clone(),
            proc: "/proc".into(),
            claims: Mutex::default(),
            in_common: false,
            writable: true,
        })
    }

    /// As another process has it that was sent the descriptor.
    pub(crate) fn in_common_with(device: &DaxDevice) -> DaxDevice {
        let shared = device.shared();
        DaxDevice::assemble(Shared {
            path: shared.path.clone(),
            file: Arc::new(shared.file.try_clone().unwrap()),
            facts: shared.facts.clone(),
            proc: shared.proc.clone(),
            claims: Mutex::default(),
            in_common: true,
            writable: true,
        })
    }

    pub(crate) fn truncate(&self, len: u64) {
        self.file.as_file().set_len(len).unwrap();
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) {
        self.file.as_file().write_all_at(bytes, offset).unwrap();
    }

    /// Copies from the start of a mapping of this file.
    pub(crate) fn read_mapped(&self, mapping: &DaxMapping, bytes: &mut [u8]) {
        assert!(
            bytes.len() <= mapping.len() && mapping.facts().size_bytes == self.facts.size_bytes
        );
        for (index, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: the index is within the mapping, which outlives the read, and the file was not truncated.
            *byte = unsafe { mapping.as_ptr().wrapping_add(index).read_volatile() };
        }
    }
}

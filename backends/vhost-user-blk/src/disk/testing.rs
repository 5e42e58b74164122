//! Disks for tests: one in memory whose failures are asked for, and device-dax on a fake host.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use daxhund_dax::Host;
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use super::{DaxDisk, Disk, ID_LEN, OpenDaxError, serial};

/// A disk in memory.
#[derive(Debug)]
pub(crate) struct MemoryDisk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    /// What was asked of it beside reads.
    pub(crate) log: Mutex<Vec<&'static str>>,
    pub(crate) fails: bool,
    read_only: bool,
}

impl MemoryDisk {
    pub(crate) fn new(len: usize) -> Self {
        Self {
            bytes: Mutex::new(vec![0; len]),
            log: Mutex::default(),
            fails: false,
            read_only: false,
        }
    }

    pub(crate) fn read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }

    fn note(&self, what: &'static str) -> io::Result<()> {
        self.log.lock().unwrap().push(what);
        if self.fails {
            Err(io::Error::other("asked for"))
        } else {
            Ok(())
        }
    }
}

impl Disk for MemoryDisk {
    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn physical_block(&self) -> u32 {
        512
    }

    fn chunk(&self) -> usize {
        1024
    }

    fn serial(&self) -> [u8; ID_LEN] {
        serial("in memory")
    }

    fn read(&self, offset: u64, into: &[VolatileSlice<'_>], _: &mut [u8]) -> io::Result<()> {
        if self.fails {
            return Err(io::Error::other("asked for"));
        }
        let bytes = self.bytes.lock().unwrap();
        let at = usize::try_from(offset).unwrap();
        let len: usize = into.iter().map(VolatileSlice::len).sum();
        crate::serve::scatter(&bytes[at..at + len], into);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.note("write")?;
        let at = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note("zero")?;
        let (at, len) = (offset.try_into().unwrap(), usize::try_from(len).unwrap());
        let at: usize = at;
        self.bytes.lock().unwrap()[at..at + len].fill(0);
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        self.note("discard")
    }

    fn flush(&self) -> io::Result<()> {
        self.note("flush")
    }
}

/// A buffer as slices of these lengths, and one of what is left.
pub(crate) fn slices<'a>(memory: &'a mut [u8], lens: &[usize]) -> Vec<VolatileSlice<'a>> {
    let mut rest = VolatileSlice::from(memory);
    let mut parts = Vec::new();
    for len in lens {
        let len = (*len).min(rest.len());
        parts.push(rest.subslice(0, len).unwrap());
        rest = rest.offset(len).unwrap();
    }
    parts.push(rest);
    parts
}

/// A host with one device, whose node is a link to `/dev/zero`: a character device that anybody can map and lock. Memory
/// is each mapping's own, and there is none beyond the offset 0. All fakes have the one node, so there is one at a time.
pub(crate) struct FakeDax {
    root: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl FakeDax {
    pub(crate) fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        let region = sys.join("devices/ndbus0/region0/dax0.0");
        let device = region.join("dax0.0");
        let attributes = region.join("dax_region");
        for dir in [
            &device.join("mapping0"),
            &attributes,
            &sys.join("bus/dax/devices"),
            &sys.join("dev/char"),
            &root.path().join("dev"),
        ] {
            fs::create_dir_all(dir).unwrap();
        }
        let size = (64 << 20).to_string();
        for (dir, name, text) in [
            (&attributes, "id", "0"),
            (&attributes, "size", &size),
            (&attributes, "align", "2097152"),
            (&region, "mode", "ram"),
            (&region, "namespace", "namespace0.0"),
            (&device, "dev", "1:5"),
            (&device, "size", &size),
            (&device, "align", "2097152"),
            (&device, "resource", "0x140200000"),
            (&device, "target_node", "1"),
            (&device, "numa_node", "0"),
        ] {
            fs::write(dir.join(name), format!("{text}\n")).unwrap();
        }
        fs::write(
            sys.join("devices/ndbus0/region0/uevent"),
            "DEVTYPE=nd_pmem\n",
        )
        .unwrap();
        let domain = sys.join("devices/ndbus0/region0/persistence_domain");
        fs::write(domain, "memory_controller\n").unwrap();
        for (target, link) in [
            (sys.join("bus/nd"), region.join("subsystem")),
            (
                sys.join("bus/nd"),
                sys.join("devices/ndbus0/region0/subsystem"),
            ),
            (sys.join("bus/dax"), device.join("subsystem")),
            (
                sys.join("bus/dax/drivers/device_dax"),
                device.join("driver"),
            ),
            (device.clone(), sys.join("bus/dax/devices/dax0.0")),
            (device.clone(), sys.join("dev/char/1:5")),
            (
                Path::new("/dev/zero").to_owned(),
                root.path().join("dev/dax0.0"),
            ),
        ] {
            symlink(target, link).unwrap();
        }
        Self {
            root,
            _alone: alone,
        }
    }

    pub(crate) fn disk(
        &self,
        range: (Option<u64>, Option<u64>),
        read_only: bool,
    ) -> Result<DaxDisk, OpenDaxError> {
        let at = |name: &str| self.root.path().join(name);
        let host = Host::at(at("sys"), at("dev"), "/proc");
        DaxDisk::open(&host, &at("dev/dax0.0"), range, read_only)
    }
}

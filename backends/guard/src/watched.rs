//! The files of sysfs by which a held device can be taken away.
//!
//! Taking away means writing to one of them: the `unbind` of a driver that is bound to the device or to something it
//! stands on (removing a namespace, a region, or changing a device's mode all begin with that), or a file of such a
//! device by which it is removed. A file that threatens nothing that is held is not watched.
//!
//! Not watched: files that the kernel refuses to act on while a driver is bound (a dax device's `size` and `align`, a
//! namespace's `size`): unbinding comes first.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::lineage::{DeviceName, Lineage};

/// Files beside a device that take it away whatever is written: PCI, ACPI, a CXL region.
const OF_THE_DEVICE: [&str; 3] = ["remove", "eject", "commit"];
/// Files beside a device that take away the child whose name is written: a dax region, a CXL root decoder.
const OF_A_CHILD: [&str; 3] = ["delete", "dax_region/delete", "delete_region"];

/// How one learns what a writer to a file means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToldBy {
    /// The file is one device's.
    Path,
    /// The writer writes a name.
    Writer,
}

/// A file to watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WatchedFile {
    pub(crate) told_by: ToldBy,
    /// The held devices that a write can take away.
    pub(crate) threatens: Vec<DeviceName>,
}

/// Every file that threatens one of these devices.
pub(crate) fn watched<'a>(
    held: impl Iterator<Item = &'a Lineage>,
) -> BTreeMap<PathBuf, WatchedFile> {
    let mut files = BTreeMap::new();
    for lineage in held {
        for part in &lineage.parts {
            let beside = |name: &&str| part.dir.join(name);
            let unbind = part.driver.as_ref().map(|driver| driver.join("unbind"));
            let of_child = OF_A_CHILD.iter().map(beside);
            for path in unbind.into_iter().chain(of_child) {
                note(&mut files, &path, ToldBy::Writer, &lineage.device);
            }
            for path in OF_THE_DEVICE.iter().map(beside) {
                note(&mut files, &path, ToldBy::Path, &lineage.device);
            }
        }
    }
    files
}

fn note(
    files: &mut BTreeMap<PathBuf, WatchedFile>,
    path: &Path,
    told_by: ToldBy,
    device: &DeviceName,
) {
    if !path.is_file() {
        return;
    }
    let file = files.entry(path.to_owned()).or_insert(WatchedFile {
        told_by,
        threatens: Vec::new(),
    });
    if !file.threatens.contains(device) {
        file.threatens.push(device.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHost;

    fn relative(host: &FakeHost, files: &BTreeMap<PathBuf, WatchedFile>) -> Vec<String> {
        let sys = std::fs::canonicalize(host.host().sys()).unwrap();
        let name = |path: &PathBuf| path.strip_prefix(&sys).unwrap().display().to_string();
        files.keys().map(name).collect()
    }

    #[test]
    fn every_driver_below_a_device_is_watched_and_no_other() {
        let host = FakeHost::new();
        host.add_pmem(0);
        host.add_pmem(1);
        host.add_driver("dax", "kmem");
        let lineages = [host.lineage("dax0.0"), host.lineage("dax1.0")];
        let files = watched(lineages.iter());
        assert_eq!(
            relative(&host, &files),
            [
                "bus/acpi/drivers/nfit/unbind",
                "bus/dax/drivers/device_dax/unbind",
                "bus/nd/drivers/dax_pmem/unbind",
                "bus/nd/drivers/nd_region/unbind",
            ]
        );
        assert!(files.values().all(|file| file.threatens.len() == 2));
        let one = watched(lineages[1..].iter());
        assert!(one.values().all(|file| file.threatens.len() == 1));
    }

    #[test]
    fn cxl_regions_can_go_by_their_own_files() {
        let host = FakeHost::new();
        host.add_cxl();
        let files = watched([host.lineage("dax5.0")].iter());
        let names = relative(&host, &files);
        for end in [
            "decoder0.0/delete_region",
            "region5/commit",
            "dax_region5/dax_region/delete",
            "0000:35:00.0/remove",
            "drivers/cxl_mem/unbind",
            "drivers/cxl_pci/unbind",
            "drivers/hmem/unbind",
        ] {
            let found = names.iter().any(|name| name.ends_with(end));
            assert_eq!(found, end != "drivers/hmem/unbind", "{end}: {names:?}");
        }
    }

    #[test]
    fn with_nothing_held_nothing_is_watched() {
        assert!(watched([].iter()).is_empty());
    }
}

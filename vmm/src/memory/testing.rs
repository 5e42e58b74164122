//! A host with one dax device, for tests of who gets what of it.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use daxhund_dax::Host;
use tempfile::TempDir;

/// A device of 64M by 2M on node 1, and its node. `stand_in` is a character device that anybody may open, such as
/// `/dev/full`: its ranges can be locked, though not mapped, and locks on it are seen by every test that uses the same one.
pub(crate) fn dax_host(stand_in: &str) -> (TempDir, Host, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let (sys, dev) = (root.path().join("sys"), root.path().join("dev"));
    let parent = sys.join("devices/platform/hmem.0");
    let device = parent.join("dax0.0");
    let rdev = fs::metadata(stand_in).unwrap().rdev();
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let write = |path: PathBuf, text: &str| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    };
    let link = |target: &Path, link: PathBuf| {
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(target, link).unwrap();
    };
    write(device.join("dev"), &number);
    write(device.join("size"), &(64_u64 << 20).to_string());
    write(device.join("align"), &(2_u64 << 20).to_string());
    write(device.join("target_node"), "1");
    write(parent.join("dax_region/id"), "0");
    write(parent.join("dax_region/size"), &(64_u64 << 20).to_string());
    link(&sys.join("bus/dax"), device.join("subsystem"));
    let driver = sys.join("bus/dax/drivers/device_dax");
    link(&driver, device.join("driver"));
    link(&device, sys.join("dev/char").join(number));
    let node = dev.join("dax0.0");
    link(Path::new(stand_in), node.clone());
    (root, Host::at(sys, dev, "/proc"), node)
}

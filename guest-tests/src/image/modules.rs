//! Kernel modules in an image: which, in what order they load, and how they are found by name.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use super::tree::Tree;
use super::{ImageError, program, read};
use crate::command::output_of;
use crate::provision::Tools;
use crate::provision::cache::Cache;
use crate::provision::kernel::{Kernel, KernelError, Module};
use crate::provision::libraries;
use crate::share::Initramfs;

/// Modules of the emulated host, and their parameters, in order.
const HOST: [(&str, &str); 12] = [
    ("kvm_amd", "nested=1"),
    ("nfit", ""),
    ("nd_pmem", ""),
    ("device_dax", ""),
    ("dax_pmem", ""),
    ("kmem", ""),
    ("9p", ""),
    ("9pnet_virtio", ""),
    ("virtio_pci", ""),
    ("virtio_console", ""),
    ("tun", ""),
    ("hwpoison_inject", ""),
];
/// Modules of the emulated host that are there for those who load them.
const HOST_AT_HAND: [&str; 7] = [
    "crc32c_generic",
    "ext4",
    "brd",
    "vfio_pci",
    "vfio_iommu_type1",
    "nvme",
    "e1000e",
];
/// Modules that a kernel may lack: a debugging aid, what later kernels have as plain functions, and what the lab's own leaves out.
const OPTIONAL: [&str; 4] = ["hwpoison_inject", "crc32c_generic", "ahci", "sd_mod"];
/// Drivers of a guest's devices.
const GUEST_DEVICES: [&str; 9] = [
    "virtio_pci",
    "virtio_pmem",
    "nd_pmem",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtiofs",
];
/// More of them, whose names say less.
const GUEST_SOCKETS: [&str; 1] = ["vmw_vsock_virtio_transport"];
/// Drivers of what is passed through to a guest; there for guests with tools only, to keep the others small.
const GUEST_PASSED_THROUGH: [&str; 5] = ["nvme", "e1000e", "uio_pci_generic", "ahci", "sd_mod"];
/// A guest's file systems. They ask for the checksum by an alias, which nobody resolves in a guest without modprobe.
const GUEST_FILE_SYSTEMS: [&str; 3] = ["crc32c_generic", "ext4", "xfs"];
/// Where a guest's agent finds, under a module's name, the files to load for it, in order.
const GUEST_INDEX: &str = "etc/lab/modprobe";

/// What the lists above say, for the key of an image made with them.
pub(super) fn fingerprint() -> String {
    format!(
        "{HOST:?}{HOST_AT_HAND:?}{GUEST_DEVICES:?}{GUEST_SOCKETS:?}{GUEST_PASSED_THROUGH:?}{GUEST_FILE_SYSTEMS:?}"
    )
}

/// A module with what it depends on; nothing when the kernel may lack it and does.
fn with_dependencies(kernel: &Kernel, name: &str) -> Result<Vec<Module>, ImageError> {
    match kernel.modules(&[name]) {
        Err(KernelError::NoModule { .. }) if OPTIONAL.contains(&name) => Ok(Vec::new()),
        modules => Ok(modules?),
    }
}

/// Adds what a guest may load, and for each name the list of files that loading it takes. A module that the kernel has
/// built in has an empty list.
pub(super) fn add_for_guest(
    tree: &mut Tree,
    kernel: &Kernel,
    form: Initramfs,
) -> Result<(), ImageError> {
    let more: [&[&str]; 2] = match form {
        Initramfs::Plain => [&[], &[]],
        Initramfs::Tools => [&GUEST_FILE_SYSTEMS, &GUEST_PASSED_THROUGH],
    };
    for name in GUEST_DEVICES
        .iter()
        .chain(&GUEST_SOCKETS)
        .chain(more.into_iter().flatten())
    {
        let mut list = String::new();
        for module in with_dependencies(kernel, name)? {
            let file = format!("lib/modules/{}.ko", module.name);
            let _ = writeln!(list, "/{file}");
            tree.file(&file, 0o644, module.data);
        }
        tree.file(&format!("{GUEST_INDEX}/{name}"), 0o644, list.into());
    }
    Ok(())
}

/// Adds the host's modules, the order in which to load them, and the index that modprobe needs: for more of them, and to know what
/// is built in.
pub(super) fn add_for_host(
    tree: &mut Tree,
    cache: &Cache,
    tools: &Tools,
    kernel: &Kernel,
) -> Result<(), ImageError> {
    let root = format!("lib/modules/{}", kernel.release);
    let mut list = String::new();
    let scratch = cache.scratch()?;
    let directory = scratch.path().join(&root);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Read { path, source }
    };
    std::fs::create_dir_all(&directory).map_err(failed(&directory))?;
    let mut loaded = Vec::new();
    let at_hand = HOST_AT_HAND.map(|name| (name, ""));
    for (name, parameters) in HOST.into_iter().chain(at_hand) {
        for module in with_dependencies(kernel, name)? {
            if loaded.contains(&module.name) {
                continue;
            }
            let file = format!("{root}/{}.ko", module.name);
            let parameters = if module.name == name { parameters } else { "" };
            if !HOST_AT_HAND.contains(&name) {
                list.push_str(format!("/{file} {parameters}").trim_end());
                list.push('\n');
            }
            let path = scratch.path().join(&file);
            std::fs::write(&path, &module.data).map_err(failed(&path))?;
            tree.file(&file, 0o644, module.data);
            loaded.push(module.name);
        }
    }
    tree.file("etc/lab/modules", 0o644, list.into());
    let lists = kernel.built_in_lists()?;
    if loaded.is_empty() && lists.is_empty() {
        return Ok(());
    }
    for (name, data) in lists {
        let path = directory.join(name);
        std::fs::write(&path, data).map_err(failed(&path))?;
    }
    // depmod is one of kmod's names, and kmod knows which it is by how it is called.
    let depmod = scratch.path().join("depmod");
    let kmod = program(tools, "kmod")?;
    std::os::unix::fs::symlink(&kmod, &depmod).map_err(failed(&depmod))?;
    let mut command = Command::new(&depmod);
    command
        .env(
            "LD_LIBRARY_PATH",
            libraries::search_path(&kmod, &tools.roots)?,
        )
        .arg("-b")
        .arg(scratch.path())
        .arg(&kernel.release);
    output_of(&mut command)?;
    for entry in std::fs::read_dir(&directory)
        .map_err(failed(&directory))?
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("modules.") {
            tree.file(&format!("{root}/{name}"), 0o644, read(&entry.path())?);
        }
    }
    Ok(())
}

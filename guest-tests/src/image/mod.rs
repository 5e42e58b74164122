//! The initramfs of the emulated host and that of its guests.
//!
//! Both hold the agent as first process, busybox, and the C library of this machine, where the release binaries were
//! linked. The host's has the kernel's modules and the tools for persistent memory as well. Not compressed: a processor
//! that is emulated takes longer to decompress than to copy. Kept in the cache under a key of everything that goes in.

mod tree;

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::command::{CommandError, output_of, text_of};
use crate::provision::cache::{Cache, CacheError};
use crate::provision::kernel::{Kernel, KernelError};
use crate::provision::libraries::{self, LibraryError};
use crate::provision::{Provisioned, Tools};
use tree::{Tree, TreeError};

/// Counts changes of what an image holds that its inputs do not show.
const FORM: &str = "1";
/// Modules of the emulated host, and their parameters, in order.
const HOST_MODULES: [(&str, &str); 11] = [
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
    ("hwpoison_inject", ""),
];
/// Modules that are there for those who load them.
const MODULES_AT_HAND: [&str; 2] = ["crc32c_generic", "ext4"];
/// Modules that a kernel may lack.
const OPTIONAL_MODULES: [&str; 1] = ["hwpoison_inject"];
/// What release binaries link.
const RUNTIME: [&str; 4] = [
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
];
/// Where libraries go; the dynamic linker looks there unasked.
const LIBRARY_DIRECTORY: &str = "lib/x86_64-linux-gnu";
/// Names under which kmod does its work.
const KMOD_NAMES: [&str; 6] = ["depmod", "insmod", "lsmod", "modinfo", "modprobe", "rmmod"];
/// `root` and one user without rights, for tests of permissions.
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nlab:x:1000:1000::/tmp:/bin/sh\n";
const GROUP: &str = "root:x:0:\nlab:x:1000:\n";

/// An image that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program of the tools.
    #[error("the unpacked packages have no `{program}`")]
    NoProgram {
        /// The program.
        program: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Modules.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Libraries.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// A program of this machine.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The archive.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// First digits of the SHA-256 of byte strings, each with its length.
pub fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let mut text = String::new();
    for byte in hash.finalize().iter().take(8) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The emulated host's initramfs for a kernel.
pub fn host(
    provisioned: &Provisioned,
    kernel: &Kernel,
    agent: &Path,
) -> Result<PathBuf, ImageError> {
    let Provisioned { cache, tools, .. } = provisioned;
    let key = key(
        tools,
        agent,
        &[
            kernel.release.as_bytes(),
            kernel.vmlinux.as_os_str().as_encoded_bytes(),
        ],
    )?;
    let place = cache
        .path("images")
        .join(format!("host-{}-{key}.cpio", kernel.release));
    if !place.is_file() {
        let mut tree = base(tools, agent, "host", &["ndctl", "daxctl", "kmod"])?;
        for name in KMOD_NAMES {
            tree.link(&format!("sbin/{name}"), "/bin/kmod");
        }
        // ndctl wants to see the directory of its keys.
        tree.directory("etc/ndctl/keys");
        add_modules(&mut tree, cache, tools, kernel)?;
        cache.write(&place, &tree.archive()?)?;
    }
    Ok(place)
}

/// The guests' initramfs; the same for all kernels, as guests need no module.
pub fn guest(provisioned: &Provisioned, agent: &Path) -> Result<PathBuf, ImageError> {
    let Provisioned { cache, tools, .. } = provisioned;
    let place = cache
        .path("images")
        .join(format!("guest-{}.cpio", key(tools, agent, &[])?));
    if !place.is_file() {
        cache.write(&place, &base(tools, agent, "guest", &[])?.archive()?)?;
    }
    Ok(place)
}

fn key(tools: &Tools, agent: &Path, more: &[&[u8]]) -> Result<String, ImageError> {
    let packages = tools
        .packages
        .iter()
        .map(|package| format!("{}={} ", package.name, package.version));
    let packages: String = packages.collect();
    let modules = format!("{HOST_MODULES:?}{MODULES_AT_HAND:?}");
    let agent_data = read(agent)?;
    let mut parts: Vec<Vec<u8>> = vec![FORM.into(), packages.into(), modules.into(), agent_data];
    for path in libraries::closure(&[agent.to_owned()], &[])?.values() {
        parts.push(read(path)?);
    }
    let parts: Vec<&[u8]> = parts
        .iter()
        .map(Vec::as_slice)
        .chain(more.iter().copied())
        .collect();
    Ok(digest(&parts))
}

/// What both images hold.
fn base(
    tools: &Tools,
    agent: &Path,
    role: &str,
    programs: &[&'static str],
) -> Result<Tree, ImageError> {
    let mut tree = Tree::default();
    for directory in ["dev", "lab", "proc", "root", "run", "sys", "tmp", "usr/bin"] {
        tree.directory(directory);
    }
    // The kernel opens it for the first process before that can mount anything.
    tree.character_device("dev/console", 5, 1);
    tree.file("etc/lab/role", 0o644, role.into());
    tree.file("etc/passwd", 0o644, PASSWD.into());
    tree.file("etc/group", 0o644, GROUP.into());
    tree.file("etc/hosts", 0o644, "127.0.0.1 localhost lab\n".into());
    tree.file("init", 0o755, stripped(agent)?);

    let busybox = program(tools, "busybox")?;
    for applet in text_of(Command::new(&busybox).arg("--list"))?.lines() {
        tree.link(&format!("bin/{applet}"), "busybox");
    }
    tree.file("bin/busybox", 0o755, read(&busybox)?);
    let mut users = vec![agent.to_owned()];
    for name in programs {
        let path = program(tools, name)?;
        tree.file(&format!("bin/{name}"), 0o755, read(&path)?);
        users.push(path);
    }
    let mut libraries = libraries::closure(&users, &tools.roots)?;
    if role == "host" {
        for name in RUNTIME {
            libraries.insert(name.to_owned(), libraries::of_this_machine(name)?);
        }
    }
    for (name, path) in libraries {
        tree.file(&format!("{LIBRARY_DIRECTORY}/{name}"), 0o755, read(&path)?);
    }
    // Programs name the dynamic linker by this path.
    tree.link(
        "lib64/ld-linux-x86-64.so.2",
        &format!("/{LIBRARY_DIRECTORY}/ld-linux-x86-64.so.2"),
    );
    Ok(tree)
}

/// Adds the modules, the order in which to load them, and the index that modprobe needs for more.
fn add_modules(
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
    let at_hand = MODULES_AT_HAND.map(|name| (name, ""));
    for (name, parameters) in HOST_MODULES.into_iter().chain(at_hand) {
        let modules = match kernel.modules(&[name]) {
            Err(KernelError::NoModule { .. }) if OPTIONAL_MODULES.contains(&name) => continue,
            modules => modules?,
        };
        for module in modules {
            if loaded.contains(&module.name) {
                continue;
            }
            let file = format!("{root}/{}.ko", module.name);
            let parameters = if module.name == name { parameters } else { "" };
            if !MODULES_AT_HAND.contains(&name) {
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
    if loaded.is_empty() {
        return Ok(());
    }
    // depmod is one of kmod's names, and kmod knows which it is by how it is called.
    let depmod = scratch.path().join("depmod");
    let kmod = program(tools, "kmod")?;
    std::os::unix::fs::symlink(&kmod, &depmod).map_err(failed(&depmod))?;
    let libraries = libraries::closure(&[kmod], &tools.roots)?;
    let places: Vec<&Path> = libraries
        .values()
        .filter_map(|path| path.parent())
        .collect();
    let places = std::env::join_paths(places).unwrap_or_default();
    let mut command = Command::new(&depmod);
    command
        .env("LD_LIBRARY_PATH", places)
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

/// A program without its debugging information, which is most of it.
fn stripped(path: &Path) -> Result<Vec<u8>, ImageError> {
    let failed = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let place = tempfile::NamedTempFile::new().map_err(failed)?;
    output_of(Command::new("strip").arg("-o").arg(place.path()).arg(path))?;
    read(place.path())
}

fn program(tools: &Tools, program: &'static str) -> Result<PathBuf, ImageError> {
    tools
        .program(program)
        .ok_or(ImageError::NoProgram { program })
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    std::fs::read(path).map_err(|source| ImageError::Read {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_where_parts_end() {
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_eq!(digest(&[b"ab"]).len(), 16);
    }
}

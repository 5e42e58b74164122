//! The initramfs of the emulated host and that of its guests.
//!
//! All hold the agent as first process and busybox, and the libraries that their programs need; daxhund's own need none. The
//! host's has the kernel's modules and the tools for persistent memory as well. A guest's has the modules of its devices, which
//! the agent loads by name, and there is a larger form with file systems. Not compressed: a processor that is emulated takes
//! longer to decompress than to copy. Kept in the cache under a key of everything that goes in.

mod load;
mod modules;
mod tree;

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::command::{CommandError, output_of, text_of};
use crate::provision::cache::CacheError;
use crate::provision::kernel::{Kernel, KernelError};
use crate::provision::libraries::{self, LibraryError};
use crate::provision::{Provisioned, Tools};
use crate::share::Initramfs;
pub use load::load;
use tree::{Tree, TreeError};

/// Counts changes of what an image holds that its inputs do not show.
const FORM: &str = "4";
/// Where libraries go; the dynamic linker looks there unasked.
const LIBRARY_DIRECTORY: &str = "lib/x86_64-linux-gnu";
/// Programs that make a guest's file systems. Busybox's own makes one without a journal.
const FILE_SYSTEM_MAKERS: [&str; 2] = ["mkfs.ext4", "mkfs.xfs"];
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
    /// A file cannot be written.
    #[error("cannot write {path}")]
    Write {
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
    let key = key(tools, agent, kernel)?;
    let place = cache
        .path("images")
        .join(format!("host-{}-{key}.cpio", kernel.release));
    if !place.is_file() {
        let mut tree = base(tools, agent, "host", &["ndctl", "daxctl", "kmod"])?;
        for name in KMOD_NAMES {
            // In place of busybox's, which do not know what is built in; the kernel looks in the other directory.
            tree.link(&format!("bin/{name}"), "/bin/kmod");
            tree.link(&format!("sbin/{name}"), "/bin/kmod");
        }
        // ndctl wants to see the directory of its keys.
        tree.directory("etc/ndctl/keys");
        modules::add_for_host(&mut tree, cache, tools, kernel)?;
        cache.write(&place, &tree.archive()?)?;
    }
    Ok(place)
}

/// A guest's initramfs for a kernel.
pub fn guest(
    provisioned: &Provisioned,
    kernel: &Kernel,
    agent: &Path,
    form: Initramfs,
) -> Result<PathBuf, ImageError> {
    let Provisioned { cache, tools, .. } = provisioned;
    let key = key(tools, agent, kernel)?;
    let (name, programs): (&str, &[&'static str]) = match form {
        Initramfs::Plain => ("guest", &[]),
        Initramfs::Tools => ("guest-tools", &FILE_SYSTEM_MAKERS),
    };
    let place = cache
        .path("images")
        .join(format!("{name}-{}-{key}.cpio", kernel.release));
    if !place.is_file() {
        let mut tree = base(tools, agent, "guest", programs)?;
        modules::add_for_guest(&mut tree, kernel, form)?;
        cache.write(&place, &tree.archive()?)?;
    }
    Ok(place)
}

fn key(tools: &Tools, agent: &Path, kernel: &Kernel) -> Result<String, ImageError> {
    let packages = tools.versions();
    let modules = modules::fingerprint();
    let agent_data = read(agent)?;
    let mut parts: Vec<Vec<u8>> = vec![FORM.into(), packages.into(), modules.into(), agent_data];
    for path in libraries::closure(&[agent.to_owned()], &[])?.values() {
        parts.push(read(path)?);
    }
    parts.push(kernel.release.as_bytes().to_vec());
    parts.push(kernel.vmlinux.as_os_str().as_encoded_bytes().to_vec());
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
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
    for (name, path) in libraries::closure(&users, &tools.roots)? {
        tree.file(&format!("{LIBRARY_DIRECTORY}/{name}"), 0o755, read(&path)?);
    }
    // Programs name the dynamic linker by this path.
    tree.link(
        "lib64/ld-linux-x86-64.so.2",
        &format!("/{LIBRARY_DIRECTORY}/ld-linux-x86-64.so.2"),
    );
    Ok(tree)
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

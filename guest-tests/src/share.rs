//! What the emulated host sees, read-only, as `/lab`: binaries, the guests' kernels and the initramfs images for them.
//!
//! It does not change while a host runs, since the host caches it. Files are linked where that is possible, else copied.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::provision::Daemon;
use crate::provision::kernel::Kernel;
use crate::provision::libraries::{self, LibraryError};

/// The share cannot be prepared.
#[derive(Debug, thiserror::Error)]
#[error("cannot put {from} into {into}")]
pub struct ShareError {
    from: PathBuf,
    into: PathBuf,
    source: io::Error,
}

/// A program of somebody else's cannot be put there.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Its libraries.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
}

/// A form of a kernel's image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ImageForm {
    /// ELF with a PVH entry.
    Elf,
    /// As distributed.
    BzImage,
}

/// What a guest's initramfs holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Initramfs {
    /// The agent, busybox, and the modules for virtio devices.
    Plain,
    /// File systems as well: their modules and the programs that make them.
    Tools,
}

/// Path on the host of the disk with programs that keep a guest busy.
pub const LOAD_PATH: &str = "/lab/load.ext4";

/// Path on the host of a guest's initramfs for a kernel.
pub fn initramfs_path(release: &str, form: Initramfs) -> String {
    let name = match form {
        Initramfs::Plain => "guest.cpio",
        Initramfs::Tools => "guest-tools.cpio",
    };
    format!("/lab/kernels/{release}/{name}")
}

/// Path of a kernel's image on the host.
pub fn kernel_path(release: &str, form: ImageForm) -> String {
    let name = match form {
        ImageForm::Elf => "vmlinux",
        ImageForm::BzImage => "bzImage",
    };
    format!("/lab/kernels/{release}/{name}")
}

/// Puts everything into a directory that is made new.
pub fn prepare(
    directory: &Path,
    binaries: &BTreeMap<String, PathBuf>,
    kernels: &[Kernel],
    initramfs: &[(String, Initramfs, PathBuf)],
) -> Result<(), ShareError> {
    let mut files: Vec<(PathBuf, String)> = binaries
        .iter()
        .map(|(name, path)| (path.clone(), format!("bin/{name}")))
        .collect();
    for kernel in kernels {
        for (path, form) in [
            (&kernel.vmlinux, ImageForm::Elf),
            (&kernel.bzimage, ImageForm::BzImage),
        ] {
            let place = kernel_path(&kernel.release, form);
            files.push((path.clone(), place.trim_start_matches("/lab/").to_owned()));
        }
    }
    for (release, form, path) in initramfs {
        let place = initramfs_path(release, *form);
        files.push((path.clone(), place.trim_start_matches("/lab/").to_owned()));
    }
    for (from, name) in files {
        add(&from, &directory.join(name))?;
    }
    Ok(())
}

/// A program of somebody else's, with the libraries that it needs, in a directory of its own: `peers/NAME`. Gives whether it
/// needs any: they are in `lib` there. They come from the unpacked packages at `roots` first, then from this machine.
pub fn add_peer(
    share: &Path,
    name: &str,
    program: &Path,
    roots: &[PathBuf],
) -> Result<bool, PeerError> {
    let place = share.join("peers").join(name);
    add(
        program,
        &place.join(program.file_name().unwrap_or_default()),
    )?;
    add_libraries(&place, &[program.to_owned()], roots)
}

/// As [`add_peer`] for a program that loads drivers by itself: they are among the libraries, without the version in their names.
pub fn add_peer_with_drivers(
    share: &Path,
    name: &str,
    daemon: &Daemon<'_>,
) -> Result<(), PeerError> {
    let Daemon {
        program,
        drivers,
        roots,
    } = daemon;
    add_peer(share, name, program, roots)?;
    let place = share.join("peers").join(name);
    for driver in drivers {
        let file = driver.file_name().unwrap_or_default().to_string_lossy();
        let (stem, _) = file.split_once('.').unwrap_or((&file, ""));
        let into = place.join("lib").join(format!("{stem}.so"));
        add(driver, &into)?;
    }
    add_libraries(&place, drivers, roots)?;
    Ok(())
}

/// What these need, unless it is there. Gives whether they need any.
fn add_libraries(place: &Path, users: &[PathBuf], roots: &[PathBuf]) -> Result<bool, PeerError> {
    let needed = libraries::closure(users, roots)?;
    for (name, path) in &needed {
        let into = place.join("lib").join(name);
        if !into.exists() {
            add(path, &into)?;
        }
    }
    Ok(!needed.is_empty())
}

/// Adds one file.
pub fn add(from: &Path, into: &Path) -> Result<(), ShareError> {
    let failed = |source| ShareError {
        from: from.to_owned(),
        into: into.to_owned(),
        source,
    };
    if let Some(parent) = into.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    // The file itself, not a symbolic link to it, whose target the host does not see.
    let file = fs::canonicalize(from).map_err(failed)?;
    // Links do not cross file systems, and some have none.
    fs::hard_link(&file, into)
        .or_else(|_| fs::copy(&file, into).map(|_| ()))
        .map_err(failed)
}

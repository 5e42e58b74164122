//! A disk with programs that keep a guest busy: fio and stress-ng, with all the libraries they name.
//!
//! A guest mounts it read-only and changes its root to it, so that nothing but what is used is read. It is the same for every
//! kernel.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{ImageError, LIBRARY_DIRECTORY, digest, program, read};
use crate::command::output_of;
use crate::provision::Provisioned;
use crate::provision::libraries;

/// Counts changes of what the disk holds that its packages do not show.
const FORM: &str = "1";
const PROGRAMS: [&str; 2] = ["fio", "stress-ng"];
/// Where a guest puts its own file systems, and what is to be under test.
const MOUNT_POINTS: [&str; 6] = ["dev", "mnt", "proc", "run", "sys", "tmp"];
const LINKER: &str = "ld-linux-x86-64.so.2";
/// Room for the file system's own structures beside the files.
const ROOM_BYTES: u64 = 16 << 20;

/// The disk's image.
pub fn load(provisioned: &Provisioned) -> Result<PathBuf, ImageError> {
    let Provisioned {
        cache,
        tools,
        loads,
        ..
    } = provisioned;
    let key = digest(&[FORM.as_bytes(), loads.versions().as_bytes()]);
    let place = cache.path("images").join(format!("load-{key}.ext4"));
    if place.is_file() {
        return Ok(place);
    }
    let scratch = cache.scratch()?;
    let root = scratch.path().join("root");
    let mut bytes = ROOM_BYTES;
    for directory in MOUNT_POINTS.into_iter().chain(["bin", "lib64"]) {
        make_directory(&root.join(directory))?;
    }
    let libraries_here = root.join(LIBRARY_DIRECTORY);
    make_directory(&libraries_here)?;
    let mut users = Vec::new();
    for name in PROGRAMS {
        let path = program(loads, name)?;
        bytes += copy(&path, &root.join("bin").join(name))?;
        users.push(path);
    }
    for (name, path) in libraries::closure(&users, &loads.roots)? {
        bytes += copy(&path, &libraries_here.join(name))?;
    }
    let linker = format!("/{LIBRARY_DIRECTORY}/{LINKER}");
    let link = root.join("lib64").join(LINKER);
    symlink(linker, &link).map_err(|source| ImageError::Write { path: link, source })?;

    let image = scratch.path().join("image");
    let maker = program(tools, "mkfs.ext4")?;
    output_of(
        Command::new(&maker)
            .env(
                "LD_LIBRARY_PATH",
                libraries::search_path(&maker, &tools.roots)?,
            )
            .args(["-q", "-F", "-O", "^has_journal", "-d"])
            .arg(&root)
            .arg(&image)
            .arg(format!("{}k", bytes.div_ceil(1024))),
    )?;
    cache.keep(&image, &place)?;
    Ok(place)
}

fn make_directory(path: &Path) -> Result<(), ImageError> {
    std::fs::create_dir_all(path).map_err(|source| ImageError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Gives how much it is.
fn copy(from: &Path, into: &Path) -> Result<u64, ImageError> {
    let failed = |source| ImageError::Write {
        path: into.to_owned(),
        source,
    };
    let data = read(from)?;
    std::fs::write(into, &data).map_err(failed)?;
    std::fs::set_permissions(into, std::fs::Permissions::from_mode(0o755)).map_err(failed)?;
    Ok(data.len() as u64)
}

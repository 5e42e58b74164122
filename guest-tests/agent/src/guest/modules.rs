//! Loads kernel modules by name, from the lists that the initramfs brings: one for each name, the files to load in order.
//!
//! The kernel resolves no names by itself here, since there is no modprobe for it to call.

use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

const INDEX: &str = "/etc/lab/modprobe";

/// Loads a module and what it depends on; nothing is done for what is built in or loaded already.
pub(crate) fn load(name: &str) -> Result<(), String> {
    let list = fs::read_to_string(Path::new(INDEX).join(name)).map_err(|error| {
        format!(
            "this initramfs has no module {name}: {error}; it has {}",
            names()
        )
    })?;
    for path in list.lines() {
        let file = File::open(path).map_err(|error| format!("cannot open {path}: {error}"))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(format!("cannot load {path}: {error}")),
        }
    }
    Ok(())
}

fn names() -> String {
    let entries = fs::read_dir(INDEX).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.join(", ")
}

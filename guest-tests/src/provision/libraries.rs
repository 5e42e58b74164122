//! The shared libraries that programs need, found by what the programs say themselves.
//!
//! Read from the files, not asked of the dynamic linker: the programs are for the emulated host, and this machine
//! need not be able to run them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use goblin::elf::Elf;

/// Where this machine keeps libraries.
const SYSTEM: [&str; 5] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib",
];

/// A library that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no program or library.
    #[error("{path} is neither a program nor a library: {reason}")]
    NotElf {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Nowhere to be found.
    #[error("{user} needs {library}, which is in none of {places:?}")]
    Missing {
        /// The library.
        library: String,
        /// What needs it.
        user: PathBuf,
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },
}

/// What a program or library says that it needs; none for one that is linked statically.
pub fn needed_by(path: &Path) -> Result<Vec<String>, LibraryError> {
    let data = fs::read(path).map_err(|source| LibraryError::Read {
        path: path.to_owned(),
        source,
    })?;
    let elf = Elf::parse(&data).map_err(|error| LibraryError::NotElf {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(elf
        .libraries
        .iter()
        .map(|name| (*name).to_owned())
        .collect())
}

/// What `LD_LIBRARY_PATH` has to be for this machine to run a program of the packages at `roots`.
pub fn search_path(program: &Path, roots: &[PathBuf]) -> Result<OsString, LibraryError> {
    let libraries = closure(&[program.to_owned()], roots)?;
    let places: BTreeSet<&Path> = libraries
        .values()
        .filter_map(|path| path.parent())
        .collect();
    Ok(std::env::join_paths(places).unwrap_or_default())
}

/// All libraries that the programs need, by name: from the unpacked packages at `roots` first, then from this machine.
pub fn closure(
    programs: &[PathBuf],
    roots: &[PathBuf],
) -> Result<BTreeMap<String, PathBuf>, LibraryError> {
    let parts = [
        "usr/lib/x86_64-linux-gnu",
        "lib/x86_64-linux-gnu",
        "usr/lib",
        "lib",
    ];
    let mut places: Vec<PathBuf> = roots
        .iter()
        .flat_map(|root| parts.map(|part| root.join(part)))
        .collect();
    places.retain(|place| place.is_dir());
    // Some packages keep libraries of their own in a directory of their own.
    let own: Vec<PathBuf> = places
        .iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| path.is_dir())
        .collect();
    places.extend(own);
    places.extend(SYSTEM.map(PathBuf::from));
    let mut found = BTreeMap::new();
    let mut queue = programs.to_vec();
    while let Some(user) = queue.pop() {
        for library in needed_by(&user)? {
            if found.contains_key(&library) {
                continue;
            }
            let path = places
                .iter()
                .map(|place| place.join(&library))
                .find(|path| path.is_file())
                .ok_or_else(|| LibraryError::Missing {
                    library: library.clone(),
                    user: user.clone(),
                    places: places.clone(),
                })?;
            queue.push(path.clone());
            found.insert(library, path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_libraries_are_found() {
        let found = closure(&[PathBuf::from("/bin/sh")], &[]).unwrap();
        assert!(found.contains_key("libc.so.6"));
        assert!(
            found.contains_key("ld-linux-x86-64.so.2"),
            "libc.so.6 needs the dynamic linker: {found:?}"
        );
    }

    #[test]
    fn a_text_file_is_refused() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        assert!(matches!(
            needed_by(&manifest),
            Err(LibraryError::NotElf { .. })
        ));
    }
}

//! A directory tree in memory that becomes a cpio archive in the "newc" form, which Linux unpacks at boot.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc::{self, Builder, ModeFileType};

/// Inode numbers only have to differ.
const FIRST_INODE: u32 = 1;

/// An archive that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The format's sizes have 32 bits.
    #[error("{path} is too large for an initramfs: {bytes} bytes")]
    TooLarge {
        /// The file in the archive.
        path: String,
        /// Its size.
        bytes: usize,
    },
    /// Writing failed.
    #[error("cannot write {path} into the initramfs")]
    Write {
        /// The file in the archive.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// Paths have no leading slash; the directories above a path come by themselves. A later entry replaces an earlier one.
#[derive(Debug, Default)]
pub(super) struct Tree {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Directory,
    File { mode: u32, data: Vec<u8> },
    Link { target: String },
    Device { major: u32, minor: u32 },
}

impl Tree {
    pub(super) fn directory(&mut self, path: &str) {
        self.add(path, Entry::Directory);
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.add(path, Entry::File { mode, data });
    }

    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.add(
            path,
            Entry::Link {
                target: target.to_owned(),
            },
        );
    }

    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.add(path, Entry::Device { major, minor });
    }

    fn add(&mut self, path: &str, entry: Entry) {
        let above = Path::new(path)
            .ancestors()
            .skip(1)
            .filter_map(Path::to_str)
            .filter(|path| !path.is_empty());
        for directory in above {
            self.entries
                .entry(directory.to_owned())
                .or_insert(Entry::Directory);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// The archive. Sorted by path, so that a directory comes before what is in it.
    pub(super) fn archive(&self) -> Result<Vec<u8>, TreeError> {
        let mut archive = Vec::new();
        for (inode, (path, entry)) in (FIRST_INODE..).zip(&self.entries) {
            let (kind, mode, data) = match entry {
                Entry::Directory => (ModeFileType::Directory, 0o755, &[] as &[u8]),
                Entry::File { mode, data } => (ModeFileType::Regular, *mode, data.as_slice()),
                Entry::Link { target } => (ModeFileType::Symlink, 0o777, target.as_bytes()),
                Entry::Device { .. } => (ModeFileType::Char, 0o600, &[] as &[u8]),
            };
            let mut builder = Builder::new(path)
                .ino(inode)
                .mode(mode)
                .set_mode_file_type(kind)
                .nlink(1);
            if let Entry::Device { major, minor } = entry {
                builder = builder.rdev_major(*major).rdev_minor(*minor);
            }
            let size = u32::try_from(data.len()).map_err(|_| TreeError::TooLarge {
                path: path.clone(),
                bytes: data.len(),
            })?;
            let mut writer = builder.write(&mut archive, size);
            let written = writer
                .write_all(data)
                .and_then(|()| writer.finish().map(|_| ()));
            written.map_err(|source| TreeError::Write {
                path: path.clone(),
                source,
            })?;
        }
        newc::trailer(&mut archive).map_err(|source| TreeError::Write {
            path: "the end of the archive".to_owned(),
            source,
        })?;
        Ok(archive)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_archive_holds_the_tree_in_order() {
        let mut tree = Tree::default();
        tree.file("bin/sh", 0o755, b"#!".to_vec());
        tree.link("lib64/ld.so", "/lib/ld.so");
        tree.character_device("dev/console", 5, 1);
        let archive = tree.archive().unwrap();
        let mut rest: &[u8] = &archive;
        let mut seen = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut data = String::new();
            reader.read_to_string(&mut data).unwrap();
            let entry = reader.entry();
            seen.push((
                entry.name().to_owned(),
                entry.mode(),
                entry.rdev_major(),
                data,
            ));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("bin", 0o040_755, 0, ""),
            ("bin/sh", 0o100_755, 0, "#!"),
            ("dev", 0o040_755, 0, ""),
            ("dev/console", 0o020_600, 5, ""),
            ("lib64", 0o040_755, 0, ""),
            ("lib64/ld.so", 0o120_777, 0, "/lib/ld.so"),
        ];
        let expected = expected
            .map(|(name, mode, major, data)| (name.to_owned(), mode, major, data.to_owned()));
        assert_eq!(seen, expected);
    }
}

//! The initramfs file: whether it is whole as far as its formats tell, and bringing it into guest memory.
//!
//! An initramfs is a row of cpio archives and compressed streams (Documentation/driver-api/early-userspace/
//! buffer-format.rst). A "newc" archive tells where each of its files ends, an xz stream has a footer; gzip, zstd and
//! lz4 streams can be known to be cut only by unpacking them, which is left to the guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::memory::snapshot::Snapshot;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

/// An initramfs can't be used.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// The file can't be opened or read.
    #[error("initramfs {} can't be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not a file.
    #[error("initramfs {} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("initramfs {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A part is missing.
    #[error("initramfs {} is truncated: {what} should end at byte {promised}, the file has {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is cut.
        what: &'static str,
        /// Byte where it should end.
        promised: u64,
        /// Bytes there are.
        found: u64,
    },
    /// It is something else.
    #[error(
        "{} is not an initramfs: it begins with {magic:02x?}, which is neither a cpio archive nor compressed",
        path.display()
    )]
    NotAnInitramfs {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        magic: Vec<u8>,
    },
    /// Reading it into guest memory failed.
    #[error("initramfs {} can't be read into guest memory at {address:#x}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Guest-physical address.
        address: u64,
        /// What vm-memory says.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

const NEWC_MAGICS: [&[u8]; 2] = [b"070701", b"070702"];
/// Magic and thirteen fields of eight hexadecimal digits.
const NEWC_HEADER: usize = 110;
const NEWC_FILE_SIZE: usize = 54;
const NEWC_NAME_SIZE: usize = 94;
const NEWC_TRAILER: &[u8] = b"TRAILER!!!\0";
const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
const XZ_FOOTER: &[u8] = b"YZ";
/// gzip, bzip2, lzma, lzop, lz4, zstd: what kernels unpack besides xz (lib/decompress.c).
const COMPRESSED: [&[u8]; 6] = [
    b"\x1f\x8b",
    b"BZh",
    b"\x5d\0\0",
    b"\x89LZO",
    b"\x02\x21\x4c\x18",
    b"\x28\xb5\x2f\xfd",
];

/// An open, checked initramfs file.
#[derive(Debug)]
pub struct Initramfs {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Initramfs {
    /// Opens it and sees that it is one, and whole as far as that can be told.
    pub fn open(path: &Path) -> Result<Self, InitramfsError> {
        let path = path.to_owned();
        let failed = |source| InitramfsError::Io {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(InitramfsError::NotAFile { path });
        }
        if meta.len() == 0 {
            return Err(InitramfsError::Empty { path });
        }
        let initramfs = Self {
            path,
            file,
            len: meta.len(),
        };
        initramfs.check(&mut Window::of(&initramfs.file))?;
        Ok(initramfs)
    }

    /// Length of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn load(&mut self, memory: &Snapshot, address: u64) -> Result<(), InitramfsError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| InitramfsError::Load {
                path,
                address,
                source,
            }
        };
        io::Seek::rewind(&mut self.file).map_err(|source| InitramfsError::Io {
            path: self.path.clone(),
            source,
        })?;
        let len = usize::try_from(self.len)
            .map_err(|_| vm_memory::GuestMemoryError::InvalidBackendAddress)
            .map_err(failed(&self.path))?;
        memory
            .read_exact_volatile_from(GuestAddress(address), &mut self.file, len)
            .map_err(failed(&self.path))
    }

    fn check(&self, window: &mut Window<'_>) -> Result<(), InitramfsError> {
        let mut at = 0;
        while at < self.len {
            let head = self.bytes(window, at, NEWC_HEADER)?;
            if head.is_empty() {
                // Somebody has cut it since its length was read.
                return Err(InitramfsError::Truncated {
                    path: self.path.clone(),
                    what: "the file",
                    promised: self.len,
                    found: at,
                });
            }
            if NEWC_MAGICS.iter().any(|magic| head.starts_with(magic)) {
                at = self.check_archive(window, at)?;
            } else if head[0] == 0 {
                // Archives are padded with zeros, to 4 bytes or to a block.
                at += head.iter().take_while(|byte| **byte == 0).count() as u64;
                if at == self.len && head.len() as u64 == self.len {
                    return Err(InitramfsError::NotAnInitramfs {
                        path: self.path.clone(),
                        magic: head.to_vec(),
                    });
                }
            } else {
                let head = head.to_vec();
                return self.check_compressed(window, at, head);
            }
        }
        Ok(())
    }

    /// The compressed part is the last: only its own format tells where it ends.
    fn check_compressed(
        &self,
        window: &mut Window<'_>,
        at: u64,
        mut head: Vec<u8>,
    ) -> Result<(), InitramfsError> {
        if head.starts_with(XZ_MAGIC) {
            // Streams may be padded with zeros by fours.
            let tail = self.bytes(window, self.len.saturating_sub(64).max(at), 64)?;
            let padding = tail.iter().rev().take_while(|byte| **byte == 0).count();
            if !tail[..tail.len() - padding].ends_with(XZ_FOOTER) {
                return Err(self.truncated("an xz stream", self.len + 1));
            }
            return Ok(());
        }
        if COMPRESSED.iter().any(|magic| head.starts_with(magic)) {
            return Ok(());
        }
        head.truncate(8);
        Err(InitramfsError::NotAnInitramfs {
            path: self.path.clone(),
            magic: head,
        })
    }

    /// Returns where the archive that begins at `at` ends.
    fn check_archive(&self, window: &mut Window<'_>, mut at: u64) -> Result<u64, InitramfsError> {
        loop {
            let header = self.bytes(window, at, NEWC_HEADER + NEWC_TRAILER.len())?;
            let field = |offset: usize| {
                let digits = header
                    .get(offset..offset + 8)
                    .and_then(|d| std::str::from_utf8(d).ok());
                digits.and_then(|d| u64::from_str_radix(d, 16).ok())
            };
            let whole = header.len() >= NEWC_HEADER;
            let sizes = field(NEWC_NAME_SIZE).zip(field(NEWC_FILE_SIZE));
            let (Some((name_size, file_size)), true) = (sizes, whole) else {
                return Err(self.truncated("a cpio entry", at + NEWC_HEADER as u64));
            };
            // Name and data are each padded to 4 bytes, counted from the start of the header.
            let data = (at + NEWC_HEADER as u64 + name_size).next_multiple_of(4);
            let end = data + file_size;
            if end > self.len {
                return Err(self.truncated("a cpio entry", end));
            }
            if header[NEWC_HEADER..] == *NEWC_TRAILER && name_size == NEWC_TRAILER.len() as u64 {
                return Ok(end);
            }
            at = end.next_multiple_of(4);
        }
    }

    fn truncated(&self, what: &'static str, promised: u64) -> InitramfsError {
        InitramfsError::Truncated {
            path: self.path.clone(),
            what,
            promised,
            found: self.len,
        }
    }

    fn bytes<'a>(
        &self,
        window: &'a mut Window<'_>,
        at: u64,
        len: usize,
    ) -> Result<&'a [u8], InitramfsError> {
        window.bytes(at, len).map_err(|source| InitramfsError::Io {
            path: self.path.clone(),
            source,
        })
    }
}

/// How much of a file is read at once. The headers of small files are near each other, those of large ones far apart.
const WINDOW: usize = 16 << 10;

/// A file of which a piece is at hand.
struct Window<'a> {
    file: &'a File,
    start: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    fn of(file: &'a File) -> Self {
        Self {
            file,
            start: 0,
            bytes: Vec::new(),
        }
    }

    /// Up to `len` bytes from `at`, at most [`WINDOW`]; fewer at the end of the file.
    fn bytes(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        let there = |window: &Self| {
            let offset = usize::try_from(at.checked_sub(window.start)?).ok()?;
            (offset.checked_add(len)? <= window.bytes.len()).then_some(offset)
        };
        let offset = if let Some(offset) = there(self) {
            offset
        } else {
            self.fill(at)?;
            0
        };
        let rest = &self.bytes[offset..];
        Ok(&rest[..len.min(rest.len())])
    }

    fn fill(&mut self, at: u64) -> io::Result<()> {
        self.start = at;
        self.bytes.resize(WINDOW, 0);
        let mut filled = 0;
        while filled < WINDOW {
            match self
                .file
                .read_at(&mut self.bytes[filled..], at + filled as u64)
            {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.bytes.clear();
                    return Err(error);
                }
            }
        }
        self.bytes.truncate(filled);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn open(bytes: &[u8]) -> Result<Initramfs, InitramfsError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Initramfs::open(file.path())
    }

    fn entry(name: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = format!(
            "070701{:048x}{:08x}{:032x}{:08x}{:08x}",
            0,
            data.len(),
            0,
            name.len() + 1,
            0
        )
        .into_bytes();
        assert_eq!(bytes.len(), NEWC_HEADER);
        bytes.extend(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn archive() -> Vec<u8> {
        let mut bytes = entry("init", b"#!/bin/sh\n");
        bytes.extend(entry("data", &[7; 5000]));
        bytes.extend(entry("TRAILER!!!", b""));
        bytes
    }

    #[test]
    fn whole_archives_are_taken() {
        open(&archive()).unwrap();
        let mut padded = archive();
        padded.resize(padded.len().next_multiple_of(512), 0);
        padded.extend(archive());
        open(&padded).unwrap();
        padded.extend(b"\x1f\x8b rest of a gzip stream");
        open(&padded).unwrap();
    }

    #[test]
    fn an_archive_cut_anywhere_is_truncated() {
        let whole = archive();
        for len in [50, 112, 130, 2000, whole.len() - 130] {
            let error = open(&whole[..len]).unwrap_err();
            assert!(
                matches!(error, InitramfsError::Truncated { .. }),
                "{len}: {error}"
            );
        }
    }

    #[test]
    fn entries_are_found_wherever_a_window_ends() {
        let mut bytes = Vec::new();
        for size in (0..40).map(|index| index * 997 % (2 * WINDOW)) {
            bytes.extend(entry("some", &vec![1; size]));
        }
        assert!(bytes.len() > 8 * WINDOW);
        let cut = bytes.clone();
        bytes.extend(entry("TRAILER!!!", b""));
        open(&bytes).unwrap();
        assert!(matches!(open(&cut), Err(InitramfsError::Truncated { .. })));
    }

    #[test]
    fn a_file_that_was_cut_meanwhile_is_truncated() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&archive()).unwrap();
        let initramfs = Initramfs {
            path: PathBuf::new(),
            len: archive().len() as u64 + 512,
            file,
        };
        let outcome = initramfs.check(&mut Window::of(&initramfs.file));
        assert!(matches!(outcome, Err(InitramfsError::Truncated { .. })));
    }

    #[test]
    fn an_xz_stream_needs_its_footer() {
        open(b"\xfd7zXZ\0.......YZ\0\0\0\0").unwrap();
        assert!(matches!(
            open(b"\xfd7zXZ\0......."),
            Err(InitramfsError::Truncated { .. })
        ));
    }

    #[test]
    fn other_things_are_named() {
        assert!(matches!(open(b""), Err(InitramfsError::Empty { .. })));
        assert!(matches!(
            open(b"hello, world"),
            Err(InitramfsError::NotAnInitramfs { .. })
        ));
        assert!(matches!(
            open(&[0; 16]),
            Err(InitramfsError::NotAnInitramfs { .. })
        ));
        assert!(matches!(
            Initramfs::open(Path::new("/")),
            Err(InitramfsError::NotAFile { .. })
        ));
        assert!(matches!(
            Initramfs::open(Path::new("/nonexistent")),
            Err(InitramfsError::Io { .. })
        ));
    }
}

//! The kernel file: what it is, whether it is whole, and bringing it into guest memory.
//!
//! bzImage (64-bit boot protocol) and ELF (PVH entry where the file has one, else the 64-bit entry with a zero page,
//! as `vmlinux` takes it). The file is opened and checked before anything is built; a reboot loads it again.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{ByteValued, GuestAddress};

use super::place;
use crate::memory::snapshot::Snapshot;

/// A kernel can't be used.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file can't be opened or read.
    #[error("kernel {} can't be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not a file.
    #[error("kernel {} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It is something else.
    #[error(
        "{} is not an x86-64 kernel: it begins with {magic:02x?}; daxhund boots bzImage (vmlinuz) and ELF (vmlinux) files",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        magic: Vec<u8>,
    },
    /// It is a kernel, but not for this machine.
    #[error("kernel {} can't boot here: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is missing.
        reason: &'static str,
    },
    /// A part is missing.
    #[error("kernel {} is truncated: its header promises {promised} bytes, the file has {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes its header promises.
        promised: u64,
        /// Bytes there are.
        found: u64,
    },
    /// linux-loader refused, most often because guest memory is too small.
    #[error("kernel {} does not load", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
}

/// Offset of `struct setup_header` in a bzImage.
const SETUP_HEADER: u64 = 0x1f1;
const SETUP_HEADER_MAGIC: u32 = 0x5372_6448;
/// First protocol version with a 64-bit entry that is announced (`xloadflags`), Linux 3.8.
const PROTOCOL_XLOADFLAGS: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
const SECTOR: u64 = 512;
/// The 64-bit entry point is this far into the protected-mode code.
const ENTRY_64: u64 = 0x200;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const ELF_X86_64: u16 = 62;
const ELF_LOAD: u32 = 1;
const ELF_NOTE: u32 = 4;
/// Owner of the note with the PVH entry; notes of a kernel are a few hundred bytes.
const XEN_NOTE_OWNER: &[u8] = b"Xen\0";
const LONGEST_NOTES: u64 = 64 << 10;
/// First address of the upper canonical half.
const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;

/// Where the boot vCPU starts and by which protocol.
pub(super) enum Entry {
    Linux64 {
        entry: u64,
        header: Option<Box<setup_header>>,
    },
    Pvh {
        entry: u64,
    },
}

#[derive(Debug, Clone)]
enum Format {
    BzImage(Box<setup_header>),
    /// End of the highest segment in memory.
    Elf {
        end: u64,
    },
}

/// An open, checked kernel file.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    len: u64,
    format: Format,
}

impl Kernel {
    /// Opens it and sees that it is a whole kernel for this machine.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(KernelError::NotAFile {
                path: path.to_owned(),
            });
        }
        let mut kernel = Self {
            path: path.to_owned(),
            file,
            len: meta.len(),
            format: Format::Elf { end: 0 },
        };
        let mut magic = vec![0; 4];
        let read = kernel.read_at(0, &mut magic).map_err(failed)?;
        magic.truncate(read);
        kernel.format = if magic == ELF_MAGIC {
            kernel.check_elf()?
        } else {
            kernel.check_bzimage()?.ok_or(KernelError::NotAKernel {
                path: path.to_owned(),
                magic,
            })?
        };
        Ok(kernel)
    }

    /// Length of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// First address after everything the kernel uses before it has read the memory map.
    pub(super) fn end_in_memory(&self) -> u64 {
        match &self.format {
            Format::Elf { end } => *end,
            Format::BzImage(header) => {
                let loaded = place::HIGH_MEMORY + self.len;
                // It unpacks itself to its preferred address, or to where it was loaded if that is higher.
                loaded
                    .max(header.pref_address.max(place::HIGH_MEMORY) + u64::from(header.init_size))
            }
        }
    }

    /// First address the kernel does not take for an initramfs.
    pub(super) fn initramfs_limit(&self) -> u64 {
        match &self.format {
            Format::Elf { .. } => 1 << 32,
            Format::BzImage(header) => u64::from(header.initrd_addr_max) + 1,
        }
    }

    pub(super) fn load(&mut self, memory: &Snapshot) -> Result<Entry, KernelError> {
        let high_memory = GuestAddress(place::HIGH_MEMORY);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| KernelError::Load { path, source }
        };
        match &self.format {
            Format::BzImage(_) => {
                let loaded =
                    BzImage::load(memory, Some(high_memory), &mut self.file, Some(high_memory))
                        .map_err(failed(&self.path))?;
                Ok(Entry::Linux64 {
                    entry: loaded.kernel_load.0 + ENTRY_64,
                    header: loaded.setup_header.map(Box::new),
                })
            }
            Format::Elf { .. } => {
                let loaded =
                    Elf::load(memory, None, &mut self.file, None).map_err(failed(&self.path))?;
                Ok(match loaded.pvh_boot_cap {
                    PvhBootCapability::PvhEntryPresent(entry) => Entry::Pvh { entry: entry.0 },
                    _ => Entry::Linux64 {
                        entry: loaded.kernel_load.0,
                        header: None,
                    },
                })
            }
        }
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.seek(SeekFrom::Start(offset))?;
        let mut read = 0;
        while read < buffer.len() {
            match self.file.read(&mut buffer[read..])? {
                0 => break,
                n => read += n,
            }
        }
        Ok(read)
    }

    fn unsupported(&self, reason: &'static str) -> KernelError {
        KernelError::Unsupported {
            path: self.path.clone(),
            reason,
        }
    }

    /// Whether a note segment has one of Xen's, as PVH kernels do; linux-loader reads which.
    fn has_xen_note(&mut self, segment: &linux_loader::elf::Elf64_Phdr) -> io::Result<bool> {
        let len = usize::try_from(segment.p_filesz.min(LONGEST_NOTES)).expect("bounded above");
        let mut notes = vec![0; len];
        let read = self.read_at(segment.p_offset, &mut notes)?;
        Ok(notes[..read]
            .windows(XEN_NOTE_OWNER.len())
            .any(|w| w == XEN_NOTE_OWNER))
    }

    /// `None` when it is no bzImage.
    fn check_bzimage(&mut self) -> Result<Option<Format>, KernelError> {
        let mut header = setup_header::default();
        let read = self
            .read_at(SETUP_HEADER, header.as_mut_slice())
            .map_err(|source| KernelError::Io {
                path: self.path.clone(),
                source,
            })?;
        if read < size_of::<setup_header>() || header.header != SETUP_HEADER_MAGIC {
            return Ok(None);
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(self.unsupported("it is a zImage that loads below 1 MiB"));
        }
        if header.version < PROTOCOL_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(self.unsupported(
                "it has no 64-bit entry point (it is a 32-bit kernel or older than Linux 3.8)",
            ));
        }
        let setup_sectors = if header.setup_sects == 0 {
            4
        } else {
            u64::from(header.setup_sects)
        };
        // `syssize` counts paragraphs of 16 bytes.
        let promised = (setup_sectors + 1) * SECTOR + u64::from(header.syssize) * 16;
        if self.len < promised {
            return Err(KernelError::Truncated {
                path: self.path.clone(),
                promised,
                found: self.len,
            });
        }
        Ok(Some(Format::BzImage(Box::new(header))))
    }

    fn check_elf(&mut self) -> Result<Format, KernelError> {
        use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
        let path = self.path.clone();
        let failed = |source| KernelError::Io {
            path: path.clone(),
            source,
        };
        let found = self.len;
        let truncated = |promised| KernelError::Truncated {
            path: path.clone(),
            promised,
            found,
        };

        let mut header = Elf64_Ehdr::default();
        if self.read_at(0, header.as_mut_slice()).map_err(failed)? < size_of::<Elf64_Ehdr>() {
            return Err(truncated(size_of::<Elf64_Ehdr>() as u64));
        }
        if (header.e_ident[4], header.e_ident[5], header.e_machine)
            != (ELF_CLASS_64, ELF_LITTLE_ENDIAN, ELF_X86_64)
        {
            return Err(self.unsupported("it is an ELF file for another processor than x86-64"));
        }
        if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum == 0 {
            return Err(self.unsupported(
                "it is an ELF file without program headers (an object file or a module?)",
            ));
        }
        let (mut end, mut segments) = (0, 0);
        // A kernel says where to enter it (PVH), or is linked to the kernel's half of the address space.
        let mut is_kernel = false;
        for index in 0..u64::from(header.e_phnum) {
            let at = header
                .e_phoff
                .saturating_add(index * size_of::<Elf64_Phdr>() as u64);
            let mut segment = Elf64_Phdr::default();
            if self.read_at(at, segment.as_mut_slice()).map_err(failed)? < size_of::<Elf64_Phdr>() {
                return Err(truncated(at.saturating_add(size_of::<Elf64_Phdr>() as u64)));
            }
            let promised = segment.p_offset.saturating_add(segment.p_filesz);
            if promised > found {
                return Err(truncated(promised));
            }
            if segment.p_type == ELF_NOTE {
                is_kernel |= self.has_xen_note(&segment).map_err(failed)?;
            }
            if segment.p_type == ELF_LOAD {
                segments += 1;
                is_kernel |= segment.p_vaddr >= KERNEL_HALF;
                end = end.max(segment.p_paddr.saturating_add(segment.p_memsz));
                if segment.p_paddr < place::HIGH_MEMORY {
                    return Err(self.unsupported(
                        "it loads below 1 MiB (is it a program instead of a kernel?)",
                    ));
                }
            }
        }
        if segments == 0 {
            return Err(self.unsupported("it is an ELF file that loads nothing"));
        }
        if !is_kernel {
            return Err(self.unsupported(
                "it is an ELF file with neither a PVH entry nor kernel addresses (a program instead of a kernel?)",
            ));
        }
        Ok(Format::Elf { end })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn open(bytes: &[u8]) -> Result<Kernel, KernelError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Kernel::open(file.path())
    }

    fn bzimage(header: setup_header, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = usize::try_from(SETUP_HEADER).unwrap();
        bytes[at..at + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        bytes
    }

    fn header() -> setup_header {
        setup_header {
            header: SETUP_HEADER_MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            setup_sects: 1,
            syssize: 0x100,
            pref_address: 0x100_0000,
            init_size: 0x20_0000,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        }
    }

    #[test]
    fn a_whole_bzimage_is_taken_and_its_needs_known() {
        let kernel = open(&bzimage(header(), 0x2000)).unwrap();
        assert_eq!(kernel.end_in_memory(), 0x120_0000);
        assert_eq!(kernel.initramfs_limit(), 0x8000_0000);
    }

    #[test]
    fn a_truncated_bzimage_says_how_much_is_missing() {
        let error = open(&bzimage(header(), 0x1000)).unwrap_err();
        assert!(
            matches!(
                error,
                KernelError::Truncated {
                    promised: 0x1400,
                    found: 0x1000,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_32_bit_kernel_is_named_as_such() {
        let error = open(&bzimage(
            setup_header {
                xloadflags: 0,
                ..header()
            },
            0x2000,
        ))
        .unwrap_err();
        assert!(error.to_string().contains("64-bit entry"), "{error}");
    }

    #[test]
    fn what_is_no_kernel_is_shown() {
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 8192]] {
            let error = open(bytes).unwrap_err();
            assert!(matches!(error, KernelError::NotAKernel { .. }), "{error}");
        }
        assert!(matches!(
            Kernel::open(Path::new("/nonexistent")),
            Err(KernelError::Io { .. })
        ));
        assert!(matches!(
            Kernel::open(Path::new("/")),
            Err(KernelError::NotAFile { .. })
        ));
    }

    #[test]
    fn a_program_is_not_a_kernel() {
        let error = Kernel::open(&std::env::current_exe().unwrap()).unwrap_err();
        assert!(matches!(error, KernelError::Unsupported { .. }), "{error}");
    }

    #[test]
    fn an_elf_file_cut_short_is_truncated() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for len in [20, 100] {
            let error = open(&whole[..len]).unwrap_err();
            assert!(
                matches!(error, KernelError::Truncated { .. }),
                "{len}: {error}"
            );
        }
    }
}

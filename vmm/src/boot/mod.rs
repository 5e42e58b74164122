//! From a kernel file to a boot vCPU at its entry point.
//!
//! Guest memory is device-dax: it may hold somebody's data. What is written here is only what a boot needs: the
//! kernel and initramfs where they load, and the firmware's own corner of the first MiB (see [`place`]). That corner
//! is written whole, so that nothing an earlier guest left there is taken for a firmware table. Everything else keeps
//! its contents.

mod initramfs;
mod kernel;
mod params;
mod tables;

pub mod place;

use std::path::PathBuf;

use linux_loader::loader::Cmdline;
use thiserror::Error;
use tracing::debug;
use vm_memory::{Bytes, GuestAddress};

pub use initramfs::{Initramfs, InitramfsError};
pub use kernel::{Kernel, KernelError};
pub use params::{MemoryMap, MemoryMapError};

use crate::acpi::Tables;
use crate::kvm::BootRegisters;
use crate::memory::snapshot::Snapshot;

/// What the user wants booted, opened and checked but not loaded: reboots load it again from the same open files.
#[derive(Debug)]
pub struct Payload {
    /// The kernel.
    pub kernel: Kernel,
    /// Its first root file system, if any.
    pub initramfs: Option<Initramfs>,
    /// Its command line.
    pub cmdline: String,
}

/// The payload can't be brought into guest memory.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel.
    #[error("the kernel can't be loaded")]
    Kernel(#[from] KernelError),
    /// The initramfs.
    #[error("the initramfs can't be loaded")]
    Initramfs(#[from] InitramfsError),
    /// The command line.
    #[error("the command line is {len} bytes long, the kernel takes {max}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// What x86 kernels take (`COMMAND_LINE_SIZE`), without the terminating zero.
        max: usize,
    },
    /// A byte that the boot protocols don't carry.
    #[error("the command line has a character that a kernel command line can't have: {reason}")]
    CmdlineCharacter {
        /// What linux-loader says of it.
        reason: linux_loader::cmdline::Error,
    },
    /// No room for all of it.
    #[error(
        "guest memory is too small: kernel{} need {needed_bytes} bytes below 4 GiB, there are {available_bytes}; \
         give the guest more memory",
        initramfs.as_ref().map(|path| format!(" and initramfs {}", path.display())).unwrap_or_default()
    )]
    MemoryTooSmall {
        /// The initramfs, where there is one.
        initramfs: Option<PathBuf>,
        /// Bytes from address 0 that would do.
        needed_bytes: u64,
        /// Contiguous bytes from address 0 that there are.
        available_bytes: u64,
    },
    /// Memory map.
    #[error("the guest's memory map can't be told to the kernel")]
    MemoryMap(#[from] MemoryMapError),
    /// Guest memory does not take it: it is gone, or smaller than the layout says.
    #[error("guest memory at {address:#x} can't be written")]
    Write {
        /// Guest-physical address.
        address: u64,
        /// What vm-memory says.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads everything; the result is where the boot vCPU starts.
pub fn load(
    payload: &mut Payload,
    memory: &Snapshot,
    map: &MemoryMap,
    acpi: &Tables,
) -> Result<BootRegisters, LoadError> {
    let available_bytes = map.contiguous_from_zero();
    if available_bytes < place::HIGH_MEMORY + place::SMALLEST_HIGH_MEMORY {
        return Err(LoadError::MemoryTooSmall {
            initramfs: None,
            needed_bytes: place::HIGH_MEMORY + payload.kernel.len(),
            available_bytes,
        });
    }
    clear_firmware_corner(memory)?;
    write(memory, acpi.address, &acpi.bytes)?;
    tables::write_reset_vector(memory)?;

    let needed_bytes = payload.kernel.end_in_memory().next_multiple_of(place::PAGE)
        + payload
            .initramfs
            .as_ref()
            .map_or(0, Initramfs::len)
            .next_multiple_of(place::PAGE);
    let too_small = || LoadError::MemoryTooSmall {
        initramfs: payload.initramfs.as_ref().map(|i| i.path().to_owned()),
        needed_bytes,
        available_bytes,
    };
    if needed_bytes > available_bytes {
        return Err(too_small());
    }
    let limit = available_bytes.min(payload.kernel.initramfs_limit());
    let initramfs_at = match &payload.initramfs {
        None => None,
        Some(initramfs) => {
            let at = map
                .last_room(initramfs.len(), limit)
                .filter(|at| *at >= payload.kernel.end_in_memory())
                .ok_or_else(too_small)?;
            Some(at)
        }
    };

    let kernel = payload.kernel.load(memory)?;
    let ramdisk = match (&mut payload.initramfs, initramfs_at) {
        (Some(initramfs), Some(at)) => {
            initramfs.load(memory, at)?;
            Some(params::Ramdisk {
                address: at,
                size: initramfs.len(),
            })
        }
        _ => None,
    };
    let cmdline_len = write_cmdline(memory, &payload.cmdline)?;
    let handover = params::Handover {
        map,
        ramdisk,
        rsdp: acpi.address,
        cmdline_len,
    };
    let registers = match kernel {
        kernel::Entry::Linux64 { entry, header } => {
            params::write_zero_page(memory, header.as_deref(), &handover)?;
            tables::write_page_tables(memory)?;
            BootRegisters::Linux64 {
                entry,
                zero_page: place::ZERO_PAGE,
                page_table: place::PAGE_TABLE_LEVEL_4,
                gdt: place::DESCRIPTORS,
            }
        }
        kernel::Entry::Pvh { entry } => {
            params::write_start_info(memory, &handover)?;
            BootRegisters::Pvh {
                entry,
                start_info: place::START_INFO,
                gdt: place::DESCRIPTORS,
            }
        }
    };
    tables::write_descriptors(memory, &registers)?;
    debug!(?registers, ?ramdisk, "kernel loaded");
    Ok(registers)
}

fn write(memory: &Snapshot, address: u64, bytes: &[u8]) -> Result<(), LoadError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| LoadError::Write { address, source })
}

/// Where Linux looks for firmware tables: an earlier guest's must not be found.
fn clear_firmware_corner(memory: &Snapshot) -> Result<(), LoadError> {
    // A page at a time: a buffer as long as the corner costs a page fault for each of its own pages.
    const ZEROS: [u8; 4096] = [0; 4096];
    for (start, end) in place::FIRMWARE_CORNER {
        let mut at = start;
        while at < end {
            let len = usize::try_from(end - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            write(memory, at, &ZEROS[..len])?;
            at += len as u64;
        }
    }
    Ok(())
}

/// Returns its length without the terminating zero.
fn write_cmdline(memory: &Snapshot, text: &str) -> Result<u32, LoadError> {
    let max = place::CMDLINE_SIZE - 1;
    if text.len() > max {
        return Err(LoadError::CmdlineTooLong {
            len: text.len(),
            max,
        });
    }
    let mut cmdline = Cmdline::new(place::CMDLINE_SIZE)
        .map_err(|reason| LoadError::CmdlineCharacter { reason })?;
    if !text.is_empty() {
        cmdline
            .insert_str(text)
            .map_err(|reason| LoadError::CmdlineCharacter { reason })?;
    }
    let bytes = cmdline
        .as_cstring()
        .map_err(|reason| LoadError::CmdlineCharacter { reason })?;
    write(memory, place::CMDLINE, bytes.as_bytes_with_nul())?;
    Ok(u32::try_from(bytes.as_bytes().len()).expect("bounded above"))
}

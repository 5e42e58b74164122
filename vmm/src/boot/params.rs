//! What the loader hands to the kernel: zero page or PVH start info, and the memory map in both.
//!
//! Sources: Documentation/arch/x86/boot.rst and zero-page.rst; Xen's docs/misc/pvh.pandoc and
//! include/public/arch-x86/hvm/start_info.h.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use thiserror::Error;
use vm_memory::GuestAddress;

use super::{LoadError, place};
use crate::memory::snapshot::Snapshot;

/// E820 address range types; the PVH map uses the same numbers.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI_DATA: u32 = 3;

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const START_INFO_VERSION: u32 = 1;
/// The zero page of a kernel without a setup header (ELF): the magic `HdrS`, 0xaa55, undefined loader.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// The memory map can't be handed over.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MemoryMapError {
    /// More ranges than the zero page has entries.
    #[error(
        "guest memory is in {ranges} pieces, the boot protocol takes {max}; use fewer memory zones"
    )]
    TooManyRanges {
        /// Ranges there are.
        ranges: usize,
        /// `E820_MAX_ENTRIES_ZEROPAGE`, or what the PVH map has room for.
        max: usize,
    },
    /// linux-loader could not write it.
    #[error("{0}")]
    Write(linux_loader::configurator::Error),
}

/// Guest RAM as (start, length), sorted, adjacent ranges merged; and what else is in the address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    ram: Vec<(u64, u64)>,
    reserved: Vec<(u64, u64)>,
}

impl MemoryMap {
    /// From ranges of RAM in any order and ranges that are neither RAM nor free.
    pub fn new(ram: impl IntoIterator<Item = (u64, u64)>, reserved: Vec<(u64, u64)>) -> Self {
        let mut sorted: Vec<(u64, u64)> = ram.into_iter().collect();
        sorted.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, size) in sorted {
            match merged.last_mut() {
                Some((last, len)) if *last + *len == start => *len += size,
                _ => merged.push((start, size)),
            }
        }
        Self {
            ram: merged,
            reserved,
        }
    }

    /// Length of the RAM that begins at address 0.
    pub fn contiguous_from_zero(&self) -> u64 {
        self.ram
            .first()
            .filter(|(start, _)| *start == 0)
            .map_or(0, |(_, size)| *size)
    }

    /// Where the last `len` bytes below `limit` begin that are not reserved: a multiple of a page.
    pub(super) fn last_room(&self, len: u64, limit: u64) -> Option<u64> {
        let mut end = limit;
        loop {
            let start = end.checked_sub(len)? / place::PAGE * place::PAGE;
            let in_the_way = |(at, size): &&(u64, u64)| *at < start + len && start < *at + *size;
            match self.reserved.iter().filter(in_the_way).min() {
                None => return Some(start),
                Some((at, _)) => end = *at,
            }
        }
    }

    /// RAM in a range: what of it is not reserved. Said without overlaps, because Linux looks for a place for its kernel before it
    /// has put them straight.
    fn free(&self, start: u64, size: u64) -> Vec<(u64, u64, u32)> {
        let mut taken = self.reserved.clone();
        taken.sort_unstable();
        let (mut free, mut next, end) = (Vec::new(), start, start + size);
        for (at, size) in taken {
            let before = at.min(end);
            if next < before {
                free.push((next, before - next, RAM));
            }
            next = next.max(at + size);
        }
        if next < end {
            free.push((next, end - next, RAM));
        }
        free
    }

    /// (start, length, type), sorted.
    fn entries(&self) -> Vec<(u64, u64, u32)> {
        let mut entries = Vec::new();
        for &(start, size) in &self.ram {
            if start >= place::HIGH_MEMORY {
                entries.extend(self.free(start, size));
                continue;
            }
            let end = start + size;
            // The legacy area is carved out of the range at 0.
            entries.push((start, place::EXTENDED_BIOS_DATA.min(end) - start, RAM));
            entries.push((
                place::EXTENDED_BIOS_DATA,
                place::ACPI - place::EXTENDED_BIOS_DATA,
                RESERVED,
            ));
            entries.push((place::ACPI, place::HIGH_MEMORY - place::ACPI, ACPI_DATA));
            if end > place::HIGH_MEMORY {
                entries.extend(self.free(place::HIGH_MEMORY, end - place::HIGH_MEMORY));
            }
        }
        entries.extend(
            self.reserved
                .iter()
                .map(|(start, size)| (*start, *size, RESERVED)),
        );
        entries.sort_unstable();
        entries
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Ramdisk {
    pub(super) address: u64,
    pub(super) size: u64,
}

/// What both protocols carry.
pub(super) struct Handover<'a> {
    pub(super) map: &'a MemoryMap,
    pub(super) ramdisk: Option<Ramdisk>,
    pub(super) rsdp: u64,
    pub(super) cmdline_len: u32,
}

/// Everything the loader places is below 4 GiB; the protocol has 32 bits for it.
fn low(value: u64) -> u32 {
    u32::try_from(value).expect("placed below 4 GiB")
}

pub(super) fn write_zero_page(
    memory: &Snapshot,
    header: Option<&setup_header>,
    handover: &Handover<'_>,
) -> Result<(), LoadError> {
    let mut params = boot_params {
        hdr: header.copied().unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: handover.rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(place::CMDLINE);
    params.hdr.cmdline_size = handover.cmdline_len;
    if let Some(ramdisk) = handover.ramdisk {
        params.hdr.ramdisk_image = low(ramdisk.address);
        params.hdr.ramdisk_size = low(ramdisk.size);
    }
    let entries = handover.map.entries();
    let max = params.e820_table.len();
    if entries.len() > max {
        return Err(MemoryMapError::TooManyRanges {
            ranges: entries.len(),
            max,
        }
        .into());
    }
    for (slot, &(addr, size, r#type)) in params.e820_table.iter_mut().zip(&entries) {
        *slot = boot_e820_entry { addr, size, r#type };
    }
    params.e820_entries = u8::try_from(entries.len()).expect("at most 128, checked above");
    let params = BootParams::new(&params, GuestAddress(place::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|e| MemoryMapError::Write(e).into())
}

pub(super) fn write_start_info(
    memory: &Snapshot,
    handover: &Handover<'_>,
) -> Result<(), LoadError> {
    let entries: Vec<hvm_memmap_table_entry> = handover
        .map
        .entries()
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let room = usize::try_from(place::ZERO_PAGE - place::MEMORY_MAP).expect("less than a page");
    let max = room / size_of::<hvm_memmap_table_entry>();
    if entries.len() > max {
        return Err(MemoryMapError::TooManyRanges {
            ranges: entries.len(),
            max,
        }
        .into());
    }
    let modules: Vec<hvm_modlist_entry> = handover
        .ramdisk
        .iter()
        .map(|ramdisk| hvm_modlist_entry {
            paddr: ramdisk.address,
            size: ramdisk.size,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: place::CMDLINE,
        rsdp_paddr: handover.rsdp,
        memmap_paddr: place::MEMORY_MAP,
        memmap_entries: u32::try_from(entries.len()).expect("checked above"),
        nr_modules: u32::try_from(modules.len()).expect("one at most"),
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            place::MODULE_LIST
        },
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(place::START_INFO));
    params.set_sections(&entries, GuestAddress(place::MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(place::MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|e| MemoryMapError::Write(e).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_legacy_area_is_never_ram() {
        let map = MemoryMap::new([(4 * GIB, GIB), (0, GIB)], vec![(place::ECAM, 1 << 20)]);
        let entries = map.entries();
        assert_eq!(
            entries,
            [
                (0, place::EXTENDED_BIOS_DATA, RAM),
                (
                    place::EXTENDED_BIOS_DATA,
                    place::ACPI - place::EXTENDED_BIOS_DATA,
                    RESERVED
                ),
                (place::ACPI, place::HIGH_MEMORY - place::ACPI, ACPI_DATA),
                (place::HIGH_MEMORY, GIB - place::HIGH_MEMORY, RAM),
                (place::ECAM, 1 << 20, RESERVED),
                (4 * GIB, GIB, RAM),
            ]
        );
        assert_eq!(map.contiguous_from_zero(), GIB);
    }

    #[test]
    fn nothing_is_placed_in_what_is_reserved() {
        let reserved = vec![(GIB - 0x3000, 0x1000), (GIB - 0x8000, 0x2000)];
        let map = MemoryMap::new([(0, GIB)], reserved);
        assert_eq!(map.last_room(0x1fff, GIB), Some(GIB - 0x2000));
        assert_eq!(map.last_room(0x2001, GIB), Some(GIB - 0x6000));
        assert_eq!(map.last_room(0x3001, GIB), Some(GIB - 0xc000));
        assert_eq!(map.last_room(GIB, GIB), None);
        let ram = map.entries().into_iter().filter(|(.., kind)| *kind == RAM);
        let ram: Vec<_> = ram.map(|(at, size, _)| (at, at + size)).collect();
        let expected = [
            (0, place::EXTENDED_BIOS_DATA),
            (place::HIGH_MEMORY, GIB - 0x8000),
            (GIB - 0x6000, GIB - 0x3000),
            (GIB - 0x2000, GIB),
        ];
        assert_eq!(ram, expected);
        let free = MemoryMap::new([(0, GIB)], vec![(4 * GIB, GIB)]);
        assert_eq!(free.last_room(GIB, GIB), Some(0));
        assert_eq!(free.last_room(5, GIB - 1), Some(GIB - 0x1000));
    }

    #[test]
    fn adjacent_zones_are_one_range() {
        let map = MemoryMap::new([(GIB, GIB), (0, GIB), (3 * GIB - 4096, 4096)], vec![]);
        assert_eq!(map.contiguous_from_zero(), 2 * GIB);
        assert_eq!(map.ram, [(0, 2 * GIB), (3 * GIB - 4096, 4096)]);
    }
}

//! Where things are in the guest's first MiB, and the machine's fixed addresses near 4 GiB.
//!
//! ```text
//! 0x0_0000 ┬ real-mode vectors, BIOS data    (cleared)
//! 0x0_0500 │ segment descriptors
//! 0x0_6000 │ PVH start info, module list, memory map
//! 0x0_7000 │ zero page (struct boot_params)
//! 0x0_9000 │ page tables for the first GiB: three pages
//! 0x2_0000 │ command line
//! 0x9_fc00 ├ extended BIOS data              (cleared, reserved)
//! 0xa_0000 │ legacy video hole               (reserved, contents kept)
//! 0xe_0000 │ ACPI tables                     (written whole)
//! 0xf_fff0 │ reset vector: asks for a reset
//! 0x10_0000┴ kernel
//! ```

/// Page size of the guest.
pub const PAGE: u64 = 4096;
/// Segment descriptors.
pub const DESCRIPTORS: u64 = 0x500;
/// `struct hvm_start_info`.
pub const START_INFO: u64 = 0x6000;
/// `struct hvm_modlist_entry`.
pub const MODULE_LIST: u64 = 0x6100;
/// `struct hvm_memmap_table_entry`, up to the zero page.
pub const MEMORY_MAP: u64 = 0x6200;
/// `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table.
pub const PAGE_TABLE_LEVEL_4: u64 = 0x9000;
/// Its only entry's table.
pub const PAGE_TABLE_LEVEL_3: u64 = 0xa000;
/// 512 entries of 2 MiB.
pub const PAGE_TABLE_LEVEL_2: u64 = 0xb000;
/// Command line.
pub const CMDLINE: u64 = 0x2_0000;
/// `COMMAND_LINE_SIZE` of x86 kernels, with the terminating zero (arch/x86/include/asm/setup.h).
pub const CMDLINE_SIZE: usize = 2048;
/// End of conventional memory.
pub const EXTENDED_BIOS_DATA: u64 = 0x9_fc00;
/// ACPI tables.
pub const ACPI: u64 = 0xe_0000;
/// Room for them.
pub const ACPI_SIZE: u64 = RESET_VECTOR - ACPI;
/// Where a PC's firmware takes over in real mode (`ffff:0000`). Linux jumps there to reboot when ACPI is
/// hardware-reduced and there is no EFI (`efi_reboot_required`, arch/x86/platform/efi/quirks.c).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First address above the legacy area.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Less than this above 1 MiB boots no kernel at all.
pub const SMALLEST_HIGH_MEMORY: u64 = 0x10_0000;

/// Where kernels look for tables of a firmware (MP, DMI, RSDP): vectors and BIOS data area, extended BIOS data area,
/// BIOS ROM. Start and end.
pub const FIRMWARE_CORNER: [(u64, u64); 3] = [
    (0, DESCRIPTORS),
    (EXTENDED_BIOS_DATA, 0xa_0000),
    (ACPI, HIGH_MEMORY),
];

/// The 32-bit windows of all PCI segments: from the start of the MMIO hole up to [`ECAM`].
pub const PCI_MMIO32: u64 = 0xc000_0000;
/// PCI configuration space, in the MMIO hole: 1 MiB for each segment, up to 16 of them.
pub const ECAM: u64 = 0xe800_0000;
/// The PCI hotplug registers, one page.
pub const HOTPLUG: u64 = 0xe900_0000;
/// The registers of processors that come and go, one page.
pub const PROCESSORS: u64 = 0xe900_1000;

//! The processor tables a 64-bit entry needs (segment descriptors, an identity map of the first GiB), and the reset
//! vector.

use super::{LoadError, place, write};
use crate::devices::power;
use crate::kvm::BootRegisters;
use crate::memory::snapshot::Snapshot;

/// Real-mode code for the reset vector: writes the ACPI reset register, then waits for what comes of it.
fn reset_code() -> Vec<u8> {
    let [low, high] = power::RESET_PORT.to_le_bytes();
    vec![
        0xba,
        low,
        high, // mov dx, RESET_PORT
        0xb0,
        power::RESET_VALUE, // mov al, RESET_VALUE
        0xee,               // out dx, al
        0xf4,               // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
}

pub(super) fn write_reset_vector(memory: &Snapshot) -> Result<(), LoadError> {
    write(memory, place::RESET_VECTOR, &reset_code())
}

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;

pub(super) fn write_descriptors(
    memory: &Snapshot,
    registers: &BootRegisters,
) -> Result<(), LoadError> {
    let bytes: Vec<u8> = registers
        .descriptors()
        .iter()
        .flat_map(|d| d.to_le_bytes())
        .collect();
    write(memory, place::DESCRIPTORS, &bytes)
}

/// Whole pages are written: what was in them before must not be taken for entries.
pub(super) fn write_page_tables(memory: &Snapshot) -> Result<(), LoadError> {
    table(memory, place::PAGE_TABLE_LEVEL_4, |i| {
        (i == 0).then_some(place::PAGE_TABLE_LEVEL_3 | PRESENT_WRITABLE)
    })?;
    table(memory, place::PAGE_TABLE_LEVEL_3, |i| {
        (i == 0).then_some(place::PAGE_TABLE_LEVEL_2 | PRESENT_WRITABLE)
    })?;
    table(memory, place::PAGE_TABLE_LEVEL_2, |i| {
        Some((i * LARGE_PAGE) | PRESENT_WRITABLE | LARGE)
    })
}

fn table(memory: &Snapshot, at: u64, entry: impl Fn(u64) -> Option<u64>) -> Result<(), LoadError> {
    let bytes: Vec<u8> = (0..ENTRIES)
        .flat_map(|i| entry(i).unwrap_or(0).to_le_bytes())
        .collect();
    write(memory, at, &bytes)
}

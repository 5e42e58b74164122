//! The registers of places that fill and empty while the guest runs: what those of PCI slots and of processors have in common.
//!
//! Registers are 32 bits wide, little-endian, and taken by aligned accesses of 4 bytes; anything else reads as all ones and
//! writes nothing. Up to 32 places share a block, a bit each. Each block has registers of its own, so there is nothing to
//! select and two vCPUs can't mix them up.
//! ```text
//!   0x00  PENDING        r    bit n: block n has a pending check or request
//!   0x20 * (n + 1), block n:
//!   +0x0  CHECK          r w1c  what came: Device Check
//!   +0x4  EJECT_REQUEST  r w1c  what is to go: Eject Request
//!   +0x8  PRESENT        r    for _STA
//!   +0xc  EJECT          w    for _EJ0
//! ```
//! Source: ACPI 6.5, 5.6.6 (notification values), 6.3.

use std::sync::Arc;

/// Bytes of the registers' window.
pub const WINDOW: u64 = 0x1000;

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 0x20;
/// Blocks that a window has room for, before the first one the common registers.
pub(crate) const MOST_BLOCKS: u64 = WINDOW / BLOCK - 1;
/// Registers of a block, in their order; the AML names them as fields.
pub(crate) const CHECK: u64 = 0x0;
pub(crate) const EJECT_REQUEST: u64 = 0x4;
pub(crate) const PRESENT: u64 = 0x8;
pub(crate) const EJECT: u64 = 0xc;
/// The register before the blocks.
pub(crate) const PENDING: u64 = 0x0;

/// Raises the edge-triggered interrupt of the registers.
pub type Interrupt = Arc<dyn Fn() + Send + Sync>;

/// Offset of a block.
pub(crate) fn block(number: u16) -> u64 {
    BLOCK * (u64::from(number) + 1)
}

/// The block that an offset is in.
pub(crate) fn block_at(offset: u64) -> Option<usize> {
    usize::try_from((offset / BLOCK).checked_sub(1)?).ok()
}

/// PENDING: whether each block, in their order, has something.
pub(crate) fn pending(blocks: impl Iterator<Item = bool>) -> u32 {
    (0u32..)
        .zip(blocks)
        .filter(|(_, has)| *has)
        .fold(0, |bits, (number, _)| bits | 1 << number)
}

/// Answers a read of the register at `offset`, which is asked for when the access is one of a register.
pub(crate) fn read(offset: u64, data: &mut [u8], register: impl FnOnce() -> u32) {
    if offset.is_multiple_of(4)
        && let Ok(data) = <&mut [u8; 4]>::try_from(data)
    {
        *data = register().to_le_bytes();
    }
}

/// What a write writes; nothing when it is none of a register.
pub(crate) fn written(data: &[u8]) -> Option<u32> {
    data.try_into().ok().map(u32::from_le_bytes)
}

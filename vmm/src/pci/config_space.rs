//! Configuration space of an endpoint: a type-0 header, BARs and a list of capabilities.
//!
//! Pure: bytes, a mask of the bits a guest may change, and what the BARs mean. Its owner puts a lock around it and
//! answers [`Function`](super::Function) from it.
//!
//! Invariants:
//! - A bit that is not in the mask changes by the owner's hand only.
//! - A BAR's address is a multiple of its size, whatever was written, also halfway through a move.
//! - Whether an address makes sense is not known here: after a write of all ones (how a guest finds the size) with
//!   decode on, a BAR claims to answer at the end of the address space. The [`Segment`](super::Segment) decides.
//!
//! Not here: I/O BARs, bridges, and the express capability: Linux looks for extended capabilities only where that is,
//! virtio has none, and a passed-through function brings its own.
//! Sources: PCI Local Bus 3.0, chapter 6; PCI Express Base 5.0, 7.5.1.

use std::fmt;

use thiserror::Error;

use super::BarChange;

/// Bytes of one function.
pub const CONFIG_SPACE: usize = 4096;
/// Bytes that a conventional function has; the capability list is in them.
const CONVENTIONAL: usize = 256;
/// Base address registers of a type-0 header.
pub const BARS: u8 = 6;

/// Number of the expansion ROM where a BAR has one: after the last BAR.
pub const ROM_BAR: u8 = BARS;
/// What can answer at an address: the BARs and the ROM.
const PLACES: usize = BARS as usize + 1;

/// Offset of the command register.
pub(crate) const COMMAND: u16 = 0x04;
/// Offset of the first BAR.
pub(crate) const FIRST_BAR: u16 = 0x10;
/// Offset of the expansion ROM's base address.
pub(super) const ROM: u16 = 0x30;
/// Offset of the status register.
pub(crate) const STATUS: u16 = 0x06;
/// Offset of the revision id.
pub(crate) const REVISION: u16 = 0x08;
/// Offset of the class code: interface, sub-class, base class.
pub(crate) const CLASS: u16 = 0x09;
/// Offset of the subsystem's vendor id and id.
pub(crate) const SUBSYSTEM: u16 = 0x2c;
/// Offset of the pointer to the first capability.
pub(crate) const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

/// The function answers in its memory BARs.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// The function reaches memory by itself.
pub(crate) const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;
/// The function does not raise its interrupt pin.
pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const COMMAND_WRITABLE: u16 =
    COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE;
/// There is a list of capabilities.
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Bit 0 of a BAR: it is in I/O space.
pub(crate) const BAR_IO: u32 = 1 << 0;
/// Bits 2:1 of a memory BAR: the next register has the upper half.
pub(crate) const BAR_64: u32 = 0b10 << 1;
/// Bit 3 of a memory BAR: loads have no side effects.
pub(crate) const BAR_PREFETCHABLE: u32 = 1 << 3;
/// The address of a memory BAR begins at bit 4.
pub(super) const BAR_FLAGS: u32 = 0xf;
/// Bit 0 of the ROM's register: it answers, if memory decode is on as well.
const ROM_ENABLE: u32 = 1 << 0;
/// The address of a ROM begins at bit 11.
pub(super) const ROM_ADDRESS: u32 = !0x7ff;
const SMALLEST_ROM: u64 = 0x800;
/// PCI Local Bus 3.0, 6.2.5.2.
const LARGEST_ROM: u64 = 16 << 20;
const SMALLEST_BAR: u64 = 16;
/// Half of the space, so that the address has a bit to be written.
const LARGEST_BAR_32: u64 = 1 << 31;

/// What the function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class code.
    pub class: Class,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Class code, PCI Code and ID Assignment 1.11.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// Base class.
    pub base: u8,
    /// Sub-class.
    pub sub: u8,
    /// Programming interface.
    pub interface: u8,
}

/// How wide a memory BAR's address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarWidth {
    /// One register.
    Bits32,
    /// Two registers.
    Bits64,
}

/// A memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its first register: 0 to 5, a 64-bit one 0 to 4.
    pub index: u8,
    /// Length in bytes, a power of two of at least 16.
    pub size: u64,
    /// Address width.
    pub width: BarWidth,
    /// Loads have no side effects.
    pub prefetchable: bool,
}

/// A BAR that can't be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BarError {
    /// No such register, or none for the upper half.
    #[error("there is no BAR {index}: a header has {BARS} of 32 bits, a 64-bit BAR takes two")]
    NoRegister {
        /// Asked for.
        index: u8,
    },
    /// Another BAR has it.
    #[error("BAR register {index} is taken already; give the BAR another index")]
    Taken {
        /// The register.
        index: u8,
    },
    /// Not a size a BAR can have.
    #[error(
        "BAR {index} has {size:#x} bytes: make it a power of two from 0x10 up, 0x80000000 at most with 32 bits"
    )]
    Size {
        /// Asked for.
        index: u8,
        /// Its size.
        size: u64,
    },
    /// Not a size a ROM can have.
    #[error(
        "the expansion ROM has {size:#x} bytes: make it a power of two from {SMALLEST_ROM:#x} to {LARGEST_ROM:#x}"
    )]
    RomSize {
        /// Asked for.
        size: u64,
    },
}

/// The capability list is full.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "capability {id:#x} takes {needed} bytes of configuration space, {room} are left; leave another one out"
)]
pub struct CapabilityError {
    /// Capability id.
    pub id: u8,
    /// Bytes with its header.
    pub needed: usize,
    /// Bytes left.
    pub room: usize,
}

/// Configuration space of one function.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SPACE]>,
    /// Bits the guest may change.
    writable: Box<[u8; CONFIG_SPACE]>,
    /// By first register.
    bars: [Option<Bar>; BARS as usize],
    /// Length of the expansion ROM.
    rom: Option<u64>,
    /// Where the pointer to the next capability goes.
    last_pointer: usize,
    /// First byte after the capabilities.
    end: usize,
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("id", &format_args!("{:#010x}", self.read_u32(0)))
            .field("command", &format_args!("{:#06x}", self.command()))
            .field("bars", &self.bars())
            .finish_non_exhaustive()
    }
}

/// Made by whoever makes the function.
impl ConfigSpace {
    /// A header without BARs, capabilities and interrupt pin; decode is off.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: Box::new([0; CONFIG_SPACE]),
            writable: Box::new([0; CONFIG_SPACE]),
            bars: [None; BARS as usize],
            rom: None,
            last_pointer: usize::from(CAPABILITIES),
            end: FIRST_CAPABILITY,
        };
        let Class {
            base,
            sub,
            interface,
        } = identity.class;
        space.set(0, &identity.vendor.to_le_bytes());
        space.set(2, &identity.device.to_le_bytes());
        space.set(REVISION, &[identity.revision]);
        space.set(CLASS, &[interface, sub, base]);
        space.set(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Only ever read by the guest that wrote it.
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds a memory BAR at address 0.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), BarError> {
        let Bar { index, size, .. } = bar;
        let registers = match bar.width {
            BarWidth::Bits32 => 1,
            BarWidth::Bits64 => 2,
        };
        if index >= BARS || BARS - index < registers {
            return Err(BarError::NoRegister { index });
        }
        if let Some(index) = (index..index + registers).find(|index| self.register_taken(*index)) {
            return Err(BarError::Taken { index });
        }
        let too_large = bar.width == BarWidth::Bits32 && size > LARGEST_BAR_32;
        if !size.is_power_of_two() || size < SMALLEST_BAR || too_large {
            return Err(BarError::Size { index, size });
        }
        let mut flags = 0;
        if bar.width == BarWidth::Bits64 {
            flags |= BAR_64;
        }
        if bar.prefetchable {
            flags |= BAR_PREFETCHABLE;
        }
        let register = FIRST_BAR + 4 * u16::from(index);
        let address_bits = (!(size - 1)).to_le_bytes();
        self.set(register, &flags.to_le_bytes());
        self.allow(register, &address_bits[..4 * usize::from(registers)]);
        self.bars[usize::from(index)] = Some(bar);
        Ok(())
    }

    /// Adds an expansion ROM at address 0, which does not answer. In changes and accesses its number is [`ROM_BAR`].
    pub fn add_rom(&mut self, size: u64) -> Result<(), BarError> {
        let possible = size.is_power_of_two() && (SMALLEST_ROM..=LARGEST_ROM).contains(&size);
        let Some(size_32) = u32::try_from(size).ok().filter(|_| possible) else {
            return Err(BarError::RomSize { size });
        };
        self.allow(ROM, &(!(size_32 - 1) | ROM_ENABLE).to_le_bytes());
        self.rom = Some(size);
        Ok(())
    }

    /// Adds a capability: `body` follows the id and the pointer to the next, `writable` says which of its bits the
    /// guest may change (none where it is shorter). Returns the capability's offset.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, CapabilityError> {
        let needed = body.len() + 2;
        let room = CONVENTIONAL - self.end;
        let (Ok(offset), true) = (u8::try_from(self.end), needed <= room) else {
            return Err(CapabilityError { id, needed, room });
        };
        let at = u16::from(offset);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, &writable[..writable.len().min(body.len())]);
        self.bytes[self.last_pointer] = offset;
        self.last_pointer = usize::from(at) + 1;
        self.end = (self.end + needed).next_multiple_of(4);
        let status = self.read_u16(STATUS) | STATUS_CAPABILITIES;
        self.set(STATUS, &status.to_le_bytes());
        Ok(offset)
    }

    /// Which of INTA (1) to INTD (4) the function raises; 0 for none.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.set(INTERRUPT_PIN, &[pin]);
    }

    /// Changes bytes from this side, whatever the guest may change; BARs and the command register are the guest's.
    /// What lies past the end is dropped.
    pub fn set(&mut self, register: u16, bytes: &[u8]) {
        overwrite(&mut self.bytes[..], register, bytes);
    }

    /// From now on the guest may change these bits and no others of these bytes.
    pub fn allow(&mut self, register: u16, mask: &[u8]) {
        overwrite(&mut self.writable[..], register, mask);
    }

    fn register_taken(&self, index: u8) -> bool {
        let upper_half = index
            .checked_sub(1)
            .and_then(|below| self.bars[usize::from(below)])
            .is_some_and(|bar| bar.width == BarWidth::Bits64);
        upper_half || self.bars[usize::from(index)].is_some()
    }
}

fn overwrite(space: &mut [u8], register: u16, bytes: &[u8]) {
    for (to, from) in space.iter_mut().skip(register.into()).zip(bytes) {
        *to = *from;
    }
}

/// Used by the guest.
impl ConfigSpace {
    /// Reads any number of bytes anywhere; what lies past the end is left as it came.
    pub fn read(&self, register: u16, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(&self.bytes[self.within(register)..]) {
            *to = *from;
        }
    }

    /// Writes any number of bytes anywhere, as far as their bits are writable, and tells which BARs moved by it.
    pub fn write(&mut self, register: u16, data: &[u8]) -> Vec<BarChange> {
        let before = self.answering();
        let from = self.within(register);
        let old = self.bytes[from..].iter_mut();
        for ((byte, mask), new) in old.zip(&self.writable[from..]).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
        let after = self.answering();
        self.places()
            .map(|(bar, size)| BarChange {
                bar,
                size,
                old: before[usize::from(bar)],
                new: after[usize::from(bar)],
            })
            .filter(|change| change.old != change.new)
            .collect()
    }

    /// Number and length of everything that has an address.
    fn places(&self) -> impl Iterator<Item = (u8, u64)> {
        let bars = self.bars.iter().flatten().map(|bar| (bar.index, bar.size));
        bars.chain(self.rom.map(|size| (ROM_BAR, size)))
    }

    fn within(&self, register: u16) -> usize {
        usize::from(register).min(self.bytes.len())
    }

    /// Where its BARs answer now, as if they had just begun to: `old` is `None`.
    pub fn bars(&self) -> Vec<BarChange> {
        let answering = self.answering();
        self.places()
            .map(|(bar, size)| BarChange {
                bar,
                size,
                old: None,
                new: answering[usize::from(bar)],
            })
            .collect()
    }

    /// What a BAR's registers hold, whether decode is on or not. `None` if there is no such BAR.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        if index == ROM_BAR {
            return self
                .rom
                .map(|_| u64::from(self.read_u32(ROM) & ROM_ADDRESS));
        }
        let bar = (*self.bars.get(usize::from(index))?)?;
        let register = FIRST_BAR + 4 * u16::from(index);
        let low = u64::from(self.read_u32(register) & !BAR_FLAGS);
        let high = match bar.width {
            BarWidth::Bits32 => 0,
            BarWidth::Bits64 => self.read_u32(register + 4),
        };
        Some(u64::from(high) << 32 | low)
    }

    fn answering(&self) -> [Option<u64>; PLACES] {
        let mut all = [None; PLACES];
        if self.memory_enabled() {
            for (index, at) in (0u8..).zip(&mut all) {
                *at = self.bar_address(index);
            }
            if self.read_u32(ROM) & ROM_ENABLE == 0 {
                all[usize::from(ROM_BAR)] = None;
            }
        }
        all
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.read_u16(COMMAND)
    }

    /// Whether the guest lets the function answer in its BARs.
    pub fn memory_enabled(&self) -> bool {
        self.command() & COMMAND_MEMORY != 0
    }

    /// Whether the guest lets the function reach memory, which is also how it sends messages.
    pub fn bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// Two bytes, little-endian.
    pub fn read_u16(&self, register: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(register, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Four bytes, little-endian.
    pub fn read_u32(&self, register: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::testing::{IDENTITY, bar32, bar64};

    fn space(bars: &[Bar]) -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY);
        for bar in bars {
            space.add_bar(*bar).unwrap();
        }
        space
    }

    fn enable(space: &mut ConfigSpace) -> Vec<BarChange> {
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes())
    }

    #[test]
    fn the_header_says_what_the_function_is() {
        let space = space(&[]);
        assert_eq!(space.read_u32(0), 0x1042_1af4);
        assert_eq!(space.read_u32(8), 0x0180_0001);
        assert_eq!(space.read_u32(0x2c), 0x0002_1af4);
        assert_eq!(space.read_u32(4), 0, "no decode, no capabilities");
        assert_eq!(space.read_u32(0x0c), 0, "type 0, one function");
        assert_eq!(space.read_u16(0xfff), 0, "past the end there is nothing");
    }

    #[test]
    fn all_ones_tell_the_size() {
        let mut space = space(&[bar32(0, 0x1000), bar64(2, 1 << 33), bar64(4, 0x4000)]);
        for register in (0x10..0x28).step_by(4) {
            space.write(register, &[0xff; 4]);
        }
        let read: Vec<u32> = (0x10..0x28).step_by(4).map(|r| space.read_u32(r)).collect();
        let expected = [0xffff_f000, 0, 0xc, 0xffff_fffe, 0xffff_c00c, 0xffff_ffff];
        assert_eq!(read, expected);
    }

    #[test]
    fn bars_answer_while_decode_is_on() {
        let mut space = space(&[bar32(0, 0x1000), bar64(2, 0x4000)]);
        assert_eq!(space.write(0x10, &0xc000_0fffu32.to_le_bytes()), []);
        assert_eq!(space.write(0x1c, &[1]), []);
        let at = |bar, size, old, new| BarChange {
            bar,
            size,
            old,
            new,
        };
        assert_eq!(space.bar_address(0), Some(0xc000_0000));
        assert_eq!(space.bar_address(1), None);
        let on = [
            at(0, 0x1000, None, Some(0xc000_0000)),
            at(2, 0x4000, None, Some(1 << 32)),
        ];
        assert_eq!(enable(&mut space), on);
        assert_eq!(space.bars(), on);
        assert_eq!(
            space.write(0x13, &[0xd0]),
            [at(0, 0x1000, Some(0xc000_0000), Some(0xd000_0000))]
        );
        assert_eq!(space.write(0x13, &[0xd0]), [], "it is there already");
        assert_eq!(
            space.write(COMMAND, &[0]),
            [
                at(0, 0x1000, Some(0xd000_0000), None),
                at(2, 0x4000, Some(1 << 32), None)
            ]
        );
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space(&[]);
        assert_eq!(space.add_capability(0x09, &[1, 2, 3], &[0, 0xff]), Ok(0x40));
        assert_eq!(space.add_capability(0x11, &[0; 10], &[]), Ok(0x48));
        assert_eq!(space.read_u16(STATUS), STATUS_CAPABILITIES);
        assert_eq!(space.read_u16(CAPABILITIES), 0x40);
        assert_eq!(space.read_u32(0x40), 0x0201_4809);
        assert_eq!(space.read_u16(0x48), 0x0011);
        space.write(0x40, &[0xff; 16]);
        assert_eq!(space.read_u32(0x40), 0xff01_4809);
        assert_eq!(space.read_u32(0x44), 3);
        let error = space.add_capability(0x09, &[0; 0xb0], &[]).unwrap_err();
        assert_eq!((error.needed, error.room), (0xb2, 0xac));
        assert_eq!(space.add_capability(0x09, &[0; 0xaa], &[]), Ok(0x54));
        assert_eq!(space.add_capability(0x09, &[], &[]).unwrap_err().room, 0);
    }

    #[test]
    fn bars_that_can_not_be_are_refused() {
        let mut space = space(&[bar64(1, 0x1000)]);
        for index in [1, 2] {
            let taken = Err(BarError::Taken { index });
            assert_eq!(space.add_bar(bar32(index, 0x1000)), taken);
        }
        let taken = Err(BarError::Taken { index: 1 });
        assert_eq!(space.add_bar(bar64(0, 0x1000)), taken);
        for bar in [bar32(6, 16), bar64(5, 16), bar32(255, 16)] {
            let index = bar.index;
            assert_eq!(space.add_bar(bar), Err(BarError::NoRegister { index }));
        }
        for size in [0, 8, 0x1001, 1 << 32] {
            let error = BarError::Size { index: 0, size };
            assert_eq!(space.add_bar(bar32(0, size)), Err(error));
        }
        space.add_bar(bar32(0, 1 << 31)).unwrap();
        space.add_bar(bar64(3, 1 << 63)).unwrap();
    }

    #[test]
    fn a_rom_answers_with_both_of_its_switches() {
        let mut space = space(&[bar32(0, 0x1000)]);
        space.add_rom(0x4_0000).unwrap();
        space.write(ROM, &[0xff; 4]);
        assert_eq!(space.read_u32(ROM), 0xfffc_0001);
        assert_eq!(space.write(ROM, &0xc010_07feu32.to_le_bytes()), []);
        assert_eq!(space.bar_address(ROM_BAR), Some(0xc010_0000 & !0x3_ffff));
        assert_eq!(enable(&mut space).len(), 1, "BAR 0 alone");
        let on = BarChange {
            bar: ROM_BAR,
            size: 0x4_0000,
            old: None,
            new: Some(0xc010_0000),
        };
        assert_eq!(space.write(ROM, &[1]), [on]);
        assert_eq!(space.bars()[1], on);
        let off = space.write(COMMAND, &[0]);
        assert_eq!((off[1].bar, off[1].old), (ROM_BAR, on.new));
        for size in [0, 0x400, 0x801, 32 << 20, 1 << 32] {
            assert_eq!(space.add_rom(size), Err(BarError::RomSize { size }));
        }
    }

    proptest! {
        #[test]
        fn a_guest_changes_nothing_but_what_it_may(
            sizes in (4u32..32, 4u32..64),
            steps in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..60)
        ) {
            let (small, large) = (1u64 << sizes.0, 1u64 << sizes.1);
            let mut space = space(&[bar32(0, small), bar64(4, large)]);
            space.add_capability(0x11, &[0x55; 10], &[0, 0xc0]).unwrap();
            space.add_rom(0x1_0000).unwrap();
            let fresh = space.clone();
            let mut answering = [None; PLACES];
            for (register, data) in steps {
                // Half of them where something is.
                let register = if register & 1 == 0 { register } else { register % 0x50 };
                for change in space.write(register, &data) {
                    let at = &mut answering[usize::from(change.bar)];
                    prop_assert_eq!(*at, change.old);
                    prop_assert_ne!(change.old, change.new);
                    *at = change.new;
                }
                for change in space.bars() {
                    prop_assert_eq!(answering[usize::from(change.bar)], change.new);
                }
                for (index, size) in [(0, small), (4, large), (ROM_BAR, 0x1_0000)] {
                    prop_assert!(space.bar_address(index).unwrap().is_multiple_of(size));
                }
                let mut read = [0; CONFIG_SPACE];
                space.read(0, &mut read);
                for (at, byte) in read.into_iter().enumerate() {
                    prop_assert_eq!((byte ^ fresh.bytes[at]) & !fresh.writable[at], 0, "{:#x}", at);
                }
            }
        }
    }
}

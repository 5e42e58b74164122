//! Where PCI and device memory lie in the guest's address space. Pure arithmetic.
//!
//! ```text
//!  3 GiB                          ECAM                4 GiB     RAM ends        3/4 of 2^bits        2^bits
//!  | seg 0 | seg 1 | ... 32-bit   | seg 0 | seg 1 ... | RAM ... | device memory | seg 0 | seg 1 ... 64-bit |
//! ```
//!
//! - Device memory (virtio-pmem) sits directly above RAM: Linux with KASLR maps only so much beyond the end of the RAM it
//!   booted with.
//! - The 64-bit windows have the top quarter. They are powers of two, aligned to their size, so a BAR as large as a
//!   window fits it.
//! - Nothing overlaps: not two windows, not a window and RAM, not a window and device memory.

use thiserror::Error;

use super::{Allocator, SegmentWindows, Window};
use crate::boot::place;

/// Most segments.
pub const MAX_SEGMENTS: u16 = 16;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;
/// Configuration space of the one bus of a segment.
const BUS: u64 = MIB;
/// Less is no use to a device with memory.
const SMALLEST_WINDOW64: u64 = GIB;
/// Linux adds and removes memory by sections of this size (x86-64).
pub const SECTION: u64 = 128 * MIB;
/// x86-64 has no wider physical addresses.
const MAX_ADDRESS_BITS: u8 = 52;

// All configuration spaces lie below the registers that come next.
const _: () = assert!(place::ECAM + MAX_SEGMENTS as u64 * BUS <= place::HOTPLUG);

/// What decides the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayoutRequest {
    /// Number of segments, 1 to 16.
    pub segments: u16,
    /// Width of a guest-physical address.
    pub address_bits: u8,
    /// First address after guest RAM.
    pub ram_end: u64,
}

/// It can't be laid out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// None, or too many.
    #[error("--platform num_pci_segments={segments}: give a number from 1 to {MAX_SEGMENTS}")]
    Segments {
        /// Asked for.
        segments: u16,
    },
    /// The address space is too small.
    #[error(
        "{segments} PCI segments need guest-physical addresses of {needed} bits, there are {bits}; \
         give a smaller --platform num_pci_segments="
    )]
    AddressWidth {
        /// Asked for.
        segments: u16,
        /// What there are.
        bits: u8,
        /// What it takes.
        needed: u8,
    },
    /// RAM reaches into the windows.
    #[error(
        "guest RAM ends at {ram_end:#x}, beyond the start of the 64-bit PCI windows at {windows:#x} (guest-physical \
         addresses have {bits} bits); give the guest less memory"
    )]
    RamTooHigh {
        /// First address after RAM.
        ram_end: u64,
        /// First address of the windows.
        windows: u64,
        /// Width of an address.
        bits: u8,
    },
}

/// Where one segment's addresses are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentLayout {
    /// Segment number.
    pub number: u16,
    /// Configuration space of bus 0.
    pub ecam: Window,
    /// For 32-bit BARs.
    pub mmio32: Window,
    /// For 64-bit BARs.
    pub mmio64: Window,
}

impl SegmentLayout {
    /// What [`Segment::new`](super::Segment::new) takes.
    pub fn windows(&self) -> SegmentWindows {
        SegmentWindows {
            number: self.number,
            mmio32: self.mmio32,
            mmio64: self.mmio64,
        }
    }
}

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciLayout {
    /// By number.
    pub segments: Vec<SegmentLayout>,
    /// For device memory, from RAM's end to the 64-bit windows; may be empty.
    pub device_memory: Window,
}

impl PciLayout {
    /// Lays it out.
    pub fn new(request: LayoutRequest) -> Result<Self, LayoutError> {
        let LayoutRequest {
            segments,
            address_bits: bits,
            ram_end,
        } = request;
        if segments == 0 || segments > MAX_SEGMENTS {
            return Err(LayoutError::Segments { segments });
        }
        let count = u64::from(segments);
        // In a quarter of the space; and the quarter is above 4 GiB, which takes 33 bits.
        let smallest_quarter = count.next_power_of_two() * SMALLEST_WINDOW64;
        let needed = u8::try_from(smallest_quarter.ilog2() + 2)
            .unwrap_or(u8::MAX)
            .max(33);
        if bits < needed {
            return Err(LayoutError::AddressWidth {
                segments,
                bits,
                needed,
            });
        }
        let quarter = 1u64 << (bits.min(MAX_ADDRESS_BITS) - 2);
        let windows = 3 * quarter;
        let device_memory = ram_end
            .max(FOUR_GIB)
            .checked_next_multiple_of(GIB)
            .and_then(|base| Window::new(base, windows.checked_sub(base)?))
            .ok_or(LayoutError::RamTooHigh {
                ram_end,
                windows,
                bits,
            })?;
        let size32 = (place::ECAM - place::PCI_MMIO32) / count / MIB * MIB;
        let size64 = quarter / count.next_power_of_two();
        let segments = (0..segments).map(|number| {
            let at = |base: u64, size: u64| {
                Window::new(base + u64::from(number) * size, size).expect("below 2^52")
            };
            SegmentLayout {
                number,
                ecam: at(place::ECAM, BUS),
                mmio32: at(place::PCI_MMIO32, size32),
                mmio64: at(windows, size64),
            }
        });
        Ok(Self {
            segments: segments.collect(),
            device_memory,
        })
    }
}

/// There is no place for device memory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "no free {size:#x} bytes with an alignment of {align:#x} in {area}, where device memory goes; remove a device or \
     give the guest less memory"
)]
pub struct NoPlace {
    /// Asked for.
    pub size: u64,
    /// Its alignment.
    pub align: u64,
    /// The area.
    pub area: Window,
}

/// Gives out guest-physical addresses for device memory, in whole sections of 128 MiB.
#[derive(Debug)]
pub struct MemoryArea(Allocator);

impl MemoryArea {
    /// All of it free.
    pub fn new(area: Window) -> Self {
        Self(Allocator::new(area))
    }

    /// An address for `size` bytes, a multiple of `align` (a power of two) and of 128 MiB. Nobody else is given an address
    /// in the same section.
    pub fn place(&mut self, size: u64, align: u64) -> Result<u64, NoPlace> {
        let no_place = NoPlace {
            size,
            align,
            area: self.0.window(),
        };
        size.checked_next_multiple_of(SECTION)
            .and_then(|size| self.0.allocate(size, align.max(SECTION), &[]))
            .map(|place| place.base())
            .ok_or(no_place)
    }

    /// The undo of [`MemoryArea::place`]. False: nothing is there.
    pub fn free(&mut self, base: u64) -> bool {
        self.0.free(base).is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(segments: u16, address_bits: u8, ram_end: u64) -> Result<PciLayout, LayoutError> {
        PciLayout::new(LayoutRequest {
            segments,
            address_bits,
            ram_end,
        })
    }

    fn window(base: u64, end: u64) -> Window {
        Window::new(base, end - base).unwrap()
    }

    #[test]
    fn two_segments_on_a_machine_of_40_bits() {
        let layout = layout(2, 40, 0x1_4000_1000).unwrap();
        let expected = SegmentLayout {
            number: 1,
            ecam: window(0xe810_0000, 0xe820_0000),
            mmio32: window(0xd400_0000, 0xe800_0000),
            mmio64: window(896 * GIB, 1024 * GIB),
        };
        assert_eq!(layout.segments[1], expected);
        assert_eq!(layout.segments[0].mmio32.base(), 0xc000_0000);
        assert_eq!(layout.segments[0].mmio64, window(768 * GIB, 896 * GIB));
        assert_eq!(layout.device_memory, window(6 * GIB, 768 * GIB));
    }

    #[test]
    fn small_ram_leaves_device_memory_above_4_gib() {
        let layout = layout(1, 36, GIB).unwrap();
        assert_eq!(layout.device_memory, window(4 * GIB, 48 * GIB));
    }

    #[test]
    fn what_does_not_fit_says_so() {
        for segments in [0, 17] {
            let error = layout(segments, 46, GIB).unwrap_err();
            assert_eq!(error, LayoutError::Segments { segments });
        }
        let error = layout(16, 35, GIB).unwrap_err();
        assert!(
            error.to_string().contains("of 36 bits, there are 35"),
            "{error}"
        );
        assert!(
            layout(1, 32, GIB)
                .unwrap_err()
                .to_string()
                .contains("33 bits")
        );
        layout(1, 33, GIB).unwrap();
        assert_eq!(layout(1, 36, 48 * GIB).unwrap().device_memory.size(), 0);
        for ram_end in [48 * GIB + 1, u64::MAX] {
            let error = layout(1, 36, ram_end).unwrap_err();
            assert!(error.to_string().contains("less memory"), "{error}");
        }
    }

    #[test]
    fn device_memory_shares_no_section() {
        let mut area = MemoryArea::new(window(4 * GIB, 8 * GIB));
        assert_eq!(area.place(1, 1), Ok(4 * GIB));
        assert_eq!(area.place(1 << 21, 1 << 21), Ok(4 * GIB + SECTION));
        assert_eq!(area.place(GIB, GIB), Ok(5 * GIB));
        assert!(area.free(4 * GIB));
        assert!(!area.free(4 * GIB));
        assert_eq!(area.place(SECTION, 1), Ok(4 * GIB));
        for (size, align) in [(3 * GIB, 1), (0, 1), (1, 3 * GIB), (u64::MAX, 1)] {
            let error = area.place(size, align).unwrap_err();
            assert_eq!((error.size, error.align), (size, align));
        }
    }

    proptest! {
        #[test]
        fn nothing_overlaps(segments in 1u16..=16, bits in 30u8..60, ram_end in any::<u64>(), shift in 0u32..40) {
            let ram_end = ram_end >> shift;
            let Ok(layout) = layout(segments, bits, ram_end) else {
                prop_assert!(bits < 36 || ram_end > 3 << 34);
                return Ok(());
            };
            let limit = 1u64 << bits.min(52);
            let mut all = vec![
                window(0, ram_end.min(place::PCI_MMIO32)),
                window(FOUR_GIB, ram_end.max(FOUR_GIB)),
                layout.device_memory,
                window(place::ECAM + 16 * MIB, FOUR_GIB),
            ];
            for segment in &layout.segments {
                prop_assert!(segment.mmio64.size() >= GIB && segment.mmio64.size().is_power_of_two());
                prop_assert!(segment.mmio64.base().is_multiple_of(segment.mmio64.size()));
                prop_assert!(segment.mmio32.base().is_multiple_of(MIB) && segment.mmio32.size() >= 40 * MIB);
                prop_assert_eq!(segment.ecam.base(), place::ECAM + u64::from(segment.number) * MIB);
                all.extend([segment.ecam, segment.mmio32, segment.mmio64]);
            }
            for (index, one) in all.iter().enumerate() {
                prop_assert!(one.end() <= limit);
                prop_assert!(!all[index + 1..].iter().any(|other| other.overlaps(*one)));
            }
            prop_assert!(layout.device_memory.base() - ram_end.max(FOUR_GIB) < GIB);
        }
    }
}

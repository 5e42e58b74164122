//! Where guest RAM lies: zones in, guest-physical ranges out. Pure arithmetic, no host, no guest.
//!
//! ```text
//!  0                     3 GiB          4 GiB
//!  |  RAM, zone by zone  |  hole: MMIO  |  RAM goes on, up to the address width
//! ```
//!
//! Invariants of a [`RamLayout`]:
//! - Zones keep their order, and the first one begins at guest address 0.
//! - No range touches the hole, no two overlap, and together they hold every byte of every zone.
//! - Each range's guest address is congruent to its file offset modulo its zone's alignment. That is
//!   what lets the host map a 2M or 1G page of the device with one entry. Both ends of the hole are
//!   multiples of the largest alignment, so a zone split at the hole keeps it on both sides.
//! - A gap is left only where that congruence forces one.
//!
//! Not done here: what the ranges are told to the guest as (the boot memory map), and mapping them.

#![forbid(unsafe_code)]

use std::fmt;

use thiserror::Error;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A byte position in the file or device that backs a zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileOffset(pub u64);

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for FileOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// First address of the 32-bit MMIO hole (3 GiB).
pub const HOLE_START: Gpa = Gpa(0xc000_0000);
/// First address after the 32-bit MMIO hole (4 GiB).
pub const HOLE_END: Gpa = Gpa(0x1_0000_0000);
/// Smallest alignment: an x86-64 base page.
pub const MIN_ALIGN: u64 = 4 << 10;
/// Largest alignment: the largest page the host can map with one entry.
pub const MAX_ALIGN: u64 = 1 << 30;

// What makes a split at the hole keep the congruence.
const _: () =
    assert!(HOLE_START.0.is_multiple_of(MAX_ALIGN) && HOLE_END.0.is_multiple_of(MAX_ALIGN));

/// A zone that wants a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneRequest {
    /// The zone's name, for errors.
    pub id: String,
    /// Size in bytes, a multiple of `align`.
    pub size: u64,
    /// Alignment in bytes: a power of two from 4K to 1G.
    pub align: u64,
    /// Where the zone begins in what backs it; 0 for memory without a file.
    pub file_offset: FileOffset,
}

/// A contiguous piece of guest RAM that belongs to one zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Index of the zone in the requests.
    pub zone: usize,
    /// First guest-physical address.
    pub gpa: Gpa,
    /// Size in bytes, never zero.
    pub size: u64,
    /// Where the range begins in what backs the zone.
    pub file_offset: FileOffset,
}

impl RamRange {
    /// The first address after the range.
    pub fn end(&self) -> Gpa {
        Gpa(self.gpa.0 + self.size)
    }
}

/// Zones that cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// There is no zone.
    #[error("there is no memory to lay out: give --memory size= or a --memory-zone")]
    NoZones,
    /// The alignment is not one the host can map with.
    #[error(
        "memory zone {id}: alignment {align:#x} is not a power of two from 4K to 1G; use a device with such an alignment"
    )]
    BadAlign {
        /// The zone.
        id: String,
        /// Its alignment.
        align: u64,
    },
    /// The size is zero.
    #[error("memory zone {id} is empty: give it a size")]
    EmptyZone {
        /// The zone.
        id: String,
    },
    /// Not whole pages.
    #[error(
        "memory zone {id}: {what} {value:#x} is not a multiple of the 4K page; use a multiple of 4K"
    )]
    NotPages {
        /// The zone.
        id: String,
        /// Which number: its size or its offset.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// Not a multiple of the zone's own alignment.
    #[error("memory zone {id}: size {size:#x} is not a multiple of its alignment {align:#x}; give size={:#x} or a larger multiple", size.next_multiple_of(*align))]
    SizeNotAligned {
        /// The zone.
        id: String,
        /// Its size.
        size: u64,
        /// Its alignment.
        align: u64,
    },
    /// The end of the zone in its file does not fit 64 bits.
    #[error(
        "memory zone {id}: offset {file_offset} plus size {size:#x} exceeds 64 bits; give smaller ones"
    )]
    OffsetOverflow {
        /// The zone.
        id: String,
        /// Where it begins in its file.
        file_offset: FileOffset,
        /// Its size.
        size: u64,
    },
    /// Address 0 would break the congruence of the first zone.
    #[error(
        "memory zone {id} is the first and begins at guest address 0, so its offset {file_offset} \
         has to be a multiple of its alignment {align:#x}; change offset= or put another zone first"
    )]
    FirstZoneOffset {
        /// The zone.
        id: String,
        /// Where it begins in its file.
        file_offset: FileOffset,
        /// Its alignment.
        align: u64,
    },
    /// RAM ends above what the guest can address.
    #[error(
        "memory zone {id} of {size:#x} bytes does not fit below guest address 2^{address_bits}, \
         the width of this host's guest addresses; give the guest less memory"
    )]
    AddressWidth {
        /// The zone.
        id: String,
        /// Its size.
        size: u64,
        /// Width of guest-physical addresses.
        address_bits: u8,
    },
}

/// Guest RAM, placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<RamRange>,
}

impl RamLayout {
    /// Places `zones` in order below 2^`address_bits`.
    pub fn place(zones: &[ZoneRequest], address_bits: u8) -> Result<Self, LayoutError> {
        if zones.is_empty() {
            return Err(LayoutError::NoZones);
        }
        let limit = 1_u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
        let mut ranges = Vec::with_capacity(zones.len() + 1);
        let mut cursor = Gpa(0);
        for (index, zone) in zones.iter().enumerate() {
            check(zone)?;
            if index == 0 && !zone.file_offset.0.is_multiple_of(zone.align) {
                return Err(LayoutError::FirstZoneOffset {
                    id: zone.id.clone(),
                    file_offset: zone.file_offset,
                    align: zone.align,
                });
            }
            cursor = place_zone(index, zone, cursor, limit, &mut ranges).ok_or_else(|| {
                LayoutError::AddressWidth {
                    id: zone.id.clone(),
                    size: zone.size,
                    address_bits,
                }
            })?;
        }
        Ok(Self { ranges })
    }

    /// The ranges by rising guest address; never empty, the first begins at 0.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The first address after all RAM.
    pub fn ram_end(&self) -> Gpa {
        self.ranges.last().map_or(Gpa(0), RamRange::end)
    }

    /// The first address after the RAM below the hole.
    pub fn low_ram_end(&self) -> Gpa {
        self.ranges
            .iter()
            .rfind(|range| range.gpa < HOLE_START)
            .map_or(Gpa(0), RamRange::end)
    }

    /// Bytes of RAM, gaps not counted.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|range| range.size).sum()
    }

    /// The range that holds `gpa`, if RAM is there.
    pub fn range_at(&self, gpa: Gpa) -> Option<&RamRange> {
        let after = self.ranges.partition_point(|range| range.gpa <= gpa);
        let range = self.ranges[..after].last()?;
        (gpa < range.end()).then_some(range)
    }

    /// Whether RAM is at `gpa`.
    pub fn is_ram(&self, gpa: Gpa) -> bool {
        self.range_at(gpa).is_some()
    }
}

fn check(zone: &ZoneRequest) -> Result<(), LayoutError> {
    let ZoneRequest {
        size,
        align,
        file_offset,
        ..
    } = *zone;
    let id = || zone.id.clone();
    if !align.is_power_of_two() || !(MIN_ALIGN..=MAX_ALIGN).contains(&align) {
        return Err(LayoutError::BadAlign { id: id(), align });
    }
    if size == 0 {
        return Err(LayoutError::EmptyZone { id: id() });
    }
    for (what, value) in [("size", size), ("offset", file_offset.0)] {
        if !value.is_multiple_of(MIN_ALIGN) {
            return Err(LayoutError::NotPages {
                id: id(),
                what,
                value,
            });
        }
    }
    // First, so that the next error can name the next multiple without overflowing.
    if file_offset.0.checked_add(size).is_none() || size > u64::MAX - MAX_ALIGN {
        return Err(LayoutError::OffsetOverflow {
            id: id(),
            file_offset,
            size,
        });
    }
    if !size.is_multiple_of(align) {
        return Err(LayoutError::SizeNotAligned {
            id: id(),
            size,
            align,
        });
    }
    Ok(())
}

/// Adds the ranges of a checked zone at or after `cursor` and returns the address after them;
/// `None` when they do not fit below `limit`.
fn place_zone(
    index: usize,
    zone: &ZoneRequest,
    cursor: Gpa,
    limit: u64,
    ranges: &mut Vec<RamRange>,
) -> Option<Gpa> {
    let mut left = zone.size;
    let mut file_offset = zone.file_offset;
    let mut gpa = next_congruent(cursor, file_offset, zone.align)?;
    if gpa < HOLE_START {
        let below = left.min(HOLE_START.0 - gpa.0);
        let end = Gpa(gpa.0 + below);
        if end.0 > limit {
            return None;
        }
        ranges.push(RamRange {
            zone: index,
            gpa,
            size: below,
            file_offset,
        });
        left -= below;
        file_offset.0 += below;
        if left == 0 {
            return Some(end);
        }
    }
    gpa = next_congruent(gpa.max(HOLE_END), file_offset, zone.align)?;
    let end = Gpa(gpa.0.checked_add(left)?);
    if end.0 > limit {
        return None;
    }
    ranges.push(RamRange {
        zone: index,
        gpa,
        size: left,
        file_offset,
    });
    Some(end)
}

/// The first address from `from` on that is congruent to `offset` modulo `align`.
fn next_congruent(from: Gpa, offset: FileOffset, align: u64) -> Option<Gpa> {
    let mask = align - 1;
    let step = offset.0.wrapping_sub(from.0) & mask;
    from.0.checked_add(step).map(Gpa)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const K: u64 = 1 << 10;
    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    fn zone(size: u64, align: u64, file_offset: u64) -> ZoneRequest {
        ZoneRequest {
            id: "z".into(),
            size,
            align,
            file_offset: FileOffset(file_offset),
        }
    }

    /// The ranges as (zone, gpa, size, file offset).
    fn place(zones: &[ZoneRequest]) -> Vec<(usize, u64, u64, u64)> {
        RamLayout::place(zones, 46)
            .unwrap()
            .ranges()
            .iter()
            .map(|range| (range.zone, range.gpa.0, range.size, range.file_offset.0))
            .collect()
    }

    #[test]
    fn three_gib_just_fit_below_the_hole() {
        let layout = RamLayout::place(&[zone(3 * G, 2 * M, 0)], 46).unwrap();
        assert_eq!(layout.ranges().len(), 1);
        assert_eq!(layout.ram_end(), HOLE_START);
        assert_eq!(layout.low_ram_end(), HOLE_START);
        assert_eq!(
            place(&[zone(3 * G + 4 * K, 4 * K, 0)]),
            [(0, 0, 3 * G, 0), (0, 4 * G, 4 * K, 3 * G),]
        );
    }

    #[test]
    fn four_gib_and_more_continue_after_the_hole() {
        for align in [4 * K, 2 * M, G] {
            assert_eq!(
                place(&[zone(4 * G, align, 0)]),
                [(0, 0, 3 * G, 0), (0, 4 * G, G, 3 * G)]
            );
            assert_eq!(
                place(&[zone(16 * G, align, 0)]),
                [(0, 0, 3 * G, 0), (0, 4 * G, 13 * G, 3 * G),]
            );
        }
        let layout = RamLayout::place(&[zone(16 * G, G, 0)], 46).unwrap();
        assert_eq!(
            (layout.ram_end(), layout.low_ram_end()),
            (Gpa(17 * G), HOLE_START)
        );
        assert_eq!(layout.size(), 16 * G);
    }

    #[test]
    fn a_1g_aligned_zone_after_512m_leaves_a_gap() {
        assert_eq!(
            place(&[zone(512 * M, 4 * K, 0), zone(4 * G, G, 0)]),
            [
                (0, 0, 512 * M, 0),
                (1, G, 2 * G, 0),
                (1, 4 * G, 2 * G, 2 * G),
            ]
        );
        // A 2M zone needs no gap there.
        assert_eq!(
            place(&[zone(512 * M, 4 * K, 0), zone(G, 2 * M, 0)])[1],
            (1, 512 * M, G, 0)
        );
    }

    #[test]
    fn offsets_carry_over_the_hole() {
        assert_eq!(
            place(&[zone(4 * G, 2 * M, 6 * M)]),
            [(0, 0, 3 * G, 6 * M), (0, 4 * G, G, 3 * G + 6 * M),]
        );
        // Congruent, not aligned: 512M in its device, so 512M past a multiple of 1G in the guest.
        assert_eq!(
            place(&[zone(G, G, 0), zone(3 * G, G, 512 * M)]),
            [
                (0, 0, G, 0),
                (1, G + 512 * M, G + 512 * M, 512 * M),
                (1, 4 * G, G + 512 * M, 2 * G),
            ]
        );
    }

    #[test]
    fn tiny_zones_around_the_hole_go_to_one_side_or_the_other() {
        let below = zone(3 * G - 4 * K, 4 * K, 0);
        assert_eq!(
            place(&[below.clone(), zone(4 * K, 4 * K, 0), zone(4 * K, 4 * K, 0)])[1..],
            [(1, 3 * G - 4 * K, 4 * K, 0), (2, 4 * G, 4 * K, 0),]
        );
        // The 4K left below the hole cannot hold a 2M page.
        assert_eq!(
            place(&[below.clone(), zone(2 * M, 2 * M, 0)])[1],
            (1, 4 * G, 2 * M, 0)
        );
        assert_eq!(
            place(&[below, zone(8 * K, 4 * K, 0)])[1..],
            [(1, 3 * G - 4 * K, 4 * K, 0), (1, 4 * G, 4 * K, 4 * K),]
        );
        // A zone that starts after the hole keeps its offset's place in the page.
        let full = zone(3 * G, 4 * K, 0);
        assert_eq!(
            place(&[full, zone(2 * M, 2 * M, M)])[1],
            (1, 4 * G + M, 2 * M, M)
        );
    }

    #[test]
    fn ram_is_where_the_ranges_are() {
        let layout = RamLayout::place(&[zone(512 * M, 4 * K, 0), zone(4 * G, G, 0)], 46).unwrap();
        for (gpa, ram) in [
            (0, true),
            (512 * M - 1, true),
            (512 * M, false),
            (G - 1, false),
            (G, true),
            (3 * G - 1, true),
            (3 * G, false),
            (4 * G - 1, false),
            (4 * G, true),
            (6 * G - 1, true),
            (6 * G, false),
            (u64::MAX, false),
        ] {
            assert_eq!(layout.is_ram(Gpa(gpa)), ram, "{gpa:#x}");
        }
        assert_eq!(layout.range_at(Gpa(5 * G)).map(|range| range.zone), Some(1));
    }

    #[test]
    fn impossible_zones_are_refused() {
        assert_eq!(RamLayout::place(&[], 46), Err(LayoutError::NoZones));
        assert!(LayoutError::NoZones.to_string().contains("--memory-zone"));
        let id = || "z".to_owned();
        for (request, error, words) in [
            (
                zone(0, 4 * K, 0),
                LayoutError::EmptyZone { id: id() },
                "give it a size",
            ),
            (
                zone(4 * K + 1, 4 * K, 0),
                LayoutError::NotPages {
                    id: id(),
                    what: "size",
                    value: 4 * K + 1,
                },
                "multiple of 4K",
            ),
            (
                zone(4 * K, 4 * K, 1),
                LayoutError::NotPages {
                    id: id(),
                    what: "offset",
                    value: 1,
                },
                "offset 0x1",
            ),
            (
                zone(3 * M, 2 * M, 0),
                LayoutError::SizeNotAligned {
                    id: id(),
                    size: 3 * M,
                    align: 2 * M,
                },
                "give size=0x400000",
            ),
            (
                zone(4 * K, 0, 0),
                LayoutError::BadAlign { id: id(), align: 0 },
                "from 4K to 1G",
            ),
            (
                zone(4 * K, K, 0),
                LayoutError::BadAlign { id: id(), align: K },
                "from 4K to 1G",
            ),
            (
                zone(G, 2 * G, 0),
                LayoutError::BadAlign {
                    id: id(),
                    align: 2 * G,
                },
                "from 4K to 1G",
            ),
            (
                zone(G, 3 * M, 0),
                LayoutError::BadAlign {
                    id: id(),
                    align: 3 * M,
                },
                "power of two",
            ),
            (
                zone(4 * G, 2 * M, M),
                LayoutError::FirstZoneOffset {
                    id: id(),
                    file_offset: FileOffset(M),
                    align: 2 * M,
                },
                "put another zone first",
            ),
            (
                zone(8 * K, 4 * K, u64::MAX - 4 * K + 1),
                LayoutError::OffsetOverflow {
                    id: id(),
                    file_offset: FileOffset(u64::MAX - 4 * K + 1),
                    size: 8 * K,
                },
                "exceeds 64 bits",
            ),
        ] {
            let found = RamLayout::place(&[request], 46).unwrap_err();
            assert_eq!(found, error);
            assert!(found.to_string().contains(words), "{found}");
            assert!(found.to_string().contains("memory zone z"), "{found}");
        }
    }

    #[test]
    fn ram_ends_within_the_address_width() {
        // 2^36 is 64G: 63G of RAM and the hole fill it.
        let fits = |size| RamLayout::place(&[zone(size, G, 0)], 36);
        assert_eq!(fits(63 * G).unwrap().ram_end(), Gpa(64 * G));
        let error = fits(64 * G).unwrap_err();
        assert_eq!(
            error,
            LayoutError::AddressWidth {
                id: "z".into(),
                size: 64 * G,
                address_bits: 36
            }
        );
        assert!(error.to_string().contains("2^36"), "{error}");
        // A width below the hole, and sizes near the end of 64 bits.
        assert!(RamLayout::place(&[zone(2 * G, G, 0)], 30).is_err());
        let huge = [zone(u64::MAX - 2 * G + 1, G, 0), zone(2 * G, G, 0)];
        assert!(matches!(
            RamLayout::place(&huge, 64),
            Err(LayoutError::AddressWidth {
                address_bits: 64,
                ..
            })
        ));
    }

    fn requests() -> impl Strategy<Value = Vec<ZoneRequest>> {
        let align = prop_oneof![Just(4 * K), Just(64 * K), Just(2 * M), Just(G)];
        let one = (align, 1_u64..=2048, 0_u64..=1024, any::<bool>()).prop_map(
            |(align, units, offset, whole)| {
                // Keeps a zone under 8G so that layouts often end near the hole.
                let size = (units * align).min(8 * G).next_multiple_of(align);
                let unit = if whole { align } else { 4 * K };
                zone(size, align, offset * unit)
            },
        );
        proptest::collection::vec(one, 1..6).prop_map(|mut zones| {
            let first = &mut zones[0];
            first.file_offset.0 -= first.file_offset.0 % first.align;
            zones
        })
    }

    proptest! {
        #[test]
        fn every_layout_keeps_the_invariants(zones in requests()) {
            let layout = RamLayout::place(&zones, 46).unwrap();
            let ranges = layout.ranges();
            prop_assert_eq!(ranges[0].gpa, Gpa(0));
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].gpa, "overlap or disorder: {:?}", pair);
                prop_assert!(pair[0].zone <= pair[1].zone);
                // The gap is smaller than the alignment of what follows, the hole aside.
                let next = zones[pair[1].zone].align;
                let from = if pair[1].gpa >= HOLE_END { pair[0].end().max(HOLE_END) } else { pair[0].end() };
                prop_assert!(pair[1].gpa.0 - from.0 < next, "needless gap: {:?}", pair);
            }
            for range in ranges {
                prop_assert!(range.size > 0);
                prop_assert!(range.end() <= HOLE_START || range.gpa >= HOLE_END);
                let align = zones[range.zone].align;
                prop_assert_eq!(range.gpa.0 % align, range.file_offset.0 % align);
                prop_assert!(layout.is_ram(range.gpa) && layout.is_ram(Gpa(range.end().0 - 1)));
            }
            prop_assert!(!layout.is_ram(HOLE_START) && !layout.is_ram(layout.ram_end()));
            for (index, zone) in zones.iter().enumerate() {
                let mut next = zone.file_offset.0;
                for range in ranges.iter().filter(|range| range.zone == index) {
                    prop_assert_eq!(range.file_offset.0, next);
                    next += range.size;
                }
                prop_assert_eq!(next, zone.file_offset.0 + zone.size);
            }
        }

        #[test]
        fn no_request_panics(
            zones in proptest::collection::vec((any::<u64>(), 0_u32..64, any::<u64>()), 1..4),
            address_bits: u8,
        ) {
            let zones: Vec<ZoneRequest> = zones
                .into_iter()
                .map(|(size, shift, offset)| zone(size & !0xfff, 1 << shift, offset & !0xfff))
                .collect();
            if let Err(error) = RamLayout::place(&zones, address_bits) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}

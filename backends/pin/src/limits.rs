//! What an address space of devices takes: where, and in which steps.
//!
//! The kernel answers a range it can't take with a bare `EINVAL`. These checks say which part of the range it is and what
//! is there instead. Pure arithmetic; ranges are inclusive, because the last address of 64 bits is one of them.

#![forbid(unsafe_code)]

use std::fmt;

use crate::mapper::{DmaRequest, MapError};
use crate::size::ByteSize;

/// Interrupt messages of x86 are writes to these addresses.
const MSI_WINDOW: IovaRange = IovaRange {
    start: 0xfee0_0000,
    last: 0xfeef_ffff,
};

/// Addresses from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
}

impl IovaRange {
    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

/// What can't be mapped, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    /// Where it is.
    pub range: IovaRange,
    /// Nothing that can be mapped lies behind it.
    pub is_end: bool,
}

impl fmt::Display for Hole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = self.range;
        if self.is_end {
            write!(
                f,
                "addresses from {:#x} on are out of the IOMMU's reach: give the guest less memory, or place this lower",
                range.start
            )
        } else if range.overlaps(&MSI_WINDOW) {
            write!(
                f,
                "{range} is where devices write their interrupts: place the memory below or above it"
            )
        } else {
            write!(
                f,
                "{range} is reserved (`cat /sys/kernel/iommu_groups/*/reserved_regions` says for what): place the memory \
                 below or above it"
            )
        }
    }
}

/// What an address space takes now. Devices that come can narrow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Addresses and lengths are multiples of this power of two.
    pub align_bytes: u64,
    /// What can be mapped; `None`: the kernel does not tell.
    pub ranges: Option<Vec<IovaRange>>,
    /// How many more ranges can be mapped; `None`: no limit.
    pub entries_left: Option<u32>,
}

impl Limits {
    /// Whether a request can be taken. The memory behind it is not looked at.
    pub fn check(&self, request: &DmaRequest<'_>) -> Result<(), MapError> {
        let DmaRequest { iova, size, .. } = *request;
        let name = || request.name.to_owned();
        let last = |start: u64| size.checked_sub(1).and_then(|rest| start.checked_add(rest));
        let (Some(last_iova), Some(_)) = (last(iova), last(request.host_address)) else {
            return Err(MapError::NoRange {
                name: name(),
                iova,
                size,
            });
        };
        let numbers = [
            ("address", iova),
            ("host address", request.host_address),
            ("size", size),
        ];
        for (what, value) in numbers {
            if !value.is_multiple_of(self.align_bytes) {
                return Err(MapError::Misaligned {
                    name: name(),
                    what,
                    value,
                    align: ByteSize(self.align_bytes),
                });
            }
        }
        let range = IovaRange {
            start: iova,
            last: last_iova,
        };
        if let Some(hole) = self.hole_in(range) {
            return Err(MapError::Hole {
                name: name(),
                range,
                hole,
            });
        }
        if self.entries_left == Some(0) {
            return Err(MapError::NoEntries { name: name(), iova });
        }
        Ok(())
    }

    /// The first hole that a range reaches into.
    pub fn hole_in(&self, range: IovaRange) -> Option<Hole> {
        let mut usable = self.ranges.clone()?;
        usable.sort_by_key(|part| part.start);
        // The first address that is not known to be usable.
        let mut next = Some(0);
        for part in &usable {
            let start = next?;
            if start > range.last {
                return None;
            }
            if part.start > start {
                let hole = IovaRange {
                    start,
                    last: part.start - 1,
                };
                if hole.overlaps(&range) {
                    return Some(Hole {
                        range: hole,
                        is_end: false,
                    });
                }
            }
            next = next.max(part.last.checked_add(1));
            if part.last == u64::MAX {
                return None;
            }
        }
        let end = IovaRange {
            start: next?,
            last: u64::MAX,
        };
        end.overlaps(&range).then_some(Hole {
            range: end,
            is_end: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapper::DmaMemory;
    use proptest::prelude::*;

    const M: u64 = 1 << 20;

    fn x86() -> Limits {
        Limits {
            align_bytes: 4096,
            ranges: Some(vec![
                IovaRange {
                    start: 0,
                    last: 0xfedf_ffff,
                },
                IovaRange {
                    start: 0xfef0_0000,
                    last: (1 << 39) - 1,
                },
            ]),
            entries_left: Some(3),
        }
    }

    fn request(iova: u64, host_address: u64, size: u64) -> DmaRequest<'static> {
        DmaRequest {
            name: "zone z0",
            iova,
            host_address,
            size,
            memory: DmaMemory::DeviceDax,
        }
    }

    fn message(limits: &Limits, request: &DmaRequest<'_>) -> String {
        limits.check(request).unwrap_err().to_string()
    }

    #[test]
    fn a_range_between_the_holes_is_taken() {
        x86().check(&request(0, 2 * M, 0xc000_0000)).unwrap();
        x86().check(&request(1 << 32, 2 * M, 1 << 30)).unwrap();
        x86().check(&request(0xfedf_f000, 2 * M, 4096)).unwrap();
        x86()
            .check(&request((1 << 39) - 4096, 2 * M, 4096))
            .unwrap();
    }

    #[test]
    fn the_hole_is_named() {
        let text = message(&x86(), &request(0xf000_0000, 2 * M, 0x2000_0000));
        assert_eq!(
            text,
            "zone z0 can't be mapped for devices at 0xf0000000..=0x10fffffff: 0xfee00000..=0xfeefffff is where devices \
             write their interrupts: place the memory below or above it"
        );
        let text = message(&x86(), &request((1 << 39) - 4096, 2 * M, 8192));
        assert!(text.contains("addresses from 0x8000000000 on are out of the IOMMU's reach"));
        let mut other = x86();
        other.ranges = Some(vec![IovaRange {
            start: 16 * M,
            last: u64::MAX,
        }]);
        let text = message(&other, &request(0, 2 * M, 4096));
        assert!(text.contains("0x0..=0xffffff is reserved"), "{text}");
    }

    #[test]
    fn addresses_and_sizes_are_whole_steps() {
        let mut large = x86();
        large.align_bytes = 1 << 16;
        let text = message(&large, &request(0x1000, 2 * M, 2 * M));
        assert_eq!(
            text,
            "zone z0: its address 0x1000 is not a multiple of 64K, the page size of the IOMMU: place it at a multiple"
        );
        assert!(message(&large, &request(0, 0x1000, 2 * M)).contains("its host address 0x1000"));
        assert!(message(&large, &request(0, 0, 0x1000)).contains("its size 0x1000"));
    }

    #[test]
    fn a_range_of_nothing_or_around_the_end_is_none() {
        let wraps = request(u64::MAX - 4095, 2 * M, 8192);
        for bad in [
            request(0, 2 * M, 0),
            wraps,
            request(0, u64::MAX - 4095, 8192),
        ] {
            assert!(matches!(x86().check(&bad), Err(MapError::NoRange { .. })));
        }
    }

    #[test]
    fn the_last_entry_is_named() {
        let mut full = x86();
        full.entries_left = Some(0);
        let text = message(&full, &request(0, 2 * M, 4096));
        assert!(text.contains("dma_entry_limit"), "{text}");
    }

    #[test]
    fn without_ranges_every_address_is_tried() {
        let unknown = Limits {
            align_bytes: 4096,
            ranges: None,
            entries_left: None,
        };
        unknown.check(&request(0xfee0_0000, 2 * M, 4096)).unwrap();
    }

    proptest! {
        /// Against the obvious: look at each address.
        #[test]
        fn a_hole_is_found_when_an_address_is_not_usable(
            parts in prop::collection::vec((0_u64..64, 0_u64..20), 0..5),
            start in 0_u64..64,
            len in 1_u64..20,
        ) {
            let ranges: Vec<IovaRange> =
                parts.iter().map(|&(start, rest)| IovaRange { start, last: start + rest }).collect();
            let usable = |address: u64| ranges.iter().any(|r| r.start <= address && address <= r.last);
            let limits = Limits { align_bytes: 1, ranges: Some(ranges.clone()), entries_left: None };
            let range = IovaRange { start, last: start + len - 1 };
            let bad = (range.start..=range.last).find(|address| !usable(*address));
            match (limits.hole_in(range), bad) {
                (None, None) => {}
                (Some(hole), Some(bad)) => {
                    prop_assert!(hole.range.start <= bad && bad <= hole.range.last);
                    let last = if hole.is_end { 100 } else { hole.range.last };
                    prop_assert!((hole.range.start..=last).all(|address| !usable(address)));
                    prop_assert!(hole.range.start == 0 || usable(hole.range.start - 1));
                    prop_assert!(hole.is_end || usable(hole.range.last + 1));
                }
                (hole, bad) => prop_assert!(false, "{hole:?} but {bad:?}"),
            }
        }

        #[test]
        fn no_numbers_make_it_panic(iova: u64, host: u64, size: u64, start: u64, last: u64, shift in 0_u32..64) {
            let limits = Limits {
                align_bytes: 1 << shift,
                ranges: Some(vec![IovaRange { start, last }, IovaRange { start: last, last: u64::MAX }]),
                entries_left: None,
            };
            let _ = limits.check(&request(iova, host, size));
        }
    }
}

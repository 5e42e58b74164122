//! Ranges of guest-physical addresses, and handing parts of one out.

use std::collections::BTreeMap;
use std::fmt;

/// A range of addresses that ends below 2^64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Window {
    base: u64,
    size: u64,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.base, self.end())
    }
}

impl Window {
    /// `size` addresses from `base`; `None` if they do not end below 2^64.
    pub fn new(base: u64, size: u64) -> Option<Self> {
        base.checked_add(size)?;
        Some(Self { base, size })
    }

    /// First address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First address after it.
    pub fn end(&self) -> u64 {
        self.base + self.size
    }

    /// Whether all of `other` is in it.
    pub fn contains(&self, other: Self) -> bool {
        self.base <= other.base && other.end() <= self.end()
    }

    /// Whether they share an address.
    pub fn overlaps(&self, other: Self) -> bool {
        self.base < other.end() && other.base < self.end() && self.size != 0 && other.size != 0
    }
}

/// Hands out parts of a window: first fit, lowest address first.
#[derive(Debug)]
pub struct Allocator {
    window: Window,
    /// By first address; never overlapping.
    taken: BTreeMap<u64, Window>,
}

impl Allocator {
    /// All of it free.
    pub fn new(window: Window) -> Self {
        Self {
            window,
            taken: BTreeMap::new(),
        }
    }

    /// What it hands out from.
    pub fn window(&self) -> Window {
        self.window
    }

    /// A free part with this size (not 0) and alignment (a power of two) that touches none of `occupied`, which is used
    /// by somebody who did not ask. `None` if there is none.
    pub fn allocate(&mut self, size: u64, align: u64, occupied: &[Window]) -> Option<Window> {
        if size == 0 || !align.is_power_of_two() {
            return None;
        }
        let mut base = self.window.base;
        loop {
            base = base.checked_next_multiple_of(align)?;
            let wanted = Window::new(base, size)?;
            if !self.window.contains(wanted) {
                return None;
            }
            // Each turn goes past one range that is in the way, so there is an end.
            let last_below = self.taken.range(..wanted.end()).next_back();
            let in_the_way = last_below
                .map(|(_, taken)| taken)
                .into_iter()
                .chain(occupied)
                .find(|other| other.overlaps(wanted));
            let Some(other) = in_the_way else {
                self.taken.insert(base, wanted);
                return Some(wanted);
            };
            base = other.end();
        }
    }

    /// Takes back what begins at `base`. `None`: nothing was handed out there.
    pub fn free(&mut self, base: u64) -> Option<Window> {
        self.taken.remove(&base)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn window(base: u64, size: u64) -> Window {
        Window::new(base, size).unwrap()
    }

    #[test]
    fn ranges_know_their_neighbours() {
        let range = window(0x1000, 0x1000);
        assert!(range.contains(window(0x1000, 0x1000)) && range.contains(window(0x1fff, 1)));
        assert!(!range.contains(window(0xfff, 2)) && !range.contains(window(0x1fff, 2)));
        assert!(range.overlaps(window(0, 0x1001)) && range.overlaps(window(0x1fff, 0x1000)));
        assert!(!range.overlaps(window(0, 0x1000)) && !range.overlaps(window(0x2000, 1)));
        assert!(!range.overlaps(window(0x1800, 0)));
        assert_eq!(Window::new(u64::MAX, 2), None);
    }

    #[test]
    fn the_lowest_place_that_fits_is_taken() {
        let mut all = Allocator::new(window(0x1000, 0x9000));
        let base = |found: Option<Window>| found.map(|found| found.base());
        assert_eq!(base(all.allocate(0x1000, 0x1000, &[])), Some(0x1000));
        assert_eq!(base(all.allocate(0x4000, 0x4000, &[])), Some(0x4000));
        assert_eq!(base(all.allocate(0x2000, 0x1000, &[])), Some(0x2000));
        assert_eq!(
            base(all.allocate(0x1000, 0x1000, &[window(0x8800, 0x10)])),
            Some(0x9000)
        );
        assert_eq!(base(all.allocate(0x2000, 0x1000, &[])), None);
        assert_eq!(all.free(0x4000), Some(window(0x4000, 0x4000)));
        assert_eq!(all.free(0x4000), None);
        assert_eq!(base(all.allocate(0x2000, 0x1000, &[])), Some(0x4000));
        for (size, align) in [(0, 1), (1, 0), (1, 3), (u64::MAX, 1), (1, 1 << 63)] {
            assert_eq!(all.allocate(size, align, &[]), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_handed_out_is_apart_aligned_and_comes_back(
            base in 0u64..0x4000,
            occupied in prop::collection::vec((0u64..0x1_0000, 0u64..0x800), 0..4),
            steps in prop::collection::vec((0u64..0x1800, 0u32..14, any::<Option<prop::sample::Index>>()), 0..60)
        ) {
            let whole = window(base, 0x8000);
            let occupied: Vec<Window> = occupied.into_iter().map(|(b, s)| window(b, s)).collect();
            let mut all = Allocator::new(whole);
            let mut held: Vec<Window> = Vec::new();
            for (size, align, free) in steps {
                if let Some(index) = free {
                    if !held.is_empty() {
                        let range = held.swap_remove(index.index(held.len()));
                        prop_assert_eq!(all.free(range.base()), Some(range));
                    }
                } else if let Some(range) = all.allocate(size, 1 << align, &occupied) {
                    prop_assert_eq!(range.size(), size);
                    prop_assert!(range.base().is_multiple_of(1 << align) && whole.contains(range));
                    prop_assert!(!held.iter().chain(&occupied).any(|other| other.overlaps(range)));
                    held.push(range);
                } else {
                    // No place was overlooked: at every aligned address something is in the way.
                    let mut at = base.next_multiple_of(1 << align);
                    while size != 0 && at + size <= whole.end() {
                        let place = window(at, size);
                        prop_assert!(held.iter().chain(&occupied).any(|other| other.overlaps(place)));
                        at += 1 << align;
                    }
                }
            }
        }
    }
}

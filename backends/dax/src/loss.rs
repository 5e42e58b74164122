//! Whether a range of guest memory is still there.
//!
//! Memory can go away under any access: the host takes a device away, a page is poisoned. What finds out first (the SIGBUS
//! handler, the owner) sets the range's [`LossMark`]; who has read or written guest memory looks at it *afterwards*, before
//! anything of what was read goes anywhere. The mark is always set before scratch memory takes the place of what is lost,
//! so a mark that is not set says that no scratch byte was read.
//!
//! ```text
//!             poison                lose
//!   Present ─────────▶ Poisoned ───────────▶ Lost        never back: memory that returns is another mapping, and
//!      │                (some ranges)          ▲          another mark
//!      └──────────────────lose─────────────────┘
//! ```
//! Everything here is atomics on memory that is there before a signal comes: setting a mark is async-signal-safe.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};

use thiserror::Error;

/// How many poisoned ranges one mark tells apart. With more, the whole range counts as lost.
const POISONED_RANGES: usize = 64;

const PRESENT: u8 = 0;
const POISONED: u8 = 1;
const LOST: u8 = 2;

/// Counts every change of every mark.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// Memory that is not there any more, or poisoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the host has taken the memory away, or it is poisoned")]
pub struct Lost;

/// A moment, to compare with later: has any guest memory been lost since?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch(u64);

impl Epoch {
    /// Taken before guest memory is read.
    pub fn now() -> Self {
        Self(CHANGES.load(Ordering::SeqCst))
    }

    /// Asked after guest memory was read: an error when any was lost meanwhile, so that what was read may be scratch.
    pub fn unbroken(self) -> Result<(), Lost> {
        // What was read was read before the count is.
        fence(Ordering::SeqCst);
        if CHANGES.load(Ordering::SeqCst) == self.0 {
            Ok(())
        } else {
            Err(Lost)
        }
    }
}

/// Says of one range of guest memory whether it is there. Clones are the same mark.
#[derive(Clone, Default)]
pub struct LossMark(Arc<Mark>);

/// What the SIGBUS handler sets.
pub(crate) struct Mark {
    state: AtomicU8,
    poisoned: [AtomicU64; POISONED_RANGES],
    taken: AtomicUsize,
}

impl Default for Mark {
    fn default() -> Self {
        Self {
            state: AtomicU8::new(PRESENT),
            poisoned: [const { AtomicU64::new(0) }; POISONED_RANGES],
            taken: AtomicUsize::new(0),
        }
    }
}

impl Mark {
    /// All of it is gone. Async-signal-safe.
    pub(crate) fn lose(&self) {
        if self.state.swap(LOST, Ordering::SeqCst) != LOST {
            CHANGES.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// `1 << order` bytes (12 to 63) at `offset`, which is a multiple of that, are not to be touched. Async-signal-safe.
    pub(crate) fn poison(&self, offset: u64, order: u8) {
        let range = offset | u64::from(order);
        let known = |slot: &AtomicU64| slot.load(Ordering::SeqCst) == range;
        if self.poisoned.iter().any(known) {
            return;
        }
        let free = self.taken.fetch_add(1, Ordering::SeqCst);
        if let Some(slot) = self.poisoned.get(free) {
            slot.store(range, Ordering::SeqCst);
            self.state.fetch_max(POISONED, Ordering::SeqCst);
        } else {
            // Stays beyond the end however often it happens.
            self.taken.store(POISONED_RANGES, Ordering::SeqCst);
            self.state.store(LOST, Ordering::SeqCst);
        }
        CHANGES.fetch_add(1, Ordering::SeqCst);
    }

    fn poisoned(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.poisoned.iter().filter_map(|slot| {
            let range = slot.load(Ordering::SeqCst);
            let (offset, order) = (range & !0xfff, range & 0xfff);
            (range != 0).then(|| offset..offset + (1 << order))
        })
    }
}

impl LossMark {
    /// Nothing is lost.
    pub fn new() -> Self {
        Self::default()
    }

    /// All of it is gone: for the owner, who hears of it without touching it.
    pub fn lose(&self) {
        self.0.lose();
    }

    /// A part is poisoned, `1 << order` bytes (at least a page) around `offset`.
    pub fn poison(&self, offset: u64, order: u8) {
        let order = order.clamp(12, 63);
        self.0.poison(offset >> order << order, order);
    }

    /// Whether all of it is gone.
    pub fn is_lost(&self) -> bool {
        self.0.state.load(Ordering::SeqCst) == LOST
    }

    /// Whether every byte of `len` at `offset` is there. Cheap while nothing is lost.
    pub fn check(&self, offset: u64, len: u64) -> Result<(), Lost> {
        // What was read was read before the mark is.
        fence(Ordering::SeqCst);
        match self.0.state.load(Ordering::SeqCst) {
            PRESENT => Ok(()),
            POISONED => {
                let end = offset.saturating_add(len);
                let mut poisoned = self.0.poisoned();
                if poisoned.any(|range| range.start < end && offset < range.end) {
                    Err(Lost)
                } else {
                    Ok(())
                }
            }
            _ => Err(Lost),
        }
    }

    /// How many hold this mark, the caller included.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Offsets of what is poisoned.
    pub fn poisoned(&self) -> Vec<Range<u64>> {
        self.0.poisoned().collect()
    }

    /// For the handler's table.
    pub(crate) fn shared(&self) -> &Arc<Mark> {
        &self.0
    }
}

impl fmt::Debug for LossMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LossMark")
            .field("is_lost", &self.is_lost())
            .field("poisoned", &self.poisoned())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_poisoned_is() {
        let mark = LossMark::new();
        mark.check(0, u64::MAX).unwrap();
        mark.poison(0x20_1000, 21);
        mark.poison(0x20_0000, 21);
        mark.poison(0x40_5678, 12);
        assert_eq!(
            mark.poisoned(),
            [0x20_0000..0x40_0000, 0x40_5000..0x40_6000]
        );
        for (offset, len) in [(0, 0x20_0000), (0x40_0000, 0x5000), (0x40_6000, 1 << 40)] {
            mark.check(offset, len).unwrap();
        }
        for (offset, len) in [
            (0, 0x20_0001),
            (0x3f_ffff, 1),
            (0x40_5fff, 1),
            (0, u64::MAX),
        ] {
            assert_eq!(mark.check(offset, len), Err(Lost), "{offset:#x} {len:#x}");
        }
        assert!(!mark.is_lost());
        mark.lose();
        assert!(mark.is_lost());
        assert_eq!(mark.check(0, 1), Err(Lost));
    }

    #[test]
    fn the_first_page_can_be_poisoned() {
        let mark = LossMark::new();
        mark.poison(0, 12);
        assert_eq!(mark.check(0, 1), Err(Lost));
        mark.check(4096, 4096).unwrap();
    }

    #[test]
    fn more_poison_than_can_be_told_apart_is_a_loss() {
        let mark = LossMark::new();
        for page in 0..POISONED_RANGES as u64 {
            mark.poison(page << 13, 12);
        }
        assert!(!mark.is_lost());
        mark.check(4096, 4096).unwrap();
        for page in 1000..1010u64 {
            mark.poison(page << 13, 12);
            assert!(mark.is_lost());
        }
    }

    #[test]
    fn what_is_read_across_a_loss_is_not_to_be_used() {
        let mark = LossMark::new();
        let epoch = Epoch::now();
        mark.lose();
        assert_eq!(epoch.unbroken(), Err(Lost));
    }
}

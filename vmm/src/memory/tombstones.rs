//! Guest-physical ranges where memory was and is no more.
//!
//! A load there is answered with a machine check, never with made-up bytes; a store goes nowhere, as on hardware whose
//! memory does not answer (a machine check for a store of the kernel would end the guest). That holds after the guest has
//! ejected the memory, too: Linux lets go of persistent memory without taking it from the programs that have mapped a file
//! on it (before 6.15 their page tables are no reason to wait). It ends when other memory comes to be there, or with a reset.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use super::layout::Gpa;

/// A range without memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    gpa: Gpa,
    size: u64,
}

impl Range {
    /// What is left of it before and after.
    fn without(&self, taken: &std::ops::Range<u64>) -> Vec<Self> {
        let (start, end) = (self.gpa.0, self.gpa.0 + self.size);
        let parts = [start..end.min(taken.start), start.max(taken.end)..end];
        let parts = parts.into_iter().filter(|part| !part.is_empty());
        parts
            .map(|part| Self {
                gpa: Gpa(part.start),
                size: part.end - part.start,
            })
            .collect()
    }
}

/// All of them; read by vCPU threads, changed by the machine's owner.
#[derive(Debug, Default)]
pub struct Tombstones(RwLock<Vec<Range>>);

impl Tombstones {
    /// The memory of this range goes away.
    pub fn insert(&self, gpa: Gpa, size: u64) {
        let range = Range { gpa, size };
        let mut ranges = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if !ranges.contains(&range) {
            ranges.push(range);
        }
    }

    /// Memory comes to be in this range.
    pub fn give_way(&self, gpa: Gpa, size: u64) {
        let taken = gpa.0..gpa.0 + size;
        let mut ranges = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let rest = ranges.iter().flat_map(|range| range.without(&taken));
        *ranges = rest.collect();
    }

    /// A guest starts anew and knows of none of them.
    pub fn clear(&self) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Whether memory was there.
    pub fn contains(&self, address: u64) -> bool {
        self.read()
            .iter()
            .any(|range| (range.gpa.0..range.gpa.0 + range.size).contains(&address))
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.read().is_empty()
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<Range>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_dead_from_its_first_byte_to_its_last_until_memory_comes_there() {
        let dead = Tombstones::default();
        assert!(dead.is_empty());
        dead.insert(Gpa(0x1000), 0x2000);
        dead.insert(Gpa(0x1000), 0x2000);
        dead.insert(Gpa(0x8000), 0x1000);
        for (address, is_dead) in [
            (0xfff, false),
            (0x1000, true),
            (0x2fff, true),
            (0x3000, false),
        ] {
            assert_eq!(dead.contains(address), is_dead, "{address:#x}");
        }
        dead.give_way(Gpa(0x2000), 0x1000);
        assert!(dead.contains(0x1fff) && !dead.contains(0x2000) && dead.contains(0x8000));
        dead.give_way(Gpa(0x8000), 0x10_0000);
        assert!(!dead.contains(0x8000) && dead.contains(0x1000));
        dead.insert(Gpa(0x4000), 0x3000);
        dead.give_way(Gpa(0x5000), 0x1000);
        for (address, is_dead) in [
            (0x4fff, true),
            (0x5000, false),
            (0x5fff, false),
            (0x6000, true),
        ] {
            assert_eq!(dead.contains(address), is_dead, "{address:#x}");
        }
        dead.clear();
        assert!(dead.is_empty());
    }
}

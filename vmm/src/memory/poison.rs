//! What of guest memory is poisoned, for as long as the machine lives.
//!
//! The kernel forgets: a page of device-dax that was touched once and found bad is faulted in again by the next touch,
//! without a signal. So it is remembered here, by guest-physical address, and every later touch gets the same answer.
//! What counts as poisoned is the whole entry that the kernel takes away (2M or 1G of device-dax), not only the line or
//! page that was touched: the kernel names the entry and nothing smaller. The page is kept too, because it is what a guest
//! is told.
//!
//! ```text
//!   unknown ── BUS_MCEERR_AO, or _AR ──▶ known ── touched, or a device's memory ──▶ out
//!                                          │                                         │
//!                                          └──── the memory leaves the guest ◀───────┘        a reset changes nothing
//! ```
//! *Out* is out of the guest's reach: KVM has no memory slot there, so that each access comes as an exit with its address. A
//! load is a machine check at that address, in the page that was touched and at the instruction that touched it; a store goes
//! nowhere, and what is there stays poisoned, as on hardware. A guest that starts anew is told that it is no RAM; where its
//! kernel has to be loaded just there it can't be started.
//!
//! An access there is done by KVM's emulator, which does not know every instruction: a program that loads with AVX gets
//! SIGILL for it, and a kernel that writes cache lines back there by CLWB ends (KVM's sources, `arch/x86/kvm/emulate.c`).
//!
//! When it goes out is a choice. Memory of a device (pmem) does at once: what is lost of it is file data, whose programs die
//! one by one, and nothing but this list keeps the next of them from reading on. RAM that nobody has touched yet stays:
//! one bad line would take 2M from the guest's kernel, which has no way to live without them, while a processor that loads
//! that line tells all the same. RAM that was touched goes: the address that the kernel told with the signal is no more than the 2M
//! around it, and only an access that is done again tells the page. A guest whose kernel needs the rest of those 2M ends
//! by it; Linux groups memory by use, in blocks of just this size, so that most often it is programs that end.
//!
//! Who else reaches it: devices of this process get an error for a request that names a byte of the range, by the mark of its
//! region ([`super::loss`]). Devices of the host keep their map: a pin can't be given back in part, and what a device
//! that reads poison does is between it and the host's hardware.
//!
//! The lists are pure: no clock, no descriptor. The owner's loop fills them from [`super::incidents`], a vCPU's exit asks them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layout::Gpa;

const PAGE: u64 = 4096;

/// A poisoned range of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Poisoned {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Pages that are known to have been touched or named, each once, by address. What the guest is told of.
    pub pages: Vec<u64>,
}

impl Poisoned {
    fn end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }
}

/// All that is poisoned.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PoisonList {
    /// By first address; neither overlap nor touch.
    ranges: BTreeMap<u64, Poisoned>,
}

impl PoisonList {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Remembers a range around the page with `touched`. `true`: something of it is new.
    ///
    /// The range is widened to whole pages; what it overlaps or touches becomes one with it.
    pub fn insert(&mut self, range: &Range<u64>, touched: Option<Gpa>) -> bool {
        let start = range.start / PAGE * PAGE;
        let end = range
            .end
            .checked_next_multiple_of(PAGE)
            .unwrap_or(u64::MAX / PAGE * PAGE);
        if start >= end {
            return false;
        }
        let page = touched.map(|at| at.0 / PAGE * PAGE);
        let page = page.filter(|page| (start..end).contains(page));
        let known = self.find(start..end).cloned().filter(|known| {
            known.gpa <= start
                && end <= known.end()
                && page.is_none_or(|p| known.pages.contains(&p))
        });
        if known.is_some() {
            return false;
        }
        let mut all = Poisoned {
            gpa: start,
            size: end - start,
            pages: page.into_iter().collect(),
        };
        // What ends where this begins is one with it too.
        let near: Vec<u64> = self
            .ranges
            .range(..=end)
            .rev()
            .take_while(|(_, other)| other.end() >= start)
            .map(|(gpa, _)| *gpa)
            .collect();
        for gpa in near {
            if let Some(other) = self.ranges.remove(&gpa) {
                let end = all.end().max(other.end());
                all.gpa = all.gpa.min(other.gpa);
                all.size = end - all.gpa;
                all.pages.extend(other.pages);
            }
        }
        all.pages.sort_unstable();
        all.pages.dedup();
        self.ranges.insert(all.gpa, all);
        true
    }

    /// The first poisoned range that has a byte of these.
    pub fn find(&self, range: Range<u64>) -> Option<&Poisoned> {
        if range.is_empty() {
            return None;
        }
        // The last that begins before the end reaches furthest: they don't overlap.
        let mut before = self.ranges.range(..range.end).rev();
        let mut found = None;
        while let Some((_, poisoned)) = before.next()
            && poisoned.end() > range.start
        {
            found = Some(poisoned);
        }
        found
    }

    /// What of a range is not in the list.
    pub fn left_of(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut left = Vec::new();
        let mut start = range.start;
        let listed = self.ranges.range(..range.end).map(|(_, poisoned)| poisoned);
        for poisoned in listed.filter(|poisoned| poisoned.end() > range.start) {
            if start < poisoned.gpa {
                left.push(start..poisoned.gpa);
            }
            start = poisoned.end();
        }
        if start < range.end {
            left.push(start..range.end);
        }
        left
    }

    /// Forgets what is poisoned of a range: its memory has left the guest.
    pub fn remove(&mut self, range: &Range<u64>) {
        let touched: Vec<u64> = self
            .ranges
            .range(..range.end)
            .rev()
            .take_while(|(_, poisoned)| poisoned.end() > range.start)
            .map(|(gpa, _)| *gpa)
            .collect();
        for gpa in touched {
            let Some(old) = self.ranges.remove(&gpa) else {
                continue;
            };
            for part in [old.gpa..range.start, range.end..old.end()] {
                if part.start < part.end {
                    let pages = old.pages.iter().copied();
                    let kept = Poisoned {
                        gpa: part.start,
                        size: part.end - part.start,
                        pages: pages.filter(|page| part.contains(page)).collect(),
                    };
                    self.ranges.insert(kept.gpa, kept);
                }
            }
        }
    }

    /// What of a range is poisoned, by address.
    pub fn within(&self, range: Range<u64>) -> Vec<Poisoned> {
        let near = self.ranges.range(..range.end);
        near.filter_map(|(_, poisoned)| {
            let (start, end) = (poisoned.gpa.max(range.start), poisoned.end().min(range.end));
            let pages = poisoned.pages.iter().copied();
            (start < end).then(|| Poisoned {
                gpa: start,
                size: end - start,
                pages: pages.filter(|page| (start..end).contains(page)).collect(),
            })
        })
        .collect()
    }

    /// All of it, by address; for `vm.info`.
    pub fn iter(&self) -> impl Iterator<Item = &Poisoned> {
        self.ranges.values()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|poisoned| poisoned.size).sum()
    }
}

/// A machine's poison: changed by its owner, asked by vCPU threads, which add the pages that they meet.
#[derive(Debug, Default)]
pub struct Poison {
    lists: RwLock<Lists>,
    machine_checks: AtomicU64,
    dropped_stores: AtomicU64,
}

#[derive(Debug, Default)]
struct Lists {
    known: PoisonList,
    /// A part of what is known. Their pages are not kept.
    out: PoisonList,
}

impl Poison {
    /// As [`PoisonList::insert`]; `true`: something of the range was not known.
    pub fn insert(&self, range: &Range<u64>, touched: Option<Gpa>) -> bool {
        let mut lists = self.write();
        let is_new = !lists.known.left_of(range.clone()).is_empty();
        lists.known.insert(range, touched);
        is_new
    }

    /// From now on the guest is not to reach it: before that is done, so that there is no moment without an answer.
    pub fn take_out(&self, range: &Range<u64>) {
        let mut lists = self.write();
        lists.known.insert(range, None);
        lists.out.insert(range, None);
    }

    /// Whether all of it is out.
    pub fn is_all_out(&self, range: Range<u64>) -> bool {
        self.left_of(range).is_empty()
    }

    /// What of a range is known to be poisoned.
    pub fn known_within(&self, range: Range<u64>) -> Vec<Poisoned> {
        self.read().known.within(range)
    }

    /// What of a range the guest is to reach.
    pub fn left_of(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.read().out.left_of(range)
    }

    /// Whether an address is out.
    pub fn is_out(&self, address: u64) -> bool {
        let next = address.saturating_add(1);
        self.read().out.find(address..next).is_some()
    }

    /// The guest took a machine check for a load from there, which need not be poison.
    pub fn note_load(&self, address: u64) {
        self.machine_checks.fetch_add(1, Ordering::Relaxed);
        let page = address / PAGE * PAGE;
        let page = page..page.saturating_add(PAGE);
        let mut lists = self.write();
        if lists.known.find(page.clone()).is_some() {
            lists.known.insert(&page, Some(Gpa(address)));
        }
    }

    /// A store of the guest to there went nowhere.
    pub fn note_store(&self, _address: u64) {
        self.dropped_stores.fetch_add(1, Ordering::Relaxed);
    }

    /// The memory of a range has left the guest.
    pub fn forget(&self, range: &Range<u64>) {
        let mut lists = self.write();
        lists.known.remove(range);
        lists.out.remove(range);
    }

    /// What is known, by address.
    pub fn known(&self) -> Vec<Poisoned> {
        self.read().known.iter().cloned().collect()
    }

    /// For `vm.counters`.
    pub fn counters(&self) -> [(&'static str, u64); 3] {
        [
            ("poisoned_bytes", self.read().known.bytes()),
            (
                "machine_checks",
                self.machine_checks.load(Ordering::Relaxed),
            ),
            (
                "dropped_stores",
                self.dropped_stores.load(Ordering::Relaxed),
            ),
        ]
    }

    fn read(&self) -> RwLockReadGuard<'_, Lists> {
        self.lists.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Lists> {
        self.lists.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const M: u64 = 1 << 20;

    #[test]
    fn a_device_s_entry_is_poisoned_whole_and_its_page_is_remembered() {
        let mut list = PoisonList::new();
        assert!(list.insert(&(2 * M..4 * M), Some(Gpa(3 * M + 5))));
        assert!(!list.insert(&(2 * M..4 * M), Some(Gpa(3 * M))), "known");
        assert!(!list.insert(&(3 * M..3 * M + 4096), None), "known");
        assert!(list.insert(&(2 * M..4 * M), Some(Gpa(2 * M))), "a new page");
        let expected = Poisoned {
            gpa: 2 * M,
            size: 2 * M,
            pages: vec![2 * M, 3 * M],
        };
        assert_eq!(list.iter().collect::<Vec<_>>(), [&expected]);
        assert_eq!(list.find(4 * M - 1..4 * M), Some(&expected));
        assert_eq!(list.find(0..2 * M), None);
        assert_eq!(list.find(4 * M..u64::MAX), None);
        assert_eq!(list.find(3 * M..3 * M), None);
        let part = Poisoned {
            gpa: 3 * M,
            size: M,
            pages: vec![3 * M],
        };
        assert_eq!(list.within(3 * M..8 * M), [part]);
        assert_eq!(list.within(4 * M..8 * M), []);
    }

    #[test]
    fn what_leaves_the_guest_is_forgotten() {
        let mut list = PoisonList::new();
        list.insert(&(2 * M..8 * M), Some(Gpa(2 * M)));
        list.remove(&(4 * M..6 * M));
        let ranges: Vec<_> = list.iter().map(|p| (p.gpa / M, p.size / M)).collect();
        assert_eq!(ranges, [(2, 2), (6, 2)]);
        assert_eq!(list.bytes(), 4 * M);
        list.remove(&(0..u64::MAX));
        assert!(list.is_empty());
    }

    #[test]
    fn absurd_ranges_do_no_harm() {
        let mut list = PoisonList::new();
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 5 * M..M;
        assert!(!list.insert(&reversed, None));
        assert!(!list.insert(&(M..M), None));
        assert!(list.insert(&(u64::MAX - 5000..u64::MAX), Some(Gpa(0))));
        assert!(list.find(u64::MAX - 6000..u64::MAX).is_some());
        assert!(list.iter().all(|poisoned| poisoned.pages.is_empty()));
    }

    #[test]
    fn what_is_out_has_an_answer_for_each_byte_and_the_rest_is_reached() {
        let poison = Poison::default();
        assert!(poison.insert(&(4 * M..6 * M), None));
        assert!(!poison.insert(&(4 * M..6 * M), Some(Gpa(5 * M))), "known");
        assert!(!poison.is_out(4 * M), "known is not out");
        let left = |range| -> Vec<_> {
            let parts = poison.left_of(range).into_iter();
            parts.map(|part| (part.start / M, part.end / M)).collect()
        };
        assert_eq!(left(0..8 * M), [(0, 8)]);
        poison.take_out(&(4 * M..6 * M));
        assert!(poison.is_all_out(4 * M..6 * M) && !poison.is_all_out(4 * M..6 * M + 1));
        for (address, is_out) in [
            (4 * M - 1, false),
            (4 * M, true),
            (6 * M - 1, true),
            (6 * M, false),
        ] {
            assert_eq!(poison.is_out(address), is_out, "{address:#x}");
        }
        assert_eq!(left(0..8 * M), [(0, 4), (6, 8)]);
        assert_eq!(left(5 * M..7 * M), [(6, 7)]);
        assert_eq!(left(3 * M..5 * M), [(3, 4)]);
        assert!(!poison.is_out(u64::MAX));
        // A load of a tombstone is counted and is no poison.
        for address in [4 * M + 5, 4 * M + 6, 100 * M] {
            poison.note_load(address);
        }
        poison.note_store(4 * M);
        let expected = Poisoned {
            gpa: 4 * M,
            size: 2 * M,
            pages: vec![4 * M, 5 * M],
        };
        assert_eq!(poison.known(), [expected]);
        let counters = poison.counters().map(|(_, count)| count);
        assert_eq!(counters, [2 * M, 3, 1]);
        poison.forget(&(0..8 * M));
        assert!(poison.known().is_empty() && !poison.is_out(4 * M));
    }

    proptest! {
        /// As a set of pages has it.
        #[test]
        fn it_is_a_set_of_pages(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 1u64..16), 1..40),
        ) {
            let (mut list, mut pages) = (PoisonList::new(), BTreeSet::new());
            for (insert, first, count) in steps {
                let range = first * PAGE..(first + count) * PAGE;
                if insert {
                    let more = (first..first + count).any(|page| !pages.contains(&page));
                    prop_assert_eq!(list.insert(&range, None), more);
                    pages.extend(first..first + count);
                } else {
                    list.remove(&range);
                    for page in first..first + count {
                        pages.remove(&page);
                    }
                }
                for page in 0..80 {
                    let found = list.find(page * PAGE..page * PAGE + 1).is_some();
                    prop_assert_eq!(found, pages.contains(&page));
                }
                prop_assert_eq!(list.bytes(), pages.len() as u64 * PAGE);
                let (from, to) = (7u64, 71u64);
                let left: u64 = list
                    .left_of(from * PAGE..to * PAGE)
                    .iter()
                    .map(|part| (part.end - part.start) / PAGE)
                    .sum();
                let listed = pages.range(from..to).count() as u64;
                prop_assert_eq!(left, to - from - listed);
                let ranges: Vec<_> = list.iter().collect();
                for pair in ranges.windows(2) {
                    prop_assert!(pair[0].end() <= pair[1].gpa);
                }
            }
        }
    }
}

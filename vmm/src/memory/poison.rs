//! What of guest memory is poisoned, for as long as the machine lives.
//!
//! The kernel forgets: a page of device-dax that was touched once and found bad is faulted in again by the next touch,
//! without a signal. So it is remembered here, by guest-physical address, and every later touch gets the same answer.
//! What counts as poisoned is the whole entry that the kernel takes away (2M or 1G of device-dax), not only the line or
//! page that was touched; the page is kept too, because it is what a guest is told.
//!
//! Pure: no clock, no descriptor. The owner's loop fills it from [`super::incidents`], a vCPU's exit asks it.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;

use super::layout::Gpa;

const PAGE: u64 = 4096;

/// A poisoned range of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
                let ranges: Vec<_> = list.iter().collect();
                for pair in ranges.windows(2) {
                    prop_assert!(pair[0].end() <= pair[1].gpa);
                }
            }
        }
    }
}

//! How many vCPUs a guest has, from one number that was asked for to the next.
//!
//! ```text
//!             fewer are asked for                     all of them ejected, their threads ended
//!   Settled ─────────────────────────▶ Shrinking ─────────────────────────────────────────────▶ Settled (resized)
//!     │  ▲                                │ deadline
//!     │  │ ended (resized)                ▼
//!     │  └──────────────── Late ◀── ejected ── Settled (unanswered): what is left is the number
//!     └─ more are asked for ─▶ Settled, at once: a vCPU that has come waits until the guest starts it
//! ```
//! The guest is asked for certain vCPUs, those with the highest numbers, and never for the first. It may let go of some of
//! them, late or never. While a change is under way there is no other.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// What a guest has for the first of its vCPUs; as of devices.
const DEADLINE: Duration = super::slot::EJECT_DEADLINE;
/// And for each: Linux takes them offline one after the other, some tens of milliseconds each when nothing is pinned there.
const DEADLINE_EACH: Duration = Duration::from_secs(1);

/// What has to be done for a number of vCPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// They are there.
    Nothing,
    /// These come.
    Add(Vec<u8>),
    /// The guest is asked for these.
    Ask(Vec<u8>),
}

impl Plan {
    /// From those that are there to `count`, which is not 0 and not more than there are numbers.
    pub fn new(present: &BTreeSet<u8>, count: usize) -> Self {
        if present.len() < count {
            let absent = (0..=u8::MAX).filter(|vcpu| !present.contains(vcpu));
            return Self::Add(absent.take(count - present.len()).collect());
        }
        let too_many: Vec<u8> = present.iter().copied().skip(count.max(1)).collect();
        if too_many.is_empty() {
            Self::Nothing
        } else {
            Self::Ask(too_many)
        }
    }
}

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest has another number of vCPUs, and nothing is left of those that went.
    Resized,
    /// It did not let go of all in time. It still has them.
    Unanswered,
}

#[derive(Debug, Clone, Copy)]
struct Shrinking {
    count: usize,
    until: Instant,
}

/// The state.
#[derive(Debug, Default)]
pub struct Resizing {
    shrinking: Option<Shrinking>,
    /// Threads of ejected vCPUs are on their way out.
    ending: bool,
}

impl Resizing {
    /// The guest was asked to have `count` vCPUs, `fewer` less than it has.
    pub fn shrink(&mut self, count: usize, fewer: usize, now: Instant) {
        let each = DEADLINE_EACH.saturating_mul(u32::try_from(fewer).unwrap_or(u32::MAX));
        self.shrinking = Some(Shrinking {
            count,
            until: now + DEADLINE + each,
        });
    }

    /// A vCPU was ejected, and its thread is told to end.
    pub fn ejected(&mut self) {
        self.ending = true;
    }

    /// Whether there is something to wait for.
    pub fn is_under_way(&self) -> bool {
        self.shrinking.is_some() || self.ending
    }

    /// How many vCPUs a guest has that is reset now: one that was asked to let go of some has done so.
    pub fn count_after_reset(&self, present: usize) -> usize {
        self.shrinking.map_or(present, |shrinking| shrinking.count)
    }

    /// Looks again: `present` are there for the guest; `ends`: a thread of an ejected one has not ended yet.
    pub fn look(&mut self, now: Instant, present: usize, ends: bool) -> Option<Outcome> {
        if ends {
            return None;
        }
        let ended = std::mem::take(&mut self.ending);
        let outcome = match self.shrinking {
            Some(Shrinking { count, .. }) if present <= count => Outcome::Resized,
            Some(Shrinking { until, .. }) if now >= until => Outcome::Unanswered,
            None if ended => Outcome::Resized,
            _ => return None,
        };
        self.shrinking = None;
        Some(outcome)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(vcpus: &[u8]) -> BTreeSet<u8> {
        vcpus.iter().copied().collect()
    }

    #[test]
    fn the_lowest_come_and_the_highest_go_but_never_the_first() {
        assert_eq!(Plan::new(&set(&[0, 1, 3]), 5), Plan::Add(vec![2, 4]));
        assert_eq!(Plan::new(&set(&[0, 1, 3]), 3), Plan::Nothing);
        assert_eq!(Plan::new(&set(&[0, 1, 3]), 1), Plan::Ask(vec![1, 3]));
        assert_eq!(Plan::new(&set(&[0, 1]), 0), Plan::Ask(vec![1]));
    }

    #[test]
    fn a_shrink_is_over_when_the_last_thread_has_ended() {
        let now = Instant::now();
        let mut resizing = Resizing::default();
        resizing.shrink(1, 2, now);
        assert_eq!(resizing.look(now, 3, false), None);
        resizing.ejected();
        assert_eq!(resizing.look(now, 2, true), None);
        assert_eq!(resizing.look(now, 2, false), None, "one is missing");
        resizing.ejected();
        assert_eq!(resizing.look(now, 1, true), None);
        assert!(resizing.is_under_way());
        assert_eq!(resizing.look(now, 1, false), Some(Outcome::Resized));
        assert!(!resizing.is_under_way());
        assert_eq!(resizing.look(now, 1, false), None, "once");
    }

    #[test]
    fn a_guest_that_keeps_some_is_not_waited_for_and_may_be_late() {
        let now = Instant::now();
        let late = now + DEADLINE + 2 * DEADLINE_EACH;
        let mut resizing = Resizing::default();
        resizing.shrink(1, 2, now);
        assert_eq!(resizing.count_after_reset(3), 1, "it was asked");
        resizing.ejected();
        assert_eq!(
            resizing.look(late, 2, true),
            None,
            "threads end in any case"
        );
        assert_eq!(resizing.look(late, 2, false), Some(Outcome::Unanswered));
        assert!(!resizing.is_under_way());
        assert_eq!(resizing.count_after_reset(2), 2, "it was asked in vain");
        resizing.ejected();
        assert!(resizing.is_under_way());
        assert_eq!(resizing.look(late, 1, false), Some(Outcome::Resized));
    }

    proptest! {
        #[test]
        fn a_plan_gives_the_number_and_leaves_the_others(others in prop::collection::btree_set(1u8..254, 0..253), count in 1usize..=254) {
            let mut present = others;
            present.insert(0);
            let mut then = present.clone();
            match Plan::new(&present, count) {
                Plan::Nothing => {}
                Plan::Add(vcpus) => {
                    prop_assert!(vcpus.iter().all(|vcpu| *vcpu < 254));
                    for vcpu in vcpus {
                        prop_assert!(then.insert(vcpu));
                    }
                }
                Plan::Ask(vcpus) => {
                    for vcpu in &vcpus {
                        prop_assert!(*vcpu != 0 && then.remove(vcpu));
                    }
                    prop_assert!(then.range(vcpus[0]..).next().is_none());
                }
            }
            prop_assert_eq!(then.len(), count);
        }
    }
}

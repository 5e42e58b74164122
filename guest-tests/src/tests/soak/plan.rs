//! What happens next in a soak: a matter of the seed and of what is attached, and of nothing else.
//!
//! ```text
//!             add                     the operator removes it, the host takes it (held, or not)
//!   absent ─────────▶ present ──────────────────────────────────────────────────────────────────▶ absent
//!                        │ ▲ pause, reboot, check
//!                        └─┘
//! ```

use lab_agent::guest_protocol::pattern_word;

/// What comes and goes.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Store {
    /// A disk on a file of the host's.
    Disk,
    /// Persistent memory on device-dax.
    Pmem,
    /// A drive of the host's, passed through.
    Drive,
}

impl Store {
    pub(super) const ALL: [Self; 3] = [Self::Disk, Self::Pmem, Self::Drive];
}

/// One thing that happens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// It is added to the running guest.
    Add(Store),
    /// The guest's operator removes it.
    Remove(Store),
    /// The host takes it and is held until it is let go of.
    Take(Store),
    /// The host takes it and nobody is asked.
    Snatch(Store),
    /// The guest is held for so long.
    Pause { millis: u64 },
    /// The guest starts anew.
    Reboot,
    /// Everything present is asked whether it has what it promised, and the guest's RAM is tried.
    Check,
}

/// Numbers that follow from a seed.
#[derive(Clone, Debug)]
pub(super) struct Dice {
    seed: u64,
    rolls: u64,
}

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, rolls: 0 }
    }

    /// Below `sides`.
    fn roll(&mut self, sides: u64) -> u64 {
        self.rolls += 1;
        pattern_word(self.rolls, self.seed) % sides
    }

    /// What happens next when these are there.
    pub(super) fn next(&mut self, present: &[Store]) -> Step {
        let store = Store::ALL[usize::try_from(self.roll(3)).unwrap_or_default()];
        let what = self.roll(16);
        match what {
            0 => Step::Reboot,
            1 | 2 => Step::Pause {
                millis: self.roll(500),
            },
            3 | 4 => Step::Check,
            _ if !present.contains(&store) => Step::Add(store),
            5..=8 => Step::Remove(store),
            _ => match store {
                // A file has no driver that could be taken from it.
                Store::Disk => Step::Remove(store),
                Store::Drive => Step::Take(store),
                Store::Pmem if what.is_multiple_of(2) => Step::Take(store),
                Store::Pmem => Step::Snatch(store),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The first steps of a seed, as they happen when all goes well.
    fn steps(seed: u64, count: usize) -> Vec<Step> {
        let mut dice = Dice::new(seed);
        let mut present: Vec<Store> = Vec::new();
        let mut steps = Vec::new();
        for _ in 0..count {
            let step = dice.next(&present);
            match step {
                Step::Add(store) => {
                    assert!(!present.contains(&store), "{step:?} with {present:?}");
                    present.push(store);
                }
                Step::Remove(store) | Step::Take(store) | Step::Snatch(store) => {
                    assert!(present.contains(&store), "{step:?} with {present:?}");
                    present.retain(|other| *other != store);
                }
                Step::Pause { .. } | Step::Reboot | Step::Check => {}
            }
            steps.push(step);
        }
        steps
    }

    #[test]
    fn a_seed_is_a_story() {
        assert_eq!(steps(7, 200), steps(7, 200));
        assert_ne!(steps(7, 200), steps(8, 200));
    }

    #[test]
    fn everything_happens_some_time() {
        let told: HashSet<String> = steps(1, 2000)
            .iter()
            .map(|step| match step {
                Step::Pause { .. } => "pause".to_owned(),
                step => format!("{step:?}"),
            })
            .collect();
        let expected = [
            "Add(Disk)",
            "Add(Pmem)",
            "Add(Drive)",
            "Remove(Disk)",
            "Remove(Pmem)",
            "Remove(Drive)",
            "Take(Pmem)",
            "Take(Drive)",
            "Snatch(Pmem)",
            "pause",
            "Reboot",
            "Check",
        ];
        for step in expected {
            assert!(told.contains(step), "{step} is not among {told:?}");
        }
        assert_eq!(told.len(), expected.len());
    }
}

//! When a guard is looked for that is not there: at once, and then ever less often. For those who hold devices; time is passed in.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// The state of the search: a new one looks at once.
#[derive(Debug, Default)]
pub struct Search {
    /// Looks in vain, and guards that did not last, since one lasted.
    failures: u32,
    /// Not before then; absent is now.
    next: Option<Instant>,
    found: Option<Instant>,
    /// Whether it was told that nobody holds removals.
    warned: bool,
}

impl Search {
    const FIRST_PAUSE: Duration = Duration::from_millis(500);
    const LONGEST_PAUSE: Duration = Duration::from_mins(1);
    /// A guard that lived so long was no failure.
    const LASTING: Duration = Duration::from_mins(1);

    /// Whether it is time to look.
    pub fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// One was found.
    pub fn found(&mut self, now: Instant) {
        (self.found, self.next, self.warned) = (Some(now), None, false);
    }

    /// None was found. Whether that is worth a word: once, until a guard was there again.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.put_off(now);
        !std::mem::replace(&mut self.warned, true)
    }

    /// The one that was found has ended. The next one is looked for at once, unless that goes on like this.
    pub fn lost(&mut self, now: Instant) {
        let found = self.found.take();
        if found.is_none_or(|found| now.saturating_duration_since(found) >= Self::LASTING) {
            self.failures = 0;
        }
        if self.failures == 0 {
            self.failures = 1;
        } else {
            self.put_off(now);
        }
    }

    /// When it is time to look; `None` is at once.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    fn put_off(&mut self, now: Instant) {
        let pause = Self::FIRST_PAUSE.saturating_mul(1 << self.failures.min(16));
        self.next = Some(now + pause.min(Self::LONGEST_PAUSE));
        self.failures += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_lost_guard_is_looked_for_at_once_and_then_ever_less_often() {
        let mut now = Instant::now();
        let mut search = Search::default();
        assert!(search.is_due(now));
        search.found(now);
        now += Search::LASTING;
        search.lost(now);
        assert!(search.is_due(now), "it had lasted");
        // One after the other dies young.
        let mut pauses = Vec::new();
        for _ in 0..10 {
            search.found(now);
            search.lost(now);
            let next = search.next.unwrap();
            assert!(!search.is_due(now));
            pauses.push(next - now);
            now = next;
        }
        assert_eq!(pauses[0], SECOND);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[9], Search::LONGEST_PAUSE);
        search.found(now);
        search.lost(now + Search::LASTING);
        assert!(search.is_due(now + Search::LASTING));
    }

    #[test]
    fn one_that_is_not_there_is_looked_for_again_and_missed_aloud_once() {
        let mut now = Instant::now();
        let mut search = Search::default();
        assert!(search.failed(now), "worth a word");
        for _ in 0..20 {
            assert!(!search.is_due(now));
            now = search.next.unwrap();
            assert!(search.is_due(now));
            assert!(!search.failed(now), "said once");
        }
        assert_eq!(search.next.unwrap() - now, Search::LONGEST_PAUSE);
        search.found(now);
        search.lost(now);
        assert!(search.failed(now), "another loss");
    }
}

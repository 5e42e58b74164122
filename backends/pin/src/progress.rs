//! How far a long map is. Arithmetic only: time is passed in.

#![forbid(unsafe_code)]

use std::time::Duration;

use serde::Serialize;

/// Pinning at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Bytes that are pinned, as far as it can be told: never less than before.
    pub done_bytes: u64,
    /// Bytes that are to be.
    pub total_bytes: u64,
    /// Since the start.
    pub elapsed: Duration,
    /// Bytes for each second, on average since the start; `None`: too early to tell.
    pub rate: Option<u64>,
    /// What is left at that rate; `None`: can't be told.
    pub eta: Option<Duration>,
}

impl Progress {
    pub(crate) fn at(done_bytes: u64, total_bytes: u64, elapsed: Duration) -> Self {
        let nanos = elapsed.as_nanos();
        let rate = (u128::from(done_bytes) * 1_000_000_000)
            .checked_div(nanos)
            .filter(|rate| *rate != 0)
            .map(|rate| u64::try_from(rate).unwrap_or(u64::MAX));
        let left = u128::from(total_bytes.saturating_sub(done_bytes));
        let eta = rate.map(|rate| {
            let millis = left.saturating_mul(1000) / u128::from(rate);
            Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
        });
        Self {
            done_bytes,
            total_bytes,
            elapsed,
            rate,
            eta,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rest_is_told_from_the_rate_so_far() {
        let half = Progress::at(512, 1024, Duration::from_secs(2));
        assert_eq!(
            (half.rate, half.eta),
            (Some(256), Some(Duration::from_secs(2)))
        );
        let start = Progress::at(0, 1024, Duration::ZERO);
        assert_eq!((start.rate, start.eta), (None, None));
        let slow = Progress::at(0, 1024, Duration::from_secs(9));
        assert_eq!((slow.rate, slow.eta), (None, None));
        let end = Progress::at(1024, 1024, Duration::from_secs(4));
        assert_eq!(end.eta, Some(Duration::ZERO));
    }

    proptest! {
        #[test]
        fn no_numbers_make_it_panic(done: u64, total: u64, seconds: u64, nanos in 0_u32..1_000_000_000) {
            let _ = Progress::at(done, total, Duration::new(seconds, nanos));
        }
    }
}

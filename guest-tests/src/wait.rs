//! Waiting: for how long at most, and for what nobody tells of.

use std::thread;
use std::time::{Duration, Instant};

/// For what takes a second or less on a real machine. It says that something stands still, not how fast it is: emulated twice
/// over, on a machine that has other work, a second has been a minute.
pub const PATIENCE: Duration = Duration::from_mins(3);
/// How many seconds here one second of a real machine's has been. What somebody waits for so long there is waited for as many
/// times longer here.
pub const SLACK: u32 = 60;
/// What is waited for is announced by nobody: the lab asks again, as a person would.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Looks until it is so, at least once; after `at_most`, the error is what `late` gives.
pub fn until<E>(
    at_most: Duration,
    mut is_so: impl FnMut() -> Result<bool, E>,
    late: impl FnOnce() -> E,
) -> Result<(), E> {
    let end = Instant::now() + at_most;
    while !is_so()? {
        if Instant::now() >= end {
            return Err(late());
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_when_it_is_so_or_too_late_or_in_an_error() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok(looks == 3)
        };
        until(Duration::from_mins(1), third, || "late").unwrap();
        let never = || Ok(false);
        assert_eq!(until(Duration::ZERO, never, || "late"), Err("late"));
        let fails = || Err("no");
        assert_eq!(until(Duration::ZERO, fails, || "late"), Err("no"));
    }
}

//! Waits for a condition that nothing announces, up to a deadline.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How often the condition is looked at: seldom enough to leave an emulated processor to those who bring it about.
const INTERVAL: Duration = Duration::from_millis(10);

/// Looks until `ready` gives something, or until the time is over.
pub(crate) fn until<T>(deadline: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = ready() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(INTERVAL);
    }
}

/// Looks until something has this path, or nothing any more.
pub(crate) fn for_path(path: &str, deadline: Duration, wanted: bool) -> Result<(), String> {
    let is_so = || (Path::new(path).symlink_metadata().is_ok() == wanted).then_some(());
    until(deadline, is_so).ok_or_else(|| {
        let state = if wanted { "not there" } else { "still there" };
        format!("{path} is {state} after {} s", deadline.as_secs())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_once_more_than_never() {
        assert_eq!(until(Duration::ZERO, || Some(1)), Some(1));
        assert_eq!(until::<u8>(Duration::ZERO, || None), None);
        let mut looks = 0;
        let third = || {
            looks += 1;
            (looks == 3).then_some(looks)
        };
        assert_eq!(until(Duration::from_mins(1), third), Some(3));
    }
}

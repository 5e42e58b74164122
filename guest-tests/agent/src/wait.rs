//! Waits for a condition that nothing announces, up to a deadline.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

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
    let is_so = || {
        let is_as_wanted = match Path::new(path).symlink_metadata() {
            Ok(metadata) => wanted && is_usable(path, &metadata),
            Err(_) => !wanted,
        };
        is_as_wanted.then_some(())
    };
    until(deadline, is_so).ok_or_else(|| {
        let state = if wanted { "not there" } else { "still there" };
        format!("{path} is {state} after {} s", deadline.as_secs())
    })
}

/// The kernel makes the node of a block device before the device can be opened (`device_add_disk`, block/genhd.c).
fn is_usable(path: &str, metadata: &Metadata) -> bool {
    let is_early = |error: io::Error| Errno::from_io_error(&error) == Some(Errno::NXIO);
    !metadata.file_type().is_block_device() || !File::open(path).is_err_and(is_early)
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

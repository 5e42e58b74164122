//! Which bytes of which files a guest uses: no byte has two users unless none of them writes.
//!
//! Files are compared by path. Two paths to one file, and other guests, are for the locks to tell.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::ByteSize;

/// Two things of one guest want the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{device} and {other} both use {}, {device} {range}, {other} {other_range}, and not both only \
     read; give each a file or a range of its own", file.display()
)]
pub struct FileError {
    /// The later one.
    pub device: String,
    /// The one before it.
    pub other: String,
    /// The file.
    pub file: PathBuf,
    /// What the later one uses of it.
    pub range: Extent,
    /// What the one before it uses of it.
    pub other_range: Extent,
}

/// A part of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// The first byte.
    pub offset: ByteSize,
    /// How many; `None` is up to the end.
    pub size: Option<ByteSize>,
}

impl Extent {
    /// Whether both have a byte.
    pub fn overlaps(self, other: Self) -> bool {
        let bounds = |extent: Self| {
            let start = extent.offset.bytes();
            let size = extent.size.map(ByteSize::bytes);
            (
                start,
                size.map_or(u64::MAX, |size| start.saturating_add(size)),
            )
        };
        let ((start, end), (other_start, other_end)) = (bounds(self), bounds(other));
        start < other_end && other_start < end
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.size {
            Some(size) => write!(f, "{size} from offset {}", self.offset),
            None => write!(f, "all from offset {}", self.offset),
        }
    }
}

/// One use of a file.
#[derive(Clone, Debug)]
pub(super) struct FileUse<'a> {
    /// What uses it, as errors name it.
    pub(super) device: String,
    pub(super) file: &'a Path,
    pub(super) extent: Extent,
    pub(super) writes: bool,
}

/// Checks that no two uses are in each other's way.
pub(super) fn check(uses: &[FileUse<'_>]) -> Result<(), FileError> {
    for (at, later) in uses.iter().enumerate() {
        for earlier in &uses[..at] {
            if later.file == earlier.file
                && (later.writes || earlier.writes)
                && later.extent.overlaps(earlier.extent)
            {
                return Err(FileError {
                    device: later.device.clone(),
                    other: earlier.device.clone(),
                    file: later.file.to_owned(),
                    range: later.extent,
                    other_range: earlier.extent,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u32, size: Option<u32>) -> Extent {
        Extent {
            offset: ByteSize::from_mib(offset),
            size: size.map(ByteSize::from_mib),
        }
    }

    #[test]
    fn ranges_overlap_where_both_have_a_byte() {
        let part = extent(4, Some(4));
        for (other, overlap) in [
            (extent(0, Some(4)), false),
            (extent(0, Some(5)), true),
            (extent(8, None), false),
            (extent(7, None), true),
            (extent(0, None), true),
            (extent(5, Some(1)), true),
        ] {
            assert_eq!(part.overlaps(other), overlap, "{other}");
            assert_eq!(other.overlaps(part), overlap, "{other}");
        }
    }

    #[test]
    fn readers_share_and_a_writer_does_not() {
        let uses = |file: &'static str, extent, writes| {
            [
                ("--pmem id=a", "/f", Extent::default(), false),
                ("--disk id=b", file, extent, writes),
            ]
            .map(|(device, file, extent, writes)| FileUse {
                device: device.to_owned(),
                file: Path::new(file),
                extent,
                writes,
            })
        };
        let whole = Extent::default();
        assert_eq!(check(&uses("/f", whole, false)), Ok(()));
        assert_eq!(check(&uses("/g", whole, true)), Ok(()));
        let error = check(&uses("/f", extent(1, Some(2)), true)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--disk id=b and --pmem id=a both use /f, --disk id=b 2M from offset 1M, --pmem id=a all \
             from offset 0, and not both only read; give each a file or a range of its own"
        );
    }
}

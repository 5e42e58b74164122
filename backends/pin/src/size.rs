//! Byte counts as people write them.

#![forbid(unsafe_code)]

use std::fmt;

/// A number of bytes that prints as `K`, `M`, `G` or `T` when that is exact, and as plain bytes when it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, char); 4] = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
        let bytes = self.0;
        match UNITS
            .iter()
            .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        {
            Some((shift, unit)) => write!(f, "{}{unit}", bytes >> shift),
            None => write!(f, "{bytes}"),
        }
    }
}

//! Byte counts as people write them on a command line.
//!
//! Errors of this crate are read by people who typed `2M` or `1G`; they print sizes so that they can be typed back.

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

#[cfg(test)]
mod tests {
    use super::ByteSize;

    #[test]
    fn prints_the_largest_exact_unit() {
        let cases = [
            (0, "0"),
            (1, "1"),
            (4096, "4K"),
            (4097, "4097"),
            (2 << 20, "2M"),
            (1 << 30, "1G"),
            (1536 << 20, "1536M"),
            (3 << 40, "3T"),
        ];
        for (bytes, text) in cases {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}

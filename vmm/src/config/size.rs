//! A number of bytes, as people write it: `4096`, `512M`, `4G`.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A size or an offset in bytes. In JSON a plain number, on the command line with K, M, G or T.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(transparent)]
#[schemars(inline)]
pub struct ByteSize(u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ByteSize {
    /// No bytes at all.
    pub const ZERO: Self = Self(0);

    /// A size of this many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// A size of this many mebibytes.
    pub const fn from_mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Reads `4096`, `4K`, `512M`, `4G` or `1T` (binary units); `None` for anything else and for
    /// what does not fit 64 bits.
    pub fn parse(text: &str) -> Option<Self> {
        let unit = text.chars().last()?.to_ascii_uppercase();
        let (digits, shift) = match UNITS.iter().find(|(letter, _)| *letter == unit) {
            Some((_, shift)) => (&text[..text.len() - 1], *shift),
            None => (text, 0),
        };
        // `u64::from_str` would take a leading plus sign.
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        digits
            .parse::<u64>()
            .ok()?
            .checked_mul(1 << shift)
            .map(Self)
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit that divides the size, so that what is printed can be typed back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS
            .iter()
            .find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((letter, shift)) => write!(f, "{}{letter}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_are_binary_and_case_does_not_matter() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4K", 4096),
            ("512M", 512 << 20),
            ("3g", 3 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(
                ByteSize::parse(text).map(ByteSize::bytes),
                Some(bytes),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1GB",
            "1 G",
            "0x10",
            "16777216T",
            "1é",
        ] {
            assert_eq!(ByteSize::parse(text), None, "{text}");
        }
    }

    #[test]
    fn json_is_a_plain_number() {
        assert_eq!(
            serde_json::to_string(&ByteSize::from_mib(1)).unwrap(),
            "1048576"
        );
        assert!(serde_json::from_str::<ByteSize>("\"1M\"").is_err());
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(bytes: u64) {
            let size = ByteSize::from_bytes(bytes);
            prop_assert_eq!(ByteSize::parse(&size.to_string()), Some(size));
        }
    }
}

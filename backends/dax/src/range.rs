//! A checked part of one dax device.
//!
//! The kernel checks nothing here at map time beyond the alignment: past the end it maps happily and answers the
//! first touch with SIGBUS. So a [`DaxRange`] can only be made through [`DaxDevice::range`](crate::DaxDevice::range)
//! and is always non-empty, aligned and within the device. It does not say that the range is free: a lock does.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::ofd::Span;
use crate::size::ByteSize;

/// An aligned, non-empty byte range within a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DaxRange {
    offset: u64,
    len: u64,
}

impl DaxRange {
    /// Where the range begins, in bytes from the device's start.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The range's length in bytes, never zero.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The first byte after the range.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// True when at least one byte is in both ranges.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// The range that was asked for; without an offset it starts at 0, without a size it runs to the end.
    pub(crate) fn checked(
        device: &Bounds<'_>,
        offset: Option<u64>,
        size: Option<u64>,
    ) -> Result<Self, RangeError> {
        let Bounds { path, len, align } = *device;
        let offset = offset.unwrap_or(0);
        let error = |kind: fn(Asked) -> RangeError, asked_len| {
            kind(Asked {
                path: path.to_owned(),
                offset: ByteSize(offset),
                size: ByteSize(asked_len),
                device_size: ByteSize(len),
                align: ByteSize(align),
            })
        };
        if !offset.is_multiple_of(align) {
            return Err(error(RangeError::MisalignedOffset, size.unwrap_or(0)));
        }
        let Some(rest) = len.checked_sub(offset).filter(|rest| *rest != 0) else {
            return Err(error(RangeError::PastEnd, size.unwrap_or(0)));
        };
        // A device's own size can leave a tail that no mapping can reach; "the whole device" stops before it.
        let asked = size.unwrap_or(rest - rest % align);
        if asked == 0 {
            return Err(error(
                if size.is_some() {
                    RangeError::ZeroSize
                } else {
                    RangeError::PastEnd
                },
                0,
            ));
        }
        if !asked.is_multiple_of(align) {
            return Err(error(RangeError::MisalignedSize, asked));
        }
        if asked > rest {
            return Err(error(RangeError::PastEnd, asked));
        }
        Ok(Self { offset, len: asked })
    }

    /// The first `len` bytes and the rest, if both are whole multiples of `align` and neither is empty.
    pub(crate) fn split(&self, len: u64, align: u64) -> Option<(Self, Self)> {
        let rest = self.len.checked_sub(len)?;
        let whole = |len: u64| len != 0 && len.is_multiple_of(align);
        let (front, back) = (
            Self { len, ..*self },
            Self {
                offset: self.offset + len,
                len: rest,
            },
        );
        (whole(len) && whole(rest)).then_some((front, back))
    }

    /// What between these two is whole multiples of `align`, if anything is.
    pub(crate) fn whole(start: u64, end: u64, align: u64) -> Option<Self> {
        let offset = start.checked_next_multiple_of(align)?;
        let len = (end - end % align).checked_sub(offset)?;
        (len != 0).then_some(Self { offset, len })
    }

    /// A range that somebody else holds, as the kernel reports it: whole bytes, neither checked nor aligned.
    pub(crate) fn reported(conflict: Span, device_len: u64) -> Self {
        let Span { offset, len } = conflict;
        let to_end = device_len.saturating_sub(offset);
        let len = if len == 0 { to_end } else { len };
        Self { offset, len }
    }

    /// The range as the kernel's locks have it.
    pub(crate) fn span(&self) -> Span {
        Span {
            offset: self.offset,
            len: self.len,
        }
    }

    #[cfg(test)]
    pub(crate) fn for_test(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }
}

impl fmt::Display for DaxRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} at offset {}",
            ByteSize(self.len),
            ByteSize(self.offset)
        )
    }
}

/// What a range is checked against.
#[derive(Clone, Copy)]
pub(crate) struct Bounds<'a> {
    pub(crate) path: &'a Path,
    pub(crate) len: u64,
    pub(crate) align: u64,
}

/// What was asked for and what the device has; part of every [`RangeError`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The device.
    pub path: PathBuf,
    /// The offset asked for.
    pub offset: ByteSize,
    /// The size asked for, 0 when none was given.
    pub size: ByteSize,
    /// The device's size.
    pub device_size: ByteSize,
    /// The device's alignment.
    pub align: ByteSize,
}

impl Asked {
    fn aligned(value: ByteSize, align: ByteSize) -> (ByteSize, ByteSize) {
        let below = value.0 - value.0 % align.0;
        (ByteSize(below), ByteSize(below.saturating_add(align.0)))
    }

    fn offset_choices(&self) -> String {
        let (below, above) = Self::aligned(self.offset, self.align);
        if above.0 < self.device_size.0 {
            format!("{below} or {above}")
        } else {
            below.to_string()
        }
    }

    fn size_choices(&self) -> String {
        let (below, above) = Self::aligned(self.size, self.align);
        let fits = |size: ByteSize| size.0 != 0 && size.0 <= self.rest();
        match (fits(below), fits(above)) {
            (true, true) => format!("{below} or {above}"),
            (true, false) => below.to_string(),
            (false, true) => above.to_string(),
            (false, false) => ByteSize(self.usable()).to_string(),
        }
    }

    fn rest(&self) -> u64 {
        self.device_size.0.saturating_sub(self.offset.0)
    }

    fn usable(&self) -> u64 {
        self.rest() - self.rest() % self.align.0
    }

    fn past_end_mend(&self) -> String {
        match self.usable() {
            0 => format!(
                "use an offset of at most {}",
                ByteSize(
                    (self.device_size.0 - self.device_size.0 % self.align.0)
                        .saturating_sub(self.align.0)
                )
            ),
            usable => format!("use size={} or less", ByteSize(usable)),
        }
    }
}

/// Why a range can't be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RangeError {
    /// The offset is not a multiple of the alignment.
    #[error(
        "offset {} of {} is not a multiple of the device's alignment {}: use offset={}",
        .0.offset, .0.path.display(), .0.align, .0.offset_choices()
    )]
    MisalignedOffset(Asked),
    /// The size is not a multiple of the alignment.
    #[error(
        "size {} of {} is not a multiple of the device's alignment {}: use size={}",
        .0.size, .0.path.display(), .0.align, .0.size_choices()
    )]
    MisalignedSize(Asked),
    /// The range ends, or starts, behind the device's end.
    #[error(
        "{} at offset {} does not fit into {}, which has {}: {}",
        .0.size, .0.offset, .0.path.display(), .0.device_size, .0.past_end_mend()
    )]
    PastEnd(Asked),
    /// A size of zero was asked for.
    #[error(
        "size 0 of {} was asked for: leave the size out for the whole device, or use a multiple of {}",
        .0.path.display(), .0.align
    )]
    ZeroSize(Asked),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const M: u64 = 1 << 20;

    fn ask(len: u64, offset: Option<u64>, size: Option<u64>) -> Result<DaxRange, RangeError> {
        let path = Path::new("/dev/dax0.0");
        DaxRange::checked(
            &Bounds {
                path,
                len,
                align: 2 * M,
            },
            offset,
            size,
        )
    }

    fn message(result: Result<DaxRange, RangeError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_the_whole_device() {
        let range = ask(64 * M, None, None).unwrap();
        assert_eq!(
            (range.offset(), range.len(), range.end()),
            (0, 64 * M, 64 * M)
        );
        let range = ask(64 * M, Some(4 * M), None).unwrap();
        assert_eq!((range.offset(), range.len()), (4 * M, 60 * M));
        // A tail below the alignment can't be mapped and is not offered.
        assert_eq!(ask(65 * M, None, None).unwrap().len(), 64 * M);
    }

    #[test]
    fn messages_name_the_device_and_what_to_type() {
        assert_eq!(
            message(ask(64 * M, Some(3 * M), None)),
            "offset 3M of /dev/dax0.0 is not a multiple of the device's alignment 2M: use offset=2M or 4M"
        );
        assert_eq!(
            message(ask(64 * M, None, Some(63 * M))),
            "size 63M of /dev/dax0.0 is not a multiple of the device's alignment 2M: use size=62M or 64M"
        );
        assert_eq!(
            message(ask(64 * M, Some(62 * M), Some(3 * M))),
            "size 3M of /dev/dax0.0 is not a multiple of the device's alignment 2M: use size=2M"
        );
        assert_eq!(
            message(ask(64 * M, None, Some(1 << 30))),
            "1G at offset 0 does not fit into /dev/dax0.0, which has 64M: use size=64M or less"
        );
        assert_eq!(
            message(ask(64 * M, Some(64 * M), Some(2 * M))),
            "2M at offset 64M does not fit into /dev/dax0.0, which has 64M: use an offset of at most 62M"
        );
        assert!(message(ask(64 * M, None, Some(0))).starts_with("size 0 of /dev/dax0.0"));
        assert!(matches!(ask(0, None, None), Err(RangeError::PastEnd(_))));
    }

    #[test]
    fn huge_numbers_do_not_wrap() {
        let top = u64::MAX - (2 * M - 1);
        assert!(matches!(
            ask(64 * M, Some(2 * M), Some(top)),
            Err(RangeError::PastEnd(_))
        ));
        assert!(matches!(
            ask(64 * M, Some(top), Some(2 * M)),
            Err(RangeError::PastEnd(_))
        ));
        assert!(matches!(
            ask(64 * M, Some(u64::MAX), Some(u64::MAX)),
            Err(RangeError::MisalignedOffset(_))
        ));
        assert!(!message(ask(64 * M, Some(u64::MAX), None)).is_empty());
        assert!(!message(ask(64 * M, None, Some(u64::MAX))).is_empty());
    }

    proptest! {
        /// Accepted exactly when the arithmetic done in 128 bits says so, and then it is what was asked for.
        #[test]
        fn agrees_with_wide_arithmetic(
            align_shift in prop::sample::select(vec![12_u32, 21, 30]),
            blocks in 0_u64..9, tail in prop::sample::select(vec![0_u64, 4096]),
            offset in prop_oneof![(0_u64..10, 0_u64..3), (0..u64::MAX / 2, 0_u64..3)],
            size in prop_oneof![(0_u64..10, 0_u64..3), (0..u64::MAX / 2, 0_u64..3)],
        ) {
            let align = 1_u64 << align_shift;
            let len = blocks * align + tail;
            let value = |(blocks, odd): (u64, u64)| blocks.wrapping_mul(align).wrapping_add(odd / 2 * 512);
            let (offset, size) = (value(offset), value(size));
            let path = Path::new("/dev/dax0.0");
            let result = DaxRange::checked(&Bounds { path, len, align }, Some(offset), Some(size));
            let valid = offset % align == 0 && size % align == 0 && size != 0
                && u128::from(offset) + u128::from(size) <= u128::from(len);
            match result {
                Ok(range) => {
                    prop_assert!(valid);
                    prop_assert_eq!((range.offset(), range.len()), (offset, size));
                }
                Err(error) => {
                    prop_assert!(!valid, "{}", error);
                    prop_assert!(error.to_string().contains("/dev/dax0.0"));
                }
            }
        }

        #[test]
        fn overlap_is_symmetric_and_means_a_common_byte(
            a in 0_u64..20, a_len in 1_u64..10, b in 0_u64..20, b_len in 1_u64..10,
        ) {
            let (x, y) = (DaxRange::for_test(a, a_len), DaxRange::for_test(b, b_len));
            let common = (a..a + a_len).any(|byte| (b..b + b_len).contains(&byte));
            prop_assert_eq!(x.overlaps(&y), common);
            prop_assert_eq!(y.overlaps(&x), common);
        }
    }
}

//! What of a device is taken, by whom, and what is free: as the locks on its node tell it.
//!
//! A look only: what it finds free can be somebody's a moment later. [`DaxDevice::lock_first_fit`] is the way to have
//! some of it, and there the lock decides.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::sync::PoisonError;

use thiserror::Error;

use crate::holder::{self, Holder};
use crate::lock::{LockError, LockKind, RangeLock};
use crate::ofd::{self, Request, Span};
use crate::open::DaxDevice;
use crate::range::DaxRange;

/// A range that somebody has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Which.
    pub range: DaxRange,
    /// Who, as far as procfs tells.
    pub holder: Option<Holder>,
}

/// What is taken of a device and what is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    size: u64,
    align: u64,
    taken: Vec<Taken>,
}

/// The locks on a device can't be asked about.
#[derive(Debug, Error)]
#[error("cannot ask for the locks on {}", path.display())]
pub struct RoomError {
    /// The device.
    pub path: PathBuf,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl Room {
    /// Bytes that can be had when nobody has any: whole multiples of the alignment.
    pub fn total_bytes(&self) -> u64 {
        self.size - self.size % self.align
    }

    /// What is taken, in order of offset.
    pub fn taken(&self) -> &[Taken] {
        &self.taken
    }

    /// What is free, in order of offset: whole multiples of the alignment, each as large as it can be.
    pub fn free(&self) -> Vec<DaxRange> {
        let mut free = Vec::new();
        let mut start = 0;
        for Taken { range, .. } in &self.taken {
            free.extend(DaxRange::whole(start, range.offset(), self.align));
            start = start.max(range.end());
        }
        free.extend(DaxRange::whole(start, self.size, self.align));
        free
    }

    /// Bytes that are free, in however many pieces.
    pub fn free_bytes(&self) -> u64 {
        self.free().iter().map(DaxRange::len).sum()
    }

    /// Bytes of the largest free piece.
    pub fn largest_free_bytes(&self) -> u64 {
        self.free().iter().map(DaxRange::len).max().unwrap_or(0)
    }
}

impl DaxDevice {
    /// Looks at what is taken of the device, by anybody.
    pub fn room(&self) -> Result<Room, RoomError> {
        let device = self.shared();
        let size = device.facts.size_bytes;
        let mut spans = Vec::new();
        // The kernel tells one lock at a time, any of those in the way; what lies beside it is asked about next.
        let mut unknown = vec![(0, size)];
        while let Some((start, end)) = unknown.pop() {
            if start >= end {
                continue;
            }
            let Some(span) = self.conflict(start, end - start)? else {
                continue;
            };
            let held = DaxRange::reported(span, size);
            unknown.push((start, held.offset()));
            unknown.push((held.end(), end));
            if !spans.contains(&span) {
                spans.push(span);
            }
        }
        let holders = holder::of_locks(&device.proc, &device.file, &spans);
        let mut taken: Vec<Taken> = spans
            .into_iter()
            .zip(holders)
            .map(|(span, holder)| Taken {
                range: DaxRange::reported(span, size),
                holder,
            })
            .collect();
        let claims = device.claims.lock().unwrap_or_else(PoisonError::into_inner);
        taken.extend(claims.iter().map(|range| Taken {
            range: *range,
            holder: Some(Holder::this_process(&device.proc)),
        }));
        drop(claims);
        taken.sort_by_key(|taken| (taken.range.offset(), taken.range.end()));
        Ok(Room {
            size,
            align: device.facts.align_bytes,
            taken,
        })
    }

    /// Locks the first range of this size that nobody has, at a multiple of `align`; `None` when there is no such. `size` and
    /// `align` are multiples of the device's own alignment. Of two who want the same range one has it, and the other the next.
    pub fn lock_first_fit(&self, size: u64, align: u64) -> Result<Option<RangeLock>, LockError> {
        let mut offset = 0_u64;
        loop {
            let Ok(range) = self.range(Some(offset), Some(size)) else {
                return Ok(None);
            };
            let busy_until = match self.busy(range) {
                Ok(Some(busy)) => busy.end(),
                Ok(None) => match self.lock(range, LockKind::Exclusive) {
                    Ok(lock) => return Ok(Some(lock)),
                    // Somebody was quicker. Who has left again already leaves no end to go on from.
                    Err(LockError::InUse { held, .. }) => held.map_or(0, |held| held.end()),
                    Err(error) => return Err(error),
                },
                Err(source) => {
                    return Err(LockError::Refused {
                        path: self.path().to_owned(),
                        asked: range,
                        source,
                    });
                }
            };
            // A range that begins before that end has a byte in common with what is in the way, whichever of several that is.
            let next = busy_until.max(offset + 1).checked_next_multiple_of(align);
            let Some(next) = next else { return Ok(None) };
            offset = next;
        }
    }

    /// Something that is taken of a range, if anything is.
    fn busy(&self, range: DaxRange) -> io::Result<Option<DaxRange>> {
        let device = self.shared();
        let claims = device.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(claim) = claims.iter().find(|claim| claim.overlaps(&range)) {
            return Ok(Some(*claim));
        }
        drop(claims);
        let conflict = ofd::conflict(&device.file, Request::Write, range.span())?;
        Ok(conflict.map(|span| DaxRange::reported(span, device.facts.size_bytes)))
    }

    fn conflict(&self, offset: u64, len: u64) -> Result<Option<Span>, RoomError> {
        let device = self.shared();
        let span = Span { offset, len };
        ofd::conflict(&device.file, Request::Write, span).map_err(|source| RoomError {
            path: device.path.clone(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::DeviceFile;

    const PAGE: u64 = 4096;

    fn pages(ranges: &[DaxRange]) -> Vec<(u64, u64)> {
        let page = |range: &DaxRange| (range.offset() / PAGE, range.len() / PAGE);
        ranges.iter().map(page).collect()
    }

    #[test]
    fn what_is_taken_is_told_with_who_has_it_and_what_is_left_in_whole_pieces() {
        let file = DeviceFile::with_align(17 * PAGE, 2 * PAGE);
        let (mine, other, look) = (file.open(), file.open(), file.open());
        let range = |page, pages| DaxRange::for_test(page * PAGE, pages * PAGE);
        let empty = look.room().unwrap();
        assert_eq!(pages(&empty.free()), [(0, 16)]);
        assert_eq!((empty.total_bytes(), empty.taken()), (16 * PAGE, &[][..]));

        let _mine = mine.lock(range(4, 2), LockKind::Exclusive).unwrap();
        let _other = other.lock(range(9, 2), LockKind::Exclusive).unwrap();
        let _shared = other.lock(range(14, 1), LockKind::Shared).unwrap();
        for device in [&mine, &other, &look] {
            let room = device.room().unwrap();
            let taken: Vec<DaxRange> = room.taken().iter().map(|taken| taken.range).collect();
            assert_eq!(pages(&taken), [(4, 2), (9, 2), (14, 1)]);
            let is_this = |taken: &Taken| taken.holder.as_ref().unwrap().pid == std::process::id();
            assert!(room.taken().iter().all(is_this), "{room:?}");
            assert_eq!(pages(&room.free()), [(0, 4), (6, 2), (12, 2)]);
            assert_eq!(room.free_bytes(), 8 * PAGE);
            assert_eq!(room.largest_free_bytes(), 4 * PAGE);
        }
    }

    #[test]
    fn a_lock_to_the_end_of_the_file_is_understood() {
        let file = DeviceFile::new(8 * PAGE);
        let (host, device) = (crate::Host::system(), file.open());
        let whole = file.open();
        let opened = &whole.shared().file;
        host.lock_file(opened, whole.path(), LockKind::Exclusive, None)
            .unwrap();
        let room = device.room().unwrap();
        assert_eq!(room.taken()[0].range, DaxRange::for_test(0, 8 * PAGE));
        assert!(room.free().is_empty());
        assert!(device.lock_first_fit(PAGE, PAGE).unwrap().is_none());
    }

    #[test]
    fn those_who_take_at_the_same_time_have_ranges_of_their_own() {
        const EACH: usize = 8;
        let file = DeviceFile::new(64 * PAGE);
        let devices: Vec<DaxDevice> = (0..4).map(|_| file.open()).collect();
        let locks: Vec<RangeLock> = std::thread::scope(|scope| {
            let threads: Vec<_> = devices
                .iter()
                .map(|device| {
                    scope.spawn(move || {
                        let take = || device.lock_first_fit(2 * PAGE, PAGE).unwrap().unwrap();
                        (0..EACH).map(|_| take()).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|it| it.join().unwrap())
                .collect()
        });
        let mut starts: Vec<u64> = locks.iter().map(|lock| lock.range().offset()).collect();
        starts.sort_unstable();
        // All of the device, and nothing twice.
        let expected: Vec<u64> = (0..32).map(|at| at * 2 * PAGE).collect();
        assert_eq!(starts, expected);
        assert!(file.open().lock_first_fit(PAGE, PAGE).unwrap().is_none());
    }

    /// What some process does.
    #[derive(Clone, Debug)]
    enum Step {
        Take {
            process: usize,
            units: u64,
            wide: bool,
        },
        LetGo {
            which: usize,
        },
        Die {
            process: usize,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3_usize, 1..7_u64, any::<bool>())
                .prop_map(|(process, units, wide)| Step::Take { process, units, wide }),
            2 => (0..16_usize).prop_map(|which| Step::LetGo { which }),
            1 => (0..3_usize).prop_map(|process| Step::Die { process }),
        ]
    }

    /// The first place where `units` fit at a multiple of `align`, by trying each.
    fn first_fit(taken: &[DaxRange], units: u64, align: u64, all: u64) -> Option<u64> {
        (0..all)
            .step_by(usize::try_from(align).unwrap())
            .find(|at| {
                let range = DaxRange::for_test(at * UNIT, units * UNIT);
                range.end() <= all * UNIT && !taken.iter().any(|taken| taken.overlaps(&range))
            })
    }

    const UNIT: u64 = 2 * PAGE;
    const UNITS: u64 = 24;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Ranges are aligned, nobody's but one's, and the first that fit; what was let go of, by whatever end, is free.
        #[test]
        fn the_first_fit_is_had_and_nothing_twice(steps in prop::collection::vec(step(), 1..40)) {
            let file = DeviceFile::with_align(UNITS * UNIT + PAGE, UNIT);
            let mut devices: Vec<DaxDevice> = (0..3).map(|_| file.open()).collect();
            let mut held: Vec<(usize, RangeLock)> = Vec::new();
            for step in steps {
                let taken: Vec<DaxRange> = held.iter().map(|(_, lock)| lock.range()).collect();
                match step {
                    Step::Take { process, units, wide } => {
                        let align = if wide { 2 } else { 1 };
                        let units = units.next_multiple_of(align);
                        let expected = first_fit(&taken, units, align, UNITS);
                        let lock = devices[process].lock_first_fit(units * UNIT, align * UNIT).unwrap();
                        prop_assert_eq!(lock.as_ref().map(|lock| lock.range().offset()), expected.map(|at| at * UNIT));
                        if let Some(lock) = lock {
                            prop_assert_eq!(lock.range().len(), units * UNIT);
                            prop_assert!(!taken.iter().any(|taken| taken.overlaps(&lock.range())));
                            held.push((process, lock));
                        }
                    }
                    Step::LetGo { which } if which < held.len() => held.swap_remove(which).1.release().unwrap(),
                    Step::LetGo { .. } => {}
                    Step::Die { process } => {
                        held.retain(|(owner, _)| *owner != process);
                        devices[process] = file.open();
                    }
                }
            }
            let room = file.open().room().unwrap();
            let taken: u64 = held.iter().map(|(_, lock)| lock.range().len()).sum();
            prop_assert_eq!(room.free_bytes() + taken, UNITS * UNIT);
            prop_assert_eq!(room.total_bytes(), UNITS * UNIT);
            drop(held);
            let all = DaxRange::for_test(0, UNITS * UNIT);
            prop_assert_eq!(file.open().room().unwrap().free(), vec![all]);
        }
    }
}

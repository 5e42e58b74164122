//! Zeroes into a mapped range, for memory whose last user is not the next.
//!
//! The kernel stores them, as what reads from `/dev/zero`: a device that vanishes meanwhile, or a page that is poisoned,
//! is an error here and not SIGBUS. Large ranges are written by several threads, as one alone does not use the memory's
//! bandwidth.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::thread;

use thiserror::Error;

use crate::mapping::DaxMapping;
use crate::pages::Pages;
use crate::range::DaxRange;
use crate::size::ByteSize;

/// More do not make memory faster.
const THREADS_AT_MOST: usize = 8;
/// What one thread is worth starting for.
const THREAD_BYTES: usize = 256 << 20;
const ZEROES: &str = "/dev/zero";

/// Why a range is not zeroes.
#[derive(Debug, Error)]
pub enum ZeroError {
    /// There is nothing to take them from.
    #[error("cannot open {ZEROES}, which zeroes come from: `mknod -m 666 {ZEROES} c 1 5`")]
    NoZeroes(#[source] io::Error),
    /// A store did not work.
    #[error(
        "cannot zero {range} of {}: the memory at offset {at} can't be written; a page there is poisoned (`dmesg` tells; \
         persistent memory: `ndctl clear-errors`), or the device is going away",
        path.display()
    )]
    Store {
        /// The device.
        path: PathBuf,
        /// What was to be zeroed.
        range: DaxRange,
        /// Where in the device it ended.
        at: ByteSize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl DaxMapping {
    /// Fills the whole range with zeroes, and enters its pages into this process's page table on the way. The memory has to be
    /// writable.
    pub fn zero(&self) -> Result<(), ZeroError> {
        let zeroes = File::open(ZEROES).map_err(ZeroError::NoZeroes)?;
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(THREADS_AT_MOST).min(self.len() / THREAD_BYTES);
        let parts = parts(self.len(), self.align(), threads);
        fill(self.pages(), &zeroes, &parts).map_err(|(at, source)| ZeroError::Store {
            path: self.path().to_owned(),
            range: self.range(),
            at: ByteSize(self.range().offset() + at as u64),
            source,
        })
    }
}

/// Cuts `len` into about as many parts as there are threads, each of whole units.
fn parts(len: usize, unit: usize, threads: usize) -> Vec<Range<usize>> {
    let each = len.div_ceil(threads.max(1)).next_multiple_of(unit);
    let starts = (0..len).step_by(each);
    starts.map(|at| at..len.min(at + each)).collect()
}

/// Fills each part on a thread of its own; the last, and those for which there is no thread, on this one. Tells the first
/// failure, by offset.
fn fill(pages: &Pages, zeroes: &File, parts: &[Range<usize>]) -> Result<(), (usize, io::Error)> {
    let Some((last, others)) = parts.split_last() else {
        return Ok(());
    };
    thread::scope(|scope| {
        let mut here = Vec::new();
        let mut running = Vec::new();
        for part in others {
            let filling = thread::Builder::new().name("zero".to_owned());
            match filling.spawn_scoped(scope, || pages.fill_from(zeroes, part.clone())) {
                Ok(thread) => running.push(thread),
                Err(_) => here.push(part),
            }
        }
        here.push(last);
        let mut failed: Vec<(usize, io::Error)> = here
            .into_iter()
            .filter_map(|part| pages.fill_from(zeroes, part.clone()).err())
            .collect();
        for thread in running {
            let filled = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            failed.extend(filled.err());
        }
        failed
            .into_iter()
            .min_by_key(|(at, _)| *at)
            .map_or(Ok(()), Err)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LockKind;
    use crate::testing::DeviceFile;

    const M: u64 = 1 << 20;

    fn map(file: &DeviceFile, offset: u64, size: u64) -> DaxMapping {
        let device = file.open();
        let range = device.range(Some(offset), Some(size)).unwrap();
        device
            .lock(range, LockKind::Exclusive)
            .unwrap()
            .map()
            .unwrap()
    }

    #[test]
    fn a_range_is_zeroes_and_its_neighbours_are_as_they_were() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        file.write_at(&vec![0xa5; 8 << 20], 0);
        map(&file, 2 * M, 4 * M).zero().unwrap();
        let whole = map(&file, 0, 8 * M);
        let mut bytes = vec![1; 8 << 20];
        file.read_mapped(&whole, &mut bytes);
        let part = |from: usize, to: usize| &bytes[from << 20..to << 20];
        assert!(part(2, 6).iter().all(|byte| *byte == 0));
        assert!(
            part(0, 2)
                .iter()
                .chain(part(6, 8))
                .all(|byte| *byte == 0xa5)
        );
    }

    #[test]
    fn every_byte_is_in_one_part() {
        for (len, threads, count) in [
            (8, 0, 1),
            (8, 1, 1),
            (8, 3, 2),
            (8, 4, 4),
            (10, 4, 3),
            (2, 4, 1),
        ] {
            let parts = parts(len, 2, threads);
            assert_eq!(parts.len(), count, "{parts:?}");
            assert!(
                parts
                    .iter()
                    .all(|part| part.start % 2 == 0 && !part.is_empty())
            );
            let all: Vec<usize> = parts.into_iter().flatten().collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn several_threads_do_it_too() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        file.write_at(&vec![0xa5; 8 << 20], 0);
        let mapping = map(&file, 0, 8 * M);
        let zeroes = File::open(ZEROES).unwrap();
        fill(mapping.pages(), &zeroes, &parts(8 << 20, 2 << 20, 4)).unwrap();
        let mut bytes = vec![1; 8 << 20];
        file.read_mapped(&mapping, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn memory_that_can_not_be_written_is_an_error_that_says_where() {
        let file = DeviceFile::with_align(8 * M, 2 * M);
        let mapping = map(&file, 2 * M, 6 * M);
        file.truncate(4 * M);
        let error = mapping.zero().unwrap_err();
        assert!(
            matches!(&error, ZeroError::Store { at: ByteSize(at), .. } if *at == 4 * M),
            "{error:?}"
        );
        assert!(error.to_string().contains("6M at offset 2M"), "{error}");
    }
}

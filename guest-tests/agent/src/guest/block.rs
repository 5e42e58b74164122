//! Block devices without the page cache in between: patterns.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use lab_agent::guest_protocol::{PhysicalReport, pattern_word};
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::memory::Words;

/// What direct I/O wants offsets, lengths and addresses aligned to.
pub(crate) const BLOCK_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 64 * 1024;
const WORD_BYTES: u64 = 8;

/// A buffer that direct I/O takes.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    skip: usize,
}

impl Aligned {
    pub(crate) fn new(bytes: usize) -> Self {
        let memory = vec![0; bytes + BLOCK_BYTES];
        let skip = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, skip }
    }

    pub(crate) fn slice(&mut self, bytes: usize) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + bytes]
    }
}

/// Opens for direct I/O.
pub(crate) fn open_direct(path: &str, writable: bool) -> Result<File, String> {
    let direct = i32::try_from(OFlags::DIRECT.bits()).map_err(|error| error.to_string())?;
    let mut options = OpenOptions::new();
    options.read(true).write(writable).custom_flags(direct);
    let opened = options.open(path);
    opened.map_err(|error| format!("cannot open {path} for direct I/O: {error}"))
}

/// Writes the seed's pattern, then flushes. Each word depends on its place on the device.
pub(crate) fn fill(path: &str, offset: u64, bytes: u64, seed: u64) -> Result<(), String> {
    let file = open_direct(path, true)?;
    let mut buffer = Aligned::new(CHUNK_BYTES);
    for_chunks(offset, bytes, |at, length| {
        let chunk = buffer.slice(length);
        for (index, word) in (at / WORD_BYTES..).zip(chunk.chunks_exact_mut(8)) {
            word.copy_from_slice(&pattern_word(index, seed).to_le_bytes());
        }
        file.write_all_at(chunk, at)
    })
    .and_then(|()| file.sync_all())
    .map_err(|error| format!("cannot write to {path}: {error}"))
}

/// Has the device zero a range without the zeros being sent.
pub(crate) fn zero(path: &str, offset: u64, bytes: u64) -> Result<(), String> {
    let file = open_direct(path, true)?;
    let how = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, how, offset, bytes)
        .map_err(|error| format!("cannot zero {bytes} bytes of {path} at {offset}: {error}"))
}

/// Reads the start of a device straight into a mapped file, so that the device writes where the file lies, and compares the
/// mapping with the seed's pattern. The file is as long at least.
pub(crate) fn read_into(
    path: &str,
    bytes: u64,
    into: &str,
    seed: u64,
) -> Result<PhysicalReport, String> {
    let file = open_direct(path, false)?;
    let length = usize::try_from(bytes).map_err(|_| "too long")?;
    let mut words = Words::of_device(into, length)?;
    let read = words
        .read_from(&file, 0, length)
        .map_err(|message| format!("from {path} into {into}: {message}"))?;
    if read != length {
        return Err(format!("{path} has given {read} of {bytes} bytes"));
    }
    let wrong =
        |index: &usize| words.get(*index) != u64::from_le(pattern_word(*index as u64, seed));
    let mut wrong_indices = (0..words.len()).filter(wrong);
    let first = wrong_indices.next();
    Ok(PhysicalReport {
        words: words.len() as u64,
        wrong_words: first.map_or(0, |_| 1 + wrong_indices.count() as u64),
        first_wrong_offset: first.map(|index| index as u64 * WORD_BYTES),
    })
}

/// Compares with the seed's pattern.
pub(crate) fn compare(
    path: &str,
    offset: u64,
    bytes: u64,
    seed: u64,
) -> Result<PhysicalReport, String> {
    let file = open_direct(path, false)?;
    let mut buffer = Aligned::new(CHUNK_BYTES);
    let mut report = PhysicalReport {
        words: 0,
        wrong_words: 0,
        first_wrong_offset: None,
    };
    for_chunks(offset, bytes, |at, length| {
        let chunk = buffer.slice(length);
        file.read_exact_at(chunk, at)?;
        for (index, word) in (at / WORD_BYTES..).zip(chunk.chunks_exact(8)) {
            report.words += 1;
            if word != pattern_word(index, seed).to_le_bytes() {
                report.wrong_words += 1;
                report.first_wrong_offset.get_or_insert(index * WORD_BYTES);
            }
        }
        Ok(())
    })
    .map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(report)
}

fn for_chunks(
    offset: u64,
    bytes: u64,
    mut work: impl FnMut(u64, usize) -> io::Result<()>,
) -> io::Result<()> {
    let end = offset + bytes;
    let mut at = offset;
    while at < end {
        let length = usize::try_from(end - at).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        work(at, length)?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned() {
        let mut buffer = Aligned::new(CHUNK_BYTES);
        assert!((buffer.slice(CHUNK_BYTES).as_ptr() as usize).is_multiple_of(BLOCK_BYTES));
    }

    #[test]
    fn chunks_cover_the_range_once() {
        let mut seen = Vec::new();
        for_chunks(4096, 200_704, |at, length| {
            seen.push((at, length));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.first(), Some(&(4096, CHUNK_BYTES)));
        let total: usize = seen.iter().map(|(_, length)| length).sum();
        assert_eq!(total, 200_704);
    }
}

//! Raw memory: anonymous memory to be tested, physical ranges that the kernel does not use, and device-dax memory.
//!
//! Invariants: a mapping is private to its value and lives as long as it; memory is only touched by volatile
//! access through a checked word index, since the host may change it at any time. Physical ranges are
//! reached through `/dev/mem`, which the kernel allows for what its command line keeps out of its hands
//! (`memmap=SIZE$ADDRESS`) and refuses for its own memory.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::ptr::NonNull;

use lab_agent::guest_protocol::{PhysicalReport, pattern_word};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Bytes of a word.
const WORD_BYTES: usize = 8;
const PAGE_BYTES: usize = 4096;

/// A mapping, seen as words.
pub(crate) struct Words {
    start: NonNull<u64>,
    count: usize,
}

impl Words {
    /// Maps anonymous memory; the kernel fills it in on first touch.
    pub(crate) fn anonymous(bytes: usize) -> Result<Self, String> {
        let failed = |error| format!("cannot map {bytes} bytes: {error}");
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place, so no existing mapping is touched.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(failed)?;
        let words = Self::new(start, bytes)?;
        // SAFETY: the range is the mapping just made, and the advice does not change its contents.
        // It saves time, nothing else: a kernel without huge pages may refuse.
        let _ = unsafe { madvise(start, bytes, Advice::LinuxHugepage) };
        Ok(words)
    }

    /// Maps the start of a device's memory.
    pub(crate) fn of_device(path: &str, bytes: usize) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("cannot map {bytes} bytes of {path}: {error}");
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place, so no existing mapping is touched.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                &device,
                0,
            )
        };
        Self::new(start.map_err(|error| failed(error.into()))?, bytes)
    }

    /// Fills it with zeros.
    pub(crate) fn clear(&mut self) {
        for index in 0..self.count {
            self.set(index, 0);
        }
    }

    fn new(start: *mut c_void, bytes: usize) -> Result<Self, String> {
        let start = NonNull::new(start.cast::<u64>()).ok_or("the kernel mapped page zero")?;
        Ok(Self {
            start,
            count: bytes / WORD_BYTES,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Address of a word in this process.
    pub(crate) fn address(&self, index: usize) -> usize {
        self.start.as_ptr() as usize + index * WORD_BYTES
    }

    pub(crate) fn set(&mut self, index: usize, word: u64) {
        assert!(index < self.count);
        // SAFETY: the index is inside the mapping, which lives as long as `self`.
        let place = unsafe { self.start.add(index) };
        // SAFETY: `place` is mapped writable and aligned: mappings start at pages, and words follow each other.
        unsafe { place.write_volatile(word) };
    }

    pub(crate) fn get(&self, index: usize) -> u64 {
        assert!(index < self.count);
        // SAFETY: the index is inside the mapping, which lives as long as `self`.
        let place = unsafe { self.start.add(index) };
        // SAFETY: `place` is mapped readable and aligned, as in `set`.
        unsafe { place.read_volatile() }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and nothing refers to it after the value is gone.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.count * WORD_BYTES) };
    }
}

/// A range of guest-physical memory.
pub(crate) struct Physical {
    words: Words,
}

impl Physical {
    /// Maps whole pages of physical memory.
    pub(crate) fn map(address: u64, bytes: u64, writable: bool) -> Result<Self, String> {
        let length = usize::try_from(bytes).map_err(|_| "too long")?;
        if length == 0
            || !length.is_multiple_of(PAGE_BYTES)
            || !address.is_multiple_of(PAGE_BYTES as u64)
        {
            return Err(format!(
                "{bytes} bytes at {address:#x} are not whole pages of {PAGE_BYTES} bytes"
            ));
        }
        let memory = OpenOptions::new()
            .read(true)
            .write(writable)
            .open("/dev/mem");
        let memory = memory.map_err(|error| format!("cannot open /dev/mem: {error}"))?;
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: the kernel chooses a free place, so no existing mapping is touched. It refuses ranges that it uses.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                &memory,
                address,
            )
        };
        let start = start.map_err(|error| {
            format!("cannot map {bytes} bytes at {address:#x}: {error}; reserve the range with memmap=SIZE$ADDRESS on the command line")
        })?;
        Ok(Self {
            words: Words::new(start, length)?,
        })
    }

    /// Writes the seed's pattern.
    pub(crate) fn fill(&mut self, seed: u64) {
        for index in 0..self.words.len() {
            self.words.set(index, pattern_word(index as u64, seed));
        }
    }

    /// Compares with the seed's pattern.
    pub(crate) fn compare(&self, seed: u64) -> PhysicalReport {
        let wrong = |index: &usize| self.words.get(*index) != pattern_word(*index as u64, seed);
        let mut wrong_indices = (0..self.words.len()).filter(wrong);
        let first = wrong_indices.next();
        PhysicalReport {
            words: self.words.len() as u64,
            wrong_words: first.map_or(0, |_| 1 + wrong_indices.count() as u64),
            first_wrong_offset: first.map(|index| (index * WORD_BYTES) as u64),
        }
    }
}

//! Raw memory: anonymous memory to be tested, physical ranges that the kernel does not use, and device-dax memory.
//!
//! Invariants: a mapping is private to its value and lives as long as it; memory is only touched by volatile
//! access through a checked word index, since the host may change it at any time. Physical ranges are
//! reached through `/dev/mem`, which the kernel allows for what its command line keeps out of its hands
//! (`memmap=SIZE$ADDRESS`) and refuses for its own memory.
#![allow(unsafe_code)]

use std::arch::asm;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use lab_agent::guest_protocol::{PhysicalReport, pattern_word};
use rustix::mm::{
    Advice, MapFlags, MsyncFlags, ProtFlags, madvise, mmap, mmap_anonymous, msync, munmap,
};

/// Bytes of a word.
const WORD_BYTES: usize = 8;
const PAGE_BYTES: usize = 4096;

/// A mapping, seen as words.
pub(crate) struct Words {
    start: NonNull<u64>,
    count: usize,
}

// SAFETY: a mapping belongs to the process and not to a thread, and the value is its only owner.
unsafe impl Send for Words {}

impl Words {
    /// Maps anonymous memory, in huge pages if there are any; the kernel fills it in on first touch.
    pub(crate) fn anonymous(bytes: usize) -> Result<Self, String> {
        let words = Self::plain(bytes)?;
        let start = words.start.as_ptr().cast();
        // SAFETY: the range is the mapping just made, and the advice does not change its contents.
        // It saves time, nothing else: a kernel without huge pages may refuse.
        let _ = unsafe { madvise(start, bytes, Advice::LinuxHugepage) };
        Ok(words)
    }

    /// Maps anonymous memory, in pages of whatever size the kernel sees fit.
    pub(crate) fn plain(bytes: usize) -> Result<Self, String> {
        Self::without_file(bytes, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// Maps huge pages of 2 MiB that the kernel has reserved.
    pub(crate) fn hugetlb(bytes: usize) -> Result<Self, String> {
        Self::without_file(
            bytes,
            MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB,
        )
    }

    fn without_file(bytes: usize, flags: MapFlags) -> Result<Self, String> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place, so no existing mapping is touched.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) };
        let start = start.map_err(|error| format!("cannot map {bytes} bytes: {error}"))?;
        Self::new(start, bytes)
    }

    /// Faults every page in, writable, without changing a byte.
    pub(crate) fn populate(&self) -> Result<(), String> {
        let bytes = self.count * WORD_BYTES;
        let start = self.start.as_ptr().cast();
        // SAFETY: the range is this value's own mapping, and the advice does not change its contents.
        let outcome = unsafe { madvise(start, bytes, Advice::LinuxPopulateWrite) };
        outcome.map_err(|error| format!("cannot fault {bytes} bytes in: {error}"))
    }

    /// Maps the start of a file, or of a device's memory.
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

    /// Writes pages back whose words have changed, and waits until they are durable.
    pub(crate) fn sync(&self, first: usize, count: usize) -> Result<(), String> {
        assert!(count > 0 && first + count <= self.count);
        let page_words = PAGE_BYTES / WORD_BYTES;
        let from = first / page_words * page_words;
        let bytes = (first + count - from) * WORD_BYTES;
        // SAFETY: the index is inside the mapping, which lives as long as `self`.
        let start = unsafe { self.start.add(from) };
        // SAFETY: the range is inside the mapping; writing it back changes nothing that this process sees.
        let synced = unsafe { msync(start.as_ptr().cast(), bytes, MsyncFlags::SYNC) };
        synced.map_err(|error| format!("cannot write {bytes} mapped bytes back: {error}"))
    }

    /// Reads its first bytes from a place in a file, the kernel or a device writing straight into it; gives how many have come.
    pub(crate) fn read_from(
        &mut self,
        file: &File,
        offset: u64,
        bytes: usize,
    ) -> Result<usize, String> {
        self.read_to(0, file, offset, bytes)
    }

    /// Reads the first bytes of a file to a place in it, all of them.
    pub(crate) fn load(&mut self, at: usize, file: &File, bytes: usize) -> Result<(), String> {
        let mut done = 0;
        while done < bytes {
            match self.read_to(at + done, file, done as u64, bytes - done)? {
                0 => return Err(format!("it ends after {done} of {bytes} bytes")),
                read => done += read,
            }
        }
        Ok(())
    }

    fn read_to(
        &mut self,
        at: usize,
        file: &File,
        offset: u64,
        bytes: usize,
    ) -> Result<usize, String> {
        assert!(at + bytes <= self.count * WORD_BYTES);
        let start = self.start.as_ptr().cast::<MaybeUninit<u8>>();
        // SAFETY: the index is inside the mapping, or its end.
        let start = unsafe { start.add(at) };
        // SAFETY: the range is inside the mapping, which is borrowed exclusively; bytes that need not be initialised have no
        // invalid values, and this process does nothing with them through the slice: only the kernel writes there.
        let place = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
        rustix::io::pread(file, place, offset)
            .map(|(read, _)| read.len())
            .map_err(|error| format!("cannot read {bytes} bytes at {offset}: {error}"))
    }

    /// Copies all of it over the start of `into`, as fast as the processor does.
    pub(crate) fn copy_to(&self, into: &mut Self) {
        assert!(self.count <= into.count);
        let (from, to) = (self.start.as_ptr(), into.start.as_ptr());
        // SAFETY: both are mappings of at least `count` words, and since `into` is borrowed exclusively, two of them. Nothing else
        // in this process refers to their memory; what another one does to a shared mapping meanwhile can only spoil the copy.
        unsafe { std::ptr::copy_nonoverlapping(from, to, self.count) };
        std::hint::black_box(to);
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

    /// The first word, by an instruction that KVM's emulator does not have (`pxor` with a memory operand).
    pub(crate) fn first_by_vector(&self) -> u64 {
        assert!(self.count >= 2);
        let word;
        // SAFETY: the 16 bytes are inside the mapping, which begins at a page as the instruction wants it aligned; only
        // the named registers change.
        unsafe {
            asm!(
                "pxor {vector}, {vector}",
                "pxor {vector}, xmmword ptr [{place}]",
                "movq {word}, {vector}",
                vector = out(xmm_reg) _,
                place = in(reg) self.start.as_ptr(),
                word = out(reg) word,
                options(nostack, readonly, preserves_flags),
            );
        }
        word
    }

    /// Stores the first word, by an instruction that KVM's emulator does not have (`movlps` to memory).
    pub(crate) fn set_first_by_vector(&mut self, word: u64) {
        // SAFETY: a mapping has at least a word; only memory of it and the named register change.
        unsafe {
            asm!(
                "movq {vector}, {word}",
                "movlps qword ptr [{place}], {vector}",
                vector = out(xmm_reg) _,
                place = in(reg) self.start.as_ptr(),
                word = in(reg) word,
                options(nostack, preserves_flags),
            );
        }
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

    /// Its words.
    pub(crate) fn words(&mut self) -> &mut Words {
        &mut self.words
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

/// Registers of a device: accessed in the width that they have, each access once and in order.
pub(crate) struct Registers {
    words: Words,
}

/// One access of a width, with its bounds and alignment checked.
macro_rules! access {
    ($write:ident, $read:ident, $width:ty) => {
        pub(crate) fn $read(&self, offset: usize) -> $width {
            // SAFETY: the place is mapped and aligned for this width, and a register has no invalid values.
            unsafe { self.place::<$width>(offset).read_volatile() }
        }

        pub(crate) fn $write(&mut self, offset: usize, value: $width) {
            let place = self.place::<$width>(offset);
            // SAFETY: `place` is mapped writable and aligned for this width. What the device does then is the test's purpose.
            unsafe { place.write_volatile(value) };
        }
    };
}

impl Registers {
    /// Maps the start of a PCI function's BAR: `resourceN` of its directory in sysfs.
    pub(crate) fn map(path: &str, bytes: usize) -> Result<Self, String> {
        Ok(Self {
            words: Words::of_device(path, bytes)?,
        })
    }

    access!(write8, read8, u8);
    access!(write16, read16, u16);
    access!(write32, read32, u32);
    access!(write64, read64, u64);

    /// Whether a register of this width fits at an offset.
    pub(crate) fn has<T>(&self, offset: usize) -> bool {
        let width = size_of::<T>();
        offset.is_multiple_of(width) && offset + width <= self.words.count * WORD_BYTES
    }

    /// A register's place, aligned for its width: mappings start at pages.
    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(
            self.has::<T>(offset),
            "no register of {} bytes at {offset:#x}",
            size_of::<T>()
        );
        let start = self.words.start.as_ptr().cast::<T>();
        // SAFETY: the offset is inside the mapping.
        unsafe { start.byte_add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(bytes: u64) -> (std::path::PathBuf, std::fs::File) {
        let name = format!("lab-agent-{}-{bytes}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true);
        let file = file.open(&path).unwrap();
        file.set_len(bytes).unwrap();
        (path, file)
    }

    #[test]
    fn what_is_synced_is_in_the_file() {
        let (path, file) = file(8192);
        let mut words = Words::of_device(path.to_str().unwrap(), 8192).unwrap();
        words.set(600, 0x1234);
        words.sync(600, 1).unwrap();
        let mut found = [0; 8];
        file.read_exact_at(&mut found, 4800).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!(u64::from_ne_bytes(found), 0x1234);
    }

    #[test]
    fn populating_changes_nothing() {
        let mut words = Words::plain(8192).unwrap();
        words.set(3, 7);
        words.populate().unwrap();
        assert_eq!((words.get(3), words.get(1023)), (7, 0));
    }

    #[test]
    fn registers_have_widths() {
        let (path, _file) = file(4096);
        let mut registers = Registers::map(path.to_str().unwrap(), 4096).unwrap();
        std::fs::remove_file(path).unwrap();
        registers.write32(4, 0x1122_3344);
        registers.write16(4, 0x5566);
        registers.write8(7, 0x77);
        assert_eq!((registers.read16(4), registers.read8(7)), (0x5566, 0x77));
        registers.write64(8, 0x0102_0304_0506_0708);
        assert_eq!(registers.read32(12), 0x0102_0304);
        assert_eq!(registers.read64(8), 0x0102_0304_0506_0708);
    }

    #[test]
    fn a_file_is_read_into_a_mapping() {
        let (path, file) = file(12288);
        file.write_all_at(&7_u64.to_ne_bytes(), 4096).unwrap();
        std::fs::remove_file(path).unwrap();
        let mut words = Words::anonymous(8192).unwrap();
        assert_eq!(words.read_from(&file, 4096, 8192).unwrap(), 8192);
        assert_eq!((words.get(0), words.get(1)), (7, 0));
        assert_eq!(words.read_from(&file, 8192, 8192).unwrap(), 4096);
    }

    #[test]
    fn a_copy_is_a_copy() {
        let (mut from, mut to) = (
            Words::anonymous(8192).unwrap(),
            Words::anonymous(16384).unwrap(),
        );
        from.set(1023, 9);
        from.copy_to(&mut to);
        assert_eq!((to.get(1023), to.get(1022)), (9, 0));
    }
}

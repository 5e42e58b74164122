//! A part of a device's region in this process's address space.
//!
//! # Invariants
//! - `start .. start + len` is mapped and belongs to this value alone until it is dropped.
//! - No Rust reference into the range is ever made here: it is a device's registers.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::function::RegionMapping;

/// A mapping, taken down when it is dropped.
#[derive(Debug)]
pub(crate) struct Pages {
    start: u64,
    len: usize,
}

/// What to map of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

impl Pages {
    pub(crate) fn map(file: impl AsFd, part: Part) -> io::Result<Self> {
        let len =
            usize::try_from(part.len).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let mut prot = ProtFlags::empty();
        prot.set(ProtFlags::READ, part.readable);
        prot.set(ProtFlags::WRITE, part.writable);
        // SAFETY: no address is asked for, so the kernel picks a free range and replaces nothing.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                prot,
                MapFlags::SHARED,
                file,
                part.offset,
            )
        }?;
        // From here on a failure drops `pages`, which unmaps.
        let pages = Self {
            start: start as u64,
            len,
        };
        // A forked child must not keep registers mapped of a device that the host takes away.
        // SAFETY: the range is this value's own mapping, and the advice changes neither contents nor bounds.
        unsafe { madvise(start, len, Advice::LinuxDontFork) }?;
        Ok(pages)
    }
}

impl RegionMapping for Pages {
    fn host_address(&self) -> u64 {
        self.start
    }

    fn size(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // A failure leaves the range mapped with nothing referring to it.
        // SAFETY: the range is this value's own mapping, and the value ends here.
        let _ = unsafe { munmap(self.start as *mut _, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_where_it_says_and_goes_when_it_is_dropped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * 4096).unwrap();
        let part = Part {
            offset: 4096,
            len: 2 * 4096,
            readable: true,
            writable: true,
        };
        let pages = Pages::map(&file, part).unwrap();
        let (start, end) = (pages.host_address(), pages.host_address() + pages.size());
        let wanted = format!("{start:x}-{end:x} rw-s 00001000");
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps().contains(&wanted));
        drop(pages);
        assert!(!maps().contains(&wanted));
    }

    #[test]
    fn a_file_that_can_not_be_mapped_is_an_error() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let part = Part {
            offset: 0,
            len: 4096,
            readable: true,
            writable: false,
        };
        Pages::map(&reader, part).unwrap_err();
    }
}

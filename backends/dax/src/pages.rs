//! Address space at an aligned address, and a shared file mapping in it.
//!
//! `mmap` promises page alignment only. To get an address that is a multiple of 2M or 1G, one alignment more than
//! needed is reserved without access, the memory is mapped over the aligned middle, and the rest is given back. The
//! reservation is this module's own, so mapping over it can't hit anything else in the process.
//!
//! Works on any file that can be mapped; knows nothing of dax.
//!
//! # Invariants
//! - `ptr .. ptr + len` is mapped and belongs to this value alone until [`Pages::unmap`] succeeds or it is dropped.
//! - No Rust reference into the range is ever made here.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// An aligned range of this process's address space: reserved without access, or with a file mapped over it.
///
/// Unmapped when dropped; [`Pages::unmap`] is the way to hear of a failure.
#[derive(Debug)]
pub struct Pages {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the value is an address and a length; only the kernel reads or writes the memory for it, and unmapping may be done by
// any thread.
unsafe impl Send for Pages {}
// SAFETY: the shared methods only return the address and the length or let the kernel access the memory.
unsafe impl Sync for Pages {}

/// What to map: everything is a multiple of `align`, which is a power of two of at least a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) len: usize,
    pub(crate) align: usize,
    pub(crate) writable: bool,
}

/// The step of [`Pages::map`] that failed.
#[derive(Debug)]
pub(crate) enum MapStep {
    Reserve(io::Error),
    Map(io::Error),
    Advise(io::Error),
}

impl Pages {
    pub(crate) fn map(file: &File, part: Part) -> Result<Self, MapStep> {
        debug_assert!(part.align.is_power_of_two() && part.len.is_multiple_of(part.align));
        // From here on a failure drops `pages`, which unmaps what is left.
        let pages = Self::reserve(part.len, part.align).map_err(MapStep::Reserve)?;
        pages.fill(file, part.offset, part.writable)?;
        // A forked child must not keep memory mapped that the host takes away, and guest memory is not for a dump.
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: the range is this value's own mapping, and neither advice changes its contents or its bounds.
            unsafe { madvise(pages.ptr.as_ptr().cast(), pages.len, advice) }
                .map_err(|error| MapStep::Advise(error.into()))?;
        }
        Ok(pages)
    }

    /// Reserves `len` bytes without access at a multiple of `align`, a power of two of at least a page.
    pub fn reserve(len: usize, align: usize) -> io::Result<Self> {
        let no_room = || io::Error::from_raw_os_error(libc::ENOMEM);
        let all = len.checked_add(align).ok_or_else(no_room)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so the kernel picks a free range and replaces nothing.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), all, ProtFlags::empty(), flags) }?;
        let ptr = NonNull::new(start.cast()).ok_or_else(no_room)?;
        Self { ptr, len: all }.keep_aligned(len, align)
    }

    /// Gives the range back to the process. A failure hands it back to the caller.
    pub fn unmap(self) -> Result<(), (Self, io::Error)> {
        let pages = ManuallyDrop::new(self);
        // SAFETY: the range is this value's own mapping; the value is consumed, so nothing can use it afterwards.
        match unsafe { munmap(pages.ptr.as_ptr().cast(), pages.len) } {
            Ok(()) => Ok(()),
            Err(error) => Err((ManuallyDrop::into_inner(pages), error.into())),
        }
    }

    /// Has the kernel enter every page into the page table, writable, without changing a byte.
    pub fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is this value's own mapping, and populating changes neither its contents nor its bounds.
        unsafe {
            madvise(
                self.ptr.as_ptr().cast(),
                self.len,
                Advice::LinuxPopulateWrite,
            )
        }
        .map_err(io::Error::from)
    }

    /// Has the kernel fill `part` with what `zeroes` reads as, which is `/dev/zero`. Where a store would be SIGBUS it answers
    /// with the offset of the first byte that it could not write, and why.
    pub(crate) fn fill_from(
        &self,
        zeroes: &File,
        part: Range<usize>,
    ) -> Result<(), (usize, io::Error)> {
        assert!(
            part.start <= part.end && part.end <= self.len,
            "fill outside of the mapping"
        );
        let mut at = part.start;
        while at < part.end {
            let start = self.ptr.as_ptr().wrapping_add(at).cast::<c_void>();
            // SAFETY: `at .. part.end` is within this value's own mapping, which outlives the call; nobody has a reference into
            // it, and an address that can't be written is answered with EFAULT.
            let read = unsafe { libc::read(zeroes.as_raw_fd(), start, part.end - at) };
            match usize::try_from(read) {
                Ok(0) => return Err((at, io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => at += read,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err((at, error));
                    }
                }
            }
        }
        Ok(())
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The range's length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the byte at `offset` can be read. Lets the kernel do the read, which answers where a load would get
    /// SIGBUS.
    pub(crate) fn can_read(&self, offset: usize) -> io::Result<bool> {
        assert!(offset < self.len, "probe outside of the mapping");
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: ptr::from_mut(&mut byte).cast::<c_void>(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: self.ptr.as_ptr().wrapping_add(offset).cast::<c_void>(),
            iov_len: 1,
        };
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: `local` describes one writable byte that outlives the call; `remote` is only read, and an address
        // that is not readable is answered with EFAULT.
        let read =
            unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
        if read == 1 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EFAULT) {
            Ok(false)
        } else {
            Err(error)
        }
    }

    /// Cuts a reservation that is one alignment too long down to its aligned middle.
    fn keep_aligned(mut self, len: usize, align: usize) -> io::Result<Self> {
        let head = self.ptr.as_ptr().align_offset(align);
        let tail = self.len - head - len;
        if tail != 0 {
            let start = self.ptr.as_ptr().wrapping_add(head + len);
            // SAFETY: the tail lies within this value's own reservation and nothing refers to it.
            unsafe { munmap(start.cast(), tail) }?;
            self.len -= tail;
        }
        if head != 0 {
            // SAFETY: the head lies within this value's own reservation and nothing refers to it.
            unsafe { munmap(self.ptr.as_ptr().cast(), head) }?;
            self.len -= head;
            // SAFETY: `head` is less than the reservation's length, so the sum stays inside it and is not null.
            self.ptr = unsafe { self.ptr.add(head) };
        }
        Ok(self)
    }

    /// Maps the file over the reservation.
    fn fill(&self, file: &File, offset: u64, writable: bool) -> Result<(), MapStep> {
        let start = self.ptr.as_ptr().cast();
        let prot = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: MAP_FIXED replaces exactly this value's own range, which nothing refers to yet.
        unsafe { mmap(start, self.len, prot, flags, file, offset) }
            .map(drop)
            .map_err(|error| MapStep::Map(error.into()))
    }
}

/// What a load would find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    /// Memory.
    Present,
    /// SIGBUS: nothing is behind the mapping.
    Gone,
    /// SIGBUS: what is there is poisoned.
    Poisoned,
    /// SIGSEGV: nothing is mapped there any more.
    Unmapped,
}

/// Has the kernel fault in the page with `address`, for reading (`MADV_POPULATE_READ`): it answers where a load would get
/// a signal. Any address will do, also one that is not mapped any more.
pub(crate) fn touch(address: usize) -> io::Result<Touched> {
    const PAGE: usize = 4096;
    let page = address & !(PAGE - 1);
    // SAFETY: populating for reading changes no byte of memory and no bounds of a mapping, whosever it is; what it does is
    // what a load there would, and where that would be a signal it is an error.
    let populated = unsafe {
        madvise(
            ptr::without_provenance_mut(page),
            PAGE,
            Advice::LinuxPopulateRead,
        )
    };
    match populated {
        Ok(()) => Ok(Touched::Present),
        Err(rustix::io::Errno::FAULT) => Ok(Touched::Gone),
        Err(rustix::io::Errno::HWPOISON) => Ok(Touched::Poisoned),
        Err(rustix::io::Errno::NOMEM) => Ok(Touched::Unmapped),
        Err(error) => Err(error.into()),
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // A failure leaves the range mapped with nothing referring to it; `unmap` is the way to hear of one.
        // SAFETY: the range is this value's own mapping, and the value ends here.
        let _ = unsafe { munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const ALIGNS: [usize; 3] = [4096, 2 << 20, 1 << 30];

    fn memfd(len: usize) -> File {
        let fd = rustix::fs::memfd_create("pages", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len as u64).unwrap();
        file
    }

    #[test]
    fn the_address_is_aligned_and_the_contents_are_the_file_s() {
        for align in ALIGNS {
            let file = memfd(3 * align);
            let part = Part {
                offset: align as u64,
                len: 2 * align,
                align,
                writable: true,
            };
            let pages = Pages::map(&file, part).unwrap();
            assert_eq!(pages.as_ptr() as usize % align, 0);
            assert_eq!(pages.len(), 2 * align);
            // SAFETY: the mapping is alive, writable, and no reference into it exists.
            unsafe { pages.as_ptr().write_volatile(0xa5) };
            let mut byte = [0];
            file.read_exact_at(&mut byte, align as u64).unwrap();
            assert_eq!(byte, [0xa5]);
            assert!(pages.can_read(0).unwrap());
            assert!(pages.can_read(2 * align - 1).unwrap());
            pages.unmap().unwrap();
        }
    }

    /// 128 TiB of user address space would be used up by half of these if a head, a tail or a mapping stayed behind.
    #[test]
    fn nothing_of_the_reservation_is_left() {
        let align = 1 << 40;
        let file = memfd(align);
        let part = Part {
            offset: 0,
            len: align,
            align,
            writable: true,
        };
        for round in 0..256 {
            let pages = Pages::map(&file, part).unwrap();
            assert_eq!((pages.as_ptr() as usize % align, pages.len()), (0, align));
            if round % 2 == 0 {
                pages.unmap().unwrap();
            }
        }
    }

    #[test]
    fn memory_that_is_not_there_is_reported_not_touched() {
        let file = memfd(4096);
        let part = Part {
            offset: 0,
            len: 2 * 4096,
            align: 4096,
            writable: true,
        };
        let pages = Pages::map(&file, part).unwrap();
        assert!(pages.can_read(4095).unwrap());
        assert!(!pages.can_read(4096).unwrap());
        let address = pages.as_ptr() as usize;
        assert_eq!(touch(address + 4095).unwrap(), Touched::Present);
        assert_eq!(touch(address + 4096).unwrap(), Touched::Gone);
        file.set_len(0).unwrap();
        assert!(!pages.can_read(0).unwrap());
        assert_eq!(touch(address).unwrap(), Touched::Gone);
        pages.unmap().unwrap();
        assert_eq!(touch(address).unwrap(), Touched::Unmapped);
    }

    #[test]
    fn failures_say_which_step() {
        let part = |len, align| Part {
            offset: 0,
            len,
            align,
            writable: true,
        };
        let huge = Pages::map(&memfd(4096), part(1 << 62, 4096));
        assert!(matches!(huge, Err(MapStep::Reserve(_))), "{huge:?}");
        let overflow = Pages::map(&memfd(4096), part(1 << 63, 1 << 63));
        assert!(matches!(overflow, Err(MapStep::Reserve(_))), "{overflow:?}");
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(reader));
        let error = Pages::map(&pipe, part(4096, 4096)).unwrap_err();
        assert!(matches!(error, MapStep::Map(_)), "{error:?}");
    }

    #[test]
    fn a_failed_map_leaves_no_address_space_behind() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(reader));
        let part = Part {
            offset: 0,
            len: 1 << 40,
            align: 1 << 30,
            writable: true,
        };
        // 128 TiB of user address space would be used up by 128 leaks of 1 TiB.
        for _ in 0..200 {
            let result = Pages::map(&pipe, part);
            assert!(matches!(result, Err(MapStep::Map(_))), "{result:?}");
        }
    }
}

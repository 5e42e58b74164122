//! Pieces of guest memory that one `readv` or `writev` fills or sends.
//!
//! The kernel does the access: memory that is gone is `EFAULT`, never a signal and never scratch, and there is no Rust
//! reference into guest memory. Invariant: a `Vectors<'m>` holds only ranges of volatile slices that are valid for `'m`.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::snapshot::Snapshot;
use vm_memory::{GuestAddress, VolatileSlice};

/// The kernel takes no more (`UIO_MAXIOV`), and one is kept for what overflows.
pub(super) const MOST: usize = 1023;

/// Ranges of guest memory.
pub struct Vectors<'m> {
    ranges: Vec<libc::iovec>,
    bytes: usize,
    memory: PhantomData<VolatileSlice<'m>>,
}

/// A range that is not guest RAM, or one too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRange;

impl<'m> Vectors<'m> {
    /// None yet.
    pub fn new() -> Self {
        Self {
            ranges: Vec::with_capacity(64),
            bytes: 0,
            memory: PhantomData,
        }
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets all ranges.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.bytes = 0;
    }

    /// Appends a range of guest memory.
    pub fn push(
        &mut self,
        memory: &'m Snapshot,
        address: GuestAddress,
        len: u32,
    ) -> Result<(), BadRange> {
        // An iterator of its own for a range that lies in two regions: RAM on both sides of a seam.
        for slice in memory.system_slices(address, len as usize) {
            let slice = slice.map_err(|_| BadRange)?;
            if self.ranges.len() >= MOST {
                return Err(BadRange);
            }
            self.ranges.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.bytes += slice.len();
        }
        Ok(())
    }

    /// `readv`: the ranges in order, then `overflow`.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>, overflow: &mut [u8]) -> io::Result<usize> {
        self.ranges.push(libc::iovec {
            iov_base: overflow.as_mut_ptr().cast(),
            iov_len: overflow.len(),
        });
        let count = count(&self.ranges);
        let result = retry(|| {
            // SAFETY: `ranges` has `count` entries. All but the last are ranges of volatile slices valid for 'm, which
            // outlives `self`, and which no Rust reference points into; the last one is `overflow`, borrowed for this
            // call alone. The kernel writes nothing else.
            unsafe { libc::readv(fd.as_raw_fd(), self.ranges.as_ptr(), count) }
        });
        // What was borrowed is not kept.
        self.ranges.pop();
        result
    }

    /// `writev` of all ranges.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = count(&self.ranges);
        retry(|| {
            // SAFETY: `ranges` has `count` entries, ranges of volatile slices valid for 'm, which outlives `self`. The
            // kernel only reads them.
            unsafe { libc::writev(fd.as_raw_fd(), self.ranges.as_ptr(), count) }
        })
    }
}

impl Default for Vectors<'_> {
    fn default() -> Self {
        Self::new()
    }
}

fn count(ranges: &[libc::iovec]) -> libc::c_int {
    // At most MOST + 1.
    libc::c_int::try_from(ranges.len()).unwrap_or(libc::c_int::MAX)
}

fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(len) = usize::try_from(call()) {
            return Ok(len);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn memory() -> Snapshot {
        // Two regions that touch.
        Snapshot::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    #[test]
    fn a_range_over_a_seam_is_read_and_written() {
        let memory = memory();
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let mut vectors = Vectors::new();
        vectors.push(&memory, GuestAddress(0xffe), 4).unwrap();
        vectors.push(&memory, GuestAddress(0), 1).unwrap();
        assert_eq!(vectors.bytes(), 5);
        peer.write_all(b"abcdefg").unwrap();
        let mut overflow = [0; 8];
        assert_eq!(vectors.read_from(ours.as_fd(), &mut overflow).unwrap(), 7);
        assert_eq!(&overflow[..2], b"fg");
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0xffe)).unwrap();
        assert_eq!(&bytes, b"abcd");
        assert_eq!(vectors.write_to(ours.as_fd()).unwrap(), 5);
        let mut bytes = [0; 5];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"abcde");
    }

    #[test]
    fn what_is_not_ram_is_refused() {
        let memory = memory();
        let mut vectors = Vectors::new();
        for (address, len) in [
            (0x2000, 1),
            (0x1fff, 2),
            (u64::MAX, 2),
            (0, u32::MAX),
            (0xffff_ffff_ffff_f000, 0x2000),
        ] {
            vectors.clear();
            assert_eq!(
                vectors.push(&memory, GuestAddress(address), len),
                Err(BadRange),
                "{address:#x}+{len:#x}"
            );
        }
    }

    #[test]
    fn the_kernel_is_given_no_more_ranges_than_it_takes() {
        let memory = memory();
        let mut vectors = Vectors::new();
        for _ in 0..MOST {
            vectors.push(&memory, GuestAddress(0), 1).unwrap();
        }
        assert_eq!(vectors.push(&memory, GuestAddress(0), 1), Err(BadRange));
    }
}

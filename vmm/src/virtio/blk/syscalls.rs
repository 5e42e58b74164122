//! The system calls of a disk that no safe wrapper offers: transfers between the image and guest memory, which no Rust
//! slice may stand for, and the discard of a block device.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::FallocateFlags;

use super::job::{Job, Step};
use super::pieces::Vectors;

/// `_IO(0x12, 119)`, linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// The flags of `fallocate` for a step on a range.
pub(super) fn allocation(step: Step) -> FallocateFlags {
    match step {
        Step::Zero => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        _ => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
    }
}

/// The flags of a write.
pub(super) fn durability(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

/// Does the job's step now, however long that takes. Bytes moved, or a negative error number.
pub(super) fn run(file: &File, job: &Job) -> i32 {
    match job.step() {
        Step::Read => transfer(file, job, 0),
        Step::Write { durable } => transfer(file, job, durability(durable)),
        Step::Sync => result(rustix::fs::fdatasync(file).map(|()| 0)),
        Step::Punch | Step::Zero => {
            let flags = allocation(job.step());
            result(rustix::fs::fallocate(file, flags, job.offset(), job.len()).map(|()| 0))
        }
        Step::Discard => discard(file, job.offset(), job.len()),
    }
}

/// Does a transfer if it needs no waiting; `-EAGAIN` if it does, `-EOPNOTSUPP` if the file system can't tell.
pub(super) fn run_now(file: &File, job: &Job) -> i32 {
    match job.step() {
        Step::Read | Step::Write { durable: false } => transfer(file, job, libc::RWF_NOWAIT),
        _ => -libc::EAGAIN,
    }
}

fn transfer(file: &File, job: &Job, flags: i32) -> i32 {
    let Ok(offset) = libc::off_t::try_from(job.offset()) else {
        return -libc::EINVAL;
    };
    let Vectors { first, count } = job.vectors();
    let count = libc::c_int::try_from(count).unwrap_or(0);
    let fd = file.as_raw_fd();
    let moved = if job.step() == Step::Read {
        // SAFETY: `first` points at `count` vectors that the borrowed job holds. They lie in guest memory whose snapshot
        // the job holds, or in a buffer of the job; no Rust reference to either exists during the call, and what the
        // kernel can't reach of guest memory is EFAULT. The descriptor is open because `file` is borrowed.
        unsafe { libc::preadv2(fd, first, count, offset, flags) }
    } else {
        // SAFETY: as above.
        unsafe { libc::pwritev2(fd, first, count, offset, flags) }
    };
    if moved < 0 {
        -last_error()
    } else {
        // The kernel moves at most 2 GiB less a page at a time.
        i32::try_from(moved).unwrap_or(-libc::EOVERFLOW)
    }
}

fn discard(file: &File, offset: u64, len: u64) -> i32 {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers, which live longer than the call; on a file that is no block device it
    // is refused. What it does to the device's contents is what the caller asked for.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if done < 0 { -last_error() } else { 0 }
}

fn last_error() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

fn result(done: rustix::io::Result<i32>) -> i32 {
    done.unwrap_or_else(|error| -error.raw_os_error())
}

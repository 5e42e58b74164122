//! A request on its way through the host: what is to be done next, and what follows from how it went.
//!
//! ```text
//!   Read, Write ──▶ moved in part: again with the rest ──▶ done
//!   Sync ─────────▶ done
//!   Discard ──────▶ (write-through: Sync) ──▶ done
//!   Punch ─▶ can't ─▶ Zero ─▶ can't ─▶ Write of zeroes
//!     └──────────────┴─▶ (write-through: Sync) ──▶ done
//! ```
//! No system call is made here; [`Engine`](super::engine::Engine)s make them.

use std::sync::Arc;

use vm_memory::GuestAddress;

use daxhund_virtio_blk::{NotMemory, Status};

use super::pieces::{Pieces, Vector, Vectors};
use crate::memory::snapshot::Snapshot;

/// What the host is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Read into the vectors.
    Read,
    /// Write from the vectors; `durable`: and have it on storage before it is done (`RWF_DSYNC`).
    Write {
        /// Whether it must survive power loss.
        durable: bool,
    },
    /// Have everything that was written on storage (`fdatasync`).
    Sync,
    /// Give the range's blocks back; it reads as zeroes (`FALLOC_FL_PUNCH_HOLE`).
    Punch,
    /// Have the range read as zeroes without writing them (`FALLOC_FL_ZERO_RANGE`).
    Zero,
    /// Tell a block device that the range is of no use any more (`BLKDISCARD`).
    Discard,
}

/// What is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The step that the job says now.
    Step,
    /// The answer.
    Done(Status),
}

/// Most bytes that go through a buffer of the VMM at a time. Bounds what a guest can have allocated for it.
const BUFFER: usize = 256 << 10;
/// Enough for any storage's direct I/O.
const BUFFER_ALIGN: usize = 4096;

/// An aligned buffer that the kernel reads and writes in place of guest memory.
#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    /// What of it is in use, as one vector.
    vector: [Vector; 1],
}

impl Buffer {
    fn new(len: usize) -> Self {
        let mut bytes = vec![0; len + BUFFER_ALIGN];
        let start = bytes.as_ptr().align_offset(BUFFER_ALIGN).min(BUFFER_ALIGN);
        let vector = [Vector::of(&mut bytes[start..start + len])];
        Self {
            bytes,
            start,
            vector,
        }
    }

    fn take(&mut self, len: usize) -> &mut [u8] {
        let bytes = &mut self.bytes[self.start..self.start + len];
        self.vector = [Vector::of(bytes)];
        bytes
    }
}

/// One request.
#[derive(Debug)]
pub(super) struct Job {
    /// The chain to give back.
    pub(super) head: u16,
    /// Where the answer goes.
    pub(super) status: GuestAddress,
    /// What the used ring says was written when the answer is Ok, and when it is not.
    pub(super) written: (u32, u32),
    step: Step,
    /// Where in the image, in bytes.
    offset: u64,
    /// How much of the range is left.
    left: u64,
    write_through: bool,
    /// The range has to read as zeroes afterwards: it is not merely of no use any more.
    zeroes: bool,
    pieces: Pieces,
    buffer: Option<Buffer>,
}

impl Job {
    pub(super) fn new() -> Self {
        Self {
            head: 0,
            status: GuestAddress(0),
            written: (0, 0),
            step: Step::Sync,
            offset: 0,
            left: 0,
            write_through: false,
            zeroes: false,
            pieces: Pieces::default(),
            buffer: None,
        }
    }

    /// Becomes a transfer. `align`: what the image asks of memory, if it asks anything.
    pub(super) fn transfer(
        &mut self,
        step: Step,
        offset: u64,
        memory: &Arc<Snapshot>,
        data: impl Iterator<Item = (GuestAddress, usize)>,
        len: u64,
        align: Option<usize>,
    ) -> Result<(), NotMemory> {
        self.begin(step, offset, len);
        self.pieces.fill(memory, data)?;
        if align.is_some_and(|align| !self.pieces.is_aligned(align)) {
            self.through_buffer()?;
        }
        Ok(())
    }

    /// Becomes a [`Step::Sync`].
    pub(super) fn sync(&mut self) {
        self.begin(Step::Sync, 0, 0);
    }

    /// Becomes a step on a range: what it holds is of no use any more.
    pub(super) fn discard(&mut self, step: Step, offset: u64, len: u64, write_through: bool) {
        self.begin(step, offset, len);
        self.write_through = write_through;
    }

    /// Becomes a step on a range that reads as zeroes afterwards.
    pub(super) fn zero(&mut self, step: Step, offset: u64, len: u64, write_through: bool) {
        self.begin(step, offset, len);
        self.write_through = write_through;
        self.zeroes = true;
    }

    fn begin(&mut self, step: Step, offset: u64, len: u64) {
        self.release();
        self.step = step;
        self.offset = offset;
        self.left = len;
        self.write_through = false;
        self.zeroes = false;
    }

    /// Lets go of guest memory and buffers.
    pub(super) fn release(&mut self) {
        self.pieces.clear();
        self.buffer = None;
    }

    /// What to do now.
    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// Where in the image.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes of it, for a step on a range.
    pub(super) fn len(&self) -> u64 {
        self.left
    }

    /// The memory of a transfer: stays where it is as long as the job lives and is not changed.
    pub(super) fn vectors(&self) -> Vectors {
        match &self.buffer {
            Some(buffer) => Vectors::of(&buffer.vector),
            None => self.pieces.vectors(),
        }
    }

    /// What follows from how the step went: bytes moved, or a negative error number.
    pub(super) fn advance(&mut self, result: i32) -> Next {
        match self.step {
            // Nothing was done.
            _ if result == -libc::EINTR => Next::Step,
            // Nothing moved: the image ends before its end, or the storage is full.
            Step::Read | Step::Write { .. } => match usize::try_from(result) {
                Ok(bytes) if bytes > 0 && bytes as u64 <= self.left => self.moved(bytes),
                _ => Next::Done(Status::IoError),
            },
            Step::Sync if result < 0 => Next::Done(Status::IoError),
            Step::Sync => Next::Done(Status::Ok),
            Step::Punch | Step::Zero | Step::Discard => match result {
                0.. if self.write_through => {
                    self.step = Step::Sync;
                    Next::Step
                }
                0.. => Next::Done(Status::Ok),
                error if is_unsupported(error) => self.instead(),
                _ => Next::Done(Status::IoError),
            },
        }
    }

    /// The way on when the file system or device can't do a step.
    fn instead(&mut self) -> Next {
        match self.step {
            // A discard is a hint, and has no other way.
            Step::Punch if self.zeroes => self.step = Step::Zero,
            Step::Zero => {
                self.step = Step::Write {
                    durable: self.write_through,
                };
                let buffer = Buffer::new(self.part());
                self.buffer = Some(buffer);
            }
            _ => return Next::Done(Status::Unsupported),
        }
        Next::Step
    }

    fn moved(&mut self, bytes: usize) -> Next {
        if let (Step::Read, Some(buffer)) = (self.step, &mut self.buffer)
            && self.pieces.copy_from(buffer.take(bytes)).is_err()
        {
            return Next::Done(Status::IoError);
        }
        self.pieces.advance(bytes);
        self.left -= bytes as u64;
        self.offset += bytes as u64;
        if self.left == 0 {
            return Next::Done(Status::Ok);
        }
        if self.buffer.is_some() && self.through_buffer().is_err() {
            return Next::Done(Status::IoError);
        }
        Next::Step
    }

    /// Has the buffer hold what is next of a transfer.
    fn through_buffer(&mut self) -> Result<(), NotMemory> {
        let len = self.part();
        let buffer = self.buffer.get_or_insert_with(|| Buffer::new(len));
        let bytes = buffer.take(len);
        // Zeroes are in it, and nothing else comes there.
        if self.zeroes || self.step == Step::Read {
            return Ok(());
        }
        self.pieces.copy_to(bytes)
    }

    /// Bytes of the next part that goes through the buffer.
    fn part(&self) -> usize {
        usize::try_from(self.left).map_or(BUFFER, |left| left.min(BUFFER))
    }
}

fn is_unsupported(error: i32) -> bool {
    matches!(-error, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const NOT_THERE: i32 = -libc::EOPNOTSUPP;

    fn memory() -> Arc<Snapshot> {
        Arc::new(Snapshot::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
    }

    fn transfer(step: Step, at: u64, len: usize, align: Option<usize>) -> Job {
        let mut job = Job::new();
        let data = [(GuestAddress(at), len)].into_iter();
        job.transfer(step, 4096, &memory(), data, len as u64, align)
            .unwrap();
        job
    }

    #[test]
    fn a_transfer_goes_on_until_all_is_moved() {
        let mut job = transfer(Step::Read, 0, 4096, None);
        assert_eq!(job.advance(1000), Next::Step);
        assert_eq!((job.offset(), job.len()), (5096, 3096));
        assert_eq!(job.advance(-libc::EINTR), Next::Step);
        assert_eq!(job.advance(3096), Next::Done(Status::Ok));
    }

    #[test]
    fn what_does_not_move_is_an_error() {
        for result in [0, -libc::EIO, -libc::EFAULT, -libc::ENOSPC, i32::MIN, 4097] {
            let mut job = transfer(Step::Read, 0, 4096, None);
            assert_eq!(job.advance(result), Next::Done(Status::IoError), "{result}");
        }
    }

    #[test]
    fn a_sync_that_fails_is_an_error() {
        let mut job = Job::new();
        job.sync();
        assert_eq!(job.advance(-libc::EINTR), Next::Step);
        assert_eq!(job.advance(-libc::EIO), Next::Done(Status::IoError));
        assert_eq!(job.advance(0), Next::Done(Status::Ok));
    }

    #[test]
    fn zeroes_are_written_where_nothing_else_makes_them() {
        let mut job = Job::new();
        job.zero(Step::Punch, 0, BUFFER as u64 + 512, true);
        assert_eq!(job.advance(NOT_THERE), Next::Step);
        assert_eq!(job.step(), Step::Zero);
        assert_eq!(job.advance(NOT_THERE), Next::Step);
        assert_eq!(job.step(), Step::Write { durable: true });
        assert_eq!(job.advance(i32::try_from(BUFFER).unwrap()), Next::Step);
        assert_eq!(job.len(), 512);
        assert_eq!(job.advance(512), Next::Done(Status::Ok));
    }

    #[test]
    fn a_discard_has_no_other_way() {
        for step in [Step::Punch, Step::Discard] {
            let mut job = Job::new();
            job.discard(step, 0, 512, false);
            assert_eq!(job.advance(NOT_THERE), Next::Done(Status::Unsupported));
            job.discard(step, 0, 512, false);
            assert_eq!(job.advance(-libc::EIO), Next::Done(Status::IoError));
        }
    }

    #[test]
    fn write_through_is_followed_by_a_sync() {
        let mut job = Job::new();
        job.zero(Step::Zero, 0, 512, true);
        assert_eq!(job.advance(0), Next::Step);
        assert_eq!(job.step(), Step::Sync);
        assert_eq!(job.advance(0), Next::Done(Status::Ok));
        job.zero(Step::Zero, 0, 512, false);
        assert_eq!(job.advance(0), Next::Done(Status::Ok));
    }

    #[test]
    fn guest_memory_is_let_go_of_at_the_end() {
        let memory = memory();
        let mut job = Job::new();
        let data = [(GuestAddress(0), 512)].into_iter();
        job.transfer(Step::Read, 0, &memory, data, 512, None)
            .unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        job.release();
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    proptest! {
        /// A write through the buffer takes from guest memory what a write without it would, however it is cut up.
        #[test]
        fn the_buffer_holds_what_is_next(
            at in 1u64..300,
            len in 1usize..(BUFFER + 1000),
            cuts in prop::collection::vec(1usize..(BUFFER * 2), 1..6),
        ) {
            let memory = memory();
            let pattern: Vec<u8> = (0..=252).cycle().take(len).collect();
            memory.write_slice(&pattern, GuestAddress(at)).unwrap();
            let mut job = Job::new();
            let data = [(GuestAddress(at), len)].into_iter();
            let step = Step::Write { durable: false };
            job.transfer(step, 0, &memory, data, len as u64, Some(1 << 20)).unwrap();
            let mut done = 0;
            for cut in cuts.iter().cycle() {
                let part = job.part();
                let bytes = job.buffer.as_mut().unwrap().take(part);
                prop_assert_eq!(bytes.as_ptr().align_offset(BUFFER_ALIGN), 0);
                prop_assert!(bytes.len() <= BUFFER);
                prop_assert_eq!(&*bytes, &pattern[done..done + bytes.len()]);
                let moved = part.min(*cut);
                done += moved;
                match job.advance(i32::try_from(moved).unwrap()) {
                    Next::Step => prop_assert!(done < len),
                    Next::Done(status) => {
                        prop_assert_eq!((status, done), (Status::Ok, len));
                        break;
                    }
                }
            }
        }

        /// The same for a read, the other way.
        #[test]
        fn the_buffer_reaches_guest_memory(
            at in 1u64..300,
            len in 1usize..(BUFFER + 1000),
            cuts in prop::collection::vec(1usize..(BUFFER * 2), 1..6),
        ) {
            let memory = memory();
            let pattern: Vec<u8> = (0..=252).cycle().take(len).collect();
            let mut job = Job::new();
            let data = [(GuestAddress(at), len)].into_iter();
            job.transfer(Step::Read, 0, &memory, data, len as u64, Some(512)).unwrap();
            let mut done = 0;
            for cut in cuts.iter().cycle() {
                let moved = job.part().min(*cut);
                let bytes = job.buffer.as_mut().unwrap().take(moved);
                bytes.copy_from_slice(&pattern[done..done + moved]);
                done += moved;
                if job.advance(i32::try_from(moved).unwrap()) != Next::Step {
                    break;
                }
            }
            let mut found = vec![0; len];
            memory.read_slice(&mut found, GuestAddress(at)).unwrap();
            prop_assert_eq!(found, pattern);
        }
    }
}

//! Steps through `io_uring`, and those that need no waiting at once.
//!
//! ```text
//!   start ─▶ a read or write that is tried first? ─▶ it needs no waiting ─▶ finished
//!               │ no                                  │ it does
//!               └──▶ submission queue ◀───────────────┘
//!   submit ─▶ kernel ─▶ completion queue + eventfd ─▶ reap
//! ```
//! Guest memory is never registered with the ring: a pin would outlive the memory. The kernel takes each job's vectors
//! when it is submitted and reaches the memory only until the job's completion is posted. So a job, which holds the
//! snapshot of guest memory, stays in its slot until its completion is reaped.
//!
//! A read of what is in the page cache costs less as a plain `preadv2` that refuses to wait than as a round through
//! the ring: there is no completion to post, no eventfd to signal. Where such reads keep failing they are tried less
//! and less.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};
use tracing::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::{Engine, Finished};
use super::job::{Job, Step};
use super::pieces::Vectors;
use super::syscalls;

/// The image, as the ring knows it.
const IMAGE: Fixed = Fixed(0);
const MOST_SLOTS: usize = 1024;

/// What is done without the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtOnce {
    /// Nothing.
    Never,
    /// Reads and writes that need no waiting.
    IfReady,
    /// Everything: the image is in memory.
    Always,
}

/// Whether it is worth trying without waiting.
#[derive(Debug, Default)]
struct Attempts {
    /// The file system can't tell whether it would wait.
    hopeless: bool,
    failed: u32,
    skip: u32,
}

impl Attempts {
    /// As many as 63 in a row are not tried where nothing is ready.
    const LONGEST: u32 = 6;

    fn worth_it(&mut self) -> bool {
        if self.hopeless {
            return false;
        }
        let now = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        now
    }

    fn learn(&mut self, result: i32) {
        match -result {
            libc::EAGAIN => {
                self.failed = (self.failed + 1).min(Self::LONGEST);
                self.skip = (1 << self.failed) - 1;
            }
            libc::EOPNOTSUPP => self.hopeless = true,
            _ => self.failed = 0,
        }
    }
}

/// An `io_uring` of one queue.
pub(super) struct Uring {
    ring: IoUring,
    /// The ring has the descriptor too, but this is what `syscalls` takes.
    image: Arc<File>,
    event: EventFd,
    /// The event's count has been taken and nothing was reaped since.
    acknowledged: bool,
    /// By the number in the completion: the jobs that the kernel has, or will have after the next submit.
    slots: Vec<Option<Box<Job>>>,
    free: Vec<u32>,
    unsubmitted: usize,
    finished: Vec<Finished>,
    at_once: AtOnce,
    reads: Attempts,
    writes: Attempts,
    done_at_once: u64,
}

impl Uring {
    /// A ring for up to `room` jobs.
    pub(super) fn new(image: Arc<File>, room: usize, at_once: AtOnce) -> io::Result<Self> {
        let room = room.clamp(1, MOST_SLOTS);
        let entries = u32::try_from(room.next_power_of_two()).unwrap_or(1);
        // Completions don't interrupt this thread, they wait for its next system call. Since Linux 5.19.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_files(&[image.as_raw_fd()])?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let numbers = 0..u32::try_from(room).unwrap_or(0);
        Ok(Self {
            ring,
            image,
            event,
            acknowledged: false,
            slots: numbers.clone().map(|_| None).collect(),
            free: numbers.rev().collect(),
            unsubmitted: 0,
            finished: Vec::with_capacity(room),
            at_once,
            reads: Attempts::default(),
            writes: Attempts::default(),
            done_at_once: 0,
        })
    }

    /// The result, if the step needs no ring.
    fn try_at_once(&mut self, job: &Job) -> Option<i32> {
        let attempts = match (job.step(), self.at_once) {
            // There is no operation for it.
            (Step::Discard, _) | (_, AtOnce::Always) => {
                return Some(syscalls::run(&self.image, job));
            }
            (Step::Read, AtOnce::IfReady) => &mut self.reads,
            (Step::Write { durable: false }, AtOnce::IfReady) => &mut self.writes,
            _ => return None,
        };
        if !attempts.worth_it() {
            return None;
        }
        let result = syscalls::run_now(&self.image, job);
        attempts.learn(result);
        // Nothing was moved and nothing is wrong: the ring does it, and tells what is wrong if something is.
        (result > 0).then_some(result)
    }

    fn entry(job: &Job) -> squeue::Entry {
        let Vectors { first, count } = job.vectors();
        let offset = job.offset();
        match job.step() {
            Step::Read => opcode::Readv::new(IMAGE, first, count)
                .offset(offset)
                .build(),
            Step::Write { durable } => opcode::Writev::new(IMAGE, first, count)
                .offset(offset)
                .rw_flags(syscalls::durability(durable))
                .build(),
            step @ (Step::Punch | Step::Zero | Step::Discard) => {
                // Bits 0, 1 and 4.
                let mode = syscalls::allocation(step).bits().cast_signed();
                opcode::Fallocate::new(IMAGE, job.len())
                    .offset(offset)
                    .mode(mode)
                    .build()
            }
            Step::Sync => opcode::Fsync::new(IMAGE)
                .flags(FsyncFlags::DATASYNC)
                .build(),
        }
    }

    /// Puts a job into a slot and its entry into the submission queue; gives it back when there is no room.
    fn enqueue(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        let Some(number) = self.free.pop() else {
            return Err(job);
        };
        let entry = Self::entry(&job).user_data(u64::from(number));
        self.slots[number as usize] = Some(job);
        // SAFETY: the entry's vectors, and the memory that they tell of, are held by the job in its box: guest memory by
        // the snapshot in it, or a buffer. The job stays in its slot, unchanged and unmoved, until `reap` has the
        // completion of this number, the last thing the kernel does for the entry; dropping the ring waits for that.
        // Guest memory the host has lost is EFAULT to the kernel. The descriptor is registered with the ring.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            self.unsubmitted += 1;
            return Ok(());
        }
        self.free.push(number);
        match self.slots[number as usize].take() {
            Some(job) => Err(job),
            None => Ok(()),
        }
    }
}

impl Engine for Uring {
    fn has_room(&self) -> bool {
        self.finished.len() < self.free.len()
    }

    fn start(&mut self, job: Box<Job>) {
        if let Some(result) = self.try_at_once(&job) {
            self.done_at_once += 1;
            self.finished.push((job, result));
        } else if let Err(job) = self.enqueue(job) {
            // As many slots as entries: only a caller that did not ask for room gets here.
            self.finished.push((job, -libc::EBUSY));
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(submitted) => self.unsubmitted = self.unsubmitted.saturating_sub(submitted),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished);
        if self.in_flight() == 0 || self.ring.completion().is_empty() {
            return;
        }
        // Before looking at all of them: what is posted after the look signals again. It saves a wake-up for nothing.
        if !std::mem::take(&mut self.acknowledged) {
            let _ = self.event.read();
        }
        let Self {
            ring, slots, free, ..
        } = self;
        for completion in ring.completion() {
            let completion: cqueue::Entry = completion;
            let number = u32::try_from(completion.user_data()).unwrap_or(u32::MAX);
            if let Some(job) = slots.get_mut(number as usize).and_then(Option::take) {
                free.push(number);
                finished.push((job, completion.result()));
            } else {
                error!(number, "a completion of nothing");
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.finished.is_empty() || self.in_flight() == 0 {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Ok(submitted) => self.unsubmitted = self.unsubmitted.saturating_sub(submitted),
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.finished.len()
    }

    fn event(&self) -> Option<&EventFd> {
        Some(&self.event)
    }

    fn acknowledge(&mut self) {
        let _ = self.event.read();
        self.acknowledged = true;
    }

    fn done_at_once(&self) -> u64 {
        self.done_at_once
    }
}

impl Drop for Uring {
    /// Waits until the kernel is done with all jobs: then nothing reaches the memory they hold.
    fn drop(&mut self) {
        let mut finished = Vec::new();
        self.reap(&mut finished);
        while self.in_flight() > 0 {
            if let Err(error) = self.wait() {
                error!(%error, jobs = self.in_flight(), "requests in flight can't be waited for");
                // The kernel may have them still: their memory must stay for ever.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            self.reap(&mut finished);
        }
        // The kernel takes a ring apart in its own time, and the image's lock would live that long.
        if let Err(error) = self.ring.submitter().unregister_files() {
            error!(%error, "the image stays open for a while");
        }
    }
}

/// Too many completions wait, or there is no memory for requests at the moment.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_where_they_fail_and_frequent_where_they_succeed() {
        let mut attempts = Attempts::default();
        let mut tried = 0;
        for _ in 0..640 {
            if attempts.worth_it() {
                tried += 1;
                attempts.learn(-libc::EAGAIN);
            }
        }
        assert!((10..20).contains(&tried), "{tried} of 640");
        while !attempts.worth_it() {}
        attempts.learn(512);
        assert!(attempts.worth_it());
        attempts.learn(-libc::EAGAIN);
        assert!(!attempts.worth_it() && attempts.worth_it());
        attempts.learn(-libc::EOPNOTSUPP);
        assert!((0..100).all(|_| !attempts.worth_it()));
    }
}

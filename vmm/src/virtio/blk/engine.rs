//! Who does the steps of jobs.
//!
//! Both engines are driven in one way: `start` some, `submit`, then `reap` what is done; the rest tells through
//! `event`. A job is the engine's from `start` to `reap`, in its box: its vectors must not move.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::job::Job;
use super::syscalls;

/// A job whose step is done: bytes moved, or a negative error number.
pub(super) type Finished = (Box<Job>, i32);

/// Does steps.
pub(super) trait Engine: Send {
    /// Whether it takes another job.
    fn has_room(&self) -> bool;

    /// Takes a job. Only if there [is room](Engine::has_room), or for a job that was just reaped.
    fn start(&mut self, job: Box<Job>);

    /// Has the host begin everything that was started. An error: some of it has not begun, try again later.
    fn submit(&mut self) -> io::Result<()>;

    /// Moves the jobs that are done by now to `finished`.
    fn reap(&mut self, finished: &mut Vec<Finished>);

    /// Waits until there is something to reap, or nothing is in flight.
    fn wait(&mut self) -> io::Result<()>;

    /// How many jobs it has.
    fn in_flight(&self) -> usize;

    /// Readable when there is something to reap; `None` if that is never so without a call.
    fn event(&self) -> Option<&EventFd> {
        None
    }

    /// Takes the event's count, so that it wakes again; then reap.
    fn acknowledge(&mut self) {}

    /// How many jobs were done at once, without the host's own queue.
    fn done_at_once(&self) -> u64 {
        0
    }
}

/// Does each step when it is started, on the calling thread.
pub(super) struct Sync {
    image: Arc<File>,
    finished: Vec<Finished>,
    room: usize,
    done: u64,
}

impl Sync {
    pub(super) fn new(image: Arc<File>, room: usize) -> Self {
        Self {
            image,
            finished: Vec::new(),
            room,
            done: 0,
        }
    }
}

impl Engine for Sync {
    fn has_room(&self) -> bool {
        self.finished.len() < self.room
    }

    fn start(&mut self, job: Box<Job>) {
        let result = syscalls::run(&self.image, &job);
        self.done += 1;
        self.finished.push((job, result));
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished);
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn done_at_once(&self) -> u64 {
        self.done
    }
}

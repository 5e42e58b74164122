//! Serves one queue of a disk.
//!
//! ```text
//!   doorbell, completion ─▶ reap ─▶ answer ─┐
//!                  ┌────────────────────────┘
//!                  ▼
//!        take all that wait ─▶ plan ─▶ start ─▶ submit ─▶ reap, answer ─▶ one interrupt ─▶ look again
//! ```
//! Doorbells are off while requests are being taken: a guest that keeps the queue busy rings none. Answers of one pass
//! share an interrupt. What the host does at once is answered in the pass that took it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use daxhund_virtio_blk::{Chain, Status};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use vm_memory::{Bytes, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::counters::{Counters, Tally};
use super::engine::{Engine, Finished};
use super::image::Image;
use super::job::{Job, Next, Step};
use super::request::{Plan, Request, Terms};
use crate::memory::ram::GuestView;
use crate::memory::snapshot::Snapshot;
use crate::virtio::device::{ActivateError, Signals};
use crate::virtio::queue::{Queue, QueueError};
use crate::virtio::worker;

/// After so many passes in a row, whoever else wants the thread (a stop, a pause) gets it.
const PASSES: usize = 8;

const KICK: u32 = 0;
const DONE: u32 = 1;
/// There is more to do, although nobody rings.
const AGAIN: u32 = 2;

/// Serves one queue.
pub struct Worker {
    name: String,
    memory: GuestView,
    queue: Queue,
    engine: Box<dyn Engine>,
    image: Arc<Image>,
    readonly: bool,
    caching: Caching,
    counters: Arc<Counters>,
    signals: Arc<dyn Signals>,
    again: EventFd,
    /// For a pass; kept for their room.
    chain: Chain,
    finished: Vec<Finished>,
    #[allow(clippy::vec_box, reason = "they go to the engine in their boxes")]
    spare: Vec<Box<Job>>,
    tally: Tally,
    /// The driver broke the rings: nothing is served until the reset.
    broken: bool,
}

/// Who decides whether writes have to be on storage when they are answered.
pub(super) enum Caching {
    /// The driver knows of no cache.
    Through,
    /// The driver flushes.
    Back,
    /// The driver turns the cache on and off.
    Switched(Arc<AtomicBool>),
}

impl Caching {
    /// By what the driver has taken of `FLUSH` and `CONFIG_WCE`; the second means nothing without the first.
    pub(super) fn agreed(flush: bool, switch: bool, writeback: &Arc<AtomicBool>) -> Self {
        match (flush, switch) {
            (false, _) => Self::Through,
            (true, false) => Self::Back,
            (true, true) => Self::Switched(Arc::clone(writeback)),
        }
    }

    fn is_through(&self) -> bool {
        match self {
            Self::Through => true,
            Self::Back => false,
            Self::Switched(writeback) => !writeback.load(Ordering::SeqCst),
        }
    }
}

/// What a worker takes from its device.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) memory: GuestView,
    pub(super) queue: Queue,
    pub(super) engine: Box<dyn Engine>,
    pub(super) image: Arc<Image>,
    pub(super) readonly: bool,
    pub(super) caching: Caching,
    pub(super) counters: Arc<Counters>,
    pub(super) signals: Arc<dyn Signals>,
}

impl Worker {
    pub(super) fn new(parts: Parts) -> Result<Self, ActivateError> {
        let again = EventFd::new(EFD_NONBLOCK).map_err(|source| ActivateError::Host {
            what: "an eventfd can't be made",
            source,
        })?;
        Ok(Self {
            name: parts.name,
            memory: parts.memory,
            queue: parts.queue,
            engine: parts.engine,
            image: parts.image,
            readonly: parts.readonly,
            caching: parts.caching,
            counters: parts.counters,
            signals: parts.signals,
            again,
            chain: Chain::default(),
            finished: Vec::new(),
            spare: Vec::new(),
            tally: Tally::default(),
            broken: false,
        })
    }

    /// Takes what is available and answers what is done, without a thread or a doorbell. `true`: there is more to take,
    /// call again. What the host still works on is left to the next call, or to [`worker::Worker::drain`].
    pub fn process_queue(&mut self) -> bool {
        let more = if self.broken {
            self.discard_finished();
            false
        } else {
            self.serve().unwrap_or_else(|error| {
                self.broken = true;
                self.signals.needs_reset(&error);
                false
            })
        };
        self.tally.interrupts = self.queue.interrupts();
        self.tally.at_once = self.engine.done_at_once();
        self.counters.add(&mut self.tally);
        more
    }

    fn serve(&mut self) -> Result<bool, QueueError> {
        for _ in 0..PASSES {
            let memory = self.memory.memory().into_inner();
            self.queue.disable_kick(&*memory)?;
            let mut answered = self.answer_finished(&memory)?;
            answered |= self.take_all(&memory)?;
            // What does not begin now is tried again below.
            let _ = self.engine.submit();
            answered |= self.answer_finished(&memory)?;
            if answered {
                self.queue.notify(&*memory)?;
            }
            if let Err(error) = self.engine.submit() {
                // No memory for requests, say. They are tried again after whoever else wants the thread.
                error!(worker = self.name, %error, "the host can't begin requests at the moment");
                return Ok(true);
            }
            if !self.engine.has_room() {
                // The next completion makes room. Until then no doorbell would help.
                return Ok(false);
            }
            if !self.queue.enable_kick(&*memory)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes chains as long as there are any, but no more than a driver can have at a time.
    fn take_all(&mut self, memory: &Arc<Snapshot>) -> Result<bool, QueueError> {
        let mut answered = false;
        for _ in 0..self.queue.size() {
            if !self.engine.has_room() {
                break;
            }
            let Some(chain) = self.queue.pop(&**memory)? else {
                break;
            };
            self.chain.read(chain);
            answered |= self.begin(memory)?;
        }
        Ok(answered)
    }

    fn begin(&mut self, memory: &Arc<Snapshot>) -> Result<bool, QueueError> {
        let mut job = self.spare.pop().unwrap_or_else(|| Box::new(Job::new()));
        let terms = Terms {
            image: &self.image,
            readonly: self.readonly,
            write_through: self.caching.is_through(),
        };
        let request = Request {
            chain: &self.chain,
            memory,
            terms,
        };
        let plan = request.plan(&mut job);
        if self.queue.is_torn() {
            // Nothing has come of it yet. It is taken again, and what is lost is known then.
            self.keep(job);
            self.queue.unpop();
            return Ok(false);
        }
        match plan {
            Plan::Start(kind, bytes) => {
                self.tally.begun(kind, bytes);
                self.engine.start(job);
                Ok(false)
            }
            Plan::Answer(status, written) => {
                self.tally.answered(status);
                self.answer(memory, &job, status, written)?;
                self.keep(job);
                Ok(true)
            }
            Plan::GiveBack => {
                self.tally.answered(Status::IoError);
                self.keep(job);
                self.queue.push(&**memory, self.chain.head(), 0)?;
                Ok(true)
            }
        }
    }

    /// Answers what the host has done, and has it go on with what is done in part.
    fn answer_finished(&mut self, memory: &Snapshot) -> Result<bool, QueueError> {
        let mut answered = false;
        loop {
            self.engine.reap(&mut self.finished);
            if self.finished.is_empty() {
                return Ok(answered);
            }
            let mut goes_on = false;
            // From the back: the order of completions means nothing.
            while let Some((mut job, result)) = self.finished.pop() {
                let step = job.step();
                match job.advance(result) {
                    Next::Step => {
                        goes_on = true;
                        self.engine.start(job);
                    }
                    Next::Done(status) => {
                        let status = self.judge(step, status);
                        let written = match status {
                            Status::Ok => job.written.0,
                            _ => job.written.1,
                        };
                        self.tally.answered(status);
                        self.answer(memory, &job, status, written)?;
                        self.keep(job);
                        answered = true;
                    }
                }
            }
            if goes_on {
                // What does not begin now is tried again by the caller.
                let _ = self.engine.submit();
            }
        }
    }

    /// A sync is believed only if none before it has failed.
    fn judge(&self, step: Step, status: Status) -> Status {
        match step {
            Step::Sync | Step::Write { durable: true } => {
                if step == Step::Sync && status != Status::Ok {
                    error!(worker = self.name, "a flush failed; the guest is told");
                    self.image.remember_failed_sync();
                }
                if self.image.has_lost_writes() {
                    Status::IoError
                } else {
                    status
                }
            }
            _ => status,
        }
    }

    fn answer(
        &mut self,
        memory: &Snapshot,
        job: &Job,
        status: Status,
        written: u32,
    ) -> Result<(), QueueError> {
        // Memory that was there when the request was read and is not any more has no reader either.
        let written = match memory.write_obj(status as u8, job.status) {
            Ok(()) => written,
            Err(_) => 0,
        };
        self.queue.push(memory, job.head, written)
    }

    fn keep(&mut self, mut job: Box<Job>) {
        job.release();
        self.spare.push(job);
    }

    /// After the rings broke: what the host does is waited for, and has nobody to be told to.
    fn discard_finished(&mut self) {
        self.engine.reap(&mut self.finished);
        self.finished.clear();
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // By its edge: each ring is one, and the count need not be taken, which saves a system call a time.
        let rings = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let doorbell = Events::with_data_raw(self.queue.kick_fd(), KICK, rings);
        let again = Events::with_data(&self.again, AGAIN, EventSet::IN);
        let done = self
            .engine
            .event()
            .map(|event| Events::with_data(event, DONE, EventSet::IN));
        for events in [Some(doorbell), Some(again), done].into_iter().flatten() {
            if let Err(error) = ops.add(events) {
                self.broken = true;
                self.signals.needs_reset(&error);
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            KICK => self.tally.kicks += 1,
            DONE => self.engine.acknowledge(),
            AGAIN => drop(self.again.read()),
            other => error!(worker = self.name, other, "an event nobody asked for"),
        }
        if self.process_queue() {
            // Only a full counter gives an error, and then it is readable anyway.
            let _ = self.again.write(1);
        }
    }
}

impl worker::Worker for Worker {
    fn name(&self) -> String {
        self.name.clone()
    }

    /// Everything that was begun is finished and answered.
    fn drain(&mut self) {
        while self.engine.in_flight() > 0 {
            if let Err(error) = self.engine.wait() {
                error!(worker = self.name, %error, "requests in flight can't be waited for");
                break;
            }
            self.drain_finished();
        }
    }
}

impl Worker {
    fn drain_finished(&mut self) {
        if self.broken {
            return self.discard_finished();
        }
        let memory = self.memory.memory().into_inner();
        let answered = self.answer_finished(&memory);
        let told = answered.and_then(|answered| {
            if answered {
                self.queue.notify(&*memory)?;
            }
            Ok(())
        });
        if told.is_err() {
            self.broken = true;
        }
        self.counters.add(&mut self.tally);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_can_not_flush_has_no_cache() {
        let writeback = Arc::new(AtomicBool::new(true));
        let is_through = |flush, switch| Caching::agreed(flush, switch, &writeback).is_through();
        assert!(is_through(false, false) && is_through(false, true));
        assert!(!is_through(true, false) && !is_through(true, true));
        writeback.store(false, Ordering::SeqCst);
        assert!(!is_through(true, false) && is_through(true, true));
    }
}

//! Serves flush requests.
//!
//! ```text
//!   doorbell ─▶ take all that wait ─▶ one flush for all of them ─▶ answer all ─▶ one interrupt ─▶ look again
//! ```
//! One flush speaks for every request that was there before it began. Requests that come while it runs wait for the
//! next. Guest memory is let go of in between: a flush can take long.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use daxhund_virtio_pmem::{Asked, Request, Response};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Counters;
use crate::memory::loss::LossMark;
use crate::memory::pmem::Flush;
use crate::memory::ram::GuestView;
use crate::virtio::device::{ActivateError, Signals};
use crate::virtio::queue::{Queue, QueueError};
use crate::virtio::worker;

/// After so many batches in a row, whoever else wants the thread (a stop, a pause) gets it.
const BATCHES: usize = 8;

/// The doorbell, and "there is more to do".
const KICK: u32 = 0;
const AGAIN: u32 = 1;

/// Serves the one queue.
pub struct Worker {
    name: String,
    memory: GuestView,
    queue: Queue,
    flush: Arc<dyn Flush>,
    lost: LossMark,
    counters: Arc<Counters>,
    signals: Arc<dyn Signals>,
    again: EventFd,
    /// Requests of the batch that is served; empty between batches.
    batch: Vec<Request>,
    /// The driver broke the rings: nothing is served until the reset.
    broken: bool,
}

/// What a worker takes from its device.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) memory: GuestView,
    pub(super) queue: Queue,
    pub(super) flush: Arc<dyn Flush>,
    pub(super) lost: LossMark,
    pub(super) counters: Arc<Counters>,
    pub(super) signals: Arc<dyn Signals>,
}

impl Worker {
    pub(super) fn new(parts: Parts) -> Result<Self, ActivateError> {
        let again = EventFd::new(EFD_NONBLOCK).map_err(|source| ActivateError::Host {
            what: "an eventfd can't be made",
            source,
        })?;
        let Parts {
            name,
            memory,
            queue,
            flush,
            lost,
            counters,
            signals,
        } = parts;
        Ok(Self {
            name,
            memory,
            queue,
            flush,
            lost,
            counters,
            signals,
            again,
            batch: Vec::new(),
            broken: false,
        })
    }

    /// Begins to serve a queue that another process has served until now.
    pub(in crate::virtio) fn take_over(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.queue.take_over(&*self.memory.memory()) {
            self.broken = true;
            self.signals.needs_reset(&error);
        }
        self.init(ops);
        // Only a full counter gives an error, and then it is readable anyway.
        let _ = self.again.write(1);
    }

    /// Serves what is available, without a thread or a doorbell. `true`: there is more, call again.
    pub fn process_queue(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.serve().unwrap_or_else(|error| {
            self.broken = true;
            self.signals.needs_reset(&error);
            false
        })
    }

    fn serve(&mut self) -> Result<bool, QueueError> {
        for _ in 0..BATCHES {
            self.queue.disable_kick(&*self.memory.memory())?;
            self.take_all()?;
            if !self.batch.is_empty() {
                let flushed = self.flush_once();
                self.answer_all(flushed)?;
            }
            if !self.queue.enable_kick(&*self.memory.memory())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn take_all(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        // A driver has no more chains than descriptors; one that makes the ring turn faster waits for the next batch.
        for _ in 0..self.queue.size() {
            match self.queue.pop(&*memory)? {
                Some(chain) => {
                    let request = Request::parse(chain);
                    if self.queue.is_torn() {
                        self.queue.unpop();
                    } else {
                        self.batch.push(request);
                    }
                }
                None => break,
            }
        }
        Ok(())
    }

    /// The response of all flushes of the batch.
    fn flush_once(&self) -> Response {
        if !self.batch.iter().any(|it| it.asked() == Asked::Flush) {
            return Response::Done;
        }
        if self.lost.is_lost() {
            return Response::Failed;
        }
        self.counters.host_flushes.fetch_add(1, Ordering::Relaxed);
        match self.flush.flush() {
            // Lost meanwhile: what was made durable is not what the guest has.
            Ok(()) if self.lost.is_lost() => Response::Failed,
            Ok(()) => Response::Done,
            Err(error) => {
                error!(worker = self.name, %error, "a flush failed; the guest is told");
                Response::Failed
            }
        }
    }

    fn answer_all(&mut self, flushed: Response) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        for request in self.batch.drain(..) {
            let response = match request.asked() {
                Asked::Flush => flushed,
                Asked::Unknown => Response::Failed,
            };
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            if response == Response::Failed {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
            }
            let len = request.respond(&*memory, response);
            self.queue.push(&*memory, request.head(), len)?;
        }
        self.queue.notify(&*memory)
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let doorbell = Events::with_data_raw(self.queue.kick_fd(), KICK, EventSet::IN);
        let again = Events::with_data(&self.again, AGAIN, EventSet::IN);
        for events in [doorbell, again] {
            if let Err(error) = ops.add(events) {
                self.broken = true;
                self.signals.needs_reset(&error);
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            KICK => self.queue.acknowledge_kick(),
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
}

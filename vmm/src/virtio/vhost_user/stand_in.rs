//! Who answers a guest's flushes when the memory that a backend has lent is taken away: this process, with errors.
//!
//! ```text
//!   activate ─▶ a backend serves the queue, whichever is there ──sever──▶ it has stopped, or was cut off ─▶ the stand-in serves it
//!                                                                              activate again ─▶ the stand-in, from the start
//! ```
//! Drivers wait for an answer without a limit, and a guest flushes when it powers off. A backend that is lost is waited for as
//! long as there is memory that the next one could flush; without memory there is nothing to wait for.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Backend, worker};
use crate::virtio::pmem;
use crate::virtio::worker as workers;

/// Beside the events of the stand-in.
const SEVERED: u32 = 2;

/// Whether the memory is taken away.
pub(super) struct End {
    /// Held while a backend is had begin or end: it does not begin after the end.
    is_severed: Mutex<bool>,
    /// Rung once, when it is.
    bell: EventFd,
}

impl End {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            is_severed: Mutex::new(false),
            bell: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// When this returns no backend serves the device, and none will.
    pub(super) fn sever(&self, backend: &Backend) {
        let mut is_severed = self
            .is_severed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *is_severed = true;
        backend.borrow_no_more();
        drop(is_severed);
        // Only a full counter gives an error, and then it is readable anyway.
        let _ = self.bell.write(1);
    }
}

/// Has the backend serve the queue, and does so itself after the end.
pub(super) struct Worker {
    pub(super) served: worker::Worker,
    pub(super) stand_in: pmem::Worker,
    pub(super) end: Arc<End>,
    pub(super) has_taken_over: bool,
}

impl Worker {
    fn take_over(&mut self, ops: &mut EventOps<'_>) {
        if !std::mem::replace(&mut self.has_taken_over, true) {
            self.stand_in.take_over(ops);
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let end = Arc::clone(&self.end);
        let is_severed = end
            .is_severed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *is_severed {
            return self.take_over(ops);
        }
        if let Err(error) = ops.add(Events::with_data(&self.end.bell, SEVERED, EventSet::IN)) {
            error!(%error, "nobody will answer when the memory is taken away");
        }
        self.served.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == SEVERED {
            // Nothing to read after a spurious wake-up; then it is not the end either, and there is another.
            if self.end.bell.read().is_ok() {
                self.take_over(ops);
            }
        } else {
            self.stand_in.process(events, ops);
        }
    }
}

impl workers::Worker for Worker {
    fn name(&self) -> String {
        self.served.name()
    }

    fn drain(&mut self) {
        self.served.drain();
    }
}

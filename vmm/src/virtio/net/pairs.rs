//! Which queue pairs of an activation are in use.
//!
//! The driver starts with one and says how many it wants. A pair that is not in use is detached from the link, so that
//! the host puts no frames where nobody looks for them; its worker then does not watch the link either, because the
//! descriptor of a detached queue is always in error.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::link::Link;

/// Shared by the workers of one activation.
pub(super) struct Pairs {
    links: Vec<Arc<dyn Link>>,
    wakes: Vec<Arc<EventFd>>,
    active: AtomicUsize,
}

impl Pairs {
    /// One of `links` is in use. The host puts frames into all queues of a link until it is told otherwise. `wakes`
    /// wake the worker of each.
    pub(super) fn new(links: Vec<Arc<dyn Link>>, wakes: Vec<Arc<EventFd>>) -> io::Result<Self> {
        for link in links.iter().skip(1) {
            link.detach()?;
        }
        Ok(Self {
            links,
            wakes,
            active: AtomicUsize::new(1),
        })
    }

    /// Whether this pair is in use.
    pub(super) fn is_active(&self, pair: usize) -> bool {
        pair < self.active.load(Ordering::SeqCst)
    }

    /// How many there may be: those whose queues the driver has enabled.
    pub(super) fn most(&self) -> usize {
        self.wakes.len()
    }

    /// Uses `wanted` pairs from now on, 1 to [`Pairs::most`]. On an error some of the change may have been done; what is
    /// in use is still what the link believes. Called from one worker only.
    pub(super) fn set_active(&self, wanted: usize) -> io::Result<()> {
        let mut result = Ok(());
        let mut active = self.active.load(Ordering::SeqCst);
        while active > wanted && result.is_ok() {
            // Told first: its worker must not take the error of a detached queue for a link that is gone.
            self.active.store(active - 1, Ordering::SeqCst);
            result = self.links[active - 1].detach();
            if result.is_err() {
                self.active.store(active, Ordering::SeqCst);
            } else {
                active -= 1;
            }
        }
        while active < wanted && result.is_ok() {
            result = self.links[active].attach();
            if result.is_ok() {
                active += 1;
                self.active.store(active, Ordering::SeqCst);
            }
        }
        for wake in &self.wakes {
            // Fails only when the counter is full, and then the worker is awake anyway.
            let _ = wake.write(1);
        }
        result
    }
}

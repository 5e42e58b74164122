//! One virtqueue with its two doorbells: a thin, checked layer over `virtio-queue`.

use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryBackend as GuestMemory;
use vmm_sys_util::eventfd::EventFd;

/// The rings make no sense: the driver broke the rules, or their memory is gone.
#[derive(Debug, Error)]
#[error("queue {index}: {source}")]
pub struct QueueError {
    /// Which queue.
    pub index: u16,
    /// What is wrong.
    #[source]
    pub source: virtio_queue::Error,
}

/// Raises the interrupt of a queue.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that the used ring has something for it.
    fn signal(&self);
}

/// A virtqueue that is served.
pub struct Queue {
    index: u16,
    rings: virtio_queue::Queue,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
}

impl Queue {
    /// `kick` is written (by KVM) when the driver rings the queue's doorbell.
    pub fn new(
        index: u16,
        rings: virtio_queue::Queue,
        kick: EventFd,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            index,
            rings,
            kick,
            interrupt,
        }
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many descriptors the driver gave it.
    pub fn size(&self) -> u16 {
        self.rings.size()
    }

    /// Readable when the driver has rung. Acknowledge, then look at the ring.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes the doorbell's count, so that it wakes again for the next one.
    pub fn acknowledge_kick(&self) {
        // Nothing to read after a spurious wake-up: the ring decides.
        let _ = self.kick.read();
    }

    /// The next chain the driver made available; `None` when there is none at the moment.
    ///
    /// `memory` is a snapshot, cheap to clone (`GuestView::memory()`). The chain has at most as many descriptors as the
    /// queue: a loop ends there.
    pub fn pop<M>(&mut self, memory: M) -> Result<Option<DescriptorChain<M>>, QueueError>
    where
        M: Clone + Deref,
        M::Target: GuestMemory,
    {
        // `pop_descriptor_chain` of the crate takes a broken index for an empty ring.
        let index = self.index;
        let failed = |source| QueueError { index, source };
        self.rings
            .iter(memory)
            .map_err(failed)
            .map(|mut i| i.next())
    }

    /// Puts the chain last popped back: it is the next one again. For a device that can't take it yet.
    pub fn unpop(&mut self) {
        let next = self.rings.next_avail().wrapping_sub(1);
        self.rings.set_next_avail(next);
    }

    /// Gives a chain back, `len` bytes of its writable part filled.
    pub fn push<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        let index = self.index;
        self.rings
            .add_used(memory, head, len)
            .map_err(|source| QueueError { index, source })
    }

    /// Raises the interrupt if the driver wants one for what was pushed. Once for a batch.
    pub fn notify<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        let index = self.index;
        let wanted = self
            .rings
            .needs_notification(memory)
            .map_err(|source| QueueError { index, source })?;
        if wanted {
            self.interrupt.signal();
        }
        Ok(())
    }

    /// Asks for a doorbell at the next available chain. `true`: chains came meanwhile, pop again.
    pub fn enable_kick<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let index = self.index;
        self.rings
            .enable_notification(memory)
            .map_err(|source| QueueError { index, source })
    }

    /// Asks for no doorbell while chains are being served. A hint to the driver.
    pub fn disable_kick<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        let index = self.index;
        self.rings
            .disable_notification(memory)
            .map_err(|source| QueueError { index, source })
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("index", &self.index)
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

//! One virtqueue with its two doorbells: a thin, checked layer over `virtio-queue`.

use std::fmt;
use std::io::{self, Read};
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend as GuestMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::loss::{Epoch, Lost};

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

    /// What another process writes to raise it: the same without a way through this one. `None`: the driver has asked for no
    /// interrupt.
    fn event(&self) -> io::Result<Option<EventFd>> {
        Ok(None)
    }
}

/// A virtqueue that another process serves: where it is, and its two bells.
pub struct Ring {
    /// Which queue.
    pub index: u16,
    /// Its length.
    pub size: u16,
    /// Guest-physical address of the descriptors.
    pub descriptors: u64,
    /// Of the driver's ring.
    pub available: u64,
    /// Of the device's ring.
    pub used: u64,
    /// Rung by the driver.
    pub kick: EventFd,
    /// Rung for the driver.
    pub call: EventFd,
}

/// A virtqueue that is served.
pub struct Queue {
    index: u16,
    rings: virtio_queue::Queue,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    interrupts: u64,
    /// Something was pushed since the last [`Queue::notify`].
    pushed: bool,
    /// Index of the used ring when [`Queue::notify`] last looked.
    told: u16,
    /// Before the chain last popped was read.
    epoch: Epoch,
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
            interrupts: 0,
            pushed: false,
            told: 0,
            epoch: Epoch::now(),
        }
    }

    /// The same rings and bells once more, for who may have to serve them after another process. One of the two serves at a time.
    pub fn twin(&self) -> io::Result<Self> {
        let rings = virtio_queue::Queue::try_from(self.rings.state()).map_err(io::Error::other)?;
        let kick = self.kick.try_clone()?;
        let interrupt = Arc::clone(&self.interrupt);
        Ok(Self::new(self.index, rings, kick, interrupt))
    }

    /// Goes on where another process has stopped: what it has not given back is served, again if it had begun. Right where it has
    /// finished in order, what it took.
    pub fn take_over<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        let index = self.index;
        let used = self
            .rings
            .used_idx(memory, Ordering::Acquire)
            .map_err(|source| QueueError { index, source })?;
        self.rings.set_next_avail(used.0);
        self.rings.set_next_used(used.0);
        self.told = used.0;
        // The one before may have died between a request's end and its interrupt.
        self.interrupt.signal();
        Ok(())
    }

    /// For another process to serve it, by the vector that the driver has chosen by now.
    pub fn into_ring(self) -> io::Result<Ring> {
        let call = match self.interrupt.event()? {
            Some(event) => event,
            // For a driver that looks at the ring itself.
            None => EventFd::new(EFD_NONBLOCK)?,
        };
        Ok(Ring {
            index: self.index,
            size: self.rings.size(),
            descriptors: self.rings.desc_table(),
            available: self.rings.avail_ring(),
            used: self.rings.used_ring(),
            kick: self.kick,
            call,
        })
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

    /// Rings the doorbell from this side. For a worker that has served its share: its event loop looks at other things
    /// first (a stop, above all), and a driver that is never done can't keep it from them.
    pub fn kick_again(&self) {
        // Only a full counter gives an error, and then it rings anyway.
        let _ = self.kick.write(1);
    }

    /// The next chain the driver made available; `None` when there is none at the moment.
    ///
    /// `memory` is a snapshot, cheap to clone (`GuestView::memory()`). The chain has at most as many descriptors as the
    /// queue: a loop ends there.
    ///
    /// The chain is read as it is walked, and memory can be lost meanwhile: see [`Queue::is_torn`].
    pub fn pop<M>(&mut self, memory: M) -> Result<Option<DescriptorChain<M>>, QueueError>
    where
        M: Clone + Deref,
        M::Target: GuestMemory,
    {
        loop {
            self.epoch = Epoch::now();
            let popped = self.take(memory.clone());
            if !self.is_torn() {
                return popped;
            }
            // Memory was lost meanwhile, these rings or something else: read again. What is lost is an error from now on, so
            // this ends when nothing more is lost.
            if let Ok(Some(_)) = popped {
                self.unpop();
            }
        }
    }

    /// Whether memory was lost since the chain last popped began to be read. Asked when all of it has been read and before
    /// anything comes of it. Then nothing of it may be believed: [`Queue::unpop`], and pop it again; what is lost is an
    /// error from then on, and what is not is read as it is.
    pub fn is_torn(&self) -> bool {
        self.epoch.unbroken().is_err()
    }

    /// What [`Queue::is_torn`] compares with, for who reads a chain without the queue at hand.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn take<M>(&mut self, memory: M) -> Result<Option<DescriptorChain<M>>, QueueError>
    where
        M: Clone + Deref,
        M::Target: GuestMemory,
    {
        let index = self.index;
        let failed = |source| QueueError { index, source };
        let next = self.rings.next_avail();
        let available = self
            .rings
            .avail_idx(&*memory, Ordering::Acquire)
            .map_err(failed)?;
        if available.0 == next {
            return Ok(None);
        }
        // The crate's iterator ends both at the end of the ring and where the ring can't be read. Taken for the end,
        // the latter would make `enable_kick` promise chains for ever.
        let chain = self.rings.iter(memory).map_err(failed)?.next();
        match chain {
            Some(chain) => Ok(Some(chain)),
            None => Err(failed(virtio_queue::Error::InvalidAvailRingIndex)),
        }
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
        self.pushed = true;
        self.rings
            .add_used(memory, head, len)
            .map_err(|source| QueueError { index, source })
    }

    /// Gives several chains back in one step: the driver sees all of them or none. For what is in pieces that only
    /// make sense together, like a frame in mergeable buffers.
    pub fn push_all<M: GuestMemory>(
        &mut self,
        memory: &M,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some(((head, len), earlier)) = chains.split_last() else {
            return Ok(());
        };
        let index = self.index;
        let failed = |source| QueueError { index, source };
        let (first, size) = (self.rings.next_used(), self.rings.size());
        let mut next = first;
        for (head, len) in earlier {
            if *head >= size {
                return Err(failed(virtio_queue::Error::InvalidDescriptorIndex));
            }
            // The used ring: flags, index, then entries of eight bytes.
            let entry = self
                .rings
                .used_ring()
                .checked_add(4 + 8 * u64::from(next % size))
                .ok_or(failed(virtio_queue::Error::AddressOverflow))?;
            memory
                .write_obj([u32::from(*head).to_le(), len.to_le()], GuestAddress(entry))
                .map_err(|e| failed(virtio_queue::Error::GuestMemory(e)))?;
            next = next.wrapping_add(1);
        }
        // The index is written with the last one, by this.
        self.rings.set_next_used(next);
        self.push(memory, *head, *len)
    }

    /// Raises the interrupt if the driver wants one for what was pushed. Once for a batch.
    pub fn notify<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        // Without the event index, `virtio-queue` wants an interrupt for nothing too.
        if !std::mem::take(&mut self.pushed) {
            return Ok(());
        }
        let index = self.index;
        let failed = |source| QueueError { index, source };
        let wanted = if self.rings.event_idx_enabled() {
            self.is_event_reached(memory).map_err(failed)?
        } else {
            self.rings.needs_notification(memory).map_err(failed)?
        };
        if wanted {
            self.interrupts += 1;
            self.interrupt.signal();
        }
        Ok(())
    }

    /// Whether the entry that the driver waits for is among those pushed since the last time (2.7.7.2 and `vring_need_event`).
    /// `virtio-queue` counts calls, not entries, so [`Queue::push_all`] would make it miss some.
    fn is_event_reached<M: GuestMemory>(
        &mut self,
        memory: &M,
    ) -> Result<bool, virtio_queue::Error> {
        // The index before the event: a driver that asks for an interrupt looks at the index after it has asked.
        fence(Ordering::SeqCst);
        let event = GuestAddress(self.rings.avail_ring())
            .checked_add(4 + 2 * u64::from(self.rings.size()))
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let event: u16 = memory
            .load(event, Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        let (event, new) = (u16::from_le(event), self.rings.next_used());
        let old = std::mem::replace(&mut self.told, new);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// How often [`Queue::notify`] has raised the interrupt.
    pub fn interrupts(&self) -> u64 {
        self.interrupts
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

/// A reader of a chain that gives no byte that may be scratch.
#[derive(Debug)]
pub struct Untorn<R> {
    from: R,
    epoch: Epoch,
}

impl<R: Read> Untorn<R> {
    /// `epoch` is the queue's ([`Queue::epoch`]).
    pub fn new(from: R, epoch: Epoch) -> Self {
        Self { from, epoch }
    }
}

impl<R: Read> Read for Untorn<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(into)?;
        self.epoch.unbroken().map_err(|Lost| {
            into.fill(0);
            io::Error::from_raw_os_error(libc::EFAULT)
        })?;
        Ok(read)
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::memory::snapshot::Snapshot;

    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Interrupt for Count {
        fn signal(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn queue(memory: &Snapshot, event_index: bool) -> (Queue, Arc<Count>) {
        let mut rings = virtio_queue::Queue::new(4).unwrap();
        rings
            .try_set_avail_ring_address(GuestAddress(AVAILABLE))
            .unwrap();
        rings.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        rings.set_event_idx(event_index);
        rings.set_ready(true);
        assert!(rings.is_valid(memory));
        let count = Arc::<Count>::default();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let queue = Queue::new(0, rings, kick, Arc::clone(&count) as Arc<_>);
        (queue, count)
    }

    fn index(memory: &Snapshot) -> u16 {
        memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn entry(memory: &Snapshot, slot: u64) -> [u32; 2] {
        memory.read_obj(GuestAddress(USED + 4 + slot * 8)).unwrap()
    }

    #[test]
    fn chains_pushed_together_are_entries_in_order() {
        let memory = Snapshot::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let (mut queue, _) = queue(&memory, true);
        queue.push_all(&memory, &[]).unwrap();
        assert_eq!(index(&memory), 0);
        queue.push_all(&memory, &[(3, 30)]).unwrap();
        queue
            .push_all(&memory, &[(0, 1), (1, 2), (2, 3), (3, 4)])
            .unwrap();
        assert_eq!(index(&memory), 5);
        let entries = [0, 1, 2, 3].map(|slot| entry(&memory, slot));
        assert_eq!(entries, [[3, 4], [0, 1], [1, 2], [2, 3]]);
        for chains in [[(4, 0), (0, 0)], [(0, 0), (4, 0)]] {
            assert!(queue.push_all(&memory, &chains).is_err(), "{chains:?}");
        }
    }

    #[test]
    fn an_event_at_any_entry_pushed_together_is_signalled() {
        let memory = Snapshot::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        for (event, wanted) in [(0u16, 1), (1, 1), (2, 1), (3, 0), (u16::MAX, 0)] {
            let (mut queue, count) = queue(&memory, true);
            let at = GuestAddress(AVAILABLE + 4 + 2 * 4);
            memory.write_obj(event, at).unwrap();
            queue.push_all(&memory, &[(0, 1), (1, 1), (2, 1)]).unwrap();
            queue.notify(&memory).unwrap();
            queue.notify(&memory).unwrap();
            assert_eq!(count.0.load(Ordering::SeqCst), wanted, "event {event}");
        }
    }

    /// Seen with Linux: it waited for a frame of one chain, which a frame of several followed before it was told.
    #[test]
    fn an_event_is_not_missed_for_what_follows_it() {
        let memory = Snapshot::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let at = GuestAddress(AVAILABLE + 4 + 2 * 4);
        for event in 0u16..4 {
            let (mut queue, count) = queue(&memory, true);
            memory.write_obj(event, at).unwrap();
            queue.push_all(&memory, &[(0, 1)]).unwrap();
            queue.push_all(&memory, &[(1, 1), (2, 1)]).unwrap();
            queue.push(&memory, 3, 1).unwrap();
            queue.notify(&memory).unwrap();
            assert_eq!(count.0.load(Ordering::SeqCst), 1, "event {event}");
        }
    }

    #[test]
    fn nothing_pushed_is_nothing_to_tell() {
        let memory = Snapshot::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        for event_index in [false, true] {
            let (mut queue, count) = queue(&memory, event_index);
            for told in [0, 1, 1] {
                queue.notify(&memory).unwrap();
                assert_eq!(count.0.load(Ordering::SeqCst), told);
                if told == 0 {
                    queue.push(&memory, 0, 0).unwrap();
                }
            }
        }
    }
}

//! A driver without a guest: guest memory, rings and doorbells, for unit tests and fuzz targets of devices.
//!
//! ```text
//! each queue at  QUEUES + index * 0x10000:  descriptors | +0x8000 available ring | +0xc000 used ring
//! buffers from   BUFFERS up, never reused
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberId, SubscriberOps};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, Activation, Device, Signals};
use super::queue::{Interrupt, Queue};
use super::worker::{Crew, Worker};
use crate::memory::ram::GuestView;
use crate::memory::snapshot::Snapshot;

/// Size of the memory.
pub const MEMORY: u64 = 64 << 20;
const QUEUES: u64 = 0x10_0000;
const BUFFERS: u64 = 0x100_0000;
/// `VIRTIO_F_RING_EVENT_IDX`, for [`Driver::start`].
pub const EVENT_IDX: u64 = 1 << 29;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const DEADLINE: Duration = Duration::from_secs(20);

/// One descriptor of a chain.
#[derive(Debug, Clone)]
pub enum Piece {
    /// The device reads these bytes.
    Readable(Vec<u8>),
    /// The device may write so many.
    Writable(u32),
    /// Whatever a hostile driver would have: address, length, flags, next.
    Raw(u64, u32, u16, u16),
}

/// A chain that was made available.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Its first descriptor.
    pub head: u16,
    /// Address and length of each piece.
    pub buffers: Vec<(u64, u32)>,
}

struct Counter(EventFd);

impl Interrupt for Counter {
    fn signal(&self) {
        self.0.write(1).expect("a counter of 64 bits");
    }

    fn event(&self) -> io::Result<Option<EventFd>> {
        self.0.try_clone().map(Some)
    }
}

/// What a device said that is not about a queue.
#[derive(Debug, Default)]
pub struct Said {
    /// Configuration changes.
    pub config_changes: AtomicUsize,
    /// Demands for a reset.
    pub resets_needed: AtomicUsize,
}

impl Signals for Said {
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, _why: &dyn std::fmt::Display) {
        self.resets_needed.fetch_add(1, Ordering::SeqCst);
    }
}

struct Ring {
    size: u16,
    kick: EventFd,
    interrupt: Arc<Counter>,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
    /// The ring's index when [`Driver::ring_if_asked`] last looked.
    rung: u16,
    /// Interrupts that were taken while waiting.
    seen: AtomicU64,
}

impl Ring {
    fn take_interrupts(&self) {
        if let Ok(count) = self.interrupt.0.read() {
            self.seen.fetch_add(count, Ordering::SeqCst);
        }
    }
}

/// Drives one device.
pub struct Driver {
    view: GuestView,
    memory: Arc<Snapshot>,
    rings: Vec<Ring>,
    next_buffer: u64,
    /// What the device has said.
    pub said: Arc<Said>,
    crew: Option<Crew>,
    here: Option<Here>,
}

/// Workers without threads.
struct Here {
    manager: EventManager<Box<dyn Worker>>,
    workers: Vec<SubscriberId>,
}

impl Drop for Here {
    fn drop(&mut self) {
        for worker in self.workers.drain(..) {
            if let Ok(mut worker) = self.manager.remove_subscriber(worker) {
                worker.drain();
            }
        }
    }
}

impl Driver {
    /// Memory and empty rings for `device`, of its own largest sizes but at most 256.
    pub fn new(device: &dyn Device) -> Self {
        let size = usize::try_from(MEMORY).expect("64 bits");
        let memory = Snapshot::from_ranges(&[(GuestAddress(0), size)]).expect("64 MiB of memory");
        Self::with_memory(device, memory)
    }

    /// As [`Driver::new`], with memory that the caller has: [`MEMORY`] bytes from 0 on, and maybe more elsewhere.
    pub fn with_memory(device: &dyn Device, memory: Snapshot) -> Self {
        let view = GuestView::new(memory);
        let memory = (*view.memory()).clone();
        let rings = device
            .queue_sizes()
            .into_iter()
            .map(|size| Ring {
                size: size.min(256),
                kick: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
                interrupt: Arc::new(Counter(EventFd::new(EFD_NONBLOCK).expect("an eventfd"))),
                next_descriptor: 0,
                next_available: 0,
                next_used: 0,
                rung: 0,
                seen: AtomicU64::new(0),
            })
            .collect();
        Self {
            view,
            memory: Arc::new(memory),
            rings,
            next_buffer: BUFFERS,
            said: Arc::default(),
            crew: None,
            here: None,
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Snapshot {
        &self.memory
    }

    /// What `DRIVER_OK` gives the device: all queues, and these feature bits.
    pub fn activation(&self, features: u64) -> Activation {
        let queues = (0u16..)
            .zip(&self.rings)
            .map(|(index, ring)| {
                let base = QUEUES + u64::from(index) * 0x1_0000;
                let mut rings = virtio_queue::Queue::new(ring.size).expect("a power of two");
                rings.set_size(ring.size);
                rings
                    .try_set_desc_table_address(GuestAddress(base))
                    .expect("aligned");
                rings
                    .try_set_avail_ring_address(GuestAddress(base + 0x8000))
                    .expect("aligned");
                rings
                    .try_set_used_ring_address(GuestAddress(base + 0xc000))
                    .expect("aligned");
                rings.set_event_idx(features & EVENT_IDX != 0);
                rings.set_ready(true);
                let kick = ring.kick.try_clone().expect("an eventfd");
                Some(Queue::new(
                    index,
                    rings,
                    kick,
                    Arc::clone(&ring.interrupt) as Arc<_>,
                ))
            })
            .collect();
        Activation {
            memory: self.view.clone(),
            features,
            queues,
            signals: Arc::clone(&self.said) as Arc<_>,
        }
    }

    /// Sets `DRIVER_OK`: the device's workers run on threads as they do in a guest.
    pub fn start(&mut self, device: &dyn Device, features: u64) -> Result<(), ActivateError> {
        let workers = device.activate(self.activation(features))?;
        self.crew = Some(Crew::spawn(workers).expect("threads"));
        Ok(())
    }

    /// As [`Driver::start`], but nothing happens except in [`Driver::turn`]: the same steps every time, for fuzzing.
    pub fn start_here(&mut self, device: &dyn Device, features: u64) -> Result<(), ActivateError> {
        let workers = device.activate(self.activation(features))?;
        let mut manager = EventManager::new().expect("an event manager");
        let workers = workers
            .into_iter()
            .map(|worker| manager.add_subscriber(worker))
            .collect();
        self.here = Some(Here { manager, workers });
        Ok(())
    }

    /// Lets the workers do what there is to do now, at most `rounds` times: some is never done.
    pub fn turn(&mut self, rounds: usize) {
        let Some(here) = &mut self.here else { return };
        for _ in 0..rounds {
            let events = here.manager.run_with_timeout(0);
            if events.expect("an event manager") == 0 {
                break;
            }
        }
    }

    /// Resets the device: when it returns, no worker is left.
    pub fn stop(&mut self) {
        self.crew = None;
        self.here = None;
    }

    /// Room in guest memory.
    pub fn room(&mut self, len: u32) -> u64 {
        let at = self.next_buffer;
        self.next_buffer = (at + u64::from(len)).next_multiple_of(64);
        assert!(
            self.next_buffer < MEMORY,
            "the test has used all its memory"
        );
        at
    }

    /// Makes a chain available and rings the doorbell.
    pub fn send(&mut self, queue: usize, pieces: &[Piece]) -> Sent {
        let sent = self.offer(queue, pieces);
        self.ring(queue);
        sent
    }

    /// Makes a chain available.
    pub fn offer(&mut self, queue: usize, pieces: &[Piece]) -> Sent {
        let base = QUEUES + queue as u64 * 0x1_0000;
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_descriptor;
        let mut buffers = Vec::new();
        for (n, piece) in pieces.iter().enumerate() {
            let at = (head + u16::try_from(n).expect("a short chain")) % size;
            let more = if n + 1 < pieces.len() { NEXT } else { 0 };
            let (address, len, flags, next) = match piece {
                Piece::Readable(bytes) => {
                    let len = u32::try_from(bytes.len()).expect("a small buffer");
                    let address = self.room(len);
                    self.memory
                        .write_slice(bytes, GuestAddress(address))
                        .expect("room");
                    (address, len, more, (at + 1) % size)
                }
                Piece::Writable(len) => (self.room(*len), *len, WRITE | more, (at + 1) % size),
                Piece::Raw(address, len, flags, next) => (*address, *len, *flags, *next),
            };
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&next.to_le_bytes());
            let place = GuestAddress(base + u64::from(at) * 16);
            self.memory
                .write_slice(&descriptor, place)
                .expect("the table");
            buffers.push((address, len));
        }
        let ring = &mut self.rings[queue];
        ring.next_descriptor = (head + u16::try_from(pieces.len()).expect("short")) % size;
        let slot = base + 0x8000 + 4 + u64::from(ring.next_available % size) * 2;
        self.memory
            .write_obj(head, GuestAddress(slot))
            .expect("the ring");
        ring.next_available = ring.next_available.wrapping_add(1);
        self.set_available_index(queue, self.rings[queue].next_available);
        Sent { head, buffers }
    }

    /// What a hostile driver may write as the ring's index.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        let base = QUEUES + queue as u64 * 0x1_0000;
        self.memory
            .store(index, GuestAddress(base + 0x8000 + 2), Ordering::SeqCst)
            .expect("the ring");
    }

    /// Rings the doorbell.
    pub fn ring(&self, queue: usize) {
        self.rings[queue]
            .kick
            .write(1)
            .expect("a counter of 64 bits");
    }

    /// Rings the doorbell if the device asked for it at what was made available since the last time, as a driver with
    /// the event index does. Tells whether it did.
    pub fn ring_if_asked(&mut self, queue: usize) -> bool {
        // The index before the event: the device looks at the index after it has asked.
        fence(Ordering::SeqCst);
        let ring = &mut self.rings[queue];
        let used = QUEUES + queue as u64 * 0x1_0000 + 0xc000;
        let asked = GuestAddress(used + 4 + u64::from(ring.size) * 8);
        let asked: u16 = self
            .memory
            .load(asked, Ordering::Relaxed)
            .expect("the ring");
        let (old, new) = (ring.rung, ring.next_available);
        ring.rung = new;
        let wanted = new.wrapping_sub(asked).wrapping_sub(1) < new.wrapping_sub(old);
        if wanted {
            self.ring(queue);
        }
        wanted
    }

    /// The next chain the device has given back: head and written length. Waits for it; panics when none comes.
    pub fn used(&mut self, queue: usize) -> (u16, u32) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.used_now(queue) {
                return used;
            }
            // With the event index: an interrupt for the next one.
            self.ask_for_interrupt(queue);
            if let Some(used) = self.used_now(queue) {
                return used;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "queue {queue}: nothing came back");
            self.wait(queue, left);
        }
    }

    /// As [`Driver::used`], when there is one by now.
    pub fn used_now(&mut self, queue: usize) -> Option<(u16, u32)> {
        let base = QUEUES + queue as u64 * 0x1_0000 + 0xc000;
        let index: u16 = self
            .memory
            .load(GuestAddress(base + 2), Ordering::SeqCst)
            .expect("the ring");
        let ring = &mut self.rings[queue];
        if index == ring.next_used {
            return None;
        }
        let entry = base + 4 + u64::from(ring.next_used % ring.size) * 8;
        ring.next_used = ring.next_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).expect("the ring");
        let len: u32 = self
            .memory
            .read_obj(GuestAddress(entry + 4))
            .expect("the ring");
        Some((u16::try_from(head).expect("a descriptor's index"), len))
    }

    /// Interrupts of a queue since the last time.
    pub fn interrupts(&self, queue: usize) -> u64 {
        let ring = &self.rings[queue];
        ring.take_interrupts();
        ring.seen.swap(0, Ordering::SeqCst)
    }

    /// Bytes of a buffer.
    pub fn bytes(&self, buffer: (u64, u32)) -> Vec<u8> {
        let mut bytes = vec![0; buffer.1 as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(buffer.0))
            .expect("a buffer");
        bytes
    }

    fn ask_for_interrupt(&self, queue: usize) {
        let ring = &self.rings[queue];
        let available = QUEUES + queue as u64 * 0x1_0000 + 0x8000;
        let event = GuestAddress(available + 4 + u64::from(ring.size) * 2);
        self.memory
            .store(ring.next_used, event, Ordering::SeqCst)
            .expect("the ring");
        fence(Ordering::SeqCst);
    }

    /// Waits for an interrupt. One of before makes this return at once, and the caller looks again.
    fn wait(&self, queue: usize, at_most: Duration) {
        let ring = &self.rings[queue];
        let bell = Epoll::new().expect("an epoll");
        let event = EpollEvent::new(EventSet::IN, 0);
        bell.ctl(ControlOperation::Add, ring.interrupt.0.as_raw_fd(), event)
            .expect("an eventfd");
        let at_most = i32::try_from(at_most.min(DEADLINE).as_millis()).expect("seconds");
        let _ = bell.wait(at_most + 1, &mut [EpollEvent::default()]);
        ring.take_interrupts();
    }
}

#[cfg(test)]
mod tests;

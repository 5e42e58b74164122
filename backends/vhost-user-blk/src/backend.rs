//! The disk as the vhost crate drives it: rings, memory and features of one session. A new one for each connection.
//!
//! ```text
//!   kick ──▶ worker of the queue:  take a batch ──▶ pop, serve, push ──▶ ... ──▶ tell the driver ──▶ let go
//!                                      │ guest memory, for reading                                    │
//!   memory changed, ring stopped ──▶ waits for the end of the batch ◀─────────────────────────────────┘
//! ```
//! A batch is bounded, so whoever waits for its end does not wait for a driver that is never done.

#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use daxhund_dax::loss::Epoch;
use daxhund_vhost_user::session::Device;
use daxhund_virtio_blk::{Chain, Status};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::disk::Disk;
use crate::guest::GuestMemory;
use crate::metrics::Metrics;
use crate::request::{Request, Terms};
use crate::serve::{Scratch, Target, serve};
use crate::space;

/// Most requests of a batch.
const REQUESTS: usize = 32;
/// A batch ends when it has moved this much.
const BYTES: u64 = 4 << 20;

/// One session's device.
#[derive(Debug)]
pub struct Backend {
    disk: Arc<dyn Disk>,
    metrics: Arc<Metrics>,
    space: Vec<u8>,
    num_queues: u16,
    write_through: AtomicBool,
    stopping: AtomicBool,
    /// Held for reading for a batch. Taken before the lock of a ring.
    guest: RwLock<GuestMemory>,
    /// Each locked by its own worker only.
    lanes: Vec<Mutex<Lane>>,
}

/// What the worker of a queue keeps.
#[derive(Debug)]
struct Lane {
    chain: Chain,
    scratch: Scratch,
    /// It was said that the ring makes no sense.
    is_told: bool,
}

/// How a batch ended.
#[derive(Debug, PartialEq, Eq)]
enum Batch {
    /// The driver has made no more available, and rings when it has.
    Drained,
    /// There may be more.
    Full,
    /// The ring is not to be served.
    Stopped,
}

impl Backend {
    /// For a disk.
    pub fn new(disk: Arc<dyn Disk>, num_queues: u16, metrics: Arc<Metrics>) -> Self {
        let lane = || {
            Mutex::new(Lane {
                chain: Chain::default(),
                scratch: Scratch::new(&*disk),
                is_told: false,
            })
        };
        Self {
            space: space::build(&*disk, num_queues).to_vec(),
            num_queues,
            write_through: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            guest: RwLock::default(),
            lanes: (0..num_queues).map(|_| lane()).collect(),
            disk,
            metrics,
        }
    }

    fn drain(&self, queue: usize, vring: &VringMutex) {
        let Some(lane) = self.lanes.get(queue) else {
            return;
        };
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match self.batch(vring, &mut lane) {
                Ok(Batch::Full) => {}
                Ok(Batch::Drained | Batch::Stopped) => return,
                Err(error) => {
                    if !std::mem::replace(&mut lane.is_told, true) {
                        tracing::warn!(queue, %error, "the rings make no sense, or their memory is gone");
                    }
                    return;
                }
            }
        }
    }

    fn batch(&self, vring: &VringMutex, lane: &mut Lane) -> Result<Batch, virtio_queue::Error> {
        let guest = self.guest.read().unwrap_or_else(PoisonError::into_inner);
        let mut requests = 0;
        let end = self.requests(vring, lane, &guest, &mut requests);
        if requests > 0 {
            let mut state = vring.get_mut();
            // Rings that can't be read any more: the driver is told rather than not.
            let tell = state.get_queue_mut().needs_notification(&*guest);
            if tell.unwrap_or(true)
                && let Err(error) = state.signal_used_queue()
            {
                tracing::debug!(%error, "the driver can't be told");
            }
        }
        end
    }

    fn requests(
        &self,
        vring: &VringMutex,
        lane: &mut Lane,
        guest: &GuestMemory,
        requests: &mut usize,
    ) -> Result<Batch, virtio_queue::Error> {
        let target = Target {
            disk: &*self.disk,
            write_through: self.write_through.load(Ordering::SeqCst),
            metrics: &self.metrics,
        };
        let mut bytes = 0;
        while *requests < REQUESTS && bytes < BYTES {
            let asked = {
                let mut state = vring.get_mut();
                let is_on = state.is_enabled() && state.get_queue().ready();
                if !is_on || self.stopping.load(Ordering::SeqCst) {
                    return Ok(Batch::Stopped);
                }
                match self.next(state.get_queue_mut(), lane, guest)? {
                    Some(asked) => asked,
                    None if state.get_queue_mut().enable_notification(guest)? => continue,
                    None => return Ok(Batch::Drained),
                }
            };
            let written = serve(&lane.chain, asked, guest, target, &mut lane.scratch);
            let mut state = vring.get_mut();
            let queue = state.get_queue_mut();
            queue.add_used(guest, lane.chain.head(), written)?;
            *requests += 1;
            bytes += lane.chain.in_len() + lane.chain.out_len();
        }
        Ok(Batch::Full)
    }

    /// Reads the next chain and what it asks. When memory was lost meanwhile, read again: what is lost is an error from then
    /// on, so this ends when nothing more is.
    fn next(
        &self,
        queue: &mut Queue,
        lane: &mut Lane,
        guest: &GuestMemory,
    ) -> Result<Option<Result<Request, Status>>, virtio_queue::Error> {
        let terms = Terms {
            len: self.disk.len(),
            read_only: self.disk.is_read_only(),
        };
        let next = queue.next_avail();
        loop {
            let epoch = Epoch::now();
            let popped = pop(queue, guest).map(|chain| {
                chain.map(|chain| {
                    lane.chain.read(chain);
                    Request::of(&lane.chain, guest, terms)
                })
            });
            if epoch.unbroken().is_ok() {
                return popped;
            }
            queue.set_next_avail(next);
        }
    }
}

fn pop<'a>(
    queue: &mut Queue,
    guest: &'a GuestMemory,
) -> Result<Option<DescriptorChain<&'a GuestMemory>>, virtio_queue::Error> {
    let available = queue.avail_idx(guest, Ordering::Acquire)?;
    if available.0 == queue.next_avail() {
        return Ok(None);
    }
    // The crate's iterator ends both at the end of the ring and where the ring can't be read. Taken for the end, the latter
    // would make `enable_notification` promise chains for ever.
    let chain = queue.iter(guest)?.next();
    chain.map_or(Err(virtio_queue::Error::InvalidAvailRingIndex), |chain| {
        Ok(Some(chain))
    })
}

impl Device for Backend {
    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    fn exit_token(&self) -> u64 {
        u64::from(self.num_queues) + 1
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        usize::from(self.num_queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(space::MOST_QUEUE_SIZE)
    }

    fn features(&self) -> u64 {
        space::features(&*self.disk, self.num_queues)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        let knows_flush = features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        self.write_through.store(!knows_flush, Ordering::SeqCst);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The rings themselves are told by the crate.
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        space::part(&self.space, offset, size)
    }

    fn set_config(&self, _: u32, _: &[u8]) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "nothing of the disk's configuration can be written",
        ))
    }

    /// When this returns, nobody touches what is not shared any more, and it is unmapped here.
    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let mut guest = self.guest.write().unwrap_or_else(PoisonError::into_inner);
        let following = GuestMemory::following(&guest, &memory.memory());
        *guest = following.map_err(io::Error::other)?;
        Ok(())
    }

    /// A thread for each queue.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.num_queues).map(|queue| 1 << queue).collect()
    }

    /// When this returns, every request that was taken is answered.
    fn stop_vring(&self, _: u32) -> io::Result<()> {
        drop(self.guest.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// An error ends the worker, so it is given for nothing but the end of the session.
    fn handle_event(
        &self,
        event: u16,
        _: EventSet,
        vrings: &[VringMutex],
        thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == self.exit_token() {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "the session is over",
            ));
        }
        if let Some(vring) = vrings.get(usize::from(event)) {
            self.drain(thread, vring);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

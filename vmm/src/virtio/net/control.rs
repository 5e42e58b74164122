//! The control queue: virtio 1.2, section 5.1.6.5.
//!
//! A command is acknowledged when it was done and refused when it was not; there are no filters here, so those for them
//! are refused. Who moves the frames, a tap's workers or a vhost-user backend, is told by [`Orders`].

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes};

use super::link::Offloads;
use crate::memory::snapshot::Snapshot;
use crate::virtio::{Queue, QueueError};

/// Descriptors of the queue.
pub const CONTROL_SIZE: u16 = 64;
/// Commands for one call of [`Control::serve`].
const BATCH: usize = 64;
/// Class, command, and the longest data of a command that is known.
const LONGEST: usize = 2 + 8;

/// What the driver can ask for.
pub trait Orders {
    /// How many pairs of queues there may be.
    fn most_pairs(&self) -> usize;

    /// So many are in use from now on, 1 to [`Orders::most_pairs`].
    fn use_pairs(&self, wanted: usize) -> io::Result<()>;

    /// What the frames that the driver receives may ask it to do. Asked only of who offers `CTRL_GUEST_OFFLOADS`.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// The control queue.
pub struct Control {
    queue: Queue,
    features: u64,
}

impl Control {
    /// Takes it out of the queues of an activation, where it comes after the pairs that were agreed on (5.1.2), and leaves
    /// those. `features`: what the driver took. `pairs`: how many it was offered.
    pub fn split_off(queues: &mut Vec<Option<Queue>>, features: u64, pairs: usize) -> Option<Self> {
        let has = |bit: u32| features & (1 << bit) != 0;
        let agreed = if has(VIRTIO_NET_F_MQ) { pairs } else { 1 };
        let queue = queues.get_mut(agreed * 2).and_then(Option::take);
        queues.truncate(agreed * 2);
        let queue = queue.filter(|_| has(VIRTIO_NET_F_CTRL_VQ))?;
        Some(Self { queue, features })
    }

    /// Its queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Does the commands that are there; `true` when there may be more, for the next turn.
    pub fn serve(&mut self, memory: &Snapshot, orders: &dyn Orders) -> Result<bool, QueueError> {
        self.queue.disable_kick(memory)?;
        let mut more = true;
        for _ in 0..BATCH {
            if let Some(chain) = self.queue.pop(memory)? {
                let head = chain.head_index();
                let answer = chain
                    .clone()
                    .writable()
                    .find(|d| d.len() > 0)
                    .map(|d| d.addr());
                let request = request(&chain);
                if self.queue.is_torn() {
                    self.queue.unpop();
                    continue;
                }
                let ack = if self.command(&request, orders) {
                    VIRTIO_NET_OK
                } else {
                    VIRTIO_NET_ERR
                };
                let [ack, ..] = ack.to_le_bytes();
                let answered = answer.is_some_and(|at| memory.write_obj(ack, at).is_ok());
                self.queue.push(memory, head, u32::from(answered))?;
            } else if !self.queue.enable_kick(memory)? {
                more = false;
                break;
            }
        }
        self.queue.notify(memory)?;
        Ok(more)
    }

    /// Whether it was done.
    fn command(&self, request: &[u8], orders: &dyn Orders) -> bool {
        let [class, command, data @ ..] = request else {
            return false;
        };
        match (u32::from(*class), u32::from(*command)) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let Some(wanted) = data.first_chunk() else {
                    return false;
                };
                let wanted = usize::from(u16::from_le_bytes(*wanted));
                self.has(VIRTIO_NET_F_MQ)
                    && (1..=orders.most_pairs()).contains(&wanted)
                    && orders
                        .use_pairs(wanted)
                        .inspect_err(|error| {
                            tracing::warn!(%error, wanted, "can't set the number of queue pairs");
                        })
                        .is_ok()
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                let Some(wanted) = data.first_chunk() else {
                    return false;
                };
                let wanted = u64::from_le_bytes(*wanted);
                let allowed = self.features & Offloads::mask();
                self.has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
                    && wanted & !allowed == 0
                    && orders.set_offloads(Offloads::from_features(wanted)).is_ok()
            }
            _ => false,
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// The first bytes that the driver wrote; fewer when the chain is shorter or not in RAM.
fn request(chain: &DescriptorChain<&Snapshot>) -> Vec<u8> {
    let memory = chain.memory();
    let mut request = Vec::with_capacity(LONGEST);
    for descriptor in chain.clone().readable() {
        for offset in 0..descriptor.len() {
            if request.len() == LONGEST {
                return request;
            }
            let byte = descriptor
                .addr()
                .checked_add(u64::from(offset))
                .and_then(|at| memory.read_obj(at).ok());
            let Some(byte) = byte else { return request };
            request.push(byte);
        }
    }
    request
}

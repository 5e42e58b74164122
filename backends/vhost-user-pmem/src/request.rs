//! One descriptor chain as a request (virtio 1.2, 5.19.6): where its type and its response are.
//!
//! ```text
//!   device-readable            device-writable
//!   le32 type (0: flush)       le32 ret (0: done, 1: I/O error)
//! ```
//! A driver splits and joins descriptors as it likes, so only the order of bytes counts.

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const LEN: usize = 4;
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// A request that waits for its response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) head: u16,
    /// Something else, or nothing that can be read, fails.
    pub(crate) is_flush: bool,
    /// `None` when the driver left no room.
    response: Option<[GuestAddress; LEN]>,
}

impl Request {
    pub(crate) fn parse<M: GuestMemoryBackend>(chain: DescriptorChain<&M>) -> Self {
        let (head, memory) = (chain.head_index(), chain.clone());
        let memory = memory.memory();
        let (mut kind, mut response) = (Field::default(), Field::default());
        let (mut whole, mut in_order) = (true, true);
        for descriptor in chain {
            if descriptor.is_write_only() {
                response.take(&descriptor);
            } else {
                // What can be read comes first.
                in_order &= response.at == 0;
                kind.take(&descriptor);
            }
            // A chain that ends with a promise of more is one that loops or that could not be read on.
            whole = !descriptor.has_next();
        }
        let is_flush = kind.read(memory) == Some(FLUSH) && whole && in_order;
        Self {
            head,
            is_flush,
            response: response.whole(),
        }
    }

    /// Writes the response: how many bytes of it there are.
    pub(crate) fn respond(&self, memory: &impl GuestMemoryBackend, done: bool) -> u32 {
        let code = if done { DONE } else { FAILED };
        let Some(bytes) = self.response else { return 0 };
        let mut written = 0;
        for (byte, at) in code.to_le_bytes().into_iter().zip(bytes) {
            if memory.write_obj(byte, at).is_err() {
                break;
            }
            written += 1;
        }
        written
    }
}

/// The addresses of a field's bytes, which may be spread over descriptors.
#[derive(Default)]
struct Field {
    bytes: [GuestAddress; LEN],
    at: usize,
}

impl Field {
    fn take(&mut self, descriptor: &Descriptor) {
        for offset in 0..u64::from(descriptor.len()).min(LEN as u64) {
            let (Some(byte), Some(address)) = (
                self.bytes.get_mut(self.at),
                descriptor.addr().0.checked_add(offset),
            ) else {
                return;
            };
            *byte = GuestAddress(address);
            self.at += 1;
        }
    }

    fn whole(&self) -> Option<[GuestAddress; LEN]> {
        (self.at == LEN).then_some(self.bytes)
    }

    fn read(&self, memory: &impl GuestMemoryBackend) -> Option<u32> {
        let mut value = [0; LEN];
        for (byte, at) in value.iter_mut().zip(self.whole()?) {
            *byte = memory.read_obj(at).ok()?;
        }
        Some(u32::from_le_bytes(value))
    }
}

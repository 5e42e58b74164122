//! A virtio-pmem device's request (virtio 1.2, 5.19.6): one descriptor chain, and where its type and its response are in it.
//!
//! ```text
//!   device-readable            device-writable
//!   le32 type (0: flush)       le32 ret (0: done, 1: I/O error)
//! ```
//! The specification lets a driver split and join descriptors as it likes, so only the order of bytes counts.

#![forbid(unsafe_code)]

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const LEN: usize = 4;
const FLUSH: u32 = 0;

/// What a response says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// The request is done.
    Done,
    /// It is not, and what was to be durable may not be.
    Failed,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Make what was stored durable.
    Flush,
    /// Something this device does not know, or nothing that can be read.
    Unknown,
}

/// A request that waits for its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    head: u16,
    asked: Asked,
    /// The response's bytes; `None` when the driver left no room for them.
    response: Option<[GuestAddress; LEN]>,
}

impl Request {
    /// Reads a chain.
    pub fn parse<M>(chain: DescriptorChain<M>) -> Self
    where
        M: Deref<Target: GuestMemoryBackend + Sized> + Clone,
    {
        let (head, memory) = (chain.head_index(), chain.clone());
        let memory = memory.memory();
        let mut kind = Field::default();
        let mut response = Field::default();
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
        let asked = match kind.read(memory) {
            Some(FLUSH) if whole && in_order => Asked::Flush,
            _ => Asked::Unknown,
        };
        Self {
            head,
            asked,
            response: response.whole(),
        }
    }

    /// What is asked for.
    pub fn asked(&self) -> Asked {
        self.asked
    }

    /// The chain to give back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Writes the response; returns how many bytes the chain's writable part has got.
    pub fn respond(&self, memory: &impl GuestMemoryBackend, response: Response) -> u32 {
        let code: u32 = match response {
            Response::Done => 0,
            Response::Failed => 1,
        };
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

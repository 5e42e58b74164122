//! One descriptor chain, read once.
//!
//! ```text
//!   device-readable                                            device-writable
//!   le32 type, le32 reserved, le64 sector | data to the disk   data from the disk | u8 status
//! ```
//! A driver may split and join descriptors as it likes, so only the order of bytes counts.

#![forbid(unsafe_code)]

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::guest::GuestMemory;

/// More than any driver sends: the kernel takes 1024 vectors at a time, and header and status have one each.
const MOST_DESCRIPTORS: usize = 1026;
const HEADER: u64 = 16;
const HEADER_LEN: usize = 16;

#[derive(Debug, Clone, Copy)]
struct Span {
    address: GuestAddress,
    len: u32,
}

/// A chain. Kept for its room.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Span>,
    writable: Vec<Span>,
    readable_len: u64,
    writable_len: u64,
    /// Nothing is missing and what can be read comes first.
    sound: bool,
}

/// The range of a chain is not memory, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotMemory;

impl Chain {
    /// Reads the descriptors.
    pub fn read(&mut self, chain: DescriptorChain<&GuestMemory>) {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        self.sound = true;
        let mut promised = true;
        for descriptor in chain {
            if self.readable.len() + self.writable.len() == MOST_DESCRIPTORS {
                self.sound = false;
                return;
            }
            let span = Span {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                self.writable.push(span);
                self.writable_len += u64::from(span.len);
            } else {
                self.sound &= self.writable.is_empty();
                self.readable.push(span);
                self.readable_len += u64::from(span.len);
            }
            promised = descriptor.has_next();
        }
        // One that ends with a promise of more loops, or could not be read on.
        self.sound &= !promised;
    }

    /// The chain to give back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Whether it is all there, in the right order.
    pub fn is_sound(&self) -> bool {
        self.sound
    }

    /// Where the answer goes: the last byte that can be written.
    pub fn status(&self, memory: &GuestMemory) -> Option<GuestAddress> {
        let last = self.writable.iter().rev().find(|span| span.len > 0)?;
        let at = last.address.0.checked_add(u64::from(last.len) - 1)?;
        memory.check_address(GuestAddress(at))
    }

    /// Type and sector.
    pub fn header(&self, memory: &GuestMemory) -> Option<(u32, u64)> {
        let mut header = [0; HEADER_LEN];
        let parts = part(&self.readable, 0, HEADER);
        gather(memory, parts, &mut header).ok()?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        Some((kind, u64::from_le_bytes(sector)))
    }

    /// How much comes with the request.
    pub fn out_len(&self) -> u64 {
        self.readable_len.saturating_sub(HEADER)
    }

    /// How much goes back with the answer.
    pub fn in_len(&self) -> u64 {
        self.writable_len.saturating_sub(1)
    }

    /// Copies what comes with the request, from its byte `from` on, as much as `into` has room for.
    pub fn copy_out(
        &self,
        memory: &GuestMemory,
        from: u64,
        into: &mut [u8],
    ) -> Result<(), NotMemory> {
        let parts = part(&self.readable, HEADER + from, into.len() as u64);
        gather(memory, parts, into)
    }

    /// Whether all of what comes with the request is memory.
    pub fn has_data(&self, memory: &GuestMemory) -> bool {
        part(&self.readable, HEADER, self.out_len())
            .all(|(address, len)| GuestMemoryBackend::check_range(memory, address, len))
    }

    /// Room for what goes back with the answer, in order; all of it or an error.
    pub fn room<'a>(
        &self,
        memory: &'a GuestMemory,
        into: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<(), NotMemory> {
        into.clear();
        for (address, len) in part(&self.writable, 0, self.in_len()) {
            for slice in GuestMemoryBackend::get_slices(memory, address, len) {
                into.push(slice.map_err(|_| NotMemory)?);
            }
        }
        Ok(())
    }

    /// What the used ring says when `data` bytes have gone back and the status was written: how much was written from the
    /// first writable byte on, without a gap.
    pub fn written(&self, data: u64) -> u32 {
        let len = if data == self.in_len() {
            data + 1
        } else {
            data
        };
        u32::try_from(len).unwrap_or(u32::MAX)
    }
}

/// The `len` bytes after the first `skip` of some spans. An address that wraps round is not memory, whatever it is.
fn part(spans: &[Span], skip: u64, len: u64) -> impl Iterator<Item = (GuestAddress, usize)> {
    let (mut skip, mut left) = (skip, len);
    spans.iter().filter_map(move |span| {
        let skipped = skip.min(u64::from(span.len));
        skip -= skipped;
        let taken = (u64::from(span.len) - skipped).min(left);
        left -= taken;
        let at = span.address.0.saturating_add(skipped);
        // 32 bits.
        let taken = usize::try_from(taken).unwrap_or(usize::MAX);
        (taken > 0).then_some((GuestAddress(at), taken))
    })
}

/// Fills `into`.
fn gather(
    memory: &GuestMemory,
    parts: impl Iterator<Item = (GuestAddress, usize)>,
    into: &mut [u8],
) -> Result<(), NotMemory> {
    let mut rest = into;
    for (address, len) in parts {
        let (now, later) = std::mem::take(&mut rest)
            .split_at_mut_checked(len)
            .ok_or(NotMemory)?;
        rest = later;
        memory.read_slice(now, address).map_err(|_| NotMemory)?;
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(NotMemory)
    }
}

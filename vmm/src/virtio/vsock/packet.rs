//! The packet of virtio-vsock: virtio 1.2, section 5.10.6. A header of 44 bytes, then data for some.

use crate::memory::loss::Lost;
use crate::memory::snapshot::Snapshot;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

/// Length of the header.
pub(super) const HEADER_BYTES: usize = 44;
/// Context id of the host.
pub(super) const HOST_CID: u64 = 2;
/// Type of a stream of bytes, the only one here.
pub(super) const STREAM: u16 = 1;
/// Flag of a shutdown: the sender receives no more.
pub(super) const RECEIVE: u32 = 1;
/// Flag of a shutdown: the sender sends no more.
pub(super) const SEND: u32 = 2;
/// A chain of more pieces is of no use to anybody.
const MOST_PIECES: usize = 1024;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Ends or refuses one.
    Reset = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Tells how much data is taken.
    CreditUpdate = 6,
    /// Asks for it.
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    /// `type` in the specification.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn op(&self) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u16 == self.op)
    }

    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        fn part<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
            let mut part = [0; N];
            part.copy_from_slice(&bytes[at..at + N]);
            part
        }
        Self {
            src_cid: u64::from_le_bytes(part(bytes, 0)),
            dst_cid: u64::from_le_bytes(part(bytes, 8)),
            src_port: u32::from_le_bytes(part(bytes, 16)),
            dst_port: u32::from_le_bytes(part(bytes, 20)),
            len: u32::from_le_bytes(part(bytes, 24)),
            kind: u16::from_le_bytes(part(bytes, 28)),
            op: u16::from_le_bytes(part(bytes, 30)),
            flags: u32::from_le_bytes(part(bytes, 32)),
            buf_alloc: u32::from_le_bytes(part(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(part(bytes, 40)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The header of a packet that the driver sends; `None` when the chain is too short for one, or not in RAM.
    pub(super) fn read(memory: &Snapshot, chain: &DescriptorChain<&Snapshot>) -> Option<Self> {
        let pieces = Pieces::readable(memory, chain, 0, HEADER_BYTES)?;
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        for piece in pieces.slices() {
            piece.copy_to(&mut bytes[at..]);
            at += piece.len();
        }
        pieces.check().ok()?;
        Some(Self::from_bytes(&bytes))
    }
}

/// A part of a chain's memory, in both of its faces ([`crate::memory::snapshot`]).
pub(super) struct Pieces<'m> {
    memory: &'m Snapshot,
    spans: Vec<(GuestAddress, usize)>,
    /// For loads and stores here.
    slices: Vec<VolatileSlice<'m>>,
    /// For system calls.
    system: Vec<VolatileSlice<'m>>,
}

impl<'m> Pieces<'m> {
    /// `len` bytes of what the driver wrote, after the first `skip`; `None` when there are fewer, or they are not RAM.
    pub(super) fn readable(
        memory: &'m Snapshot,
        chain: &DescriptorChain<&Snapshot>,
        skip: usize,
        len: usize,
    ) -> Option<Self> {
        Self::collect(memory, chain.clone().readable(), skip, len)
    }

    /// All that the device may write, at most `most` bytes.
    pub(super) fn writable(
        memory: &'m Snapshot,
        chain: &DescriptorChain<&Snapshot>,
        most: usize,
    ) -> Option<Self> {
        let room = chain
            .clone()
            .writable()
            .map(|d| u64::from(d.len()))
            .sum::<u64>();
        let len = usize::try_from(room).unwrap_or(most).min(most);
        Self::collect(memory, chain.clone().writable(), 0, len)
    }

    fn collect(
        memory: &'m Snapshot,
        descriptors: impl Iterator<Item = Descriptor>,
        mut skip: usize,
        len: usize,
    ) -> Option<Self> {
        let mut pieces = Self {
            memory,
            spans: Vec::new(),
            slices: Vec::new(),
            system: Vec::new(),
        };
        let mut left = len;
        for descriptor in descriptors {
            if left == 0 {
                break;
            }
            let size = descriptor.len() as usize;
            let skipped = skip.min(size);
            skip -= skipped;
            let part = (size - skipped).min(left);
            if part == 0 {
                continue;
            }
            let address = GuestAddress(descriptor.addr().0.checked_add(skipped as u64)?);
            for slice in GuestMemoryBackend::get_slices(memory, address, part) {
                if pieces.slices.len() == MOST_PIECES {
                    return None;
                }
                pieces.slices.push(slice.ok()?);
            }
            for slice in memory.system_slices(address, part) {
                pieces.system.push(slice.ok()?);
            }
            pieces.spans.push((address, part));
            left -= part;
        }
        (left == 0).then_some(pieces)
    }

    /// Whether all of it is still there: asked when it was read.
    pub(super) fn check(&self) -> Result<(), Lost> {
        let mut spans = self.spans.iter();
        spans.try_for_each(|(address, len)| self.memory.check(*address, *len))
    }

    fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// All of it, for system calls.
    pub(super) fn system(&self) -> &[VolatileSlice<'m>] {
        &self.system
    }

    pub(super) fn len(&self) -> usize {
        self.slices.iter().map(VolatileSlice::len).sum()
    }

    /// The part from `from` on, for loads and stores.
    pub(super) fn part(&self, from: usize, most: usize) -> Vec<VolatileSlice<'m>> {
        part(&self.slices, from, most)
    }

    /// The part from `from` on, for system calls.
    pub(super) fn system_part(&self, from: usize, most: usize) -> Vec<VolatileSlice<'m>> {
        part(&self.system, from, most)
    }

    /// Stores a header at the beginning; `None` when there is no room.
    pub(super) fn put(&self, header: &Header) -> Option<()> {
        let bytes = header.to_bytes();
        let mut left = &bytes[..];
        for slice in self.part(0, HEADER_BYTES) {
            let (now, later) = left.split_at_checked(slice.len())?;
            slice.write_slice(now, 0).ok()?;
            left = later;
        }
        left.is_empty().then_some(())
    }
}

/// What follows the first `from` bytes of some slices, at most `most` bytes of it.
fn part<'m>(slices: &[VolatileSlice<'m>], mut from: usize, most: usize) -> Vec<VolatileSlice<'m>> {
    let mut left = most;
    let mut parts = Vec::new();
    for slice in slices {
        let skipped = from.min(slice.len());
        from -= skipped;
        let len = (slice.len() - skipped).min(left);
        if len > 0
            && let Ok(part) = slice.subslice(skipped, len)
        {
            parts.push(part);
            left -= len;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_back_as_it_is_written() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 1000,
            dst_port: 52,
            len: 3,
            kind: STREAM,
            op: Op::Data as u16,
            flags: RECEIVE | SEND,
            buf_alloc: 65536,
            fwd_cnt: 7,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[24..36], [3, 0, 0, 0, 1, 0, 5, 0, 3, 0, 0, 0]);
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(header.op(), Some(Op::Data));
        for op in [0, 8, u16::MAX] {
            assert_eq!(Header { op, ..header }.op(), None);
        }
    }
}

//! A virtio disk's requests, for whoever serves them: one descriptor chain, read once, and where its parts are.
//!
//! ```text
//!   device-readable                                            device-writable
//!   le32 type, le32 reserved, le64 sector | data to the disk   data from the disk | u8 status
//! ```
//! A driver may split and join descriptors as it likes, so only the order of bytes counts. Nothing here is done to a disk, and
//! nothing that a driver says is believed: what is asked is checked against the disk by [`place`], and guest memory by whoever
//! implements it.
//! Source: virtio 1.2, 5.2.6.

#![forbid(unsafe_code)]

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes of a sector, the unit of the protocol.
pub const SECTOR: u32 = 512;
/// The most data of one request. Four times what Linux sends with the most segments that are offered here.
pub const MOST_DATA: u64 = 64 << 20;

/// More than any driver sends: the kernel takes 1024 vectors at a time, and header and status have one each.
const MOST_DESCRIPTORS: usize = 1026;
const HEADER: u64 = 16;
const HEADER_LEN: usize = 16;
const SEGMENT: usize = 16;

/// How a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Not done, or not all of it.
    IoError = 1,
    /// No such request.
    Unsupported = 2,
}

/// The range of a chain is not memory, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotMemory;

impl From<NotMemory> for Status {
    fn from(_: NotMemory) -> Self {
        Self::IoError
    }
}

/// What a discard or a write of zeroes is about, as the driver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first sector.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_*`.
    pub flags: u32,
}

impl Segment {
    /// In bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.sectors) * u64::from(SECTOR)
    }

    /// Whether it is about nothing.
    pub fn is_empty(&self) -> bool {
        self.sectors == 0
    }
}

/// Where on a disk of `disk_len` bytes `len` bytes at a sector are, if all of them are there.
pub fn place(disk_len: u64, sector: u64, len: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(u64::from(SECTOR));
    let end = offset.and_then(|offset| offset.checked_add(len));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= disk_len => Ok(offset),
        _ => Err(Status::IoError),
    }
}

/// Whether a read or a write of so much is one.
pub fn is_transfer(len: u64) -> bool {
    len <= MOST_DATA && len.is_multiple_of(u64::from(SECTOR))
}

#[derive(Debug, Clone, Copy)]
struct Span {
    address: GuestAddress,
    len: u32,
}

/// A chain, read once. Kept for its room.
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

impl Chain {
    /// Reads the descriptors.
    pub fn read<M: GuestMemoryBackend>(&mut self, chain: DescriptorChain<&M>) {
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
    pub fn status<M: GuestMemoryBackend>(&self, memory: &M) -> Option<GuestAddress> {
        let last = self.writable.iter().rev().find(|span| span.len > 0)?;
        let at = last.address.0.checked_add(u64::from(last.len) - 1)?;
        memory.check_address(GuestAddress(at))
    }

    /// Type and sector.
    pub fn header<M: GuestMemoryBackend>(&self, memory: &M) -> Option<(u32, u64)> {
        let mut header = [0; HEADER_LEN];
        let first = self.readable.first()?;
        if u64::from(first.len) >= HEADER {
            memory.read_slice(&mut header, first.address).ok()?;
        } else {
            gather(memory, part(&self.readable, 0, HEADER), &mut header).ok()?;
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        Some((kind, u64::from_le_bytes(sector)))
    }

    /// What comes with the request.
    pub fn data_out(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        part(&self.readable, HEADER, self.out_len())
    }

    /// How much comes with the request.
    pub fn out_len(&self) -> u64 {
        self.readable_len.saturating_sub(HEADER)
    }

    /// Room for what goes back with the answer.
    pub fn data_in(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        part(&self.writable, 0, self.in_len())
    }

    /// How much goes back with the answer.
    pub fn in_len(&self) -> u64 {
        self.writable_len.saturating_sub(1)
    }

    /// Copies what comes with the request, from its byte `from` on, as much as `into` has room for.
    pub fn copy_out<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        from: u64,
        into: &mut [u8],
    ) -> Result<(), NotMemory> {
        let parts = part(&self.readable, HEADER + from, into.len() as u64);
        gather(memory, parts, into)
    }

    /// The one segment that a discard or a write of zeroes has.
    pub fn segment<M: GuestMemoryBackend>(&self, memory: &M) -> Result<Segment, Status> {
        if self.out_len() != SEGMENT as u64 {
            return Err(Status::IoError);
        }
        let mut segment = [0; SEGMENT];
        self.copy_out(memory, 0, &mut segment)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = segment;
        Ok(Segment {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        })
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
fn gather<M: GuestMemoryBackend>(
    memory: &M,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(lens: &[u32]) -> Vec<Span> {
        let mut at = 0;
        let span = |len: &u32| {
            at += 0x1000;
            Span {
                address: GuestAddress(at),
                len: *len,
            }
        };
        lens.iter().map(span).collect()
    }

    #[test]
    fn a_part_is_found_however_the_driver_has_split_it() {
        let all: Vec<_> = part(&spans(&[4, 0, 20, 8]), 6, 20).collect();
        assert_eq!(all, [(GuestAddress(0x3002), 18), (GuestAddress(0x4000), 2)]);
        let wraps = [Span {
            address: GuestAddress(u64::MAX - 1),
            len: 16,
        }];
        let all: Vec<_> = part(&wraps, 8, 4).collect();
        assert_eq!(all, [(GuestAddress(u64::MAX), 4)]);
    }

    #[test]
    fn a_place_is_on_the_disk_or_an_error() {
        assert_eq!(place(4096, 7, 512), Ok(3584));
        assert_eq!(place(4096, 8, 0), Ok(4096));
        for (sector, len) in [(8, 1), (7, 513), (u64::MAX, 0), (u64::MAX / 512, 512)] {
            assert_eq!(place(4096, sector, len), Err(Status::IoError), "{sector}");
        }
        assert!(is_transfer(0) && is_transfer(MOST_DATA));
        assert!(!is_transfer(511) && !is_transfer(MOST_DATA + 512));
    }

    #[test]
    fn the_used_ring_counts_the_status_only_behind_all_the_data() {
        let chain = Chain {
            writable: spans(&[512, 1]),
            writable_len: 513,
            ..Chain::default()
        };
        assert_eq!((chain.written(512), chain.written(0)), (513, 0));
    }
}

//! One descriptor chain as a request, and what is to be done for it.
//!
//! ```text
//!   device-readable                                            device-writable
//!   le32 type, le32 reserved, le64 sector | data to the disk   data from the disk | u8 status
//! ```
//! A driver may split and join descriptors as it likes, so only the order of bytes counts. Whatever is wrong with a
//! request is its answer; one that has no room for an answer is given back empty.

use std::sync::Arc;

use virtio_bindings::virtio_blk as spec;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::image::{Image, Storage};
use super::job::{Job, Status, Step};
use super::pieces::NotMemory;
use super::{MOST_DISCARD_SECTORS, MOST_ZEROES_SECTORS, SECTOR};
use crate::memory::snapshot::Snapshot;

/// More than any driver sends: the kernel takes 1024 vectors at a time, and header and status have one each.
const MOST_DESCRIPTORS: usize = 1026;
/// The most data of one request. Four times what Linux sends with the most segments this device offers.
const MOST_DATA: u64 = 64 << 20;
const HEADER: u64 = 16;
const HEADER_LEN: usize = 16;
const RANGE: usize = 16;
const ID: usize = spec::VIRTIO_BLK_ID_BYTES as usize;

#[derive(Debug, Clone, Copy)]
struct Span {
    address: GuestAddress,
    len: u32,
}

/// A chain, read once. Kept for its room.
#[derive(Debug, Default)]
pub(super) struct Chain {
    head: u16,
    readable: Vec<Span>,
    writable: Vec<Span>,
    readable_len: u64,
    writable_len: u64,
    /// Nothing is missing and what can be read comes first.
    sound: bool,
}

/// What the driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    In,
    Out,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Other,
}

impl Kind {
    fn new(kind: u32) -> Self {
        match kind {
            spec::VIRTIO_BLK_T_IN => Self::In,
            spec::VIRTIO_BLK_T_OUT => Self::Out,
            spec::VIRTIO_BLK_T_FLUSH => Self::Flush,
            spec::VIRTIO_BLK_T_GET_ID => Self::GetId,
            spec::VIRTIO_BLK_T_DISCARD => Self::Discard,
            spec::VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            _ => Self::Other,
        }
    }
}

/// What a request needs to know of its disk.
pub(super) struct Terms<'a> {
    pub(super) image: &'a Image,
    pub(super) readonly: bool,
    /// The driver knows of no write cache, or has turned it off.
    pub(super) write_through: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// The host has to do the job: so many bytes are to be moved.
    Start(Kind, u64),
    /// The answer, and what the used ring says was written.
    Answer(Status, u32),
    /// There is no room for an answer.
    GiveBack,
}

impl Chain {
    /// Reads the descriptors.
    pub(super) fn read(&mut self, chain: DescriptorChain<&Snapshot>) {
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
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// The last byte that can be written.
    fn status(&self, memory: &Snapshot) -> Option<GuestAddress> {
        let last = self.writable.iter().rev().find(|span| span.len > 0)?;
        let at = last.address.0.checked_add(u64::from(last.len) - 1)?;
        memory.check_address(GuestAddress(at))
    }

    fn header(&self, memory: &Snapshot) -> Option<(Kind, u64)> {
        let mut header = [0; HEADER_LEN];
        let first = self.readable.first()?;
        if u64::from(first.len) >= HEADER {
            memory.read_slice(&mut header, first.address).ok()?;
        } else {
            gather(memory, part(&self.readable, 0, HEADER), &mut header)?;
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = Kind::new(u32::from_le_bytes([k0, k1, k2, k3]));
        Some((kind, u64::from_le_bytes(sector)))
    }

    /// What comes with the request.
    fn data_out(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        part(&self.readable, HEADER, self.out_len())
    }

    fn out_len(&self) -> u64 {
        self.readable_len.saturating_sub(HEADER)
    }

    /// Room for what goes back.
    fn data_in(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        part(&self.writable, 0, self.in_len())
    }

    fn in_len(&self) -> u64 {
        self.writable_len.saturating_sub(1)
    }

    /// What the used ring says: how much was written from the first writable byte on, without a gap.
    fn written(&self, data: u64) -> u32 {
        let len = if data == self.in_len() {
            data + 1
        } else {
            data
        };
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    /// Decides, and makes `job` what the host has to do.
    pub(super) fn plan(&self, memory: &Arc<Snapshot>, terms: &Terms<'_>, job: &mut Job) -> Plan {
        let Some(status) = self.status(memory) else {
            return Plan::GiveBack;
        };
        job.head = self.head;
        job.status = status;
        job.written = (self.written(0), self.written(0));
        let answer = |status| Plan::Answer(status, self.written(0));
        let Some((kind, sector)) = self.header(memory).filter(|_| self.sound) else {
            return answer(Status::IoError);
        };
        let planned = match kind {
            Kind::In => self.transfer(memory, terms, job, Step::Read, sector),
            Kind::Out => {
                let durable = terms.write_through;
                self.transfer(memory, terms, job, Step::Write { durable }, sector)
            }
            Kind::Flush => {
                job.sync();
                Ok(Plan::Start(kind, 0))
            }
            Kind::GetId => self.id(memory, terms.image.serial()),
            Kind::Discard | Kind::WriteZeroes => self.range(memory, terms, job, kind),
            Kind::Other => Err(Status::Unsupported),
        };
        planned.unwrap_or_else(answer)
    }

    fn transfer(
        &self,
        memory: &Arc<Snapshot>,
        terms: &Terms<'_>,
        job: &mut Job,
        step: Step,
        sector: u64,
    ) -> Result<Plan, Status> {
        let reads = step == Step::Read;
        let (kind, len) = if reads {
            (Kind::In, self.in_len())
        } else {
            (Kind::Out, self.out_len())
        };
        if (!reads && terms.readonly) || len > MOST_DATA || !len.is_multiple_of(u64::from(SECTOR)) {
            return Err(Status::IoError);
        }
        let offset = place(terms.image, sector, len)?;
        let written = if reads {
            self.written(len)
        } else {
            self.written(0)
        };
        if len == 0 {
            return Ok(Plan::Answer(Status::Ok, written));
        }
        job.written.0 = written;
        let align = terms.image.memory_align();
        let filled = if reads {
            job.transfer(step, offset, memory, self.data_in(), len, align)
        } else {
            job.transfer(step, offset, memory, self.data_out(), len, align)
        };
        match filled {
            Ok(()) => Ok(Plan::Start(kind, len)),
            Err(NotMemory) => Err(Status::IoError),
        }
    }

    fn id(&self, memory: &Snapshot, serial: &[u8; ID]) -> Result<Plan, Status> {
        let mut rest = &serial[..];
        for (address, len) in self.data_in() {
            let (now, later) = rest.split_at(len.min(rest.len()));
            rest = later;
            memory
                .write_slice(now, address)
                .map_err(|_| Status::IoError)?;
        }
        let written = (serial.len() - rest.len()) as u64;
        Ok(Plan::Answer(Status::Ok, self.written(written)))
    }

    /// Discard and write zeroes: one range, as the configuration space says.
    fn range(
        &self,
        memory: &Snapshot,
        terms: &Terms<'_>,
        job: &mut Job,
        kind: Kind,
    ) -> Result<Plan, Status> {
        const UNMAP: u32 = spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        let image = terms.image;
        if terms.readonly || self.out_len() != RANGE as u64 {
            return Err(Status::IoError);
        }
        let mut range = [0; RANGE];
        gather(memory, self.data_out(), &mut range).ok_or(Status::IoError)?;
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let (known, most) = match kind {
            Kind::Discard if !image.can_discard() => return Err(Status::Unsupported),
            Kind::Discard => (0, MOST_DISCARD_SECTORS),
            _ => (UNMAP, MOST_ZEROES_SECTORS),
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > most {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * u64::from(SECTOR);
        let offset = place(image, u64::from_le_bytes(sector), len)?;
        if len == 0 {
            return Ok(Plan::Answer(Status::Ok, self.written(0)));
        }
        match kind {
            Kind::Discard if image.storage() == Storage::BlockDevice => {
                job.discard(Step::Discard, offset, len, terms.write_through);
            }
            Kind::Discard => job.discard(Step::Punch, offset, len, terms.write_through),
            _ if flags & UNMAP != 0 && image.can_discard() => {
                job.zero(Step::Punch, offset, len, terms.write_through);
            }
            _ => job.zero(Step::Zero, offset, len, terms.write_through),
        }
        Ok(Plan::Start(kind, len))
    }
}

/// Where in the image, if all of it is there.
fn place(image: &Image, sector: u64, len: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(u64::from(SECTOR));
    let end = offset.and_then(|offset| offset.checked_add(len));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= image.len() => Ok(offset),
        _ => Err(Status::IoError),
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

/// Copies what the parts have; `None` when they are not memory or not enough.
fn gather(
    memory: &Snapshot,
    parts: impl Iterator<Item = (GuestAddress, usize)>,
    into: &mut [u8],
) -> Option<()> {
    let mut rest = into;
    for (address, len) in parts {
        let (now, later) = std::mem::take(&mut rest).split_at_mut_checked(len)?;
        rest = later;
        memory.read_slice(now, address).ok()?;
    }
    rest.is_empty().then_some(())
}

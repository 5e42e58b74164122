//! What a chain asks of the disk, checked against it. Nothing is done here.

#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk as spec;

use crate::chain::Chain;
use crate::guest::GuestMemory;

/// Bytes of a sector, the unit of the protocol.
pub const SECTOR: u32 = 512;
/// The most data of one request.
pub const MOST_DATA: u64 = 64 << 20;
/// Most sectors of one range to discard or to zero: what is done at once is bounded.
pub const MOST_RANGE_SECTORS: u32 = (64 << 20) / SECTOR;
/// Most ranges in one request.
pub const MOST_RANGES: u32 = 1;

const RANGE: usize = 16;

/// How a request ends (virtio 1.2, section 5.2.6).
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

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The disk's length in bytes.
    pub len: u64,
    /// Nothing may be changed.
    pub read_only: bool,
}

/// What is to be done; every range is within the disk, a multiple of a sector and not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Fill the room of the chain.
    Read(Range),
    /// Take the data of the chain.
    Write(Range),
    /// Make durable what was written.
    Flush,
    /// Say who the disk is.
    GetId,
    /// The range is of no use any more.
    Discard(Range),
    /// The range reads as zeroes from now on.
    Zero(Range),
    /// Nothing: the request is right and has no length.
    Nothing,
}

/// A part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u64,
}

impl Request {
    /// Reads and checks.
    pub fn of(chain: &Chain, memory: &GuestMemory, terms: Terms) -> Result<Self, Status> {
        if !chain.is_sound() {
            return Err(Status::IoError);
        }
        let (kind, sector) = chain.header(memory).ok_or(Status::IoError)?;
        match kind {
            spec::VIRTIO_BLK_T_IN => {
                let range = transfer(terms, sector, chain.in_len())?;
                Ok(range.map_or(Self::Nothing, Self::Read))
            }
            spec::VIRTIO_BLK_T_OUT if terms.read_only => Err(Status::IoError),
            spec::VIRTIO_BLK_T_OUT => {
                let range = transfer(terms, sector, chain.out_len())?;
                Ok(range.map_or(Self::Nothing, Self::Write))
            }
            spec::VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            spec::VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES if terms.read_only => {
                Err(Status::IoError)
            }
            spec::VIRTIO_BLK_T_DISCARD => {
                let range = segment(chain, memory, terms, 0)?;
                Ok(range.map_or(Self::Nothing, Self::Discard))
            }
            spec::VIRTIO_BLK_T_WRITE_ZEROES => {
                let unmap = spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let range = segment(chain, memory, terms, unmap)?;
                Ok(range.map_or(Self::Nothing, Self::Zero))
            }
            _ => Err(Status::Unsupported),
        }
    }
}

fn transfer(terms: Terms, sector: u64, len: u64) -> Result<Option<Range>, Status> {
    if len > MOST_DATA || !len.is_multiple_of(u64::from(SECTOR)) {
        return Err(Status::IoError);
    }
    place(terms, sector, len)
}

/// The one range that a discard or a write of zeroes has, as the configuration space says.
fn segment(
    chain: &Chain,
    memory: &GuestMemory,
    terms: Terms,
    known: u32,
) -> Result<Option<Range>, Status> {
    if chain.out_len() != RANGE as u64 {
        return Err(Status::IoError);
    }
    let mut range = [0; RANGE];
    let copied = chain.copy_out(memory, 0, &mut range);
    copied.map_err(|_| Status::IoError)?;
    let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range;
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > MOST_RANGE_SECTORS {
        return Err(Status::IoError);
    }
    let len = u64::from(sectors) * u64::from(SECTOR);
    place(terms, u64::from_le_bytes(sector), len)
}

/// The range, if all of it is there; `None` when it is empty.
fn place(terms: Terms, sector: u64, len: u64) -> Result<Option<Range>, Status> {
    let offset = sector.checked_mul(u64::from(SECTOR));
    let end = offset.and_then(|offset| offset.checked_add(len));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= terms.len => {
            Ok((len > 0).then_some(Range { offset, len }))
        }
        _ => Err(Status::IoError),
    }
}

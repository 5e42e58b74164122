//! What a chain asks of the disk, checked against it. Nothing is done here.

#![forbid(unsafe_code)]

use daxhund_virtio_blk::{Chain, SECTOR, Status, is_transfer};
use virtio_bindings::virtio_blk as spec;

use crate::guest::GuestMemory;

/// Most sectors of one range to discard or to zero: what is done at once is bounded.
pub const MOST_RANGE_SECTORS: u32 = (64 << 20) / SECTOR;
/// Most ranges in one request.
pub const MOST_RANGES: u32 = 1;

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
    if !is_transfer(len) {
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
    let segment = chain.segment(memory)?;
    if segment.flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if segment.sectors > MOST_RANGE_SECTORS {
        return Err(Status::IoError);
    }
    place(terms, segment.sector, segment.len())
}

/// The range, if all of it is there; `None` when it is empty.
fn place(terms: Terms, sector: u64, len: u64) -> Result<Option<Range>, Status> {
    let offset = daxhund_virtio_blk::place(terms.len, sector, len)?;
    Ok((len > 0).then_some(Range { offset, len }))
}

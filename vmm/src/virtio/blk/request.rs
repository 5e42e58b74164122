//! What is to be done for a request.
//!
//! Whatever is wrong with a request is its answer; one that has no room for an answer is given back empty.

use std::sync::Arc;

use daxhund_virtio_blk::{Chain, Status, is_transfer, place};
use virtio_bindings::virtio_blk as spec;
use vm_memory::Bytes;

use super::image::{Image, Storage};
use super::job::{Job, Step};
use super::{MOST_DISCARD_SECTORS, MOST_ZEROES_SECTORS};
use crate::memory::snapshot::Snapshot;

const ID: usize = spec::VIRTIO_BLK_ID_BYTES as usize;

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
#[derive(Clone, Copy)]
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

/// A request, as far as it was read.
pub(super) struct Request<'a> {
    pub(super) chain: &'a Chain,
    pub(super) memory: &'a Arc<Snapshot>,
    pub(super) terms: Terms<'a>,
}

impl Request<'_> {
    /// Decides, and makes `job` what the host has to do.
    pub(super) fn plan(&self, job: &mut Job) -> Plan {
        let (chain, memory) = (self.chain, &**self.memory);
        let Some(status) = chain.status(memory) else {
            return Plan::GiveBack;
        };
        job.head = chain.head();
        job.status = status;
        job.written = (chain.written(0), chain.written(0));
        let answer = |status| Plan::Answer(status, chain.written(0));
        let Some((kind, sector)) = chain.header(memory).filter(|_| chain.is_sound()) else {
            return answer(Status::IoError);
        };
        let kind = Kind::new(kind);
        let planned = match kind {
            Kind::In => self.transfer(job, Step::Read, sector),
            Kind::Out => {
                let durable = self.terms.write_through;
                self.transfer(job, Step::Write { durable }, sector)
            }
            Kind::Flush => {
                job.sync();
                Ok(Plan::Start(kind, 0))
            }
            Kind::GetId => self.id(self.terms.image.serial()),
            Kind::Discard | Kind::WriteZeroes => self.range(job, kind),
            Kind::Other => Err(Status::Unsupported),
        };
        planned.unwrap_or_else(answer)
    }

    fn transfer(&self, job: &mut Job, step: Step, sector: u64) -> Result<Plan, Status> {
        let (chain, memory, image) = (self.chain, self.memory, self.terms.image);
        let reads = step == Step::Read;
        let (kind, len) = if reads {
            (Kind::In, chain.in_len())
        } else {
            (Kind::Out, chain.out_len())
        };
        if (!reads && self.terms.readonly) || !is_transfer(len) {
            return Err(Status::IoError);
        }
        let offset = place(image.len(), sector, len)?;
        let written = chain.written(if reads { len } else { 0 });
        if len == 0 {
            return Ok(Plan::Answer(Status::Ok, written));
        }
        job.written.0 = written;
        let align = image.memory_align();
        if reads {
            job.transfer(step, offset, memory, chain.data_in(), len, align)?;
        } else {
            job.transfer(step, offset, memory, chain.data_out(), len, align)?;
        }
        Ok(Plan::Start(kind, len))
    }

    fn id(&self, serial: &[u8; ID]) -> Result<Plan, Status> {
        let mut rest = &serial[..];
        for (address, len) in self.chain.data_in() {
            let (now, later) = rest.split_at(len.min(rest.len()));
            rest = later;
            self.memory
                .write_slice(now, address)
                .map_err(|_| Status::IoError)?;
        }
        let written = (serial.len() - rest.len()) as u64;
        Ok(Plan::Answer(Status::Ok, self.chain.written(written)))
    }

    /// Discard and write zeroes: one range, as the configuration space says.
    fn range(&self, job: &mut Job, kind: Kind) -> Result<Plan, Status> {
        const UNMAP: u32 = spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        let Terms {
            image,
            readonly,
            write_through,
        } = self.terms;
        if readonly {
            return Err(Status::IoError);
        }
        let segment = self.chain.segment(&**self.memory)?;
        let (known, most) = match kind {
            Kind::Discard if !image.can_discard() => return Err(Status::Unsupported),
            Kind::Discard => (0, MOST_DISCARD_SECTORS),
            _ => (UNMAP, MOST_ZEROES_SECTORS),
        };
        if segment.flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if segment.sectors > most {
            return Err(Status::IoError);
        }
        let len = segment.len();
        let offset = place(image.len(), segment.sector, len)?;
        if len == 0 {
            return Ok(Plan::Answer(Status::Ok, self.chain.written(0)));
        }
        match kind {
            Kind::Discard if image.storage() == Storage::BlockDevice => {
                job.discard(Step::Discard, offset, len, write_through);
            }
            Kind::Discard => job.discard(Step::Punch, offset, len, write_through),
            _ if segment.flags & UNMAP != 0 && image.can_discard() => {
                job.zero(Step::Punch, offset, len, write_through);
            }
            _ => job.zero(Step::Zero, offset, len, write_through),
        }
        Ok(Plan::Start(kind, len))
    }
}

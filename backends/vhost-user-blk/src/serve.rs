//! Does one request and says how it went.

#![forbid(unsafe_code)]

use daxhund_dax::loss::Epoch;
use daxhund_virtio_blk::{Chain, NotMemory, Status};
use vm_memory::{Bytes, GuestMemoryBackend, VolatileSlice};

use crate::disk::Disk;
use crate::guest::GuestMemory;
use crate::metrics::Metrics;
use crate::request::{Range, Request};

/// What a worker copies through, and keeps its lists in.
#[derive(Debug)]
pub struct Scratch {
    bytes: Vec<u8>,
}

impl Scratch {
    /// For this disk.
    pub fn new(disk: &dyn Disk) -> Self {
        Self {
            bytes: vec![0; disk.chunk()],
        }
    }
}

/// What the request is done to.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The disk.
    pub disk: &'a dyn Disk,
    /// What is written is durable before it is answered: the driver knows of no flush.
    pub write_through: bool,
    /// Where it is counted.
    pub metrics: &'a Metrics,
}

/// Does what the chain asks and writes the answer. What the used ring is to say is returned.
pub fn serve(
    chain: &Chain,
    asked: Result<Request, Status>,
    memory: &GuestMemory,
    target: Target<'_>,
    scratch: &mut Scratch,
) -> u32 {
    let Some(at) = chain.status(memory) else {
        // No room for an answer: given back empty.
        return 0;
    };
    let done = asked.and_then(|request| perform(chain, request, memory, target, scratch));
    let (status, data) = match done {
        Ok(data) => (Status::Ok, data),
        Err(status) => (status, 0),
    };
    count(target.metrics, asked, status);
    // The memory may have gone since: then nobody reads the answer.
    let _ = memory.write_obj(status as u8, at);
    chain.written(data)
}

fn count(metrics: &Metrics, asked: Result<Request, Status>, status: Status) {
    metrics.requests.inc();
    let (counter, by) = match asked {
        _ if status != Status::Ok => (&metrics.errors, 1),
        Ok(Request::Read(range)) => (&metrics.read_bytes, range.len),
        Ok(Request::Write(range)) => (&metrics.written_bytes, range.len),
        Ok(Request::Flush) => (&metrics.flushes, 1),
        _ => return,
    };
    counter.inc_by(by);
}

/// Bytes that have gone back.
fn perform(
    chain: &Chain,
    request: Request,
    memory: &GuestMemory,
    target: Target<'_>,
    scratch: &mut Scratch,
) -> Result<u64, Status> {
    let disk = target.disk;
    let changed = match request {
        Request::Read(range) => return read(chain, range, memory, disk, scratch),
        Request::GetId => return id(chain, memory, disk),
        Request::Nothing => return Ok(0),
        Request::Flush => disk.flush(),
        Request::Write(range) => {
            write(chain, range, memory, disk, scratch)?;
            durable(target)
        }
        Request::Discard(range) => disk.discard(range.offset, range.len),
        Request::Zero(range) => disk
            .zero(range.offset, range.len)
            .and_then(|()| durable(target)),
    };
    changed.map_err(failed).map(|()| 0)
}

fn durable(target: Target<'_>) -> std::io::Result<()> {
    if target.write_through {
        target.disk.flush()
    } else {
        Ok(())
    }
}

#[allow(clippy::needless_pass_by_value, reason = "maps an error")]
fn failed(error: std::io::Error) -> Status {
    // One line for each request is the guest's to cause: never above debug.
    tracing::debug!(%error, "a request failed");
    Status::IoError
}

/// Room for what goes back with the answer, in order; all of it or an error.
fn room<'a>(
    chain: &Chain,
    memory: &'a GuestMemory,
    into: &mut Vec<VolatileSlice<'a>>,
) -> Result<(), NotMemory> {
    into.clear();
    for (address, len) in chain.data_in() {
        for slice in GuestMemoryBackend::get_slices(memory, address, len) {
            into.push(slice.map_err(|_| NotMemory)?);
        }
    }
    Ok(())
}

fn read(
    chain: &Chain,
    range: Range,
    memory: &GuestMemory,
    disk: &dyn Disk,
    scratch: &mut Scratch,
) -> Result<u64, Status> {
    let mut slices = Vec::new();
    room(chain, memory, &mut slices)?;
    let epoch = Epoch::now();
    disk.read(range.offset, &slices, &mut scratch.bytes)
        .map_err(failed)?;
    if epoch.unbroken().is_err() {
        // Something was lost meanwhile. Where it was this room, it is no memory any more.
        room(chain, memory, &mut slices)?;
    }
    Ok(range.len)
}

fn write(
    chain: &Chain,
    range: Range,
    memory: &GuestMemory,
    disk: &dyn Disk,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    // Looked at first: a request that can't be done whole is not begun.
    let is_memory = |(address, len)| GuestMemoryBackend::check_range(memory, address, len);
    if !chain.data_out().all(is_memory) {
        return Err(Status::IoError);
    }
    let mut done = 0;
    while done < range.len {
        let left = usize::try_from(range.len - done).unwrap_or(usize::MAX);
        let most = scratch.bytes.len().min(left);
        let bytes = &mut scratch.bytes[..most];
        // Ends: what is lost is an error from then on, and no more than there is can be lost.
        loop {
            let epoch = Epoch::now();
            chain.copy_out(memory, done, bytes)?;
            if epoch.unbroken().is_ok() {
                break;
            }
        }
        disk.write(range.offset + done, bytes).map_err(failed)?;
        done += most as u64;
    }
    Ok(())
}

fn id(chain: &Chain, memory: &GuestMemory, disk: &dyn Disk) -> Result<u64, Status> {
    let mut slices = Vec::new();
    room(chain, memory, &mut slices)?;
    let serial = disk.serial();
    Ok(scatter(&serial, &slices) as u64)
}

/// Copies bytes to slices, in order; how many there was room for.
pub(crate) fn scatter(bytes: &[u8], room: &[VolatileSlice<'_>]) -> usize {
    let mut rest = bytes;
    for slice in room {
        let (now, later) = rest.split_at(slice.len().min(rest.len()));
        slice.copy_from(now);
        rest = later;
    }
    bytes.len() - rest.len()
}

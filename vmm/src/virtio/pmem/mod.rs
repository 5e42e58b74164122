//! Persistent memory (virtio 1.2, section 5.19): a range of guest memory, and a queue to flush it through.
//!
//! The guest reads and writes the memory itself; this device only says where it is and makes it durable on request.
//! The memory is attached elsewhere, like RAM, and must stay at its address as long as the device lives.
//!
//! Invariants:
//! - Every request is answered: Linux waits for the answer without a limit. After the memory is lost
//!   ([`PmemDevice::mark_lost`]) the answer is an error, and nothing on the host is touched for it.
//! - "Done" is said only after a flush of the host that began after the request was seen.

mod worker;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

pub use worker::Worker;

use super::device::{Signals, read_space};
use super::queue::Queue;
use super::worker as workers;
use super::{ActivateError, Activation, Device, Kind};
use crate::memory::layout::Gpa;
use crate::memory::loss::LossMark;
use crate::memory::pmem::Flush;
use crate::memory::ram::GuestView;

const QUEUE_SIZE: u16 = 64;

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    host_flushes: AtomicU64,
}

/// A worker that answers every flush with an error: for memory that is gone, and nobody else answers.
pub(in crate::virtio) fn worker_without_memory(
    name: String,
    memory: GuestView,
    queue: Queue,
    signals: Arc<dyn Signals>,
) -> Result<Worker, ActivateError> {
    let lost = LossMark::new();
    lost.lose();
    Worker::new(worker::Parts {
        name,
        memory,
        queue,
        flush: Arc::new(UntilSevered(RwLock::new(None))),
        lost,
        counters: Arc::default(),
        signals,
    })
}

/// A range of persistent memory.
pub struct PmemDevice {
    id: String,
    space: [u8; 16],
    flush: Arc<UntilSevered>,
    lost: LossMark,
    counters: Arc<Counters>,
}

/// What makes stores durable, until it is taken back.
struct UntilSevered(RwLock<Option<Arc<dyn Flush>>>);

impl Flush for UntilSevered {
    /// What is under way when it is closed keeps its file open until it ends.
    fn flush(&self) -> io::Result<()> {
        let flush = self
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        flush.map_or(Err(io::ErrorKind::NotConnected.into()), |flush| {
            flush.flush()
        })
    }
}

impl UntilSevered {
    fn close(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl PmemDevice {
    /// For memory that the guest has at `gpa`, `size` bytes long.
    pub fn new(id: &str, gpa: Gpa, size: u64, flush: Arc<dyn Flush>) -> Self {
        let mut space = [0; 16];
        space[..8].copy_from_slice(&gpa.0.to_le_bytes());
        space[8..].copy_from_slice(&size.to_le_bytes());
        Self {
            id: id.to_owned(),
            space,
            flush: Arc::new(UntilSevered(RwLock::new(Some(flush)))),
            lost: LossMark::new(),
            counters: Arc::default(),
        }
    }

    /// With the mark of its memory, which whoever finds out first sets. Before the first activation.
    #[must_use]
    pub fn with_mark(mut self, mark: LossMark) -> Self {
        self.lost = mark;
        self
    }

    /// The memory is gone: from now on, and for flushes that are under way, the answer is an error.
    pub fn mark_lost(&self) {
        self.lost.lose();
    }

    /// The one worker, for a caller that runs it itself.
    pub fn worker(&self, activation: Activation) -> Result<Worker, ActivateError> {
        let Activation {
            memory,
            queues,
            signals,
            ..
        } = activation;
        let queue = queues
            .into_iter()
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue { index: 0 })?;
        Worker::new(worker::Parts {
            name: thread_name(&self.id),
            memory,
            queue,
            flush: Arc::clone(&self.flush) as Arc<dyn Flush>,
            lost: self.lost.clone(),
            counters: Arc::clone(&self.counters),
            signals,
        })
    }
}

impl Device for PmemDevice {
    fn kind(&self) -> Kind {
        Kind::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space, offset, data);
    }

    fn activate(
        &self,
        activation: Activation,
    ) -> Result<Vec<Box<dyn workers::Worker>>, ActivateError> {
        Ok(vec![Box::new(self.worker(activation)?)])
    }

    /// Linux waits for the answer to a flush without a limit.
    fn outlives_host(&self) -> bool {
        true
    }

    fn sever(&self) {
        self.mark_lost();
        self.flush.close();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requests", read(&self.counters.requests)),
            ("errors", read(&self.counters.errors)),
            ("host_flushes", read(&self.counters.host_flushes)),
        ]
    }
}

/// `_pmem_ID`, or `ID` if that has an underscore already (`_pmem0`), as much of it as a thread's name takes.
fn thread_name(id: &str) -> String {
    const LONGEST: usize = 15;
    let mut name = if id.starts_with('_') {
        id.to_owned()
    } else {
        format!("_pmem_{id}")
    };
    name.truncate(name.floor_char_boundary(LONGEST));
    name
}

#[cfg(test)]
mod tests;

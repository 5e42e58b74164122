//! Persistent memory that a vhost-user backend lends: what is its own.
//!
//! The memory is mapped here and is a region of guest memory like any other. The backend is left with the queue of flush
//! requests: a guest whose backend is gone stores on, and its flushes wait for the next one. When the memory is taken away nobody
//! is waited for: flushes are answered here, with errors (`stand_in`). The guest is told where the
//! memory is by the configuration space, which drivers of all ages read.

use std::io;
use std::sync::Arc;

use super::class::{Class, Config, Shape};
use super::stand_in::{self, End};
use super::{Backend, VhostUserDevice, worker};
use crate::memory::layout::Gpa;
use crate::virtio::device::{Device, Kind, read_space};
use crate::virtio::pmem::worker_without_memory;
use crate::virtio::worker::Worker;
use crate::virtio::{ActivateError, Activation};

/// Start and size (virtio 1.2, 5.19.4).
const CONFIG_BYTES: u32 = 16;

/// The one queue.
pub fn shape() -> Shape {
    Shape::even(1, 64)
}

/// Persistent memory. Not among the features: `SHMEM_REGION`, by which a driver would look for the memory in a BAR.
pub const PMEM: Class = Class {
    name: "vhost-user pmem",
    example: "daxhund-vhost-user-pmem --socket-path ... --dax ...",
    kind: Kind::Pmem,
    features: 0,
    own_features: 0,
    config: Config::Backend {
        bytes: CONFIG_BYTES,
        // What the backend says of the place is not believed: it is this side's.
        fit: |config, _| config.fill(0),
    },
    uncounted: 0,
    always: 0,
    unsaid: 1,
    more_by: 0,
    in_pairs: false,
    has_control: false,
    lends: true,
};

/// A range of persistent memory, and the backend that flushes it.
pub struct LentPmem {
    queue: VhostUserDevice,
    backend: Arc<Backend>,
    end: Arc<End>,
    space: [u8; CONFIG_BYTES as usize],
}

impl LentPmem {
    /// For memory that the guest has at `gpa`, `size` bytes long.
    pub fn new(backend: Arc<Backend>, gpa: Gpa, size: u64) -> io::Result<Self> {
        let mut space = [0; CONFIG_BYTES as usize];
        space[..8].copy_from_slice(&gpa.0.to_le_bytes());
        space[8..].copy_from_slice(&size.to_le_bytes());
        Ok(Self {
            queue: VhostUserDevice::new(Arc::clone(&backend)),
            backend,
            end: Arc::new(End::new()?),
            space,
        })
    }
}

impl Device for LentPmem {
    fn kind(&self) -> Kind {
        Kind::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn ring_features(&self) -> u64 {
        self.queue.ring_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.queue.queue_sizes()
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space, offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let host = |source| ActivateError::Host {
            what: "no descriptor of a queue's doorbell",
            source,
        };
        let queue = activation.queues.first().and_then(Option::as_ref);
        let queue = queue.ok_or(ActivateError::MissingQueue { index: 0 })?;
        let stand_in = worker_without_memory(
            super::thread_name(self.backend.id(), ""),
            activation.memory.clone(),
            queue.twin().map_err(host)?,
            Arc::clone(&activation.signals),
        )?;
        let served = worker::Worker {
            backend: Arc::clone(&self.backend),
            service: Some(super::service(&PMEM, activation)?),
            orderly: None,
        };
        Ok(vec![Box::new(stand_in::Worker {
            served,
            stand_in,
            end: Arc::clone(&self.end),
            has_taken_over: false,
        })])
    }

    /// Linux waits for the answer to a flush without a limit: it gets one from here.
    fn outlives_host(&self) -> bool {
        true
    }

    fn sever(&self) {
        self.end.sever(&self.backend);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.queue.counters()
    }
}

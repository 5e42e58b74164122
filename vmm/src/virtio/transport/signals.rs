//! From a device's worker to the driver: interrupts by the vectors that the driver chose.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::common::NO_VECTOR;
use crate::pci::MsiRoutes;
use crate::virtio::device::Signals;
use crate::virtio::queue::Interrupt;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What vCPU threads and workers share. The registers are the vCPUs'; this is what workers need of them, as atomics,
/// so that raising an interrupt takes no lock.
pub(super) struct Wires {
    id: String,
    routes: Arc<dyn MsiRoutes>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// For a driver without MSI-X that polls; read-to-clear.
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
}

impl Wires {
    pub(super) fn new(id: &str, routes: Arc<dyn MsiRoutes>, queues: usize) -> Self {
        Self {
            id: id.to_owned(),
            routes,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    pub(super) fn set_vectors(&self, config: u16, queues: impl Iterator<Item = u16>) {
        self.config_vector.store(config, Ordering::SeqCst);
        for (wire, vector) in self.queue_vectors.iter().zip(queues) {
            wire.store(vector, Ordering::SeqCst);
        }
    }

    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
    }

    fn raise(&self, vector: u16, isr: u8) {
        if vector == NO_VECTOR {
            self.isr.fetch_or(isr, Ordering::SeqCst);
        } else {
            self.routes.signal(vector);
        }
    }
}

impl Signals for Wires {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }

    fn needs_reset(&self, why: &dyn fmt::Display) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            warn!(device = self.id, %why, "the device is not served until its driver resets it");
        }
        self.raise(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }
}

/// The interrupt of one queue.
pub(super) struct QueueWire {
    pub(super) wires: Arc<Wires>,
    pub(super) index: usize,
}

impl Interrupt for QueueWire {
    fn signal(&self) {
        let vector = self.wires.queue_vectors[self.index].load(Ordering::SeqCst);
        self.wires.raise(vector, ISR_QUEUE);
    }

    fn event(&self) -> io::Result<Option<EventFd>> {
        let vector = self.wires.queue_vectors[self.index].load(Ordering::SeqCst);
        self.wires.routes.event_of(vector)
    }
}

//! The worker of a device that a backend serves: it has the backend begin and end, and sees nothing of what is between, but for
//! the orders that the driver of a network gives.

use std::fmt;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::warn;
use vm_memory::GuestAddressSpace;

use super::Backend;
use super::net::Network;
use super::session::Service;
use crate::memory::ram::GuestView;
use crate::virtio::device::Signals;
use crate::virtio::net::Control;
use crate::virtio::worker;

pub(super) struct Worker {
    pub(super) backend: Arc<Backend>,
    pub(super) service: Option<Service>,
    pub(super) orderly: Option<Orderly>,
}

/// Who takes the driver's orders.
pub(super) struct Orderly {
    pub(super) control: Control,
    pub(super) memory: GuestView,
    pub(super) signals: Arc<dyn Signals>,
    /// As many pairs of queues as the driver has set up.
    pub(super) pairs: usize,
}

impl Orderly {
    fn doorbell(&self) -> Events {
        Events::new_raw(self.control.queue().kick_fd(), EventSet::IN)
    }

    /// Nobody is listened to any more.
    fn broken(&self, ops: &mut EventOps<'_>, why: &dyn fmt::Display) {
        self.signals.needs_reset(why);
        // What was not added is not removed.
        let _ = ops.remove(self.doorbell());
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(service) = self.service.take()
            && let Err(error) = self.backend.start(service)
        {
            warn!(device = self.backend.id(), %error, "the device is not served");
        }
        // An order comes after the start that it is about.
        if let Some(orderly) = &self.orderly {
            if let Err(error) = ops.add(orderly.doorbell()) {
                return orderly.broken(ops, &error);
            }
            // The driver may have given some before.
            orderly.control.queue().kick_again();
        }
    }

    /// The driver gives orders. All other doorbells go to the backend, interrupts come from it.
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        let Some(orderly) = &mut self.orderly else {
            return;
        };
        orderly.control.queue().acknowledge_kick();
        let network = Network {
            backend: &self.backend,
            pairs: orderly.pairs,
        };
        let memory = orderly.memory.memory();
        match orderly.control.serve(&memory, &network) {
            Ok(true) => orderly.control.queue().kick_again(),
            Ok(false) => {}
            Err(error) => orderly.broken(ops, &error),
        }
    }
}

impl worker::Worker for Worker {
    fn name(&self) -> String {
        super::thread_name(self.backend.id(), "")
    }

    fn drain(&mut self) {
        if let Err(error) = self.backend.stop() {
            warn!(device = self.backend.id(), %error, "the backend may still serve the device");
        }
    }
}

//! The worker of a device that a backend serves: it has the backend begin and end, and sees nothing of what is between.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use tracing::warn;

use super::Backend;
use super::session::Service;
use crate::virtio::worker;

pub(super) struct Worker {
    pub(super) backend: Arc<Backend>,
    pub(super) service: Option<Service>,
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, _ops: &mut EventOps<'_>) {
        if let Some(service) = self.service.take()
            && let Err(error) = self.backend.start(service)
        {
            warn!(device = self.backend.id(), %error, "the device is not served");
        }
    }

    /// Doorbells go to the backend, interrupts come from it.
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
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

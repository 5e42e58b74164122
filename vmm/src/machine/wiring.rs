//! Introduces devices to KVM: interrupts one way, doorbells the other.

use std::io;

use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{Doorbells, Message, Vectors};
use crate::pci::{MsiMessage, MsiRoutes};
use crate::virtio::transport;

/// A function's MSI-X vectors as KVM raises them.
pub(super) struct KvmRoutes(pub(super) Vectors);

impl MsiRoutes for KvmRoutes {
    fn set(&self, vector: u16, message: Option<MsiMessage>) {
        let done = match message {
            Some(MsiMessage { address, data }) => self.0.route(vector, Message { address, data }),
            None => self.0.mask(vector),
        };
        if let Err(error) = done {
            // The guest sees a device without this interrupt; there is no register to tell it by.
            error!(%error, vector, ?message, "KVM does not take an interrupt route");
        }
    }

    fn signal(&self, vector: u16) {
        self.0.signal(vector);
    }

    fn is_pending(&self, vector: u16) -> bool {
        self.0.is_pending(vector)
    }
}

/// Doorbells that KVM rings without a way through this process.
pub(super) struct KvmDoorbells(pub(super) Doorbells);

impl transport::Doorbells for KvmDoorbells {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.connect(address, event)
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.disconnect(address, event)
    }
}

//! What the host tells of passed-through devices: one descriptor for all of them, for the owner's loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use tracing::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::passthrough::{Notice, PassedThrough};

/// The devices that are listened to.
pub(super) struct Notices {
    epoll: Epoll,
    devices: Vec<Arc<PassedThrough>>,
}

impl Notices {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            devices: Vec::new(),
        })
    }

    /// Listens to a device.
    pub(super) fn watch(&mut self, device: &Arc<PassedThrough>) {
        for (_, event) in device.notices() {
            self.control(ControlOperation::Add, event.as_raw_fd());
        }
        self.devices.push(Arc::clone(device));
    }

    /// The undo of [`Notices::watch`].
    pub(super) fn forget(&mut self, device: &Arc<PassedThrough>) {
        for (_, event) in device.notices() {
            self.control(ControlOperation::Delete, event.as_raw_fd());
        }
        self.devices.retain(|other| !Arc::ptr_eq(other, device));
    }

    fn control(&self, operation: ControlOperation, fd: RawFd) {
        let event = EpollEvent::new(EventSet::IN, 0);
        if let Err(error) = self.epoll.ctl(operation, fd, event) {
            warn!(%error, "what the host tells of a device may not be heard");
        }
    }

    /// What was told since the last call.
    pub(super) fn drain(&self) -> Vec<(String, Notice)> {
        let mut told = Vec::new();
        for device in &self.devices {
            for (notice, event) in device.notices() {
                let mut count = [0; 8];
                if rustix::io::read(event, &mut count).is_ok() {
                    told.push((device.id().to_owned(), notice));
                }
            }
        }
        told
    }
}

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

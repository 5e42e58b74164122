//! Removals that the guard performs itself, each on a thread of its own: unbinding blocks, and the opening of the file
//! for it waits for the guard's own answer.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::core::HolderId;
use crate::host::Host;
use crate::lineage::DeviceName;
use crate::release::{UnbindError, unbind};

/// A removal that was tried.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) peer: HolderId,
    pub(crate) device: DeviceName,
    pub(crate) outcome: Result<(), UnbindError>,
}

/// Removals under way. Readable when one is done.
#[derive(Debug)]
pub(crate) struct Removals {
    done: (Sender<Done>, Receiver<Done>),
    wake: EventFd,
}

impl Removals {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            done: channel(),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Takes a device away for a peer. The thread ends with the removal; nobody waits for it.
    pub(crate) fn begin(&self, host: &Host, peer: HolderId, device: DeviceName) {
        let (host, done) = (host.clone(), self.done.0.clone());
        let wake = self.wake.try_clone();
        thread::spawn(move || {
            let outcome = unbind(&host, &device);
            // Both fail only when the guard has ended meanwhile, and nobody is there to be told.
            drop(done.send(Done {
                peer,
                device,
                outcome,
            }));
            drop(wake.and_then(|wake| wake.write(1)));
        });
    }

    pub(crate) fn next_done(&self) -> Option<Done> {
        // Reset before looking, so that no end is missed. It was not set when another end was seen on the way.
        drop(self.wake.read());
        self.done.1.try_recv().ok()
    }
}

impl AsRawFd for Removals {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

//! What other threads tell the owner.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::power::PowerRequest;
use crate::kvm::VcpuFault;
use crate::pci::Ejected;

/// Every cause of a change that comes from a vCPU thread.
#[derive(Debug)]
pub enum Event {
    /// The guest used a power or reset register.
    Power(PowerRequest),
    /// A vCPU ended in a triple fault; its thread is gone.
    TripleFault,
    /// A vCPU can't go on; its thread is gone.
    VcpuFailed(VcpuFault),
    /// A vCPU found no memory behind an access. It waits for the owner to look.
    MemoryGone {
        /// What it found.
        fault: VcpuFault,
        /// How often the owner had looked by then.
        mended: u64,
    },
    /// A vCPU's guest has touched poison: an incident tells where. It waits at the access for the owner to look.
    PoisonTouched {
        /// How often the owner had looked by then.
        mended: u64,
    },
    /// The thread of a vCPU panicked: a defect of the VMM.
    VcpuPanicked(u8),
    /// The guest has let go of the device in a slot.
    Ejected(Ejected),
    /// The guest has let go of this vCPU, which is not among those present any more.
    ProcessorEjected(u8),
}

/// Posts events; never blocks.
#[derive(Debug, Clone)]
pub struct EventSender {
    queue: Sender<Event>,
    wake: Arc<EventFd>,
}

impl EventSender {
    /// Posts an event. An owner that has gone needs none.
    pub fn send(&self, event: Event) {
        if self.queue.send(event).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            // Only a full counter gives this, and then the owner is awake anyway.
            tracing::debug!(%error, "owner already woken");
        }
    }
}

/// The owner's end.
#[derive(Debug)]
pub struct Events {
    queue: Receiver<Event>,
    wake: Arc<EventFd>,
}

impl Events {
    /// A queue and its sender.
    pub fn channel() -> io::Result<(EventSender, Self)> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sender, queue) = channel();
        Ok((
            EventSender {
                queue: sender,
                wake: Arc::clone(&wake),
            },
            Self { queue, wake },
        ))
    }

    /// All events there are; called when the descriptor is readable.
    pub fn drain(&self) -> impl Iterator<Item = Event> + '_ {
        // Nothing to read when a spurious wake-up got here: the queue decides.
        let _ = self.wake.read();
        self.queue.try_iter()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

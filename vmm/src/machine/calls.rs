//! Calls of the API on their way to the owner.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::api::{Call, CallSink, Gone};

/// The API's end; never blocks.
#[derive(Debug, Clone)]
pub(super) struct CallSender {
    queue: Sender<Call>,
    wake: Arc<EventFd>,
}

impl CallSink for CallSender {
    fn submit(&self, call: Call) -> Result<(), Gone> {
        self.queue.send(call).map_err(|_| Gone)?;
        // Only a full counter gives an error, and then the owner is awake anyway.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// The owner's end.
#[derive(Debug)]
pub(super) struct Calls {
    queue: Receiver<Call>,
    wake: Arc<EventFd>,
}

impl Calls {
    /// A queue and its sender.
    pub(super) fn channel() -> io::Result<(CallSender, Self)> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sender, queue) = channel();
        let sender = CallSender {
            queue: sender,
            wake: Arc::clone(&wake),
        };
        Ok((sender, Self { queue, wake }))
    }

    /// The next call there is. Before the first of a wake-up, [`Calls::acknowledge`].
    pub(super) fn next(&self) -> Option<Call> {
        self.queue.try_recv().ok()
    }

    /// Takes note of a wake-up.
    pub(super) fn acknowledge(&self) {
        // Nothing to read after a spurious one: the queue decides.
        let _ = self.wake.read();
    }
}

impl AsRawFd for Calls {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

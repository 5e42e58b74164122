//! Frames from the driver's buffers to the link.

use std::io;

use super::counters::Counters;
use super::link::Link;
use super::vectors::{BadRange, Vectors};
use super::{HEADER_BYTES, LARGEST_FRAME};
use crate::memory::snapshot::Snapshot;
use crate::virtio::{Queue, QueueError};

/// Frames for one call of [`Tx::serve`].
const BATCH: usize = 256;

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// The driver will ring.
    Kick,
    /// Room on the link.
    Room,
    /// The next turn: there is more to do.
    Turn,
}

/// A transmit queue.
pub(super) struct Tx {
    queue: Queue,
}

impl Tx {
    /// Serves this queue.
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue }
    }

    /// Its queue.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Sends frames until there are no more, or the link takes no more, or it is somebody else's turn.
    pub(super) fn serve(
        &mut self,
        memory: &Snapshot,
        link: &dyn Link,
        counters: &Counters,
    ) -> Result<Wait, QueueError> {
        self.queue.disable_kick(memory)?;
        let wait = self.send_frames(memory, link, counters)?;
        self.queue.notify(memory)?;
        Ok(wait)
    }

    fn send_frames(
        &mut self,
        memory: &Snapshot,
        link: &dyn Link,
        counters: &Counters,
    ) -> Result<Wait, QueueError> {
        let mut frame = Vectors::new();
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop(memory)? else {
                if self.queue.enable_kick(memory)? {
                    continue;
                }
                return Ok(Wait::Kick);
            };
            let head = chain.head_index();
            frame.clear();
            let gathered = chain.readable().try_for_each(|descriptor| {
                if descriptor.len() as usize > LARGEST_FRAME {
                    return Err(BadRange);
                }
                frame.push(memory, descriptor.addr(), descriptor.len())
            });
            if self.queue.is_torn() {
                self.queue.unpop();
                continue;
            }
            let fits = (HEADER_BYTES..=LARGEST_FRAME).contains(&frame.bytes());
            if gathered.is_err() || !fits {
                counters.tx.dropped();
            } else {
                match link.write_frame(&frame) {
                    Ok(len) => counters.tx.moved(len.saturating_sub(HEADER_BYTES)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.queue.unpop();
                        return Ok(Wait::Room);
                    }
                    // The header makes no sense to the kernel, the interface is down, the memory is gone: the frame is
                    // lost, as on a wire.
                    Err(_) => counters.tx.dropped(),
                }
            }
            self.queue.push(memory, head, 0)?;
        }
        Ok(Wait::Turn)
    }
}

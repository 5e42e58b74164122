//! Frames from the link into the driver's buffers.
//!
//! A frame is read straight into guest memory, so buffers are taken before its length is known: `held` are chains that
//! were popped and are not used yet; what a frame leaves over serves the next one. What of a frame has no room goes to
//! a scratch buffer, which is how one that does not fit is recognised.

use std::collections::VecDeque;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend as _};

use super::counters::Counters;
use super::link::Link;
use super::vectors::{BadRange, MOST, Vectors};
use super::{HEADER_BYTES, LARGEST_FRAME};
use crate::memory::snapshot::Snapshot;
use crate::virtio::{Queue, QueueError};

/// Frames for one call of [`Rx::serve`], so that a worker looks at its other queues and at its owner.
const BATCH: usize = 128;
/// Where the header says over how many chains a frame is spread.
const NUM_BUFFERS: usize = 10;

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// The next frame.
    Frame,
    /// Buffers: the driver will ring. Frames stay where they are.
    Buffers,
    /// The next turn: there is more to do.
    Turn,
    /// Nothing: the link is gone.
    Nothing,
}

/// A receive queue.
pub(super) struct Rx {
    queue: Queue,
    mergeable: bool,
    /// Frames may be as large as [`LARGEST_FRAME`].
    large: bool,
    held: VecDeque<Held>,
    /// Of all of `held`, one after the other.
    pieces: VecDeque<(GuestAddress, u32)>,
    held_bytes: usize,
    /// Looks at the ring in this turn that were of no use.
    refused: usize,
    /// Of one frame; kept for its allocation.
    used: Vec<(u16, u32)>,
    scratch: Vec<u8>,
}

/// A popped chain.
struct Held {
    head: u16,
    pieces: usize,
    bytes: u32,
}

impl Rx {
    /// `mergeable`: a frame may be spread over chains. `large`: the driver takes frames that it will cut itself.
    pub(super) fn new(queue: Queue, mergeable: bool, large: bool) -> Self {
        Self {
            queue,
            mergeable,
            large,
            held: VecDeque::new(),
            pieces: VecDeque::new(),
            held_bytes: 0,
            refused: 0,
            used: Vec::new(),
            scratch: vec![0; LARGEST_FRAME],
        }
    }

    /// Its queue.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Moves frames until there are no more, or no buffers, or it is somebody else's turn.
    pub(super) fn serve(
        &mut self,
        memory: &Snapshot,
        link: &dyn Link,
        counters: &Counters,
    ) -> Result<Wait, QueueError> {
        self.queue.disable_kick(memory)?;
        self.refused = 0;
        let mut wait = self.move_frames(memory, link, counters)?;
        if self.refused >= BATCH && wait == Wait::Buffers {
            wait = Wait::Turn;
        }
        self.queue.notify(memory)?;
        Ok(wait)
    }

    fn move_frames(
        &mut self,
        memory: &Snapshot,
        link: &dyn Link,
        counters: &Counters,
    ) -> Result<Wait, QueueError> {
        let mut vectors = Vectors::new();
        for _ in 0..BATCH {
            if !self.fill(memory)? {
                return Ok(Wait::Buffers);
            }
            vectors.clear();
            if self.gather(memory, &mut vectors).is_err() {
                // RAM when they were taken, not any more. Rare, so there is no telling them apart.
                self.give_all_back(memory)?;
                continue;
            }
            match link.read_frame(&mut vectors, &mut self.scratch) {
                Ok(0) => return Ok(Wait::Nothing),
                Ok(len) if len > vectors.bytes() || len < HEADER_BYTES => counters.rx.dropped(),
                Ok(len) => self.deliver(memory, len, counters)?,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Wait::Frame),
                    // The memory of a buffer is gone, and the frame with it. Which buffer, the kernel does not say.
                    Some(libc::EFAULT) => {
                        counters.rx.dropped();
                        self.give_all_back(memory)?;
                    }
                    _ => {
                        tracing::warn!(%error, "a network device's link can't be read any more");
                        return Ok(Wait::Nothing);
                    }
                },
            }
        }
        Ok(Wait::Frame)
    }

    /// Takes buffers until the largest frame fits, or until there are no more: `false` when those are too few to
    /// begin with. Then the driver has been asked to ring for more.
    fn fill(&mut self, memory: &Snapshot) -> Result<bool, QueueError> {
        loop {
            if self.is_full() {
                return Ok(true);
            }
            let Some(chain) = self.queue.pop(memory)? else {
                if !self.queue.enable_kick(memory)? {
                    return Ok(self.is_enough());
                }
                if self.is_refused_too_often() {
                    return Ok(false);
                }
                continue;
            };
            let head = chain.head_index();
            let before = self.pieces.len();
            let (mut bytes, mut is_ram) = (0u64, true);
            for descriptor in chain.writable() {
                let (address, len) = (descriptor.addr(), descriptor.len());
                is_ram &= memory.check_range(address, len as usize);
                self.pieces.push_back((address, len));
                bytes += u64::from(len);
            }
            let pieces = self.pieces.len() - before;
            match u32::try_from(bytes) {
                Ok(bytes) if is_ram && bytes as usize >= HEADER_BYTES && pieces <= MOST / 2 => {
                    self.held_bytes += bytes as usize;
                    self.held.push_back(Held {
                        head,
                        pieces,
                        bytes,
                    });
                }
                // Of no use for any frame.
                _ => {
                    self.pieces.truncate(before);
                    self.queue.push(memory, head, 0)?;
                    if self.is_refused_too_often() {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Counts what brought this turn no further. A driver must not keep the worker going round in circles.
    fn is_refused_too_often(&mut self) -> bool {
        self.refused += 1;
        self.refused >= BATCH
    }

    fn is_full(&self) -> bool {
        if self.mergeable {
            self.held_bytes >= LARGEST_FRAME || self.pieces.len() >= MOST / 4
        } else {
            !self.held.is_empty()
        }
    }

    /// Whether to read a frame with what is held, all there is. A driver that has most of its buffers is about to give
    /// some back, and a large frame that is left on the link until then need not be dropped.
    fn is_enough(&self) -> bool {
        let waits =
            self.mergeable && self.large && self.pieces.len() * 2 < usize::from(self.queue.size());
        !self.held.is_empty() && !waits
    }

    /// The held chains as one buffer.
    fn gather<'m>(&self, memory: &'m Snapshot, vectors: &mut Vectors<'m>) -> Result<(), BadRange> {
        self.pieces
            .iter()
            .try_for_each(|(address, len)| vectors.push(memory, *address, *len))
    }

    /// Gives the chains that a frame of `len` bytes fills to the driver.
    fn deliver(
        &mut self,
        memory: &Snapshot,
        len: usize,
        counters: &Counters,
    ) -> Result<(), QueueError> {
        self.used.clear();
        let mut left = u32::try_from(len).unwrap_or(u32::MAX);
        for held in &self.held {
            let part = left.min(held.bytes);
            self.used.push((held.head, part));
            left -= part;
            if left == 0 {
                break;
            }
        }
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        if self.put(memory, NUM_BUFFERS, count.to_le_bytes()).is_err() {
            counters.rx.dropped();
            return self.give_all_back(memory);
        }
        for _ in 0..self.used.len() {
            self.forget_first();
        }
        counters.rx.moved(len - HEADER_BYTES);
        self.queue.push_all(memory, &self.used)
    }

    /// Stores two bytes of a frame's header; a hostile driver may have cut it anywhere.
    fn put(&self, memory: &Snapshot, offset: usize, bytes: [u8; 2]) -> Result<(), BadRange> {
        for (at, byte) in (offset..).zip(bytes) {
            let mut left = u64::try_from(at).map_err(|_| BadRange)?;
            let address = self.pieces.iter().find_map(|(address, len)| {
                if left < u64::from(*len) {
                    return address.checked_add(left);
                }
                left -= u64::from(*len);
                None
            });
            memory
                .write_obj(byte, address.ok_or(BadRange)?)
                .map_err(|_| BadRange)?;
        }
        Ok(())
    }

    fn forget_first(&mut self) -> Option<u16> {
        let held = self.held.pop_front()?;
        self.pieces.drain(..held.pieces);
        self.held_bytes -= held.bytes as usize;
        Some(held.head)
    }

    /// Gives all that is held back, unused.
    fn give_all_back(&mut self, memory: &Snapshot) -> Result<(), QueueError> {
        while let Some(head) = self.forget_first() {
            self.queue.push(memory, head, 0)?;
        }
        Ok(())
    }
}

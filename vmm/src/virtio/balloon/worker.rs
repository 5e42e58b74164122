//! Takes what the driver gives up and hands it to whoever gives it back to the host.

use std::io::Read;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::warn;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard};

use super::State;
use super::pages::runs;
use crate::memory::discard::{Discard, Discarded};
use crate::memory::loss::{Epoch, Lost};
use crate::memory::ram::GuestView;
use crate::memory::snapshot::Snapshot;
use crate::virtio::device::Signals;
use crate::virtio::queue::{Queue, QueueError};
use crate::virtio::worker::Worker;

/// Most bytes of page numbers that one chain may list; Linux lists 1024.
const LIST: usize = 64 << 10;
/// Most free ranges that one chain may report; Linux reports 32.
const RANGES: usize = 4096;
/// Calls to the host before the event loop looks at other things.
const SHARE_CALLS: usize = LIST / 4;
/// Bytes given back before it does.
const SHARE_BYTES: u64 = 1 << 30;

type Chain = DescriptorChain<GuestMemoryLoadGuard<Snapshot>>;

/// Every cause of work: a queue's doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Inflate,
    Deflate,
    Report,
}

impl Token {
    const ALL: [Self; 3] = [Self::Inflate, Self::Deflate, Self::Report];

    fn event(self, fd: RawFd) -> Events {
        Events::with_data_raw(fd, self as u32, EventSet::IN)
    }

    fn of(events: &Events) -> Option<Self> {
        Self::ALL.get(events.data() as usize).copied()
    }
}

/// What the host had to do for a chain.
#[derive(Debug, Default)]
struct Work {
    calls: usize,
    bytes: u64,
}

/// Serves the queues.
pub(super) struct BalloonWorker {
    /// By token.
    queues: [Option<Queue>; 3],
    memory: GuestView,
    signals: Arc<dyn Signals>,
    giver: Giver,
    /// The driver broke the rules: nothing is served until it resets the device.
    broken: bool,
}

/// What happens with a chain.
struct Giver {
    discard: Arc<dyn Discard>,
    state: Arc<State>,
    list: Vec<u8>,
    ranges: Vec<(u64, u64)>,
}

impl BalloonWorker {
    pub(super) fn new(
        queues: [Option<Queue>; 3],
        memory: GuestView,
        signals: Arc<dyn Signals>,
        discard: Arc<dyn Discard>,
        state: Arc<State>,
    ) -> Self {
        Self {
            queues,
            memory,
            signals,
            giver: Giver {
                discard,
                state,
                list: vec![0; LIST],
                ranges: Vec::new(),
            },
            broken: false,
        }
    }

    fn serve(&mut self, token: Token) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues[token as usize] else {
            return Ok(());
        };
        queue.acknowledge_kick();
        let memory = self.memory.memory();
        let mut sum = Work::default();
        let mut pushed = false;
        loop {
            if sum.calls >= SHARE_CALLS || sum.bytes >= SHARE_BYTES {
                queue.kick_again();
                break;
            }
            let Some(chain) = queue.pop(memory.clone())? else {
                if queue.enable_kick(&*memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let work = match token {
                Token::Inflate => self.giver.inflate(&memory, chain, queue.epoch()),
                Token::Deflate => self.giver.deflate(&memory, chain, queue.epoch()),
                Token::Report => self.giver.report(chain, queue.epoch()),
            };
            let Ok(work) = work else {
                // Memory was lost while it was read; nothing was given back for it.
                queue.unpop();
                continue;
            };
            // An empty chain costs something too.
            sum.calls += work.calls + 1;
            sum.bytes += work.bytes;
            // Only now may the driver use the pages for something else.
            queue.push(&*memory, head, 0)?;
            pushed = true;
        }
        if pushed {
            queue.notify(&*memory)?;
        }
        Ok(())
    }
}

impl Giver {
    fn inflate(&mut self, memory: &Snapshot, chain: Chain, epoch: Epoch) -> Result<Work, Lost> {
        let list = self.read_list(memory, chain);
        epoch.unbroken()?;
        let Some(len) = list else {
            return Ok(self.bad());
        };
        count(&self.state.inflated, (len / 4) as u64);
        let mut work = Work::default();
        for run in runs(&self.list[..len]) {
            work.add(&self.state, self.discard.discard(run.gpa, run.len));
        }
        Ok(work)
    }

    /// The pages come back by themselves when they are touched.
    fn deflate(&mut self, memory: &Snapshot, chain: Chain, epoch: Epoch) -> Result<Work, Lost> {
        let list = self.read_list(memory, chain);
        epoch.unbroken()?;
        let Some(len) = list else {
            return Ok(self.bad());
        };
        count(&self.state.deflated, (len / 4) as u64);
        Ok(Work::default())
    }

    fn report(&mut self, chain: Chain, epoch: Epoch) -> Result<Work, Lost> {
        self.ranges.clear();
        let mut ranges = chain.writable();
        for range in ranges.by_ref().take(RANGES) {
            self.ranges.push((range.addr().0, u64::from(range.len())));
        }
        let ignored = ranges.count() as u64;
        epoch.unbroken()?;
        let mut work = Work::default();
        for (gpa, len) in &self.ranges {
            count(&self.state.reported_bytes, *len);
            work.add(&self.state, self.discard.discard(*gpa, *len));
        }
        count(&self.state.ignored, ignored);
        Ok(if work.calls == 0 { self.bad() } else { work })
    }

    /// Fills `list` and tells how much of it; `None` when the chain has no list or can't be read.
    fn read_list(&mut self, memory: &Snapshot, chain: Chain) -> Option<usize> {
        let mut reader = chain.reader(memory).ok()?;
        let all = reader.available_bytes() / 4 * 4;
        let len = all.min(LIST);
        count(&self.state.ignored, ((all - len) / 4) as u64);
        reader.read_exact(&mut self.list[..len]).ok()?;
        (len > 0).then_some(len)
    }

    fn bad(&self) -> Work {
        count(&self.state.bad_chains, 1);
        Work::default()
    }
}

impl Work {
    fn add(&mut self, state: &State, told: Discarded) {
        self.calls += 1;
        self.bytes += told.done;
        count(&state.discarded_bytes, told.done);
        count(&state.kept_bytes, told.kept);
        count(&state.outside_bytes, told.outside);
    }
}

impl MutEventSubscriber for BalloonWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (token, queue) in Token::ALL.into_iter().zip(&self.queues) {
            let Some(queue) = queue else { continue };
            if let Err(error) = ops.add(token.event(queue.kick_fd())) {
                warn!(?token, %error, "not waited on");
            }
            // The driver may have filled its ring before it said that it is ready.
            queue.kick_again();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let Some(token) = Token::of(&events) else {
            return;
        };
        if self.broken {
            if let Err(error) = ops.remove(token.event(events.fd())) {
                warn!(?token, %error, "still waited on");
            }
            return;
        }
        if let Err(error) = self.serve(token) {
            self.broken = true;
            self.signals.needs_reset(&error);
        }
    }
}

impl Worker for BalloonWorker {
    fn name(&self) -> String {
        "_balloon".to_owned()
    }
}

fn count(counter: &AtomicU64, more: u64) {
    // Guest-controlled sums: they may wrap and must not panic.
    counter.fetch_add(more, Ordering::Relaxed);
}

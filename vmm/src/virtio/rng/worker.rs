//! Fills the driver's buffers from the source.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::{debug, warn};
use vm_memory::GuestAddressSpace;

use super::source::{Got, Source};
use super::{Counters, lock};
use crate::memory::ram::GuestView;
use crate::virtio::device::Signals;
use crate::virtio::queue::{Queue, QueueError};
use crate::virtio::worker::Worker;

/// Most bytes for one chain. A driver that asks for more gets so many, as from any short read.
const MOST: usize = 64 << 10;
/// Chains served before the event loop looks at other things.
const SHARE: usize = 32;
/// When to ask a source again that can't be waited on: some hardware generators have no `poll`.
const AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// When to ask one again that failed.
const AFTER_ERROR: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Every cause of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Kick,
    Source,
    Timer,
}

impl Token {
    const ALL: [Self; 3] = [Self::Kick, Self::Source, Self::Timer];

    fn event(self, fd: RawFd) -> Events {
        Events::with_data_raw(fd, self as u32, EventSet::IN)
    }

    fn of(events: &Events) -> Option<Self> {
        Self::ALL.get(events.data() as usize).copied()
    }
}

/// Serves the one queue.
pub(super) struct RngWorker {
    queue: Queue,
    memory: GuestView,
    signals: Arc<dyn Signals>,
    source: Arc<Mutex<Source>>,
    counters: Arc<Counters>,
    buffer: Vec<u8>,
    /// The source's descriptor while it is waited on.
    waiting: Option<RawFd>,
    timer: OwnedFd,
    /// The driver broke the rules: nothing is served until it resets the device.
    broken: bool,
}

impl RngWorker {
    pub(super) fn new(
        queue: Queue,
        memory: GuestView,
        signals: Arc<dyn Signals>,
        source: Arc<Mutex<Source>>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        Ok(Self {
            queue,
            memory,
            signals,
            source,
            counters,
            buffer: vec![0; MOST],
            waiting: None,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            broken: false,
        })
    }

    fn serve(&mut self, ops: &mut EventOps<'_>) -> Result<(), QueueError> {
        // Reading may close it and open another.
        self.stop_waiting(ops);
        let memory = self.memory.memory();
        let mut pushed = false;
        let mut left = SHARE;
        loop {
            if left == 0 {
                self.queue.kick_again();
                break;
            }
            let Some(chain) = self.queue.pop(memory.clone())? else {
                if self.queue.enable_kick(&*memory)? {
                    continue;
                }
                break;
            };
            left -= 1;
            let head = chain.head_index();
            let writer = chain
                .writer(&memory)
                .ok()
                .filter(|writer| writer.available_bytes() > 0);
            let Some(mut writer) = writer else {
                self.counters.bad_chains.fetch_add(1, Ordering::Relaxed);
                self.queue.push(&*memory, head, 0)?;
                pushed = true;
                continue;
            };
            let room = writer.available_bytes().min(MOST);
            let got = lock(&self.source).read(&mut self.buffer[..room]);
            if let Got::Bytes(n) = got {
                // Fails only where guest memory does, and then the driver has nothing to read.
                let written = match writer.write_all(&self.buffer[..n]) {
                    Ok(()) => n,
                    Err(_) => 0,
                };
                // The guest's numbers are nobody else's.
                self.buffer[..n].fill(0);
                self.counters
                    .bytes
                    .fetch_add(written as u64, Ordering::Relaxed);
                let len = u32::try_from(written).unwrap_or(0);
                self.queue.push(&*memory, head, len)?;
                pushed = true;
                continue;
            }
            self.queue.unpop();
            match got {
                Got::Later => self.wait(ops),
                Got::Failed => {
                    self.counters.source_errors.fetch_add(1, Ordering::Relaxed);
                    self.arm(AFTER_ERROR);
                }
                // The chain stays where it is: for ever, or until the source has more when the driver rings again.
                Got::Ended | Got::Bytes(_) => {}
            }
            break;
        }
        if pushed {
            self.queue.notify(&*memory)?;
        }
        Ok(())
    }

    fn wait(&mut self, ops: &mut EventOps<'_>) {
        let fd = lock(&self.source).fd();
        match ops.add(Token::Source.event(fd)) {
            Ok(()) => self.waiting = Some(fd),
            Err(error) => {
                debug!(%error, "the source of random numbers is asked again and again");
                self.arm(AGAIN);
            }
        }
    }

    fn stop_waiting(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.waiting.take() {
            remove(ops, fd, Token::Source);
        }
    }

    fn arm(&self, after: Timespec) {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: after,
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            // Never for a valid descriptor and time.
            warn!(%error, "the timer of the random number source is not set");
        }
    }
}

fn remove(ops: &mut EventOps<'_>, fd: RawFd, token: Token) {
    if let Err(error) = ops.remove(token.event(fd)) {
        warn!(?token, %error, "still waited on");
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fds = [
            (self.queue.kick_fd(), Token::Kick),
            (self.timer.as_raw_fd(), Token::Timer),
        ];
        for (fd, token) in fds {
            if let Err(error) = ops.add(token.event(fd)) {
                warn!(?token, %error, "not waited on");
            }
        }
        // The driver may have filled its ring before it said that it is ready.
        self.queue.kick_again();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let Some(token) = Token::of(&events) else {
            return;
        };
        if self.broken {
            remove(ops, events.fd(), token);
            return;
        }
        match token {
            Token::Kick => self.queue.acknowledge_kick(),
            Token::Timer => {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            }
            Token::Source => {}
        }
        if let Err(error) = self.serve(ops) {
            self.broken = true;
            self.signals.needs_reset(&error);
        }
    }
}

impl Worker for RngWorker {
    fn name(&self) -> String {
        "_rng".to_owned()
    }
}

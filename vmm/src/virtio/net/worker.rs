//! Serves one queue pair; the worker of the first one serves the control queue too.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, Orders};
use super::counters::Counters;
use super::link::{Link, Offloads};
use super::pairs::Pairs;
use super::rx::{self, Rx};
use super::tx::{self, Tx};
use crate::memory::ram::GuestView;
use crate::virtio::{QueueError, Signals, Worker};

/// Why the worker is woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Receive,
    Transmit,
    Control,
    Link,
    /// There is more to do, or the number of pairs in use has changed.
    Turn,
}

impl Token {
    const ALL: [Self; 5] = [
        Self::Receive,
        Self::Transmit,
        Self::Control,
        Self::Link,
        Self::Turn,
    ];

    fn of(data: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|token| *token as u32 == data)
    }
}

/// Serves one queue pair.
pub(super) struct PairWorker {
    /// Name of its thread.
    pub name: String,
    /// Number of the pair.
    pub pair: usize,
    /// Guest memory.
    pub memory: GuestView,
    /// Queue of the host's side.
    pub link: Arc<dyn Link>,
    /// The device's counters.
    pub counters: Arc<Counters>,
    /// Whether the link is there; the device shows it in its configuration space.
    pub link_up: Arc<AtomicBool>,
    /// To the driver.
    pub signals: Arc<dyn Signals>,
    /// Which pairs are in use.
    pub pairs: Arc<Pairs>,
    /// Wakes this worker.
    pub turn: Arc<EventFd>,
    /// Receive queue.
    pub rx: Rx,
    /// Transmit queue.
    pub tx: Tx,
    /// Control queue.
    pub control: Option<Control>,
    /// What it waits for.
    pub state: State,
}

/// What a worker waits for.
#[derive(Debug)]
pub(super) struct State {
    rx: rx::Wait,
    tx: tx::Wait,
    /// What the link is watched for at present.
    watched: EventSet,
}

impl Default for State {
    fn default() -> Self {
        Self {
            rx: rx::Wait::Buffers,
            tx: tx::Wait::Kick,
            watched: EventSet::empty(),
        }
    }
}

/// What the driver gives orders to.
struct Tap<'a> {
    link: &'a dyn Link,
    pairs: &'a Pairs,
}

impl Orders for Tap<'_> {
    fn most_pairs(&self) -> usize {
        self.pairs.most()
    }

    fn use_pairs(&self, wanted: usize) -> io::Result<()> {
        self.pairs.set_active(wanted)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.link.set_offloads(offloads)
    }
}

impl PairWorker {
    fn receive(&mut self) -> Result<(), QueueError> {
        if self.state.rx == rx::Wait::Nothing || !self.pairs.is_active(self.pair) {
            return Ok(());
        }
        let memory = self.memory.memory();
        self.state.rx = self.rx.serve(&memory, self.link.as_ref(), &self.counters)?;
        match self.state.rx {
            // Detached while it was read. It counts as out of use before it is detached, so this is no link that is gone.
            rx::Wait::Nothing if !self.pairs.is_active(self.pair) => {
                self.state.rx = rx::Wait::Buffers;
            }
            rx::Wait::Nothing => self.link_is_gone(),
            rx::Wait::Turn => self.again(),
            rx::Wait::Frame | rx::Wait::Buffers => {}
        }
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), QueueError> {
        if self.state.tx == tx::Wait::Room {
            return Ok(());
        }
        let memory = self.memory.memory();
        self.state.tx = self.tx.serve(&memory, self.link.as_ref(), &self.counters)?;
        if self.state.tx == tx::Wait::Turn {
            self.again();
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), QueueError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let tap = Tap {
            link: self.link.as_ref(),
            pairs: &self.pairs,
        };
        if control.serve(&memory, &tap)? {
            self.again();
        }
        Ok(())
    }

    fn link_event(&mut self, events: EventSet) -> Result<(), QueueError> {
        if events.contains(EventSet::OUT) && self.state.tx == tx::Wait::Room {
            self.state.tx = tx::Wait::Kick;
            self.transmit()?;
        }
        if events.contains(EventSet::IN) {
            self.receive()?;
        } else if events.intersects(EventSet::ERROR | EventSet::HANG_UP)
            && self.pairs.is_active(self.pair)
        {
            tracing::warn!(thread = %self.name, "a network device's link is gone");
            self.link_is_gone();
            // Its chains go back, the frames are lost.
            self.transmit()?;
        }
        Ok(())
    }

    /// Frames of the guest are dropped from now on, and it is told.
    fn link_is_gone(&mut self) {
        self.state.rx = rx::Wait::Nothing;
        self.state.tx = tx::Wait::Kick;
        if self.link_up.swap(false, Ordering::SeqCst) {
            self.signals.config_changed();
        }
    }

    /// Another turn, after the other queues and the owner had theirs.
    fn again(&self) {
        // Fails only when the counter is full, and then there is a turn anyway.
        let _ = self.turn.write(1);
    }

    /// Watches the link for what is waited for. For nothing at all it must not be watched: an error would be reported
    /// again and again.
    fn watch_link(&mut self, ops: &mut EventOps<'_>) {
        let mut wanted = EventSet::empty();
        if self.pairs.is_active(self.pair) && self.state.rx != rx::Wait::Nothing {
            if self.state.rx == rx::Wait::Frame {
                wanted |= EventSet::IN;
            }
            if self.state.tx == tx::Wait::Room {
                wanted |= EventSet::OUT;
            }
        }
        if wanted == self.state.watched {
            return;
        }
        let events = Events::with_data_raw(self.link.fd().as_raw_fd(), Token::Link as u32, wanted);
        let done = if wanted.is_empty() {
            ops.remove(events)
        } else if self.state.watched.is_empty() {
            ops.add(events)
        } else {
            ops.modify(events)
        };
        match done {
            Ok(()) => self.state.watched = wanted,
            Err(error) => self.broken(ops, &error),
        }
    }

    fn doorbells(&self) -> Vec<Events> {
        let mut doorbells = vec![
            (self.turn.as_raw_fd(), Token::Turn),
            (self.rx.queue().kick_fd(), Token::Receive),
            (self.tx.queue().kick_fd(), Token::Transmit),
        ];
        if let Some(control) = &self.control {
            doorbells.push((control.queue().kick_fd(), Token::Control));
        }
        doorbells
            .into_iter()
            .map(|(fd, token)| Events::with_data_raw(fd, token as u32, EventSet::IN))
            .collect()
    }

    /// Serves nothing any more.
    fn broken(&mut self, ops: &mut EventOps<'_>, why: &dyn std::fmt::Display) {
        self.signals.needs_reset(why);
        for events in self.doorbells() {
            // What was not added is not removed.
            let _ = ops.remove(events);
        }
        if !self.state.watched.is_empty() {
            let link = Events::empty_raw(self.link.fd().as_raw_fd());
            let _ = ops.remove(link);
            self.state.watched = EventSet::empty();
        }
    }
}

impl MutEventSubscriber for PairWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for events in self.doorbells() {
            if let Err(error) = ops.add(events) {
                return self.broken(ops, &error);
            }
        }
        // The driver may have filled its queues before.
        self.again();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let result = match Token::of(events.data()) {
            Some(Token::Receive) => {
                self.rx.queue().acknowledge_kick();
                self.receive()
            }
            Some(Token::Transmit) => {
                self.tx.queue().acknowledge_kick();
                self.transmit()
            }
            Some(Token::Control) => {
                if let Some(control) = &self.control {
                    control.queue().acknowledge_kick();
                }
                self.control()
            }
            Some(Token::Link) => self.link_event(events.event_set()),
            Some(Token::Turn) => {
                // Nothing to read after a spurious wake-up: then there is just nothing to do.
                let _ = self.turn.read();
                self.control()
                    .and_then(|()| self.transmit())
                    .and_then(|()| self.receive())
            }
            None => Ok(()),
        };
        match result {
            Ok(()) => self.watch_link(ops),
            Err(error) => self.broken(ops, &error),
        }
    }
}

impl Worker for PairWorker {
    fn name(&self) -> String {
        self.name.clone()
    }
}

//! Serves the queues: packets of the guest to the board, packets of the board to the guest.

use std::fmt::Display;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::board::Board;
use super::connection::BUFFER;
use super::counters::Counters;
use super::packet::{HEADER_BYTES, Header, Pieces};
use crate::memory::ram::GuestView;
use crate::virtio::{Queue, QueueError, Signals, Worker};

/// Packets of one direction for one turn, so that the other one and the owner have theirs.
const BATCH: usize = 128;

/// Why the worker is woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The guest has made room.
    Room,
    /// The guest has packets.
    Packets,
    /// A client wants to be taken.
    Listener,
    /// A socket of a client or a connection.
    Socket,
    /// Something has taken too long.
    Timer,
    /// There is more to do.
    Turn,
}

impl Token {
    const ALL: [Self; 6] = [
        Self::Room,
        Self::Packets,
        Self::Listener,
        Self::Socket,
        Self::Timer,
        Self::Turn,
    ];

    fn of(data: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|token| *token as u32 == data)
    }
}

/// Serves the queues of one device.
pub(super) struct VsockWorker {
    /// Name of its thread.
    pub(super) name: String,
    /// Guest memory.
    pub(super) memory: GuestView,
    /// Packets to the guest.
    pub(super) rx: Queue,
    /// Packets of the guest.
    pub(super) tx: Queue,
    /// To the driver.
    pub(super) signals: Arc<dyn Signals>,
    /// The device's counters.
    pub(super) counters: Arc<Counters>,
    /// The sockets.
    pub(super) board: Board,
    /// Fires at the next deadline.
    pub(super) timer: OwnedFd,
    /// Wakes this worker.
    pub(super) turn: EventFd,
    /// What it waits for.
    pub(super) state: State,
}

/// What a worker waits for.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The guest has packets that were not looked at, because there is no room for answers.
    held: bool,
    /// The timer will fire.
    timer_set: bool,
    /// Nothing is served any more.
    broken: bool,
}

impl VsockWorker {
    /// Packets of the guest, as long as there is room for answers.
    fn serve_packets(&mut self, ops: &mut EventOps<'_>, now: Instant) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        let memory = &*memory;
        self.tx.disable_kick(memory)?;
        let mut more = true;
        for _ in 0..BATCH {
            if !self.board.hears_guest() {
                break;
            }
            let Some(chain) = self.tx.pop(memory)? else {
                if self.tx.enable_kick(memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let header = Header::read(memory, &chain);
            if self.tx.is_torn() {
                self.tx.unpop();
                continue;
            }
            self.counters.packet_from_guest();
            match header {
                Some(header) => {
                    let data = || {
                        let len = header.len.min(BUFFER) as usize;
                        Pieces::readable(memory, &chain, HEADER_BYTES, len)
                    };
                    self.board.guest_packet(ops, &header, data, now);
                }
                None => self.counters.dropped(),
            }
            self.tx.push(memory, head, 0)?;
        }
        self.state.held = more && !self.board.hears_guest();
        if more && !self.state.held {
            self.again();
        }
        self.tx.notify(memory)
    }

    /// Packets for the guest, as long as there is room for them.
    fn serve_room(&mut self, ops: &mut EventOps<'_>, now: Instant) -> Result<(), QueueError> {
        if !self.board.owes() {
            return Ok(());
        }
        let memory = self.memory.memory();
        let memory = &*memory;
        self.rx.disable_kick(memory)?;
        for turn in 0.. {
            if !self.board.owes() {
                break;
            }
            if turn == BATCH {
                self.again();
                break;
            }
            let Some(chain) = self.rx.pop(memory)? else {
                if self.rx.enable_kick(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let most = HEADER_BYTES + BUFFER as usize;
            let room =
                Pieces::writable(memory, &chain, most).filter(|room| room.len() > HEADER_BYTES);
            let Some(room) = room else {
                // Of no use for any packet.
                self.rx.push(memory, head, 0)?;
                continue;
            };
            match self.board.fill(ops, &room, now) {
                Some(len) => self.rx.push(memory, head, len)?,
                None => self.rx.unpop(),
            }
        }
        self.rx.notify(memory)
    }

    fn handle(
        &mut self,
        events: Events,
        ops: &mut EventOps<'_>,
        now: Instant,
    ) -> Result<(), QueueError> {
        match Token::of(events.data()) {
            Some(Token::Room) => self.rx.acknowledge_kick(),
            Some(Token::Packets) => {
                self.tx.acknowledge_kick();
                self.serve_packets(ops, now)?;
            }
            Some(Token::Listener) => self.board.accept(ops, now),
            Some(Token::Socket) => self.board.socket_event(ops, events, now),
            Some(Token::Timer) => {
                // Nothing to read after a spurious wake-up: the deadlines decide.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.state.timer_set = false;
                self.board.expire(ops, now);
            }
            Some(Token::Turn) => {
                let _ = self.turn.read();
                self.serve_packets(ops, now)?;
            }
            None => {}
        }
        self.serve_room(ops, now)?;
        if self.state.held && self.board.hears_guest() {
            self.serve_packets(ops, now)?;
            self.serve_room(ops, now)?;
        }
        Ok(())
    }

    /// Another turn, after the owner had its.
    fn again(&self) {
        // Fails only when the counter is full, and then there is a turn anyway.
        let _ = self.turn.write(1);
    }

    /// Sets the timer to the next deadline, unless it is set: then that one is the next.
    fn set_timer(&mut self, now: Instant) -> Result<(), rustix::io::Errno> {
        if self.state.timer_set {
            return Ok(());
        }
        let Some(at) = self.board.deadline() else {
            return Ok(());
        };
        // Zero would switch it off.
        let after = at
            .saturating_duration_since(now)
            .max(Duration::from_millis(1));
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(after).map_err(|_| rustix::io::Errno::OVERFLOW)?,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value)?;
        self.state.timer_set = true;
        Ok(())
    }

    fn fixed(&self) -> [(RawFd, Token); 4] {
        [
            (self.rx.kick_fd(), Token::Room),
            (self.tx.kick_fd(), Token::Packets),
            (self.timer.as_raw_fd(), Token::Timer),
            (self.turn.as_raw_fd(), Token::Turn),
        ]
    }

    /// Serves nothing any more.
    fn broken(&mut self, ops: &mut EventOps<'_>, why: &dyn Display) {
        if self.state.broken {
            return;
        }
        self.state.broken = true;
        self.signals.needs_reset(why);
        self.board.end_all(ops);
        let listener = self.board.listener().as_raw_fd();
        for fd in self.fixed().map(|(fd, _)| fd).into_iter().chain([listener]) {
            // What was not added is not removed.
            let _ = ops.remove(Events::empty_raw(fd));
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (fd, token) in self.fixed() {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token as u32, EventSet::IN)) {
                return self.broken(ops, &error);
            }
        }
        if let Err(error) = self.board.listen(ops, Token::Listener as u32) {
            return self.broken(ops, &error);
        }
        // The driver may have filled its queues before.
        self.again();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.state.broken {
            return;
        }
        let now = Instant::now();
        if let Err(error) = self.handle(events, ops, now) {
            return self.broken(ops, &error);
        }
        if let Err(error) = self.set_timer(now) {
            return self.broken(ops, &error);
        }
        if let Err(error) = self.board.listen(ops, Token::Listener as u32) {
            self.broken(ops, &error);
        }
    }
}

impl Worker for VsockWorker {
    fn name(&self) -> String {
        self.name.clone()
    }
}
